//! A lane: a ring of slots that is a strict first-in first-out queue, lock-free and linearizable.
//!
//! An operation takes its turn *by changing the slot*, not before: the slot of the ticket at the tail goes from "free for
//! round r" to the item by one compare-and-swap, and moving the tail on is a service to the others that anyone may
//! do. So there is no moment at which a participant that stops or dies holds anything: it has either done its operation or
//! not begun it. The published scheme (fetch-and-add a ticket, then work at its slot) has such a moment; see the crate's README.
//!
//! Enqueues never read the head and dequeues never read the tail: full and empty are told by the slot alone. The indices are
//! hints that never run ahead of the truth: they are moved once in [`LAZY_MAX`] tickets, and whoever finds one behind
//! walks on from there. Participants remember how far they were, and so hardly ever walk. This halves the locked
//! instructions of an operation.

use crate::cell::{Cell, State};
use crate::sync::{AcqRel, Acquire, AtomicU32, AtomicU64, Relaxed};

/// An attempt fails only if another one succeeded, or if a peer scribbles; this many in a row are the latter.
const ATTEMPTS_MAX: u32 = 1 << 20;

/// An index is moved at every ticket that is a multiple of this, or of a quarter of the slots if that is less.
pub const LAZY_MAX: u64 = 32;

/// How many tickets an index may be behind when nobody is slow, in a lane of `1 << shift` slots.
pub fn lazy(shift: u32) -> u64 {
    ((1u64 << shift) / 4).clamp(1, LAZY_MAX)
}

/// From where on a participant looks, and where it must stop. `from` is a ticket that the index has reached in truth.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub from: u64,
    pub limit: u64,
}

/// No queue gets that far; an index that says so is a peer's scribble.
pub const TICKET_MAX: u64 = 1 << 60;

impl Bounds {
    /// None but that of sane tickets.
    pub fn none() -> Self {
        Self { from: 0, limit: TICKET_MAX }
    }
}

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// The cells of a lane: side by side, or each on a cache line of its own, of which the first cell counts.
#[derive(Debug)]
pub struct Slots<'a, C> {
    pub cells: &'a [C],
    /// Logarithm of the cells from one slot to the next.
    pub spread: u32,
}

impl<C> Clone for Slots<'_, C> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<C> Copy for Slots<'_, C> {}

impl<'a, C> Slots<'a, C> {
    #[allow(clippy::len_without_is_empty, reason = "a lane has slots")]
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.cells.len() >> self.spread
    }

    #[inline(always)]
    pub fn cell(&self, number: usize) -> &'a C {
        &self.cells[number << self.spread & (self.cells.len() - 1)]
    }

    /// The slots of lane `number`, of `1 << shift` each.
    #[inline(always)]
    pub fn of_lane(&self, number: usize, shift: u32) -> Self {
        let cells = 1 << (shift + self.spread);
        Self { cells: &self.cells[number * cells..][..cells], spread: self.spread }
    }

    pub fn iter(&self) -> impl Iterator<Item = &'a C> {
        self.cells.iter().step_by(1 << self.spread)
    }
}

/// The ticket of the next operation of one kind, and the CPU of the last participant that did one.
#[repr(C, align(128))]
pub struct Index {
    pub ticket: AtomicU64,
    pub cpu: AtomicU32,
}

#[repr(C)]
pub struct LaneControl {
    pub tail: Index,
    pub head: Index,
}

/// Why an operation did not happen. `Bounds::from` is then the ticket at which it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The slot of the ticket still holds an item: at that moment the lane was full.
    Full,
    /// The slot of the ticket waits for its item: at that moment the lane was empty.
    Empty,
    /// The lane is further than the caller's limit.
    Beyond,
    /// The lane takes nothing any more; a dequeue that sees this has also found it empty.
    Sealed,
    /// The memory says what no sequence of operations leads to.
    Corrupt,
}

/// The item at the head, not taken yet.
#[derive(Clone, Copy)]
pub struct Front<R> {
    pub ticket: u64,
    pub raw: R,
    /// Where the search for it began.
    begin: u64,
}

pub struct Lane<'a, C> {
    pub control: &'a LaneControl,
    pub slots: Slots<'a, C>,
    pub shift: u32,
    /// See [`lazy`].
    pub lazy: u64,
}

