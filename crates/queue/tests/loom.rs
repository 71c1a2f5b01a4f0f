//! Every interleaving of small cases. Run with `RUSTFLAGS="--cfg modeled --cfg loom"`, as `make loom` does; otherwise this file is empty.
#![cfg(loom)]

use loom::sync::Arc;
use loom::thread;
use polytropo_queue::cell::{Cell, DoubleCell, SingleCell};
use polytropo_queue::model::Parts;
use polytropo_queue::sync::death;
use polytropo_queue::{Deadline, Error};

fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(model);
}

fn two_producers_keep_their_order<C: Cell<Item = u64> + 'static>(shift: u32) {
    explore(3, move || {
        let queue = Arc::new(Parts::<C>::new(1, shift, 4));
        let producers: Vec<_> = [10, 20]
            .map(|base| {
                let queue = Arc::clone(&queue);
                thread::spawn(move || {
                    let mut handle = queue.handle_on_cpu(0);
                    (0..2).take_while(|n| handle.try_enqueue(base + n).is_ok()).count() as u64
                })
            })
            .into_iter()
            .collect();
        let mut handle = queue.handle_on_cpu(0);
        let mut taken: Vec<u64> = (0..2).filter_map(|_| handle.try_dequeue().ok()).collect();
        let counts: Vec<u64> = producers.into_iter().map(|t| t.join().unwrap()).collect();
        taken.extend(std::iter::from_fn(|| handle.try_dequeue().ok()));
        for (base, count) in [10, 20].into_iter().zip(counts) {
            let mine: Vec<u64> = taken.iter().copied().filter(|item| item / 10 == base / 10).collect();
            assert_eq!(mine, (base..base + count).collect::<Vec<_>>());
        }
    });
}

#[test]
fn single_two_producers_keep_their_order() {
    [1, 3].into_iter().for_each(two_producers_keep_their_order::<SingleCell>);
}

#[test]
fn double_two_producers_keep_their_order() {
    [1, 3].into_iter().for_each(two_producers_keep_their_order::<DoubleCell>);
}

#[test]
fn two_consumers_share_without_doubling() {
    explore(3, || {
        let queue = Arc::new(Parts::<SingleCell>::new(1, 1, 4));
        let mut handle = queue.handle_on_cpu(0);
        handle.try_enqueue(1).unwrap();
        let consumer = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                let mut handle = queue.handle_on_cpu(0);
                [handle.try_dequeue().ok(), handle.try_dequeue().ok()]
            })
        };
        handle.try_enqueue(2).unwrap();
        let mine = handle.try_dequeue().ok();
        let theirs = consumer.join().unwrap();
        let rest = std::iter::from_fn(|| handle.try_dequeue().ok());
        let mut all: Vec<u64> = theirs.into_iter().chain([mine]).flatten().chain(rest).collect();
        all.sort_unstable();
        assert_eq!(all, [1, 2]);
    });
}

/// A lost wake-up would be a deadlock here.
#[test]
fn sleepers_on_both_sides_are_woken() {
    explore(2, || {
        let queue = Arc::new(Parts::<SingleCell>::new(1, 1, 4));
        let producer = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                let mut handle = queue.handle_on_cpu(0);
                for item in 0..3 {
                    handle.enqueue(item, Deadline::Never).unwrap();
                }
            })
        };
        let mut handle = queue.handle_on_cpu(0);
        for item in 0..3 {
            assert_eq!(handle.dequeue(Deadline::Never), Ok(item));
        }
        producer.join().unwrap();
    });
}

#[test]
fn two_sleepers_get_one_item_each() {
    explore(2, || {
        let queue = Arc::new(Parts::<SingleCell>::new(1, 1, 4));
        let consumers: Vec<_> = (0..2)
            .map(|_| {
                let queue = Arc::clone(&queue);
                thread::spawn(move || queue.handle_on_cpu(0).dequeue(Deadline::Never).unwrap())
            })
            .collect();
        let mut handle = queue.handle_on_cpu(0);
        handle.enqueue(1, Deadline::Never).unwrap();
        handle.enqueue(2, Deadline::Never).unwrap();
        let sum: u64 = consumers.into_iter().map(|t| t.join().unwrap()).sum();
        assert_eq!(sum, 3);
    });
}

/// An enqueue that succeeded is seen before a dequeue says "closed", and sleepers learn of the end.
#[test]
fn nothing_is_left_behind_by_close() {
    explore(3, || {
        let queue = Arc::new(Parts::<SingleCell>::new(1, 1, 4));
        let producer = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || queue.handle_on_cpu(0).try_enqueue(7))
        };
        let closer = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || queue.view().close())
        };
        let mut handle = queue.handle_on_cpu(0);
        let first = handle.dequeue(Deadline::Never);
        if first.is_ok() {
            assert_eq!(handle.dequeue(Deadline::Never), Err(Error::Closed));
        }
        closer.join().unwrap();
        let enqueued = producer.join().unwrap();
        match enqueued {
            Ok(()) => assert_eq!(first, Ok(7)),
            Err(error) => assert_eq!((error, first), (Error::Closed, Err(Error::Closed))),
        }
    });
}

