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
pub const LAZY_MAX: u64 = 8;

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

/// A slot on a cache line of its own.
#[repr(C, align(64))]
pub struct Slot<C> {
    pub cell: C,
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

/// Why an operation did not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The slot of this ticket still holds an item: at that moment the lane was full.
    Full(u64),
    /// The slot of this ticket waits for its item: at that moment the lane was empty.
    Empty(u64),
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
    pub slots: &'a [Slot<C>],
    pub shift: u32,
}

impl Index {
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
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
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
        &self.slots[ticket as usize & (self.slots.len() - 1)].cell
    }

    #[inline(always)]
    fn round(&self, ticket: u64) -> u64 {
        ticket >> self.shift
    }

    /// How many tickets the index may be behind when nobody is slow.
    #[inline(always)]
    fn lazy(&self) -> u64 {
        (self.slots.len() as u64 / 4).clamp(1, LAZY_MAX)
    }

    /// Moves an index behind `ticket`, which was done, now and then. `begin` is the ticket at which the search for it began.
    #[inline(always)]
    fn advance(&self, index: &Index, ticket: u64, begin: u64) {
        let next = ticket + 1;
        prefetch(self.cell(next));
        if next & (self.lazy() - 1) == 0 || next - begin > self.lazy() {
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
    pub fn enqueue(&self, item: C::Item, bounds: &mut Bounds, cpu: u32) -> Result<u64, Refusal> {
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
                        return Ok(ticket);
                    }
                }
                State::Occupied | State::FreeNext => ticket += 1,
                // The tail was at this ticket before the slot was read, so the lane holds all the items before it.
                State::OccupiedPrevious => {
                    bounds.from = ticket;
                    return Err(Refusal::Full(ticket));
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
        let mut ticket = self.enqueue(*first, bounds, cpu)? + 1;
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
                    return Err(Refusal::Empty(ticket));
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

    /// Whether the lane is still full (empty) as `Refusal::Full` (`Refusal::Empty`) told: it has been so all the time, since no
    /// slot returns to what it was.
    pub fn is_still(&self, refusal: Refusal) -> bool {
        match refusal {
            Refusal::Full(ticket) => {
                C::state(self.cell(ticket).load(), self.round(ticket)) == State::OccupiedPrevious
            }
            Refusal::Empty(ticket) => C::state(self.cell(ticket).load(), self.round(ticket)) == State::Free,
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
        !matches!(self.front(&mut Bounds { from, ..Bounds::none() }), Err(Refusal::Empty(_)))
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
