//! RCQS, RCQD and RCQB.

use super::{CAPACITY, Handle, Item, Queue};
use polytropo_queue::bytes::BytesHandle;
use polytropo_queue::cell::{DoubleCell, SingleCell};
use polytropo_queue::layout::DEFAULT_SKEW;
use polytropo_queue::{Config, Deadline, Heap, Rcqb, Rcqd, Rcqs, Stats};

/// No bound: each CPU keeps to its own lane while that has room (items).
pub const FREE: u32 = u32::MAX;

fn config<const LANES: usize>(item_size: usize, skew: u32, packed: bool) -> Config {
    Config { lanes: LANES, item_size, skew, packed, ..Config::strict(CAPACITY) }
}

fn waits(stats: Stats) -> [u64; 3] {
    [stats.sleeps, stats.wakes, stats.spins_in_vain]
}

macro_rules! words {
    ($name:ident, $queue:ty, $cell:ty) => {
        pub struct $name<const LANES: usize, const SKEW: u32 = DEFAULT_SKEW, const PACKED: bool = true>(
            $queue,
        );

        impl<const LANES: usize, const SKEW: u32, const PACKED: bool> Queue<[u64; 1]>
            for $name<LANES, SKEW, PACKED>
        {
            type Handle<'a> = polytropo_queue::Handle<'a, $cell>;
            fn new(_: usize) -> Self {
                Self(<$queue>::new(&config::<LANES>(8, SKEW, PACKED)).expect("the configuration is right"))
            }
            fn handle(&self, _: usize) -> Self::Handle<'_> {
                self.0.handle()
            }
            fn waits(&self) -> [u64; 3] {
                waits(self.0.stats())
            }
        }

        impl Handle<[u64; 1]> for polytropo_queue::Handle<'_, $cell> {
            #[inline(always)]
            fn put(&mut self, item: [u64; 1]) {
                self.enqueue(item[0], Deadline::Never).expect("the queue is open");
            }
            #[inline(always)]
            fn get(&mut self) -> [u64; 1] {
                [self.dequeue(Deadline::Never).expect("the queue is open")]
            }
        }
    };
}
words!(Single, Rcqs<Heap>, SingleCell);
words!(Double, Rcqd<Heap>, DoubleCell);

pub struct Bytes<const LANES: usize, const PACKED: bool = true>(Rcqb<Heap>);

impl<const N: usize, const LANES: usize, const PACKED: bool> Queue<[u64; N]> for Bytes<LANES, PACKED> {
    type Handle<'a> = BytesHandle<'a>;
    fn new(_: usize) -> Self {
        Self(Rcqb::new(&config::<LANES>(N * 8, DEFAULT_SKEW, PACKED)).expect("the configuration is right"))
    }
    fn handle(&self, _: usize) -> Self::Handle<'_> {
        self.0.handle()
    }
    fn waits(&self) -> [u64; 3] {
        waits(self.0.stats())
    }
}

impl<const N: usize> Handle<[u64; N]> for BytesHandle<'_> {
    #[inline]
    fn put(&mut self, item: [u64; N]) {
        // SAFETY: numbers are bytes.
        let bytes = unsafe { std::slice::from_raw_parts(item.as_ptr().cast(), <[u64; N]>::SIZE) };
        BytesHandle::put(self, bytes, Deadline::Never).expect("the queue is open");
    }
    #[inline]
    fn get(&mut self) -> [u64; N] {
        let mut item = [0u64; N];
        // SAFETY: bytes make numbers.
        let bytes = unsafe { std::slice::from_raw_parts_mut(item.as_mut_ptr().cast(), <[u64; N]>::SIZE) };
        BytesHandle::get(self, bytes, Deadline::Never).expect("the queue is open");
        item
    }
}