/// At every moment there is an item in one of the lanes, so a dequeue may not say "empty".
#[test]
fn empty_is_exact_over_lanes() {
    explore(3, || {
        let queue = Arc::new(Parts::<SingleCell>::new(2, 1, 4));
        queue.handle_on_cpu(0).try_enqueue(1).unwrap();
        let mover = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                queue.handle_on_cpu(1).try_enqueue(2).unwrap();
                queue.handle_on_cpu(0).try_dequeue().unwrap()
            })
        };
        let taken = queue.handle_on_cpu(1).try_dequeue().expect("the queue was never empty");
        let moved = mover.join().unwrap();
        assert_eq!(taken + moved, 3);
    });
}

/// At every moment one lane has room, so an enqueue may not say "full".
#[test]
fn full_is_exact_over_lanes() {
    explore(2, || {
        let queue = Arc::new(Parts::<SingleCell>::new(2, 1, 4));
        for item in 0..3 {
            queue.handle_on_cpu(0).try_enqueue(item).unwrap();
        }
        let mover = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                queue.handle_on_cpu(0).try_dequeue().unwrap();
                queue.handle_on_cpu(1).try_enqueue(4).unwrap();
            })
        };
        queue.handle_on_cpu(0).try_enqueue(5).expect("the queue was never full");
        mover.join().unwrap();
    });
}

/// The producer is killed before each of its steps in turn, while a consumer works.
#[test]
fn a_dead_enqueuer_holds_nobody_up() {
    for steps in 0..10 {
        explore(2, move || {
            let queue = Arc::new(Parts::<SingleCell>::new(1, 1, 4));
            let victim = {
                let queue = Arc::clone(&queue);
                thread::spawn(move || {
                    let mut handle = queue.handle_on_cpu(0);
                    death::after(steps, || handle.try_enqueue(1).unwrap()).is_some()
                })
            };
            let mut handle = queue.handle_on_cpu(0);
            handle.try_enqueue(2).unwrap();
            let mut taken: Vec<u64> = handle.try_dequeue().ok().into_iter().collect();
            let finished = victim.join().unwrap();
            // Four more operations at each slot: the dead one blocks none of them.
            for item in 3..7 {
                taken.extend(std::iter::from_fn(|| handle.try_dequeue().ok()));
                handle.try_enqueue(item).unwrap();
            }
            taken.extend(std::iter::from_fn(|| handle.try_dequeue().ok()));
            let ones = taken.iter().filter(|item| **item == 1).count();
            assert!(ones <= 1 && (ones == 1 || !finished));
            taken.retain(|item| *item != 1);
            assert_eq!(taken, [2, 3, 4, 5, 6]);
        });
    }
}

/// The same for a consumer: what it takes is gone at most once.
#[test]
fn a_dead_dequeuer_holds_nobody_up() {
    for steps in 0..10 {
        explore(2, move || {
            let queue = Arc::new(Parts::<SingleCell>::new(1, 1, 4));
            let mut handle = queue.handle_on_cpu(0);
            handle.try_enqueue(1).unwrap();
            handle.try_enqueue(2).unwrap();
            let victim = {
                let queue = Arc::clone(&queue);
                thread::spawn(move || {
                    let mut handle = queue.handle_on_cpu(0);
                    death::after(steps, || handle.try_dequeue().unwrap())
                })
            };
            let mut taken: Vec<u64> = handle.try_dequeue().ok().into_iter().collect();
            let theirs = victim.join().unwrap();
            for item in 3..7 {
                taken.extend(std::iter::from_fn(|| handle.try_dequeue().ok()));
                handle.try_enqueue(item).unwrap();
            }
            taken.extend(std::iter::from_fn(|| handle.try_dequeue().ok()));
            let lost = [1, 2].iter().filter(|item| !taken.contains(item) && theirs != Some(**item)).count();
            assert!(lost <= usize::from(theirs.is_none()));
            assert!(theirs.is_none_or(|item| !taken.contains(&item)));
            assert!(taken.is_sorted() && taken.ends_with(&[3, 4, 5, 6]));
        });
    }
}

mod pool {
    use super::*;
    use polytropo_queue::model::BytesParts;
    use polytropo_queue::pool::Reaped;
    use polytropo_queue::sync::Relaxed;

    fn put(parts: &BytesParts, identity: u64, item: u32) -> Result<(), Error> {
        let (view, mut local) = parts.join(identity);
        view.try_put(&mut local, &mut 0, &mut |index| parts.content(index).store(item, Relaxed))
    }

    fn get(parts: &BytesParts, identity: u64) -> Result<u32, Error> {
        let (view, mut local) = parts.join(identity);
        view.try_get(&mut local, &mut 0, &mut |index| parts.content(index).load(Relaxed))
    }

