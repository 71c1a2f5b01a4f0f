//! RCQS and RCQD inside a process: against a model, in histories of threads, at their limits.
#![cfg(not(modeled))]

mod common;

use common::{Call, Clock, Operation, displacement_max, is_linearizable};
use polytropo_queue::cell::{Cell, DoubleCell, SingleCell};
use polytropo_queue::{Config, Deadline, Error, Heap, Rcqd, Rcqs};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::time::Duration;

#[derive(Clone, Debug)]
enum Step {
    Enqueue,
    Dequeue,
    EnqueueBatch(usize),
    DequeueBatch(usize),
    Close,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => Just(Step::Enqueue),
        8 => Just(Step::Dequeue),
        2 => (0usize..12).prop_map(Step::EnqueueBatch),
        2 => (0usize..12).prop_map(Step::DequeueBatch),
        1 => Just(Step::Close),
    ];
    prop::collection::vec(step, 0..200)
}

/// One thread, every operation, beside a plain queue.
macro_rules! agrees_with_the_model {
    ($queue:ty, $steps:expr, $capacity:expr) => {{
        let queue = <$queue>::new(&Config::strict($capacity)).unwrap();
        let mut handle = queue.handle();
        let (mut model, mut closed, mut next) = (VecDeque::new(), false, 0u64);
        for step in $steps {
            match step {
                Step::Enqueue => {
                    next += 1;
                    let expected = match (closed, model.len() < $capacity) {
                        (true, _) => Err(Error::Closed),
                        (false, true) => Ok(()),
                        (false, false) => Err(Error::Full),
                    };
                    prop_assert_eq!(handle.try_enqueue(next), expected);
                    if expected.is_ok() {
                        model.push_back(next);
                    }
                }
                Step::Dequeue => {
                    let none = if closed { Error::Closed } else { Error::Empty };
                    prop_assert_eq!(handle.try_dequeue(), model.pop_front().ok_or(none));
                }
                Step::EnqueueBatch(count) => {
                    let items: Vec<u64> = (next + 1..).take(count).collect();
                    next += count as u64;
                    let room = if closed { 0 } else { $capacity - model.len() };
                    let done = handle.try_enqueue_batch(&items).unwrap_or(0);
                    prop_assert_eq!(done, count.min(room));
                    model.extend(&items[..done]);
                }
                Step::DequeueBatch(count) => {
                    let mut out = vec![0; count];
                    let done = handle.try_dequeue_batch(&mut out).unwrap_or(0);
                    prop_assert_eq!(done, count.min(model.len()));
                    prop_assert_eq!(&out[..done], model.drain(..done).collect::<Vec<_>>());
                }
                Step::Close => {
                    handle.close();
                    closed = true;
                }
            }
            prop_assert_eq!(handle.len(), model.len());
        }
    }};
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 1 } else { 256 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn single_agrees_with_the_model(steps in steps(), log2 in 1usize..6) {
        agrees_with_the_model!(Rcqs<Heap>, steps, 1 << log2);
    }

    #[test]
    fn double_agrees_with_the_model(steps in steps(), log2 in 1usize..6) {
        agrees_with_the_model!(Rcqd<Heap>, steps, 1 << log2);
    }

    /// Every state of a slot is told from every other, in every round.
    #[test]
    fn cells_keep_what_they_are_given(round in 0u64..1 << 61, item in 0u64..1 << 40) {
        check_cell::<SingleCell>(round, item)?;
        check_cell::<DoubleCell>(round, item)?;
    }
}

fn check_cell<C: Cell<Item = u64>>(round: u64, item: u64) -> Result<(), TestCaseError> {
    use polytropo_queue::cell::State::{
        Free, FreeNext, Occupied, OccupiedNext, OccupiedPrevious, Other, Sealed,
    };
    let raw = C::occupied(round, item);
    prop_assert_eq!(C::item(raw), item);
    prop_assert_eq!(C::state(raw, round), Occupied);
    prop_assert_eq!(C::state(raw, round + 1), OccupiedPrevious);
    prop_assert_eq!(C::state(raw, round + 2), Other);
    prop_assert_eq!(C::state(C::occupied(round + 1, item), round), OccupiedNext);
    prop_assert_eq!(C::state(C::free(round), round), Free);
    prop_assert_eq!(C::state(C::free(round + 1), round), FreeNext);
    prop_assert_eq!(C::state(C::free(round), round + 1), Other);
    prop_assert_eq!(C::state(C::sealed(round), round), Sealed);
    prop_assert_eq!(C::state(C::sealed(round), round + 1), Other);
    Ok(())
}

