//! Nikolaev's scalable circular queue (DISC 2019): two rings of indices, one of free places and one of full ones.

use super::{CAPACITY, Item, Place, Tries, TriesHandle};
use crossbeam_utils::CachePadded;
use std::sync::atomic::Ordering::{AcqRel, Acquire, SeqCst};
use std::sync::atomic::{AtomicI64, AtomicU64};

const ENTRIES: u64 = 2 * CAPACITY as u64;
const INDEX_MASK: u64 = ENTRIES - 1;
const NO_INDEX: u64 = INDEX_MASK;
const SAFE: u64 = ENTRIES;
const CYCLE_SHIFT: u32 = ENTRIES.trailing_zeros() + 1;
const THRESHOLD: i64 = 3 * CAPACITY as i64 - 1;

fn entry(cycle: u64, safe: u64, index: u64) -> u64 {
    cycle << CYCLE_SHIFT | safe | index
}

struct Ring {
    head: CachePadded<AtomicU64>,
    threshold: CachePadded<AtomicI64>,
    tail: CachePadded<AtomicU64>,
    entries: Box<[AtomicU64]>,
}

/// Neighbouring tickets go to different cache lines.
fn place(ticket: u64) -> usize {
    let position = ticket % ENTRIES;
    let (lines, in_line) = (ENTRIES / 8, 8);
    (position % lines * in_line + position / lines) as usize
}

impl Ring {
    fn new(full: bool) -> Self {
        let filled = if full { CAPACITY as u64 } else { 0 };
        let entries: Vec<AtomicU64> =
            (0..ENTRIES).map(|_| AtomicU64::new(entry(0, SAFE, NO_INDEX))).collect();
        for index in 0..filled {
            entries[place(ENTRIES + index)].store(entry(1, SAFE, index), SeqCst);
        }
        Self {
            head: CachePadded::new(AtomicU64::new(ENTRIES)),
            threshold: CachePadded::new(AtomicI64::new(if full { THRESHOLD } else { -1 })),
            tail: CachePadded::new(AtomicU64::new(ENTRIES + filled)),
            entries: entries.into(),
        }
    }

    fn put(&self, index: u64) {
        loop {
            let ticket = self.tail.fetch_add(1, AcqRel);
            let (cycle, cell) = (ticket / ENTRIES, &self.entries[place(ticket)]);
            let mut seen = cell.load(Acquire);
            while seen >> CYCLE_SHIFT < cycle
                && seen & INDEX_MASK == NO_INDEX
                && (seen & SAFE != 0 || self.head.load(Acquire) <= ticket)
            {
                match cell.compare_exchange_weak(seen, entry(cycle, SAFE, index), AcqRel, Acquire) {
                    Ok(_) => {
                        if self.threshold.load(SeqCst) != THRESHOLD {
                            self.threshold.store(THRESHOLD, SeqCst);
                        }
                        return;
                    }
                    Err(now) => seen = now,
                }
            }
        }
    }

    fn get(&self) -> Option<u64> {
        if self.threshold.load(SeqCst) < 0 {
            return None;
        }
        loop {
            let ticket = self.head.fetch_add(1, AcqRel);
            let (cycle, cell) = (ticket / ENTRIES, &self.entries[place(ticket)]);
            let mut seen = cell.load(Acquire);
            loop {
                if seen >> CYCLE_SHIFT == cycle {
                    cell.fetch_or(NO_INDEX, AcqRel);
                    return Some(seen & INDEX_MASK);
                }
                let passed = if seen & INDEX_MASK == NO_INDEX {
                    entry(cycle, seen & SAFE, NO_INDEX)
                } else {
                    seen & !SAFE
                };
                if seen >> CYCLE_SHIFT > cycle {
                    break;
                }
                match cell.compare_exchange_weak(seen, passed, AcqRel, Acquire) {
                    Ok(_) => break,
                    Err(now) => seen = now,
                }
            }
            let tail = self.tail.load(Acquire);
            if tail <= ticket + 1 {
                self.catch_up(tail, ticket + 1);
                self.threshold.fetch_sub(1, SeqCst);
                return None;
            }
            if self.threshold.fetch_sub(1, SeqCst) <= 0 {
                return None;
            }
        }
    }

    fn catch_up(&self, mut tail: u64, mut head: u64) {
        while self.tail.compare_exchange_weak(tail, head, AcqRel, Acquire).is_err() {
            head = self.head.load(Acquire);
            tail = self.tail.load(Acquire);
            if tail >= head {
                break;
            }
        }
    }
}

pub struct Scq<T> {
    full: Ring,
    free: Ring,
    items: Box<[Place<T>]>,
}

impl<T: Item> Tries<T> for Scq<T> {
    type Handle<'a> = &'a Self;
    const LOCKED: (bool, bool) = (true, true);
    fn new(_: usize) -> Self {
        Self { full: Ring::new(false), free: Ring::new(true), items: Place::many(CAPACITY) }
    }
    fn handle(&self, _: usize) -> Self::Handle<'_> {
        self
    }
}

impl<T: Item> TriesHandle<T> for &Scq<T> {
    fn try_put(&mut self, item: &T) -> bool {
        let Some(index) = self.free.get() else { return false };
        // SAFETY: the index came out of the free ring, to this thread alone.
        unsafe { self.items[index as usize].write(item) };
        self.full.put(index);
        true
    }

    fn try_get(&mut self) -> Option<T> {
        let index = self.full.get()?;
        // SAFETY: the index came out of the full ring, to this thread alone, after the item was written.
        let item = unsafe { self.items[index as usize].read() };
        self.free.put(index);
        Some(item)
    }
}
