//! One word of a slot: what it says, and how it changes.
//!
//! A slot says *free for round r*, *holds an item of round r* or *sealed in round r*. Rounds of free slots are exact, so that an
//! enqueue that slept for years cannot hit a later round. Zeroed memory is a queue whose slots are free for round 0.

use crate::sync::{AcqRel, Acquire, AtomicU64, AtomicU128};

/// What a slot says, seen from the round that the reader works in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Free for this round.
    Free,
    /// Free for the next round: this round's item came and went.
    FreeNext,
    /// Holds this round's item.
    Occupied,
    /// Still holds the item of the round before.
    OccupiedPrevious,
    /// Already holds the item of the next round.
    OccupiedNext,
    /// Closed: takes nothing any more.
    Sealed,
    /// Something that only a stale reader or a damaged queue sees.
    Other,
}

/// A slot's word. Implemented by [`SingleCell`] (RCQS) and [`DoubleCell`] (RCQD).
pub trait Cell: Send + Sync + Sized {
    type Raw: Copy + Eq;
    type Item: Copy + Send;
    /// Items must be below this power of two.
    const ITEM_BITS: u32;
    fn new() -> Self;
    fn supported() -> bool;
    fn fits(item: Self::Item) -> bool;
    fn load(&self) -> Self::Raw;
    fn replace(&self, current: Self::Raw, new: Self::Raw) -> bool;
    fn free(round: u64) -> Self::Raw;
    fn sealed(round: u64) -> Self::Raw;
    fn occupied(round: u64, item: Self::Item) -> Self::Raw;
    fn state(raw: Self::Raw, round: u64) -> State;
    fn item(raw: Self::Raw) -> Self::Item;
    /// Rounds from `round` to the slot's own.
    fn rounds_ahead(raw: Self::Raw, round: u64) -> i64;
}

const OCCUPIED: u64 = 1 << 63;
const SEALED: u64 = 1 << 62;

/// 64 bits: `1 | round modulo 2^23 | 40 bits of item`, or `0 | sealed | 62 bits of round`.
///
/// A dequeue that stops between its load and its compare-and-swap while exactly a multiple of 2^23 rounds pass, and
/// finds an equal item there, would take it out of turn: at least 2^23 x capacity operations inside one pause.
#[repr(transparent)]
pub struct SingleCell(AtomicU64);

const SINGLE_ITEM_BITS: u32 = 40;
const SINGLE_ITEM_MASK: u64 = (1 << SINGLE_ITEM_BITS) - 1;
const SINGLE_ROUND_MASK: u64 = (1 << (63 - SINGLE_ITEM_BITS)) - 1;

impl Cell for SingleCell {
    type Raw = u64;
    type Item = u64;
    const ITEM_BITS: u32 = SINGLE_ITEM_BITS;

    fn new() -> Self {
        Self(AtomicU64::new(0))
    }
    fn supported() -> bool {
        true
    }
    #[inline(always)]
    fn fits(item: u64) -> bool {
        item <= SINGLE_ITEM_MASK
    }
    #[inline(always)]
    fn load(&self) -> u64 {
        self.0.load(Acquire)
    }
    #[inline(always)]
    fn replace(&self, current: u64, new: u64) -> bool {
        self.0.compare_exchange(current, new, AcqRel, Acquire).is_ok()
    }
    #[inline(always)]
    fn free(round: u64) -> u64 {
        round & (SEALED - 1)
    }
    #[inline(always)]
    fn sealed(round: u64) -> u64 {
        Self::free(round) | SEALED
    }
    #[inline(always)]
    fn occupied(round: u64, item: u64) -> u64 {
        OCCUPIED | (round & SINGLE_ROUND_MASK) << SINGLE_ITEM_BITS | item & SINGLE_ITEM_MASK
    }
    #[inline(always)]
    fn state(raw: u64, round: u64) -> State {
        if raw & OCCUPIED == 0 {
            return free_state(raw, round);
        }
        match (raw >> SINGLE_ITEM_BITS).wrapping_sub(round) & SINGLE_ROUND_MASK {
            0 => State::Occupied,
            1 => State::OccupiedNext,
            SINGLE_ROUND_MASK => State::OccupiedPrevious,
            _ => State::Other,
        }
    }
    #[inline(always)]
    fn item(raw: u64) -> u64 {
        raw & SINGLE_ITEM_MASK
    }
    fn rounds_ahead(raw: u64, round: u64) -> i64 {
        if raw & OCCUPIED == 0 {
            return (raw & !SEALED).wrapping_sub(round) as i64;
        }
        let modulo = (raw >> SINGLE_ITEM_BITS).wrapping_sub(round) & SINGLE_ROUND_MASK;
        // The sign is the highest bit that is kept.
        (modulo << (SINGLE_ITEM_BITS + 1)) as i64 >> (SINGLE_ITEM_BITS + 1)
    }
}

/// 128 bits: the tag (`occupied | sealed | 62 bits of round`) above 64 bits of item. Rounds are always exact.
#[repr(transparent)]
pub struct DoubleCell(AtomicU128);

impl Cell for DoubleCell {
    type Raw = u128;
    type Item = u64;
    const ITEM_BITS: u32 = 64;

    fn new() -> Self {
        Self(AtomicU128::new(0))
    }
    /// Without the instruction, 128-bit atomics are locks in the memory of one process, which others cannot see. (Under Miri there are
    /// no others.)
    fn supported() -> bool {
        cfg!(miri) || AtomicU128::is_lock_free()
    }
    #[inline(always)]
    fn fits(_: u64) -> bool {
        true
    }
    #[inline(always)]
    fn load(&self) -> u128 {
        self.0.load(Acquire)
    }
    #[inline(always)]
    fn replace(&self, current: u128, new: u128) -> bool {
        self.0.compare_exchange(current, new, AcqRel, Acquire).is_ok()
    }
    #[inline(always)]
    fn free(round: u64) -> u128 {
        u128::from(round & (SEALED - 1)) << 64
    }
    #[inline(always)]
    fn sealed(round: u64) -> u128 {
        Self::free(round) | u128::from(SEALED) << 64
    }
    #[inline(always)]
    fn occupied(round: u64, item: u64) -> u128 {
        Self::free(round) | u128::from(OCCUPIED) << 64 | u128::from(item)
    }
    #[inline(always)]
    fn state(raw: u128, round: u64) -> State {
        let tag = (raw >> 64) as u64;
        if tag & OCCUPIED == 0 {
            return if raw as u64 == 0 { free_state(tag, round) } else { State::Other };
        }
        match (tag & !OCCUPIED).wrapping_sub(round) {
            0 => State::Occupied,
            1 => State::OccupiedNext,
            u64::MAX => State::OccupiedPrevious,
            _ => State::Other,
        }
    }
    #[inline(always)]
    fn item(raw: u128) -> u64 {
        raw as u64
    }
    fn rounds_ahead(raw: u128, round: u64) -> i64 {
        ((raw >> 64) as u64 & !(OCCUPIED | SEALED)).wrapping_sub(round) as i64
    }
}

impl SingleCell {
    /// The item that a slot holds, whatever its round.
    pub fn held_item(raw: u64) -> Option<u64> {
        (raw & OCCUPIED != 0).then(|| Self::item(raw))
    }
}

#[inline(always)]
fn free_state(word: u64, round: u64) -> State {
    if word == round {
        State::Free
    } else if word == round.wrapping_add(1) {
        State::FreeNext
    } else if word == round | SEALED {
        State::Sealed
    } else {
        State::Other
    }
}
