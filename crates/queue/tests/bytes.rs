//! RCQB inside a process, and what a peer that scribbles over shared memory can and cannot do.
#![cfg(not(modeled))]

use polytropo_queue::{Config, Deadline, Error, Heap, Rcqb};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::time::Duration;

fn config(capacity: usize, item_size: usize) -> Config {
    Config { item_size, ..Config::strict(capacity) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 1 } else { 128 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_model(
        steps in prop::collection::vec(prop::option::weighted(0.55, prop::collection::vec(any::<u8>(), 0..90)), 0..300),
    ) {
        let queue = Rcqb::new(&config(8, 80)).unwrap();
        let (mut handle, mut model, mut out) = (queue.handle(), VecDeque::new(), [0; 80]);
        for step in steps {
            match step {
                Some(item) => {
                    let expected = match (item.len(), model.len()) {
                        (81.., _) => Err(Error::TooLarge),
                        (_, 8) => Err(Error::Full),
                        _ => Ok(()),
                    };
                    prop_assert_eq!(handle.try_put(&item), expected);
                    if expected.is_ok() {
                        model.push_back(item);
                    }
                }
                None => {
                    let taken = handle.try_get(&mut out).map(|length| out[..length].to_vec());
                    prop_assert_eq!(taken, model.pop_front().ok_or(Error::Empty));
                }
            }
            prop_assert_eq!(queue.len(), model.len());
        }
    }
}

#[test]
fn threads_get_whole_items_once() {
    let items = if cfg!(miri) { 6u64 } else { 20_000 };
    for lanes in [1, 2] {
        let queue = Rcqb::new(&Config { lanes, ..config(16, 200) }).unwrap();
        let mut taken: Vec<u64> = std::thread::scope(|scope| {
            let getters: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let (mut handle, mut taken, mut out) = (queue.handle(), Vec::new(), [0; 200]);
                        while let Ok(length) = handle.get(&mut out, Deadline::Never) {
                            let number = u64::from_le_bytes(out[..8].try_into().unwrap());
                            assert_eq!(length, 8 + number as usize % 190);
                            assert!(out[8..length].iter().all(|byte| *byte == number as u8), "a torn item");
                            taken.push(number);
                        }
                        taken
                    })
                })
                .collect();
            std::thread::scope(|inner| {
                for putter in 0..2 {
                    let queue = &queue;
                    inner.spawn(move || {
                        let mut handle = queue.handle();
                        for number in (0..items).map(|n| n * 2 + putter) {
                            let mut item = number.to_le_bytes().to_vec();
                            item.resize(8 + number as usize % 190, number as u8);
                            handle.put(&item, Deadline::Never).unwrap();
                        }
                    });
                }
            });
            queue.close();
            getters.into_iter().flat_map(|getter| getter.join().unwrap()).collect()
        });
        taken.sort_unstable();
        assert!(taken.into_iter().eq(0..2 * items));
    }
}

#[test]
fn deadlines_and_close() {
    let queue = Rcqb::new(&config(2, 8)).unwrap();
    let (mut handle, mut out) = (queue.handle(), [0; 8]);
    let soon = || Deadline::after(Duration::from_millis(5));
    assert_eq!(handle.get(&mut out, soon()), Err(Error::TimedOut));
    handle.put(b"one", soon()).unwrap();
    handle.put(b"", soon()).unwrap();
    assert_eq!(handle.put(b"three", soon()), Err(Error::TimedOut));
    assert_eq!(handle.try_get(&mut out[..7]), Err(Error::TooLarge));
    queue.close();
    assert_eq!(handle.put(b"four", soon()), Err(Error::Closed));
    assert_eq!(handle.get(&mut out, soon()), Ok(3));
    assert_eq!(&out[..3], b"one");
    assert_eq!(handle.get(&mut out, soon()), Ok(0));
    assert_eq!(handle.get(&mut out, soon()), Err(Error::Closed));
}

/// Whatever lies in the memory: attaching refuses or works, and every operation comes to an end.
#[cfg(not(miri))]
mod shared {
    use super::*;
    use polytropo_queue::shm::Mapping;
    use polytropo_queue::{Memory, Rcqd, Rcqs, identity};
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    #[test]
    fn places_of_participants_come_back() {
        let config = Config { participants: 2, ..config(4, 8) };
        let memory = Mapping::anonymous(Rcqb::<Mapping>::size_bytes(&config).unwrap()).unwrap();
        let again = || Mapping::of(memory.descriptor().try_clone_to_owned().unwrap()).unwrap();
        let us = identity::of_this_process().unwrap();
        let first = Rcqb::create(again(), &config, us).unwrap();
        for _ in 0..5 {
            let second = Rcqb::attach(again(), us).unwrap();
            assert_eq!(Rcqb::attach(again(), us).err(), Some(Error::TooManyParticipants));
            drop(second);
        }
        drop(first);
    }

    fn words(memory: &Mapping) -> &[AtomicU64] {
        // SAFETY: the mapping is page aligned and that long; atomics may change under us.
        unsafe { std::slice::from_raw_parts(memory.base().as_ptr().cast(), memory.size() / 8) }
    }

