//! Many interleavings of cases that are too large for all of them. Run with `RUSTFLAGS="--cfg modeled --cfg shuttle"`, as `make loom`
//! does; otherwise this file is empty. `SHUTTLE_ROUNDS` sets how many.
//!
//! Half of the schedules are random, half prefer a few long preemptions (PCT): a participant that stops in the middle of something for
//! long. The seeds are fixed. A lost wake-up is a deadlock, which shuttle finds.
#![cfg(shuttle)]

mod common;

use common::{Call, Clock, Operation, displacement_max, is_linearizable};
use polytropo_queue::cell::{Cell, DoubleCell, SingleCell};
use polytropo_queue::model::{BytesParts, Parts};
use polytropo_queue::sync::{Relaxed, death};
use polytropo_queue::{Deadline, Error};
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::{Arc, Mutex};
use shuttle::{Config, Runner, thread};

fn explore(model: impl Fn() + Send + Sync + Clone + 'static) {
    let rounds = std::env::var("SHUTTLE_ROUNDS").map_or(1000, |rounds| rounds.parse().unwrap());
    Runner::new(RandomScheduler::new_from_seed(1, rounds), Config::new()).run(model.clone());
    Runner::new(PctScheduler::new_from_seed(2, 4, rounds), Config::new()).run(model);
}

/// With one lane all on one CPU: nobody spins then, all sleep at once.
fn cpu_of(thread: usize, lanes: usize) -> u32 {
    if lanes == 1 { 0 } else { thread as u32 }
}

/// Runs `count` threads and gathers what they return.
fn in_threads<R: Send + 'static>(count: usize, body: impl Fn(usize) -> R + Send + Sync + 'static) -> Vec<R> {
    let body = Arc::new(body);
    let threads: Vec<_> = (0..count)
        .map(|number| {
            let body = Arc::clone(&body);
            thread::spawn(move || body(number))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// Waiting producers and consumers on a tiny queue, closed at the end: everything arrives once, everyone comes home.
fn all_arrives<C: Cell<Item = u64> + 'static>(lanes: usize, shift: u32) {
    explore(move || {
        let queue = Arc::new(Parts::<C>::new(lanes, shift, 2));
        let consumers = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                in_threads(3, move |number| {
                    let mut handle = queue.handle_on_cpu(cpu_of(number, lanes));
                    let mut taken = Vec::new();
                    loop {
                        match handle.dequeue(Deadline::Never) {
                            Ok(item) => taken.push(item),
                            Err(error) => {
                                assert_eq!(error, Error::Closed);
                                return taken;
                            }
                        }
                    }
                })
            })
        };
        let put = {
            let queue = Arc::clone(&queue);
            in_threads(3, move |number| {
                let mut handle = queue.handle_on_cpu(cpu_of(number, lanes));
                (0..5).for_each(|n| handle.enqueue(number as u64 * 10 + n, Deadline::Never).unwrap());
            })
        };
        assert_eq!(put.len(), 3);
        queue.view().close();
        let taken = consumers.join().unwrap();
        for mine in &taken {
            for producer in 0..3 {
                let order: Vec<u64> = mine.iter().copied().filter(|item| item / 10 == producer).collect();
                assert!(lanes > 1 || order.is_sorted(), "{mine:?}");
            }
        }
        let mut all: Vec<u64> = taken.into_iter().flatten().collect();
        all.sort_unstable();
        assert_eq!(all, (0..3).flat_map(|p| (0..5).map(move |n| p * 10 + n)).collect::<Vec<u64>>());
    });
}

#[test]
fn all_arrives_one_lane_single() {
    all_arrives::<SingleCell>(1, 1);
}

#[test]
fn all_arrives_one_lane_double() {
    all_arrives::<DoubleCell>(1, 2);
}

#[test]
fn all_arrives_two_lanes() {
    all_arrives::<SingleCell>(2, 1);
}

/// Nobody closes, so that a producer or consumer that sleeps beside room or items sleeps for ever.
fn nobody_sleeps_on<C: Cell<Item = u64> + 'static>(lanes: usize, shift: u32) {
    explore(move || {
        let queue = Arc::new(Parts::<C>::new(lanes, shift, 2));
        let sums = in_threads(6, move |number| {
            let mut handle = queue.handle_on_cpu(cpu_of(number, lanes));
            if number < 3 {
                (0..4).for_each(|n| handle.enqueue(number as u64 * 10 + n, Deadline::Never).unwrap());
                return 0;
            }
            (0..4).map(|_| handle.dequeue(Deadline::Never).unwrap()).sum::<u64>()
        });
        assert_eq!(sums.iter().sum::<u64>(), 3 * (1 + 2 + 3) + 4 * (10 + 20));
    });
}

#[test]
fn nobody_sleeps_on_one_lane() {
    nobody_sleeps_on::<SingleCell>(1, 1);
}

#[test]
fn nobody_sleeps_on_two_lanes() {
    nobody_sleeps_on::<DoubleCell>(2, 1);
}