fn run_threads(threads: usize, work: impl Fn(usize) -> Vec<Operation> + Sync) -> Vec<Operation> {
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|n| {
                scope.spawn({
                    let work = &work;
                    move || work(n)
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    })
}

#[test]
fn recorded_histories_are_linearizable() {
    let rounds = if cfg!(miri) { 3 } else { 4000 };
    for round in 0..rounds {
        let capacity = [2, 4][round % 2];
        let queue = Rcqs::new(&Config::strict(capacity)).unwrap();
        let (clock, barrier) = (Clock::default(), std::sync::Barrier::new(3));
        let history = run_threads(3, |thread| {
            let mut handle = queue.handle();
            barrier.wait();
            (0..7u64)
                .map(|n| {
                    if (n + thread as u64 + round as u64) % 7 < 4 {
                        let item = thread as u64 * 100 + n;
                        clock.record(Call::Enqueue(item), || handle.try_enqueue(item).map(|()| 0))
                    } else {
                        clock.record(Call::Dequeue, || handle.try_dequeue())
                    }
                })
                .collect()
        });
        assert!(is_linearizable(&history, capacity), "round {round}: {history:#?}");
    }
}

#[test]
fn the_checker_finds_what_is_wrong() {
    let operation = |call, outcome, begin, end| Operation { call, outcome, begin, end };
    let swapped = [
        operation(Call::Enqueue(1), Ok(0), 0, 1),
        operation(Call::Enqueue(2), Ok(0), 2, 3),
        operation(Call::Dequeue, Ok(2), 4, 5),
        operation(Call::Dequeue, Ok(1), 6, 7),
    ];
    assert!(!is_linearizable(&swapped, 4));
    assert_eq!(displacement_max(&swapped), 1);
    let overlapping = swapped.map(|o| operation(o.call, o.outcome, 0, o.end + 8));
    assert!(is_linearizable(&overlapping, 4));
    let missed =
        [operation(Call::Enqueue(1), Ok(0), 0, 1), operation(Call::Dequeue, Err(Error::Empty), 2, 3)];
    assert!(!is_linearizable(&missed, 4));
    let overfull =
        [operation(Call::Enqueue(1), Ok(0), 0, 1), operation(Call::Enqueue(2), Err(Error::Full), 2, 3)];
    assert!(!is_linearizable(&overfull, 2) && is_linearizable(&overfull, 1));
}

#[test]
fn blocked_producers_and_consumers_all_finish() {
    let items = if cfg!(miri) { 8 } else { 20_000u64 };
    let queue = Rcqs::new(&Config::relaxed(4, 2)).unwrap();
    let sums = std::thread::scope(|scope| {
        let consumers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut handle = queue.handle();
                    let mut sum = 0;
                    loop {
                        match handle.dequeue(Deadline::Never) {
                            Ok(item) => sum += item,
                            Err(error) => break (error, sum),
                        }
                    }
                })
            })
            .collect();
        std::thread::scope(|inner| {
            for _ in 0..3 {
                inner.spawn(|| {
                    let mut handle = queue.handle();
                    (1..=items).for_each(|item| handle.enqueue(item, Deadline::Never).unwrap());
                });
            }
        });
        queue.close();
        consumers.into_iter().map(|consumer| consumer.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(sums.iter().all(|(error, _)| *error == Error::Closed));
    assert_eq!(sums.iter().map(|(_, sum)| sum).sum::<u64>(), 3 * items * (items + 1) / 2);
}

#[test]
fn deadlines_end_waits_and_lose_nothing() {
    let queue = Rcqd::new(&Config::strict(2)).unwrap();
    let mut handle = queue.handle();
    let soon = || Deadline::after(Duration::from_millis(5));
    assert_eq!(handle.dequeue(soon()), Err(Error::TimedOut));
    assert_eq!(handle.enqueue_batch(&[u64::MAX, 2, 3], soon()), Ok(2));
    assert_eq!(handle.enqueue(4, soon()), Err(Error::TimedOut));
    let mut out = [0; 4];
    assert_eq!(handle.dequeue_batch(&mut out, soon()), Ok(2));
    assert_eq!(out[..2], [u64::MAX, 2]);
    assert_eq!((queue.stats().enqueued, queue.stats().dequeued), (2, 2));
}

#[test]
fn wrong_configurations_and_items_are_refused() {
    for capacity in [0, 1, 3, 1 << 21] {
        assert!(Rcqs::new(&Config::strict(capacity)).is_err(), "capacity {capacity}");
    }
    for lanes in [0, 3, 8, 128] {
        assert!(Rcqs::new(&Config { lanes, ..Config::strict(8) }).is_err(), "{lanes} lanes");
    }
    let queue = Rcqs::new(&Config::strict(2)).unwrap();
    assert_eq!(queue.handle().try_enqueue(1 << 40), Err(Error::TooLarge));
    assert!(Rcqs::create(Heap::new(100).unwrap(), &Config::strict(2)).is_err());
    assert_eq!(Rcqs::attach(Heap::new(4096).unwrap()).err(), Some(Error::NotAQueue));
}
