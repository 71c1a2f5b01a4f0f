//! The buffers of an RCQB, and who holds each.
//!
//! A buffer is free, *filling* (its enqueuer copies in), *ready*, or *reading* (its dequeuer copies out). One word says so, with the
//! participant that brought it there and a generation, and changes by compare-and-swap only; that word is the truth. The ring says in
//! which order ready buffers are to be read, the hints say which are not worth a try; both may be wrong after a death,
//! and whoever meets an entry that the word does not confirm drops it.
//!
//! | a participant dies after | what is left | who repairs it |
//! |---|---|---|
//! | free -> filling | a filling buffer of a dead owner | `reap` frees it: the enqueue never happened |
//! | filling -> ready | a ready buffer that the ring does not name | `reap` puts it into the ring: delivered |
//! | the ring's slot was filled | nothing | |
//! | ready -> reading | a ring entry whose buffer is not ready | the next dequeue drops it |
//! | the ring's slot was freed | a reading buffer of a dead owner | `reap` frees it and counts the item as lost |
//! | reading -> free | a free buffer whose hint says busy | `reap` corrects the hint |

use crate::sync::{AcqRel, Acquire, AtomicU32, AtomicU64, Relaxed, Release, fence_after_update};

/// Which buffers are likely to be in use: one bit each, so that zeroed memory is a pool of free ones.
#[repr(C, align(64))]
pub struct Hint {
    pub busy: AtomicU64,
}

#[repr(C, align(64))]
pub struct BufferHeader {
    pub word: AtomicU64,
    pub length: AtomicU32,
}

/// An attached process: what tells it from all others of its machine, 0 if the place is free.
#[repr(C, align(64))]
pub struct Participant {
    pub identity: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Use {
    Free = 0,
    Filling = 1,
    Ready = 2,
    Reading = 3,
}

/// A buffer's word: bits 0-1 the use, 2-15 the participant, 16-63 the generation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Holding(u64);

impl Holding {
    #[inline(always)]
    pub fn usage(self) -> Use {
        [Use::Free, Use::Filling, Use::Ready, Use::Reading][(self.0 & 3) as usize]
    }

    pub fn participant(self) -> u32 {
        (self.0 >> 2 & 0x3fff) as u32
    }

    #[inline(always)]
    pub fn generation(self) -> u64 {
        self.0 >> 16
    }

    #[inline(always)]
    fn is(self, usage: Use) -> bool {
        self.0 & 3 == usage as u64
    }

    /// The same owner and generation.
    #[inline(always)]
    fn used_for(self, usage: Use) -> Self {
        Self(self.0 & !3 | usage as u64)
    }

    /// The same generation.
    #[inline(always)]
    fn become_used(self, usage: Use, participant: u32) -> Self {
        Self(self.0 & !0xffff | u64::from(participant & 0x3fff) << 2 | usage as u64)
    }

    #[inline(always)]
    fn become_free(self) -> Self {
        Self((self.0 & !0xffff).wrapping_add(1 << 16))
    }
}

/// A buffer that the caller holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    pub index: usize,
    pub holding: Holding,
}

/// The owner of what is published and whose enqueuer is gone.
const NOBODY: u32 = 0x3fff;

const INDEX_BITS: u32 = 20;
const TICKET_GENERATION_MASK: u64 = (1 << INDEX_BITS) - 1;

impl Held {
    /// What the ring carries: index and generation, 20 bits each.
    #[inline(always)]
    pub fn ring_item(self) -> u64 {
        (self.holding.generation() & TICKET_GENERATION_MASK) << INDEX_BITS | self.index as u64
    }
}

#[derive(Clone, Copy)]
pub struct Pool<'a> {
    pub participants: &'a [Participant],
    pub hints: &'a [Hint],
    pub headers: &'a [BufferHeader],
}