/// Four participants that only try, on two slots, close in the middle: nobody turns for ever, nothing is lost.
#[test]
fn tries_and_close_agree() {
    explore(|| {
        let queue = Arc::new(Parts::<SingleCell>::new(1, 1, 2));
        let outcomes = in_threads(4, {
            let queue = Arc::clone(&queue);
            move |number| {
                let mut handle = queue.handle_on_cpu(0);
                let (mut put, mut taken) = (Vec::new(), Vec::new());
                for n in 0..6 {
                    if number == 3 && n == 3 {
                        handle.close();
                    }
                    let item = number as u64 * 10 + n;
                    match handle.try_enqueue(item) {
                        Ok(()) => put.push(item),
                        Err(error) => assert!(matches!(error, Error::Full | Error::Closed), "{error}"),
                    }
                    match handle.try_dequeue() {
                        Ok(item) => taken.push(item),
                        Err(error) => assert!(matches!(error, Error::Empty | Error::Closed), "{error}"),
                    }
                }
                (put, taken)
            }
        });
        let (mut put, mut taken): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
        for (some_put, some_taken) in outcomes {
            put.extend(some_put);
            taken.extend(some_taken);
        }
        let mut handle = queue.handle_on_cpu(0);
        let end = loop {
            match handle.try_dequeue() {
                Ok(item) => taken.push(item),
                Err(error) => break error,
            }
        };
        assert_eq!(end, Error::Closed);
        put.sort_unstable();
        taken.sort_unstable();
        assert_eq!(put, taken);
    });
}

fn histories<C: Cell<Item = u64> + 'static>(lanes: usize, shift: u32, bound: Option<usize>) {
    explore(move || {
        let (queue, clock) = (Arc::new(Parts::<C>::new(lanes, shift, 1)), Arc::new(Clock::default()));
        let history: Vec<Operation> = in_threads(4, move |number| {
            let mut handle = queue.handle_on_cpu(number as u32);
            (0..6)
                .map(|n| {
                    if thread_rng().gen_range(0..7) < 4 {
                        let item = number as u64 * 100 + n;
                        clock.record(Call::Enqueue(item), || handle.try_enqueue(item).map(|()| 0))
                    } else {
                        clock.record(Call::Dequeue, || handle.try_dequeue())
                    }
                })
                .collect::<Vec<_>>()
        })
        .into_iter()
        .flatten()
        .collect();
        match bound {
            None => assert!(is_linearizable(&history, lanes << shift), "{history:#?}"),
            Some(bound) => assert!(displacement_max(&history) <= bound, "{history:#?}"),
        }
    });
}

#[test]
fn histories_are_linearizable_single() {
    histories::<SingleCell>(1, 1, None);
}

#[test]
fn histories_are_linearizable_double() {
    histories::<DoubleCell>(1, 2, None);
}

/// As `README.md` promises: (lanes - 1) x (2 x skew + 1), and one for each operation under way.
#[test]
fn histories_stay_within_the_bound() {
    histories::<SingleCell>(2, 2, Some(3 + 4));
}

/// Putters and getters of bytes that die anywhere, and a reaper: what was put whole is delivered once, or lost with a dead getter.
#[test]
fn deaths_lose_what_the_dead_held_and_nothing_else() {
    const VICTIM: u64 = 600;
    explore(|| {
        let parts = Arc::new(BytesParts::new(2, 8));
        let put = Arc::new(Mutex::new(Vec::new()));
        let taken = Arc::new(Mutex::new(Vec::new()));
        let deaths = in_threads(4, {
            let (parts, put, taken) = (Arc::clone(&parts), Arc::clone(&put), Arc::clone(&taken));
            move |number| {
                let (view, mut local) = parts.join(VICTIM + number as u64);
                let steps = thread_rng().gen_range(0..60);
                let mut near = 0;
                let body = || {
                    for n in 0..3 {
                        let item = number as u32 * 10 + n + 1;
                        let fill = |index| parts.content(index).store(item, Relaxed);
                        if view.try_put(&mut local, &mut near, fill).is_ok() {
                            put.lock().unwrap().push(item);
                        }
                        let read = |index| parts.content(index).load(Relaxed);
                        if let Ok(item) = view.try_get(&mut local, &mut near, read) {
                            taken.lock().unwrap().push(item);
                        }
                    }
                };
                death::after(steps, body).is_none()
            }
        });
        let dead = deaths.into_iter().filter(|died| *died).count();
        let (mut view, mut local) = parts.join(1);
        let reaped = view.reap(&mut local, |identity| identity >= VICTIM);
        assert!(reaped.participants == 4 && view.join(|_| false).is_ok());
        let mut taken = std::mem::take(&mut *taken.lock().unwrap());
        while let Ok(item) = view.try_get(&mut local, &mut 0, |index| parts.content(index).load(Relaxed)) {
            taken.push(item);
        }
        let put = std::mem::take(&mut *put.lock().unwrap());
        let all = taken.len();
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), all, "an item came twice");
        let lost = put.iter().filter(|item| !taken.contains(item)).count();
        assert!(lost <= dead, "{lost} items lost by {dead} deaths");
        // All of the capacity is there again.
        for item in 100..104 {
            let fill = |index| parts.content(index).store(item, Relaxed);
            assert_eq!(view.try_put(&mut local, &mut 0, fill), Ok(()));
        }
        assert_eq!(view.try_put(&mut local, &mut 0, |_| {}), Err(Error::Full));
    });
}
