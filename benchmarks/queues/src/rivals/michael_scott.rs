//! Michael and Scott's queue (PODC 1996), bounded by its pool of nodes; pointers are numbers of nodes with a counter.

use super::{CAPACITY, Item, Place, Tries, TriesHandle};
use crossbeam_utils::CachePadded;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

const NONE: u32 = u32::MAX;

fn pointer(node: u32, count: u32) -> u64 {
    u64::from(count) << 32 | u64::from(node)
}
fn node(pointer: u64) -> u32 {
    pointer as u32
}
fn next_count(pointer: u64) -> u32 {
    ((pointer >> 32) as u32).wrapping_add(1)
}

pub struct MichaelScott<T> {
    head: CachePadded<AtomicU64>,
    tail: CachePadded<AtomicU64>,
    free: CachePadded<AtomicU64>,
    next: Box<[CachePadded<AtomicU64>]>,
    items: Box<[Place<T>]>,
}

impl<T: Item> Tries<T> for MichaelScott<T> {
    type Handle<'a> = &'a Self;
    const LOCKED: (bool, bool) = (true, true);

    fn new(_: usize) -> Self {
        // Node 0 is the first dummy; the others are on the free list, each pointing to the one after it.
        let link = |n: usize| if n == 0 || n == CAPACITY { NONE } else { n as u32 + 1 };
        Self {
            head: CachePadded::new(AtomicU64::new(pointer(0, 0))),
            tail: CachePadded::new(AtomicU64::new(pointer(0, 0))),
            free: CachePadded::new(AtomicU64::new(pointer(1, 0))),
            next: (0..=CAPACITY).map(|n| CachePadded::new(AtomicU64::new(pointer(link(n), 0)))).collect(),
            items: Place::many(CAPACITY + 1),
        }
    }

    fn handle(&self, _: usize) -> Self::Handle<'_> {
        self
    }
}

impl<T: Item> MichaelScott<T> {
    fn allocate(&self) -> Option<u32> {
        let mut first = self.free.load(Acquire);
        loop {
            let taken = node(first);
            if taken == NONE {
                return None;
            }
            let second = node(self.next[taken as usize].load(Acquire));
            match self.free.compare_exchange_weak(first, pointer(second, next_count(first)), AcqRel, Acquire)
            {
                Ok(_) => return Some(taken),
                Err(now) => first = now,
            }
        }
    }

    fn give_back(&self, freed: u32) {
        let mut first = self.free.load(Relaxed);
        loop {
            let link = &self.next[freed as usize];
            link.store(pointer(node(first), next_count(link.load(Relaxed))), Relaxed);
            match self.free.compare_exchange_weak(first, pointer(freed, next_count(first)), Release, Relaxed)
            {
                Ok(_) => return,
                Err(now) => first = now,
            }
        }
    }
}

impl<T: Item> TriesHandle<T> for &MichaelScott<T> {
    fn try_put(&mut self, item: &T) -> bool {
        let Some(fresh) = self.allocate() else { return false };
        // SAFETY: the node was just taken from the free list.
        unsafe { self.items[fresh as usize].write(item) };
        let own = &self.next[fresh as usize];
        own.store(pointer(NONE, next_count(own.load(Relaxed))), Release);
        loop {
            let tail = self.tail.load(Acquire);
            let link = &self.next[node(tail) as usize];
            let next = link.load(Acquire);
            if tail != self.tail.load(Acquire) {
                continue;
            }
            if node(next) != NONE {
                let _ =
                    self.tail.compare_exchange(tail, pointer(node(next), next_count(tail)), AcqRel, Relaxed);
            } else if link.compare_exchange(next, pointer(fresh, next_count(next)), AcqRel, Relaxed).is_ok() {
                let _ = self.tail.compare_exchange(tail, pointer(fresh, next_count(tail)), AcqRel, Relaxed);
                return true;
            }
        }
    }

    fn try_get(&mut self) -> Option<T> {
        loop {
            let head = self.head.load(Acquire);
            let tail = self.tail.load(Acquire);
            let next = self.next[node(head) as usize].load(Acquire);
            if head != self.head.load(Acquire) {
                continue;
            }
            if node(head) == node(tail) {
                if node(next) == NONE {
                    return None;
                }
                let _ =
                    self.tail.compare_exchange(tail, pointer(node(next), next_count(tail)), AcqRel, Relaxed);
                continue;
            }
            if node(next) == NONE {
                continue;
            }
            // As in the paper, read before the exchange; what is torn is thrown away with the failing exchange.
            // SAFETY: nodes are never freed, and every pattern of bits is an item.
            let item = unsafe { self.items[node(next) as usize].read() };
            if self
                .head
                .compare_exchange(head, pointer(node(next), next_count(head)), AcqRel, Relaxed)
                .is_ok()
            {
                self.give_back(node(head));
                return Some(item);
            }
        }
    }
}