impl Pool<'_> {
    #[inline(always)]
    fn holding(&self, index: usize) -> Holding {
        Holding(self.headers[index].word.load(Acquire))
    }

    /// Moves a buffer from one holding to the next; false if it is not held so any more.
    #[inline(always)]
    fn change(&self, index: usize, from: Holding, to: Holding) -> bool {
        self.headers[index].word.compare_exchange(from.0, to.0, AcqRel, Relaxed).is_ok()
    }

    /// Takes a free buffer for filling. `near` is where to begin; it is moved to where one was found.
    #[inline(always)]
    pub fn claim(&self, near: &mut usize, participant: u32) -> Option<Held> {
        if let Some(held) = self.claim_one(*near & (self.headers.len() - 1), participant) {
            return Some(held);
        }
        self.claim_further(near, participant)
    }

    #[cold]
    #[inline(never)]
    fn claim_further(&self, near: &mut usize, participant: u32) -> Option<Held> {
        let last = *near & (self.headers.len() - 1);
        let first = last / 64;
        for turn in 0..self.hints.len() {
            let group = (first + turn) % self.hints.len();
            let mut bits = !self.hints[group].busy.load(Acquire);
            while bits != 0 {
                let bit = bits & bits.wrapping_neg();
                bits ^= bit;
                let index = group * 64 + bit.trailing_zeros() as usize;
                if index >= self.headers.len() {
                    break;
                }
                let claimed = self.claim_one(index, participant);
                self.set_busy(index);
                if claimed.is_some() {
                    *near = index;
                    return claimed;
                }
            }
        }
        None
    }

    #[inline(always)]
    fn claim_one(&self, index: usize, participant: u32) -> Option<Held> {
        let free = self.holding(index);
        let filling = free.become_used(Use::Filling, participant);
        let claimed = free.is(Use::Free) && self.change(index, free, filling);
        claimed.then_some(Held { index, holding: filling })
    }

    /// The item is in the buffer: it may be read once the ring names it. None if the buffer was taken away: the caller was
    /// thought dead.
    #[inline(always)]
    pub fn finish(&self, held: Held) -> Option<Held> {
        let ready = held.holding.used_for(Use::Ready);
        self.change(held.index, held.holding, ready).then_some(Held { holding: ready, ..held })
    }

    /// Takes the ready buffer that the ring names, for reading. None if it is not that any more.
    #[inline(always)]
    pub fn take(&self, ring_item: u64, participant: u32) -> Option<Held> {
        let index = (ring_item & ((1 << INDEX_BITS) - 1)) as usize;
        let generation = ring_item >> INDEX_BITS;
        if index >= self.headers.len() {
            return None;
        }
        // Again, if a reaper has changed the owner in between, and no more than that.
        for _ in 0..4 {
            let ready = self.holding(index);
            if !ready.is(Use::Ready) || ready.generation() & TICKET_GENERATION_MASK != generation {
                return None;
            }
            let reading = ready.become_used(Use::Reading, participant);
            if self.change(index, ready, reading) {
                return Some(Held { index, holding: reading });
            }
        }
        None
    }

    /// Gives a held buffer back. False if it was taken away: the caller was thought dead.
    #[inline(always)]
    pub fn release(&self, held: Held) -> bool {
        let released = self.change(held.index, held.holding, held.holding.become_free());
        if released {
            self.set_free(held.index);
        }
        released
    }

    /// After the buffer's word said "free". Together with `set_busy` a store-buffer race, hence the fences: either this one
    /// sees the busy bit or the other sees the free buffer.
    #[inline(always)]
    fn set_free(&self, index: usize) {
        let (busy, bit) = (&self.hints[index / 64].busy, 1 << (index % 64));
        fence_after_update();
        if busy.load(Relaxed) & bit != 0 {
            busy.fetch_and(!bit, AcqRel);
        }
    }

    fn set_busy(&self, index: usize) {
        let (busy, bit) = (&self.hints[index / 64].busy, 1 << (index % 64));
        busy.fetch_or(bit, AcqRel);
        fence_after_update();
        if self.holding(index).is(Use::Free) {
            busy.fetch_and(!bit, AcqRel);
        }
    }

    /// Takes a place for a process.
    pub fn join(&self, identity: u64) -> Option<u32> {
        let place =
            |entry: &Participant| entry.identity.compare_exchange(0, identity, AcqRel, Relaxed).is_ok();
        self.participants.iter().position(place).map(|number| number as u32)
    }

    pub fn leave(&self, participant: u32, identity: u64) {
        // A failure means that others have thought this process dead, and cleared its place.
        let _ =
            self.participants[participant as usize].identity.compare_exchange(identity, 0, Release, Relaxed);
    }

    /// Takes the place of a participant that is dead, if there is one. The caller must reap that place before it does anything else.
    ///
    /// The place then has the identity of a living process: nobody else reaps it and nobody can take it before all is
    /// done; and if the caller dies meanwhile, it is again a place of someone dead.
    pub fn take_place_of_dead(&self, own: u64, is_dead: impl Fn(u64) -> bool) -> Option<u32> {
        let place = |entry: &Participant| {
            let identity = entry.identity.load(Acquire);
            let dead = identity != 0 && identity != own && is_dead(identity);
            dead && entry.identity.compare_exchange(identity, own, AcqRel, Relaxed).is_ok()
        };
        self.participants.iter().position(place).map(|number| number as u32)
    }

    /// Repairs what the former owner of a place has left. `named` calls its argument with every item that the ring holds;
    /// `publish` puts a ready buffer into the ring.
    pub fn reap_place(
        &self,
        place: u32,
        named: impl Fn(&mut dyn FnMut(u64)),
        mut publish: impl FnMut(Held) -> bool,
    ) -> Reaped {
        let mut reaped = Reaped { participants: 1, ..Reaped::default() };
        // What the ring names is published, so that it does not matter any more by whom. The rest is not.
        named(&mut |ring_item| self.forget_owner(ring_item, place));
        for index in 0..self.headers.len() {
            let holding = self.holding(index);
            if holding.is(Use::Free) {
                self.hints[index / 64].busy.fetch_and(!(1 << (index % 64)), AcqRel);
            } else if holding.participant() == place {
                self.reap_one(Held { index, holding }, &mut publish, &mut reaped);
            }
        }
        reaped
    }

    fn forget_owner(&self, ring_item: u64, place: u32) {
        let index = (ring_item & ((1 << INDEX_BITS) - 1)) as usize;
        if index >= self.headers.len() {
            return;
        }
        let holding = self.holding(index);
        let same = holding.generation() & TICKET_GENERATION_MASK == ring_item >> INDEX_BITS;
        if same && holding.is(Use::Ready) && holding.participant() == place {
            let _ = self.change(index, holding, holding.become_used(Use::Ready, NOBODY));
        }
    }

    fn reap_one(&self, held: Held, publish: &mut impl FnMut(Held) -> bool, reaped: &mut Reaped) {
        match held.holding.usage() {
            Use::Free => {}
            Use::Ready if publish(held) => reaped.rescued += 1,
            Use::Filling | Use::Ready => reaped.lost_enqueues += u64::from(self.release(held)),
            Use::Reading => reaped.lost_dequeues += u64::from(self.release(held)),
        }
    }
}

/// What a reaper found.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Reaped {
    pub participants: usize,
    /// Items whose enqueue was not done: never in the queue.
    pub lost_enqueues: u64,
    /// Items that a dead participant had taken out.
    pub lost_dequeues: u64,
    /// Items that a dead participant had finished and not published: published now.
    pub rescued: u64,
}

impl Reaped {
    pub fn add(&mut self, other: Self) {
        self.participants += other.participants;
        self.lost_enqueues += other.lost_enqueues;
        self.lost_dequeues += other.lost_dequeues;
        self.rescued += other.rescued;
    }
}
