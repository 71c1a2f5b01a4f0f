//! The block-based bounded queue of Wang and others (ATC 2022), in its retry-new mode.

use super::{CAPACITY, Item, Place, Tries, TriesHandle};
use crossbeam_utils::CachePadded;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

const BLOCKS: u64 = 16;
const BLOCK_SLOTS: u64 = CAPACITY as u64 / BLOCKS;
/// A cursor is a version above an offset; offsets overshoot by at most the number of threads.
const OFFSET_BITS: u32 = 24;
const OFFSET_MASK: u64 = (1 << OFFSET_BITS) - 1;

fn offset(cursor: u64) -> u64 {
    cursor & OFFSET_MASK
}
fn version(cursor: u64) -> u64 {
    cursor >> OFFSET_BITS
}

struct Block {
    allocated: CachePadded<AtomicU64>,
    committed: CachePadded<AtomicU64>,
    reserved: CachePadded<AtomicU64>,
    consumed: CachePadded<AtomicU64>,
}

pub struct Bbq<T> {
    put_head: CachePadded<AtomicU64>,
    get_head: CachePadded<AtomicU64>,
    blocks: Box<[Block]>,
    items: Box<[Place<T>]>,
}

enum Reservation {
    Entry(u64),
    None,
    BlockDone,
}

impl<T: Item> Tries<T> for Bbq<T> {
    type Handle<'a> = &'a Self;
    const LOCKED: (bool, bool) = (true, true);

    fn new(_: usize) -> Self {
        // All blocks but the first are done, in round 0.
        let cursor = |block: u64| CachePadded::new(AtomicU64::new(if block == 0 { 0 } else { BLOCK_SLOTS }));
        let block = |n| Block {
            allocated: cursor(n),
            committed: cursor(n),
            reserved: cursor(n),
            consumed: cursor(n),
        };
        Self {
            put_head: CachePadded::new(AtomicU64::new(0)),
            get_head: CachePadded::new(AtomicU64::new(0)),
            blocks: (0..BLOCKS).map(block).collect(),
            items: Place::many(CAPACITY),
        }
    }

    fn handle(&self, _: usize) -> Self::Handle<'_> {
        self
    }
}

impl<T> Bbq<T> {
    fn reserve(block: &Block) -> Reservation {
        loop {
            let reserved = block.reserved.load(Acquire);
            if offset(reserved) >= BLOCK_SLOTS {
                return Reservation::BlockDone;
            }
            let committed = block.committed.load(Acquire);
            if offset(reserved) == offset(committed) {
                return Reservation::None;
            }
            if offset(committed) != BLOCK_SLOTS && offset(block.allocated.load(Acquire)) != offset(committed)
            {
                return Reservation::None;
            }
            if block.reserved.compare_exchange(reserved, reserved + 1, AcqRel, Relaxed).is_ok() {
                return Reservation::Entry(offset(reserved));
            }
        }
    }

    fn advance_put(&self, head: u64) -> bool {
        let (index, round) = (head % BLOCKS, head / BLOCKS);
        let next = &self.blocks[((index + 1) % BLOCKS) as usize];
        let consumed = next.consumed.load(Acquire);
        if version(consumed) < round || version(consumed) == round && offset(consumed) != BLOCK_SLOTS {
            return false;
        }
        let fresh = (round + 1) << OFFSET_BITS;
        next.committed.fetch_max(fresh, AcqRel);
        next.allocated.fetch_max(fresh, AcqRel);
        self.put_head.fetch_max(head + 1, AcqRel);
        true
    }

    fn advance_get(&self, head: u64) -> bool {
        let (index, round) = (head % BLOCKS, head / BLOCKS);
        let next = &self.blocks[((index + 1) % BLOCKS) as usize];
        if version(next.committed.load(Acquire)) != round + 1 {
            return false;
        }
        let fresh = (round + 1) << OFFSET_BITS;
        next.consumed.fetch_max(fresh, AcqRel);
        next.reserved.fetch_max(fresh, AcqRel);
        self.get_head.fetch_max(head + 1, AcqRel);
        true
    }
}

impl<T: Item> TriesHandle<T> for &Bbq<T> {
    fn try_put(&mut self, item: &T) -> bool {
        loop {
            let head = self.put_head.load(Acquire);
            let index = head % BLOCKS;
            let block = &self.blocks[index as usize];
            if offset(block.allocated.load(Acquire)) < BLOCK_SLOTS {
                let place = offset(block.allocated.fetch_add(1, AcqRel));
                if place < BLOCK_SLOTS {
                    // SAFETY: the place was allocated to this thread alone.
                    unsafe { self.items[(index * BLOCK_SLOTS + place) as usize].write(item) };
                    block.committed.fetch_add(1, AcqRel);
                    return true;
                }
            }
            if !self.advance_put(head) {
                return false;
            }
        }
    }

    fn try_get(&mut self) -> Option<T> {
        loop {
            let head = self.get_head.load(Acquire);
            let index = head % BLOCKS;
            let block = &self.blocks[index as usize];
            match Bbq::<T>::reserve(block) {
                Reservation::Entry(place) => {
                    // SAFETY: committed, and reserved by this thread alone.
                    let item = unsafe { self.items[(index * BLOCK_SLOTS + place) as usize].read() };
                    block.consumed.fetch_add(1, AcqRel);
                    return Some(item);
                }
                Reservation::None => return None,
                Reservation::BlockDone => {
                    if !self.advance_get(head) {
                        return None;
                    }
                }
            }
        }
    }
}
