//! A lane: a ring of slots that is a strict first-in first-out queue, lock-free and linearizable.
//!
//! An operation takes its turn *by changing the slot*, not before: the slot of the ticket at the tail goes from "free for
//! round r" to the item by one compare-and-swap, and moving the tail on is a service to the others that anyone may
//! do. So there is no moment at which a participant that stops or dies holds anything: it has either done its operation or
//! not begun it. The published scheme (fetch-and-add a ticket, then work at its slot) has such a moment; see the crate's README.
//!
//! Enqueues never read the head and dequeues never read the tail: full and empty are told by the slot alone.

use crate::cell::{Cell, State};
use crate::sync::{AcqRel, Acquire, AtomicU32, AtomicU64, Relaxed};

/// An attempt fails only if another one succeeded, or if a peer scribbles; this many in a row are the latter.
const ATTEMPTS_MAX: u32 = 1 << 20;

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
}

pub struct Lane<'a, C> {
    pub control: &'a LaneControl,
    pub slots: &'a [Slot<C>],
    pub shift: u32,
}

impl Index {
    fn advance(&self, ticket: u64) {
        // Failure means that someone else has moved it on.
        let _ = self.ticket.compare_exchange(ticket, ticket.wrapping_add(1), AcqRel, Relaxed);
    }

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

impl<C: Cell> Lane<'_, C> {
    #[inline(always)]
    fn cell(&self, ticket: u64) -> &C {
        &self.slots[ticket as usize & (self.slots.len() - 1)].cell
    }

    #[inline(always)]
    fn round(&self, ticket: u64) -> u64 {
        ticket >> self.shift
    }

    /// Puts `item` in at the tail, if its ticket is at most `limit`.
    #[inline]
    pub fn enqueue(&self, item: C::Item, limit: u64, cpu: u32) -> Result<u64, Refusal> {
        let tail = &self.control.tail;
        for _ in 0..ATTEMPTS_MAX {
            let ticket = tail.ticket.load(Acquire);
            if ticket > limit {
                return Err(Refusal::Beyond);
            }
            let (round, cell) = (self.round(ticket), self.cell(ticket));
            let raw = cell.load();
            match C::state(raw, round) {
                State::Free => {
                    if cell.replace(raw, C::occupied(round, item)) {
                        tail.advance(ticket);
                        tail.publish_cpu(cpu);
                        return Ok(ticket);
                    }
                }
                State::Occupied | State::FreeNext => tail.advance(ticket),
                // The tail was at this ticket before the slot was read, so the lane holds all the items before it.
                State::OccupiedPrevious => return Err(Refusal::Full(ticket)),
                State::Sealed => return Err(Refusal::Sealed),
                State::OccupiedNext | State::Other => self.check(tail, ticket, raw)?,
            }
        }
        Err(Refusal::Corrupt)
    }

    /// An index may lag by a batch, and must not lag by a round.
    fn batch_max(&self) -> usize {
        (self.slots.len() / 2).max(1)
    }

    /// Puts in as many of `items` as fit and `limit` allows, moving the tail once.
    pub fn enqueue_batch(&self, items: &[C::Item], limit: u64, cpu: u32) -> Result<usize, Refusal> {
        let [first, rest @ ..] = &items[..items.len().min(self.batch_max())] else { return Ok(0) };
        let mut ticket = self.enqueue(*first, limit, cpu)?.wrapping_add(1);
        let mut done = 1;
        for item in rest {
            let (round, cell) = (self.round(ticket), self.cell(ticket));
            // Exact rounds: a slot that is free for this ticket's round makes this the ticket at the tail.
            if ticket > limit || !cell.replace(C::free(round), C::occupied(round, *item)) {
                break;
            }
            ticket = ticket.wrapping_add(1);
            done += 1;
        }
        if done > 1 {
            self.control.tail.advance_to(ticket);
        }
        Ok(done)
    }

