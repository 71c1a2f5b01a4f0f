//! What may overtake an item, in each of the queues: the bounds of `README.md`.
#![cfg(not(modeled))]

mod common;

use common::{Call, Clock, Operation, displacement_max};
use polytropo_queue::bytes::BytesHandle;
use polytropo_queue::cell::{Cell, DoubleCell, SingleCell};
use polytropo_queue::{Config, Deadline, Error, Handle, Heap, Rcqb, Rcqd, Rcqs};
use proptest::prelude::*;

/// A queue of numbers of 40 bits.
trait Queue: Sync + Sized {
    type End<'a>: End
    where
        Self: 'a;
    fn make(config: &Config) -> Self;
    fn end(&self, cpu: u32) -> Self::End<'_>;
}

trait End {
    fn put(&mut self, item: u64, deadline: Option<Deadline>) -> Result<u64, Error>;
    fn get(&mut self, deadline: Option<Deadline>) -> Result<u64, Error>;
}

macro_rules! words {
    ($queue:ty, $cell:ty) => {
        impl Queue for $queue {
            type End<'a> = Handle<'a, $cell>;
            fn make(config: &Config) -> Self {
                Self::new(config).unwrap()
            }
            fn end(&self, cpu: u32) -> Self::End<'_> {
                self.handle_on_cpu(cpu)
            }
        }
    };
}
words!(Rcqs<Heap>, SingleCell);
words!(Rcqd<Heap>, DoubleCell);

impl<C: Cell<Item = u64>> End for Handle<'_, C> {
    fn put(&mut self, item: u64, deadline: Option<Deadline>) -> Result<u64, Error> {
        match deadline {
            None => self.try_enqueue(item),
            Some(deadline) => self.enqueue(item, deadline),
        }
        .map(|()| 0)
    }
    fn get(&mut self, deadline: Option<Deadline>) -> Result<u64, Error> {
        match deadline {
            None => self.try_dequeue(),
            Some(deadline) => self.dequeue(deadline),
        }
    }
}

impl Queue for Rcqb<Heap> {
    type End<'a> = BytesHandle<'a>;
    fn make(config: &Config) -> Self {
        Self::new(config).unwrap()
    }
    fn end(&self, cpu: u32) -> Self::End<'_> {
        self.handle_on_cpu(cpu)
    }
}

impl End for BytesHandle<'_> {
    fn put(&mut self, item: u64, deadline: Option<Deadline>) -> Result<u64, Error> {
        match deadline {
            None => self.try_put(&item.to_le_bytes()),
            Some(deadline) => BytesHandle::put(self, &item.to_le_bytes(), deadline),
        }
        .map(|()| 0)
    }
    fn get(&mut self, deadline: Option<Deadline>) -> Result<u64, Error> {
        let mut out = [0; 8];
        let length = match deadline {
            None => self.try_get(&mut out),
            Some(deadline) => BytesHandle::get(self, &mut out, deadline),
        }?;
        assert_eq!(length, 8);
        Ok(u64::from_le_bytes(out))
    }
}

/// As `README.md` promises, for so many operations under way at once.
fn displacement_bound(lanes: usize, skew: u32, under_way: usize) -> usize {
    if lanes == 1 { 0 } else { (lanes - 1) * (2 * skew as usize + 1) + under_way }
}

/// One thread that acts for four CPUs: nothing lost or doubled, room for all of the capacity, overtaking within the bound.
fn lanes_hold_all<Q: Queue>(moves: &[(bool, u32)], skew: u32, packed: bool) -> Result<(), TestCaseError> {
    let queue = Q::make(&Config { skew, packed, ..Config::relaxed(64, 4) });
    let mut ends: Vec<_> = (0..4).map(|cpu| queue.end(cpu)).collect();
    let (clock, mut next, mut held, mut history) = (Clock::default(), 0, 0, Vec::new());
    for (enqueue, cpu) in moves {
        let end = &mut ends[*cpu as usize];
        let operation = if *enqueue {
            next += 1;
            clock.record(Call::Enqueue(next), || end.put(next, None))
        } else {
            clock.record(Call::Dequeue, || end.get(None))
        };
        match (operation.call, operation.outcome) {
            (Call::Enqueue(_), Ok(_)) => held += 1,
            (Call::Enqueue(_), Err(error)) => prop_assert_eq!((error, held), (Error::Full, 64)),
            (Call::Dequeue, Ok(_)) => held -= 1,
            (Call::Dequeue, Err(error)) => prop_assert_eq!((error, held), (Error::Empty, 0)),
        }
        history.push(operation);
    }
    while held > 0 {
        history.push(clock.record(Call::Dequeue, || ends[0].get(None)));
        held -= 1;
    }
    prop_assert_eq!(ends[0].get(None), Err(Error::Empty));
    prop_assert!(displacement_max(&history) <= displacement_bound(4, skew, 1));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 256 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lanes_hold_all_and_stay_within_the_skew(
        moves in prop::collection::vec((any::<bool>(), 0u32..4), 0..600), skew in 1u32..20, packed in any::<bool>(),
    ) {
        lanes_hold_all::<Rcqs<Heap>>(&moves, skew, packed)?;
        lanes_hold_all::<Rcqd<Heap>>(&moves, skew, packed)?;
        lanes_hold_all::<Rcqb<Heap>>(&moves, skew, packed)?;
    }
}

/// Four threads that put and take in turn: all arrives, once, and within the bound.
fn threads_stay_within_the_bound<Q: Queue>() {
    let items = if cfg!(miri) { 12 } else { 1500 };
    for (lanes, skew) in [(1, 64), (2, 4), (4, 8)] {
        let queue = Q::make(&Config { lanes, skew, ..Config::strict(64) });
        let clock = Clock::default();
        let work = |thread: u64| {
            let mut end = queue.end(thread as u32);
            let mut mine = Vec::new();
            for n in 0..items {
                let item = thread << 32 | n;
                mine.push(clock.record(Call::Enqueue(item), || end.put(item, Some(Deadline::Never))));
                mine.push(clock.record(Call::Dequeue, || end.get(Some(Deadline::Never))));
            }
            mine
        };
        let work = &work;
        let history: Vec<Operation> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|thread| scope.spawn(move || work(thread))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let mut taken: Vec<u64> =
            history.iter().filter(|o| o.call == Call::Dequeue).map(|o| o.outcome.unwrap()).collect();
        taken.sort_unstable();
        let all: Vec<u64> = (0..4u64).flat_map(|thread| (0..items).map(move |n| thread << 32 | n)).collect();
        assert!(taken == all, "an item was lost or came twice");
        let (worst, bound) = (displacement_max(&history), displacement_bound(lanes, skew, 4));
        assert!(worst <= bound, "{worst} items overtook one; with {lanes} lanes at most {bound} may");
    }
}

#[test]
fn threads_stay_within_the_bound_single() {
    threads_stay_within_the_bound::<Rcqs<Heap>>();
}

#[test]
fn threads_stay_within_the_bound_double() {
    threads_stay_within_the_bound::<Rcqd<Heap>>();
}

#[test]
fn threads_stay_within_the_bound_bytes() {
    threads_stay_within_the_bound::<Rcqb<Heap>>();
}