    const VICTIM: u64 = 666;

    fn reap(parts: &BytesParts) -> Reaped {
        let (view, mut local) = parts.join(999);
        let reaped = view.reap(&mut local, |identity| identity == VICTIM);
        view.pool.leave(view.participant, 999);
        reaped
    }

    /// Every buffer can be used, as often as one likes; what was in the queue is appended to `taken`.
    fn is_as_new(parts: &BytesParts, taken: &mut Vec<u32>) {
        let (view, mut local) = parts.join(1000);
        let content = |index| parts.content(index).load(Relaxed);
        for _ in 0..2 {
            while let Ok(item) = view.try_get(&mut local, &mut 0, &mut |index| content(index)) {
                taken.push(item);
            }
            for item in [100, 101] {
                let fill = &mut |index| parts.content(index).store(item, Relaxed);
                assert_eq!(view.try_put(&mut local, &mut 0, fill), Ok(()));
            }
            assert_eq!(view.try_put(&mut local, &mut 0, &mut |_| {}), Err(Error::Full));
        }
        taken.retain(|item| *item < 100);
    }

    #[test]
    fn what_a_dead_putter_left_is_delivered_once_or_never_was() {
        for steps in 0..22 {
            explore(2, move || {
                let parts = Arc::new(BytesParts::new(1, 4));
                let victim = {
                    let parts = Arc::clone(&parts);
                    thread::spawn(move || {
                        let (view, mut local) = parts.join(VICTIM);
                        let fill = &mut |index| parts.content(index).store(1, Relaxed);
                        death::after(steps, || view.try_put(&mut local, &mut 0, fill)).is_some()
                    })
                };
                let mut taken: Vec<u32> = Vec::new();
                put(&parts, 1, 2).unwrap();
                taken.extend(get(&parts, 2));
                let finished = victim.join().unwrap();
                let reaped = reap(&parts);
                assert_eq!((reaped.participants, reaped.lost_dequeues), (1, 0));
                is_as_new(&parts, &mut taken);
                let ones = taken.iter().filter(|item| **item == 1).count();
                assert!(ones == 1 || ones == 0 && !finished && reaped.lost_enqueues <= 1);
                assert_eq!(taken.iter().filter(|item| **item == 2).count(), 1);
            });
        }
    }

    #[test]
    fn what_a_dead_getter_held_is_lost_once_and_reported() {
        for steps in 0..22 {
            explore(2, move || {
                let parts = Arc::new(BytesParts::new(1, 4));
                {
                    let (view, mut local) = parts.join(1);
                    for item in [1, 2] {
                        let fill = &mut |index| parts.content(index).store(item, Relaxed);
                        view.try_put(&mut local, &mut 0, fill).unwrap();
                    }
                }
                let victim = {
                    let parts = Arc::clone(&parts);
                    thread::spawn(move || {
                        let (view, mut local) = parts.join(VICTIM);
                        let read = &mut |index| parts.content(index).load(Relaxed);
                        death::after(steps, || view.try_get(&mut local, &mut 0, read).unwrap())
                    })
                };
                let mut taken: Vec<u32> = get(&parts, 2).ok().into_iter().collect();
                let theirs = victim.join().unwrap();
                let reaped = reap(&parts);
                assert_eq!((reaped.participants, reaped.lost_enqueues), (1, 0));
                is_as_new(&parts, &mut taken);
                taken.extend(theirs);
                taken.sort_unstable();
                let all = taken.len() as u64;
                taken.dedup();
                assert_eq!(taken.len() as u64, all, "an item came twice");
                // A getter that died after it gave the buffer back had its item.
                assert!(all == 2 || all == 1 && theirs.is_none());
                assert!(reaped.lost_dequeues <= 2 - all);
            });
        }
    }

    /// A reaper at work does not disturb the living.
    #[test]
    fn the_reaper_and_a_getter_agree() {
        for steps in 0..22 {
            explore(2, move || {
                let parts = Arc::new(BytesParts::new(1, 4));
                let finished = {
                    let (view, mut local) = parts.join(VICTIM);
                    let fill = &mut |index| parts.content(index).store(1, Relaxed);
                    death::after(steps, || view.try_put(&mut local, &mut 0, fill)).is_some()
                };
                put(&parts, 1, 2).unwrap();
                let getter = {
                    let parts = Arc::clone(&parts);
                    thread::spawn(move || get(&parts, 2))
                };
                let reaped = reap(&parts);
                let mut taken = vec![getter.join().unwrap().expect("there was an item")];
                is_as_new(&parts, &mut taken);
                assert_eq!(reaped.participants, 1);
                let ones = taken.iter().filter(|item| **item == 1).count();
                assert!(ones == 1 || ones == 0 && !finished);
                assert_eq!(taken.iter().filter(|item| **item == 2).count(), 1);
            });
        }
    }
}