    /// Looks at the item at the head, if its ticket is at most `limit`.
    #[inline]
    pub fn front(&self, limit: u64) -> Result<Front<C::Raw>, Refusal> {
        let head = &self.control.head;
        for _ in 0..ATTEMPTS_MAX {
            let ticket = head.ticket.load(Acquire);
            if ticket > limit {
                return Err(Refusal::Beyond);
            }
            let round = self.round(ticket);
            let raw = self.cell(ticket).load();
            match C::state(raw, round) {
                State::Occupied => return Ok(Front { ticket, raw }),
                State::FreeNext | State::OccupiedNext => head.advance(ticket),
                // All before it are gone and it has not come, nor anything after it.
                State::Free => return Err(Refusal::Empty(ticket)),
                State::Sealed => return Err(Refusal::Sealed),
                State::OccupiedPrevious | State::Other => self.check(head, ticket, raw)?,
            }
        }
        Err(Refusal::Corrupt)
    }

    /// Takes what `front` showed; false if another was first.
    #[inline]
    pub fn remove(&self, front: Front<C::Raw>, cpu: u32) -> bool {
        let next = C::free(self.round(front.ticket).wrapping_add(1));
        if !self.cell(front.ticket).replace(front.raw, next) {
            return false;
        }
        self.control.head.advance(front.ticket);
        self.control.head.publish_cpu(cpu);
        true
    }

    #[inline]
    pub fn dequeue(&self, limit: u64, cpu: u32) -> Result<C::Item, Refusal> {
        self.take(limit, cpu).map(|front| C::item(front.raw))
    }

    #[inline]
    fn take(&self, limit: u64, cpu: u32) -> Result<Front<C::Raw>, Refusal> {
        for _ in 0..ATTEMPTS_MAX {
            let front = self.front(limit)?;
            if self.remove(front, cpu) {
                return Ok(front);
            }
        }
        Err(Refusal::Corrupt)
    }

    /// Takes as many items as `out` holds, are there and `limit` allows, moving the head once.
    pub fn dequeue_batch(&self, out: &mut [C::Item], limit: u64, cpu: u32) -> Result<usize, Refusal> {
        let batch = out.len().min(self.batch_max());
        let [first, rest @ ..] = &mut out[..batch] else { return Ok(0) };
        let front = self.take(limit, cpu)?;
        *first = C::item(front.raw);
        let mut ticket = front.ticket.wrapping_add(1);
        let mut done = 1;
        for place in rest {
            let (round, cell) = (self.round(ticket), self.cell(ticket));
            let raw = cell.load();
            if ticket > limit
                || C::state(raw, round) != State::Occupied
                || !cell.replace(raw, C::free(round.wrapping_add(1)))
            {
                break;
            }
            *place = C::item(raw);
            ticket = ticket.wrapping_add(1);
            done += 1;
        }
        if done > 1 {
            self.control.head.advance_to(ticket);
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

    /// A cheap look whether a dequeue would find something to do.
    #[inline]
    pub fn seems_ready(&self) -> bool {
        let ticket = self.control.head.ticket.load(Relaxed);
        C::state(self.cell(ticket).load(), self.round(ticket)) != State::Free
    }

    /// A cheap look whether an enqueue would find something to do.
    #[inline]
    pub fn seems_roomy(&self) -> bool {
        let ticket = self.control.tail.ticket.load(Relaxed);
        C::state(self.cell(ticket).load(), self.round(ticket)) != State::OccupiedPrevious
    }

    /// Items in the lane, as far as can be told while others work.
    pub fn item_count(&self) -> usize {
        let head = self.control.head.ticket.load(Acquire);
        let tail = self.control.tail.ticket.load(Acquire);
        (tail.wrapping_sub(head) as i64).clamp(0, self.slots.len() as i64) as usize
    }

    /// Tells a reader that was overtaken (try again) from memory that is damaged.
    #[cold]
    fn check(&self, index: &Index, ticket: u64, raw: C::Raw) -> Result<(), Refusal> {
        if index.ticket.load(Acquire) == ticket && self.cell(ticket).load() == raw {
            return Err(Refusal::Corrupt);
        }
        Ok(())
    }
}