impl Index {
    #[cold]
    #[inline(never)]
    fn advance_to(&self, target: u64) {
        let mut seen = self.ticket.load(Relaxed);
        while seen < target {
            match self.ticket.compare_exchange(seen, target, AcqRel, Relaxed) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    #[inline(always)]
    fn publish_cpu(&self, cpu: u32) {
        if self.cpu.load(Relaxed) != cpu {
            self.cpu.store(cpu, Relaxed);
        }
    }
}

/// Brings a slot here, to be written soon: the next operation finds it there, if there is something to do before it.
#[inline(always)]
fn prefetch<C>(cell: &C) {
    #[cfg(all(target_arch = "x86_64", not(modeled), not(miri)))]
    // SAFETY: a prefetch has no effect but on caches, and processors that do not know this one pass over it. By hand, since
    // compilers write one for reading unless they build for a newer processor.
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) core::ptr::from_ref(cell), options(nostack, preserves_flags, readonly));
    }
    let _ = cell;
}

impl<C: Cell> Lane<'_, C> {
    #[inline(always)]
    fn cell(&self, ticket: u64) -> &C {
        self.slots.cell(ticket as usize)
    }

    #[inline(always)]
    fn round(&self, ticket: u64) -> u64 {
        ticket >> self.shift
    }

    /// Moves an index behind `ticket`, which was done, now and then. `begin` is the ticket at which the search for it began.
    #[inline(always)]
    fn advance(&self, index: &Index, ticket: u64, begin: u64) {
        let next = ticket + 1;
        prefetch(self.cell(next));
        if next & (self.lazy - 1) == 0 || next - begin > self.lazy {
            index.advance_to(next);
        }
    }

    /// The index must tell it too, so that the next choice of a lane comes out otherwise.
    #[cold]
    fn beyond(&self, index: &Index, ticket: u64) -> Refusal {
        if ticket > TICKET_MAX {
            return Refusal::Corrupt;
        }
        index.advance_to(ticket);
        Refusal::Beyond
    }

    /// The next ticket to look at after one that was passed.
    #[cold]
    fn skip(&self, index: &Index, ticket: u64, raw: C::Raw) -> Result<u64, Refusal> {
        let ahead = C::rounds_ahead(raw, self.round(ticket));
        let index = index.ticket.load(Acquire);
        if ahead <= 0 && index <= ticket {
            return Err(Refusal::Corrupt);
        }
        // The slot is in a later round, so that all tickets up to the one before this round of it are done.
        let rounds = u64::try_from(ahead - 1).unwrap_or(0);
        Ok(index.max(ticket.saturating_add(1).saturating_add(rounds.saturating_mul(self.slots.len() as u64))))
    }

    /// Puts `item` in at the tail, if its ticket is at most the limit.
    #[inline(always)]
    pub fn enqueue(&self, item: C::Item, bounds: &mut Bounds, cpu: u32) -> Result<(), Refusal> {
        let tail = &self.control.tail;
        let ticket = tail.ticket.load(Acquire).max(bounds.from);
        let (round, cell) = (self.round(ticket), self.cell(ticket));
        let free = C::free(round);
        if ticket <= bounds.limit && cell.load() == free && cell.replace(free, C::occupied(round, item)) {
            self.advance(tail, ticket, ticket);
            tail.publish_cpu(cpu);
            bounds.from = ticket + 1;
            return Ok(());
        }
        self.enqueue_further(item, bounds, cpu)
    }

    /// The same, where the first look did not do: out of line, to keep that short.
    #[cold]
    #[inline(never)]
    fn enqueue_further(&self, item: C::Item, bounds: &mut Bounds, cpu: u32) -> Result<(), Refusal> {
        let tail = &self.control.tail;
        let begin = tail.ticket.load(Acquire).max(bounds.from);
        let mut ticket = begin;
        for _ in 0..ATTEMPTS_MAX {
            if ticket > bounds.limit {
                return Err(self.beyond(tail, ticket));
            }
            let (round, cell) = (self.round(ticket), self.cell(ticket));
            let raw = cell.load();
            match C::state(raw, round) {
                State::Free => {
                    if cell.replace(raw, C::occupied(round, item)) {
                        self.advance(tail, ticket, begin);
                        tail.publish_cpu(cpu);
                        bounds.from = ticket + 1;
                        return Ok(());
                    }
                }
                State::Occupied | State::FreeNext => ticket += 1,
                // The tail was at this ticket before the slot was read, so the lane holds all the items before it.
                State::OccupiedPrevious => {
                    bounds.from = ticket;
                    return Err(Refusal::Full);
                }
                State::Sealed => return Err(Refusal::Sealed),
                State::OccupiedNext | State::Other => ticket = self.skip(tail, ticket, raw)?,
            }
        }
        Err(Refusal::Corrupt)
    }

    /// An index may lag by a batch, and must not lag by a round.
    fn batch_max(&self) -> usize {
        (self.slots.len() / 2).max(1)
    }

    /// Puts in as many of `items` as fit and `limit` allows, moving the tail once.
    pub fn enqueue_batch(&self, items: &[C::Item], bounds: &mut Bounds, cpu: u32) -> Result<usize, Refusal> {
        let [first, rest @ ..] = &items[..items.len().min(self.batch_max())] else { return Ok(0) };
        self.enqueue(*first, bounds, cpu)?;
        let mut ticket = bounds.from;
        let mut done = 1;
        for item in rest {
            let (round, cell) = (self.round(ticket), self.cell(ticket));
            // Exact rounds: a slot that is free for this ticket's round makes this the ticket at the tail.
            if ticket > bounds.limit || !cell.replace(C::free(round), C::occupied(round, *item)) {
                break;
            }
            ticket += 1;
            done += 1;
        }
        if done > 1 {
            self.control.tail.advance_to(ticket);
            bounds.from = ticket;
        }
        Ok(done)
    }

    /// Looks at the item at the head, if its ticket is at most the limit.
    #[inline(always)]
    pub fn front(&self, bounds: &mut Bounds) -> Result<Front<C::Raw>, Refusal> {
        let ticket = self.control.head.ticket.load(Acquire).max(bounds.from);
        let raw = self.cell(ticket).load();
        if ticket <= bounds.limit && C::state(raw, self.round(ticket)) == State::Occupied {
            return Ok(Front { ticket, raw, begin: ticket });
        }
        self.front_further(bounds)
    }

    #[cold]
    #[inline(never)]
    fn front_further(&self, bounds: &mut Bounds) -> Result<Front<C::Raw>, Refusal> {
        let head = &self.control.head;
        let begin = head.ticket.load(Acquire).max(bounds.from);
        let mut ticket = begin;
        for _ in 0..ATTEMPTS_MAX {
            if ticket > bounds.limit {
                return Err(self.beyond(head, ticket));
            }
            let raw = self.cell(ticket).load();
            match C::state(raw, self.round(ticket)) {
                State::Occupied => return Ok(Front { ticket, raw, begin }),
                State::FreeNext | State::OccupiedNext => ticket += 1,
                // All before it are gone and it has not come, nor anything after it.
                State::Free => {
                    bounds.from = ticket;
                    return Err(Refusal::Empty);
                }
                State::Sealed => {
                    bounds.from = ticket;
                    return Err(Refusal::Sealed);
                }
                State::OccupiedPrevious | State::Other => ticket = self.skip(head, ticket, raw)?,
            }
        }
        Err(Refusal::Corrupt)
    }

    /// Takes what `front` showed; false if another was first.
    #[inline(always)]
    pub fn remove(&self, front: Front<C::Raw>, bounds: &mut Bounds, cpu: u32) -> bool {
        let next = C::free(self.round(front.ticket).wrapping_add(1));
        let removed = self.cell(front.ticket).replace(front.raw, next);
        // Whoever did it, it is done.
        bounds.from = front.ticket + 1;
        if removed {
            self.advance(&self.control.head, front.ticket, front.begin);
            self.control.head.publish_cpu(cpu);
        }
        removed
    }

    #[inline(always)]
    pub fn dequeue(&self, bounds: &mut Bounds, cpu: u32) -> Result<C::Item, Refusal> {
        self.take(bounds, cpu).map(|front| C::item(front.raw))
    }

    #[inline(always)]
    fn take(&self, bounds: &mut Bounds, cpu: u32) -> Result<Front<C::Raw>, Refusal> {
        let front = self.front(bounds)?;
        if self.remove(front, bounds, cpu) { Ok(front) } else { self.take_further(bounds, cpu) }
    }

    #[cold]
    #[inline(never)]
    fn take_further(&self, bounds: &mut Bounds, cpu: u32) -> Result<Front<C::Raw>, Refusal> {
        for _ in 0..ATTEMPTS_MAX {
            let front = self.front(bounds)?;
            if self.remove(front, bounds, cpu) {
                return Ok(front);
            }
        }
        Err(Refusal::Corrupt)
    }

    /// Takes as many items as `out` holds, are there and `limit` allows, moving the head once.
    pub fn dequeue_batch(
        &self,
        out: &mut [C::Item],
        bounds: &mut Bounds,
        cpu: u32,
    ) -> Result<usize, Refusal> {
        let batch = out.len().min(self.batch_max());
        let [first, rest @ ..] = &mut out[..batch] else { return Ok(0) };
        let front = self.take(bounds, cpu)?;
        *first = C::item(front.raw);
        let mut ticket = front.ticket + 1;
        let mut done = 1;
        for place in rest {
            let (round, cell) = (self.round(ticket), self.cell(ticket));
            let raw = cell.load();
            if ticket > bounds.limit
                || C::state(raw, round) != State::Occupied
                || !cell.replace(raw, C::free(round.wrapping_add(1)))
            {
                break;
            }
            *place = C::item(raw);
            ticket += 1;
            done += 1;
        }
        if done > 1 {
            self.control.head.advance_to(ticket);
            bounds.from = ticket;
        }
        Ok(done)
    }

    /// Whether the lane is still full (empty) as a refusal at `ticket` told: it has been so all the time, since no slot returns to
    /// what it was.
    pub fn is_still(&self, refusal: Refusal, ticket: u64) -> bool {
        let is = |state| C::state(self.cell(ticket).load(), self.round(ticket)) == state;
        match refusal {
            Refusal::Full => is(State::OccupiedPrevious),
            Refusal::Empty => is(State::Free),
            Refusal::Sealed => true,
            Refusal::Beyond | Refusal::Corrupt => false,
        }
    }

    /// Seals the empty lane at `ticket`; false if an item came first.
    pub fn seal(&self, ticket: u64) -> bool {
        let round = self.round(ticket);
        let cell = self.cell(ticket);
        cell.replace(C::free(round), C::sealed(round)) || C::state(cell.load(), round) == State::Sealed
    }

    /// Whether a dequeue that begins at `from` would find something to do.
    #[inline]
    pub fn seems_ready(&self, from: u64) -> bool {
        !matches!(self.front(&mut Bounds { from, ..Bounds::none() }), Err(Refusal::Empty))
    }

    /// Whether an enqueue would find something to do.
    #[inline]
    pub fn seems_roomy(&self) -> bool {
        let ticket = self.settled_tail();
        C::state(self.cell(ticket).load(), self.round(ticket)) != State::OccupiedPrevious
    }

    /// The ticket of the next dequeue.
    pub fn settled_head(&self) -> u64 {
        let mut bounds = Bounds::none();
        match self.front(&mut bounds) {
            Ok(front) => front.ticket,
            Err(_) => bounds.from.max(self.control.head.ticket.load(Acquire)),
        }
    }

    /// The ticket of the next enqueue.
    pub fn settled_tail(&self) -> u64 {
        let first = self.control.tail.ticket.load(Acquire);
        let is_done = |ticket: u64| {
            matches!(
                C::state(self.cell(ticket).load(), self.round(ticket)),
                State::Occupied | State::FreeNext
            )
        };
        (first..first.saturating_add(self.slots.len() as u64))
            .find(|ticket| !is_done(*ticket))
            .unwrap_or(first)
    }

    /// Items in the lane, as far as can be told while others work.
    pub fn item_count(&self) -> usize {
        let head = self.settled_head();
        (self.settled_tail().wrapping_sub(head) as i64).clamp(0, self.slots.len() as i64) as usize
    }
}