    fn share(memory: &Mapping) -> Mapping {
        Mapping::of(memory.descriptor().as_fd().try_clone_to_owned().unwrap()).unwrap()
    }

    struct Random(u64);
    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
    }

    fn value(random: &mut Random, old: u64) -> u64 {
        match random.next() % 6 {
            0 => 0,
            1 => u64::MAX,
            2 => old ^ 1 << (random.next() % 64),
            3 => old.wrapping_add(1),
            4 => random.next() % 64,
            _ => random.next(),
        }
    }

    #[test]
    fn headers_are_checked() {
        let config = config(8, 64);
        let size = Rcqb::<Mapping>::size_bytes(&config).unwrap();
        let us = identity::of_this_process().unwrap();
        let mut random = Random(7);
        let mut refused = 0;
        for _ in 0..2000 {
            let memory = Mapping::anonymous(size).unwrap();
            drop(Rcqb::create(share(&memory), &config, us).unwrap());
            let word = &words(&memory)[random.next() as usize % 6];
            word.store(value(&mut random, word.load(Ordering::Relaxed)), Ordering::Relaxed);
            match Rcqb::attach(share(&memory), us) {
                Err(_) => refused += 1,
                Ok(queue) => {
                    let _ = queue.handle().try_put(b"x");
                }
            }
        }
        assert!(refused > 1000, "{refused}");
    }

    #[test]
    fn scribbles_end_in_errors_not_in_crashes() {
        let running = AtomicUsize::new(1);
        let config = Config { lanes: 2, ..config(8, 64) };
        let us = identity::of_this_process().unwrap();
        let memory = Mapping::anonymous(Rcqb::<Mapping>::size_bytes(&config).unwrap()).unwrap();
        let queue = Rcqb::create(share(&memory), &config, us).unwrap();
        let word_memory = Mapping::anonymous(Rcqs::<Mapping>::size_bytes(&config).unwrap()).unwrap();
        let single = Rcqs::create(share(&word_memory), &config).unwrap();
        let double_memory = Mapping::anonymous(Rcqd::<Mapping>::size_bytes(&config).unwrap()).unwrap();
        let double = Rcqd::create(share(&double_memory), &config).unwrap();
        let mut errors = [0u32; 3];
        std::thread::scope(|scope| {
            let scribbler = scope.spawn(|| {
                let mut random = Random(99);
                while running.load(Ordering::Relaxed) == 1 {
                    for memory in [&memory, &word_memory, &double_memory] {
                        let all = words(memory);
                        let word = &all[random.next() as usize % all.len()];
                        word.store(value(&mut random, word.load(Ordering::Relaxed)), Ordering::Relaxed);
                    }
                    std::thread::sleep(Duration::from_micros(random.next() % 50));
                }
            });
            let (mut bytes, mut single, mut double) = (queue.handle(), single.handle(), double.handle());
            let mut out = [0; 64];
            let until = std::time::Instant::now() + Duration::from_millis(1500);
            while std::time::Instant::now() < until {
                let soon = Deadline::after(Duration::from_micros(200));
                errors[0] += u32::from(bytes.put(&[1; 64], soon).is_err())
                    + u32::from(bytes.get(&mut out, soon).is_err());
                errors[1] +=
                    u32::from(single.enqueue(3, soon).is_err()) + u32::from(single.dequeue(soon).is_err());
                errors[2] +=
                    u32::from(double.enqueue(3, soon).is_err()) + u32::from(double.dequeue(soon).is_err());
                queue.reap();
            }
            running.store(0, Ordering::Relaxed);
            scribbler.join().unwrap();
        });
        assert!(errors.iter().all(|count| *count > 0), "the scribbler did nothing: {errors:?}");
    }

    #[test]
    fn shared_memory_of_peers_cannot_shrink() {
        let memory = Mapping::anonymous(4096).unwrap();
        assert!(memory.is_sealed());
        assert!(rustix_ftruncate(&memory, 0).is_err());
    }

    fn rustix_ftruncate(memory: &Mapping, size: i64) -> Result<(), i32> {
        use std::os::fd::AsRawFd;
        // SAFETY: a system call on a descriptor that is open.
        let result = unsafe { libc::ftruncate(memory.descriptor().as_raw_fd(), size) };
        if result == 0 { Ok(()) } else { Err(result) }
    }

    #[test]
    fn other_kinds_of_memory_are_refused() {
        let config = config(8, 64);
        let memory = Mapping::anonymous(Rcqs::<Mapping>::size_bytes(&config).unwrap()).unwrap();
        drop(Rcqs::create(share(&memory), &config).unwrap());
        assert_eq!(Rcqd::attach(share(&memory)).err(), Some(Error::NotAQueue));
        assert!(Rcqs::attach(share(&memory)).is_ok());
        assert!(Rcqs::create(share(&memory), &config).is_err(), "a queue is there already");
        let _ = Rcqs::attach(Heap::new(64).unwrap()).err().unwrap();
    }
}
