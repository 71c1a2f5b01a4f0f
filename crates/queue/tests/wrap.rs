//! Queues whose tickets begin where numbers become too long for their place: written into memory as `LAYOUT.md` says.
#![cfg(not(modeled))]

use polytropo_queue::{Config, Error, Heap, Memory, Rcqd, Rcqs};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const SLOTS: u64 = 8;

/// Lets every lane begin at `ticket`, a multiple of its slots.
fn begin_at(memory: &impl Memory, config: &Config, double: bool, ticket: u64) {
    assert_eq!(ticket % SLOTS, 0);
    let word = |offset: usize| {
        assert!(offset + 8 <= memory.size());
        // SAFETY: within the memory, aligned, and atomics may be made of any bytes.
        unsafe { memory.base().add(offset).cast::<AtomicU64>().as_ref() }
    };
    let (lanes, line) = (config.lanes, if config.packed { if double { 16 } else { 8 } } else { 64 });
    for lane in 0..lanes {
        word(384 + 256 * lane).store(ticket, Relaxed);
        word(384 + 256 * lane + 128).store(ticket, Relaxed);
    }
    for slot in 0..lanes * SLOTS as usize {
        let low = 384 + 256 * lanes + line * slot;
        word(if double { low + 8 } else { low }).store(ticket / SLOTS, Relaxed);
    }
}

/// Fills and empties the queue again and again, beside a plain queue, with old and new participants.
macro_rules! passes {
    ($queue:ty, $double:expr, $ticket:expr, $lanes:expr, $packed:expr) => {{
        let config =
            Config { lanes: $lanes, packed: $packed, skew: 4, ..Config::strict(SLOTS as usize * $lanes) };
        let memory = Heap::new(<$queue>::size_bytes(&config).unwrap()).unwrap();
        let queue = <$queue>::create(memory, &config).unwrap();
        begin_at(queue.memory(), &config, $double, $ticket);
        let (mut handle, mut model, mut next) = (queue.handle(), VecDeque::new(), 0u64);
        for turn in 0..60usize {
            if turn % 20 == 0 {
                handle = queue.handle();
            }
            let room = config.capacity - model.len();
            for _ in 0..if turn % 7 == 0 { room } else { room.min(turn % 5) } {
                next += 1;
                assert_eq!(handle.try_enqueue(next), Ok(()), "at {:#x}", $ticket);
                model.push_back(next);
            }
            assert_eq!(queue.len(), model.len());
            if model.len() == config.capacity {
                assert_eq!(handle.try_enqueue(1), Err(Error::Full));
            }
            for _ in 0..if turn % 11 == 0 { model.len() } else { model.len().min(turn % 4) } {
                let item = handle.try_dequeue().unwrap();
                let place =
                    model.iter().position(|one| *one == item).expect("once, and only what was put in");
                assert!($lanes > 1 || place == 0);
                model.remove(place);
            }
            if model.is_empty() {
                assert_eq!(handle.try_dequeue(), Err(Error::Empty));
            }
        }
        queue.close();
        model.iter().for_each(|_| assert!(handle.try_dequeue().is_ok()));
        assert_eq!(handle.try_dequeue(), Err(Error::Closed));
    }};
}

#[test]
fn tickets_pass_every_boundary() {
    // The 23 bits of an item's round, 32 bits of a ticket and of a round, 40 bits.
    for boundary in [SLOTS << 23, 1 << 32, SLOTS << 32, 1 << 40, SLOTS << 46] {
        for lanes in [1, 2] {
            for packed in [false, true] {
                passes!(Rcqs<Heap>, false, boundary - 2 * SLOTS, lanes, packed);
                passes!(Rcqd<Heap>, true, boundary - 2 * SLOTS, lanes, packed);
            }
        }
    }
}

/// At 2^60, centuries away, operations fail instead of going round.
#[test]
fn tickets_end_in_an_error() {
    let config = Config { packed: false, ..Config::strict(SLOTS as usize) };
    let queue =
        Rcqs::create(Heap::new(Rcqs::<Heap>::size_bytes(&config).unwrap()).unwrap(), &config).unwrap();
    begin_at(queue.memory(), &config, false, (1 << 60) - SLOTS);
    let mut handle = queue.handle();
    let put = (0..2 * SLOTS).map(|item| handle.try_enqueue(item));
    let (good, bad): (Vec<_>, Vec<_>) = put.partition(Result::is_ok);
    assert_eq!(good.len() as u64, SLOTS);
    assert!(bad.iter().all(|error| *error == Err(Error::Full)));
    assert!((0..SLOTS).all(|item| handle.try_dequeue() == Ok(item)));
    assert_eq!(handle.try_enqueue(1), Ok(()), "the ticket 2^60 itself");
    assert_eq!(handle.try_dequeue(), Ok(1));
    assert_eq!(handle.try_enqueue(2), Err(Error::Corrupt));
    assert_eq!(handle.try_dequeue(), Err(Error::Corrupt));
}
