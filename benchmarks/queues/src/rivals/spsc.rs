//! One single-producer ring per thread, and a bitmap of the rings that have something. Who clears a ring's bit is its one consumer
//! until it sets the bit again; it keeps the ring for a number of items.

use super::{CAPACITY, Item, Place, Tries, TriesHandle};
use crossbeam_utils::CachePadded;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

const ITEMS_PER_HOLD: u32 = 32;

struct Ring<T> {
    tail: CachePadded<AtomicU64>,
    head: CachePadded<AtomicU64>,
    items: Box<[Place<T>]>,
}

pub struct Spsc<T> {
    rings: Box<[Ring<T>]>,
    /// Bit n of word n / 64: ring n may have items and no consumer.
    doorbell: Box<[CachePadded<AtomicU64>]>,
}

impl<T: Item> Tries<T> for Spsc<T> {
    type Handle<'a> = SpscHandle<'a, T>;
    const LOCKED: (bool, bool) = (true, false);

    fn new(threads: usize) -> Self {
        let counter = || CachePadded::new(AtomicU64::new(0));
        let slots = (CAPACITY / threads.next_power_of_two()).max(16);
        let ring = |_| Ring { tail: counter(), head: counter(), items: Place::many(slots) };
        // One more: the one that ends the run.
        Self {
            rings: (0..=threads).map(ring).collect(),
            doorbell: (0..=threads / 64).map(|_| counter()).collect(),
        }
    }

    fn handle(&self, thread: usize) -> Self::Handle<'_> {
        SpscHandle { queue: self, own: thread, tail: 0, head_seen: 0, held: None, scan: thread }
    }
}

pub struct SpscHandle<'a, T> {
    queue: &'a Spsc<T>,
    own: usize,
    tail: u64,
    head_seen: u64,
    held: Option<Hold>,
    scan: usize,
}

struct Hold {
    ring: usize,
    head: u64,
    tail_seen: u64,
    left: u32,
}

impl<T: Item> SpscHandle<'_, T> {
    fn ring_bell(&self, ring: usize) {
        let (word, bit) = (&self.queue.doorbell[ring / 64], 1 << (ring % 64));
        // The item must be visible before the bit is found set, or a consumer that clears it now would miss the item.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if word.load(Relaxed) & bit == 0 {
            word.fetch_or(bit, AcqRel);
        }
    }

    fn claim(&mut self) -> Option<Hold> {
        for turn in 0..self.queue.rings.len() {
            let ring = (self.scan + turn) % self.queue.rings.len();
            let (word, bit) = (&self.queue.doorbell[ring / 64], 1 << (ring % 64));
            if word.load(Relaxed) & bit == 0 || word.fetch_and(!bit, AcqRel) & bit == 0 {
                continue;
            }
            self.scan = ring;
            let parts = &self.queue.rings[ring];
            let (head, tail_seen) = (parts.head.load(Acquire), parts.tail.load(Acquire));
            if head != tail_seen {
                return Some(Hold { ring, head, tail_seen, left: ITEMS_PER_HOLD });
            }
            self.end_hold(ring, head);
        }
        None
    }

    /// Gives a ring up; if something came meanwhile, says so.
    fn end_hold(&self, ring: usize, head: u64) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if self.queue.rings[ring].tail.load(Acquire) != head {
            self.ring_bell(ring);
        }
    }
}

impl<T: Item> TriesHandle<T> for SpscHandle<'_, T> {
    fn try_put(&mut self, item: &T) -> bool {
        let ring = &self.queue.rings[self.own];
        let slots = ring.items.len() as u64;
        if self.tail - self.head_seen == slots {
            self.head_seen = ring.head.load(Acquire);
            if self.tail - self.head_seen == slots {
                // Who waits must hold no ring, or all could wait for each other's.
                if let Some(hold) = self.held.take() {
                    self.end_hold(hold.ring, hold.head);
                }
                return false;
            }
        }
        // SAFETY: the one producer owns what lies between tail and head.
        unsafe { ring.items[(self.tail % slots) as usize].write(item) };
        self.tail += 1;
        ring.tail.store(self.tail, Release);
        self.ring_bell(self.own);
        true
    }

    fn try_get(&mut self) -> Option<T> {
        let mut hold = match self.held.take() {
            Some(hold) => hold,
            None => self.claim()?,
        };
        let ring = &self.queue.rings[hold.ring];
        // SAFETY: the one consumer owns what lies between head and tail, and there is something, as in `claim`.
        let item = unsafe { ring.items[(hold.head % ring.items.len() as u64) as usize].read() };
        hold.head += 1;
        hold.left -= 1;
        ring.head.store(hold.head, Release);
        if hold.head == hold.tail_seen {
            hold.tail_seen = ring.tail.load(Acquire);
        }
        if hold.left == 0 || hold.head == hold.tail_seen {
            self.end_hold(hold.ring, hold.head);
        } else {
            self.held = Some(hold);
        }
        Some(item)
    }
}

impl<T> Drop for SpscHandle<'_, T> {
    fn drop(&mut self) {
        if let Some(hold) = self.held.take() {
            self.queue.doorbell[hold.ring / 64].fetch_or(1 << (hold.ring % 64), AcqRel);
        }
    }
}
