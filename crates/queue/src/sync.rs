//! The one place from which the crate takes its atomics, so that a model checker can be swapped in: loom, which
//! explores every interleaving of a small case (`--cfg modeled --cfg loom`), or shuttle, which explores many of a large one
//! (`--cfg modeled --cfg shuttle`).
//!
//! Under both every atomic operation is also a *step*: a test may let a thread die before any given step of an
//! operation, as a process that is killed there would.

pub use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

#[cfg(loom)]
use loom as checker;
#[cfg(shuttle)]
use shuttle as checker;

#[cfg(not(modeled))]
pub use core::sync::atomic::{AtomicU32, AtomicU64};
#[cfg(not(modeled))]
pub use portable_atomic::AtomicU128;

#[cfg(modeled)]
pub use model::{AtomicU32, AtomicU64, AtomicU128, Park, death};

/// Orders a successful read-modify-write before the loads that follow it, whatever their addresses.
///
/// The waker's half ("publish, then look for sleepers") and the sleeper's half ("say that I sleep, then look again") are a
/// store-buffer race: without this a wake-up is lost. On x86-64 a locked instruction has already drained the store
/// buffer, so that only the compiler has to be held back.
#[inline(always)]
pub fn fence_after_update() {
    #[cfg(modeled)]
    checker::sync::atomic::fence(SeqCst);
    #[cfg(all(not(modeled), target_arch = "x86_64", not(miri)))]
    core::sync::atomic::compiler_fence(SeqCst);
    #[cfg(all(not(modeled), any(not(target_arch = "x86_64"), miri)))]
    core::sync::atomic::fence(SeqCst);
}

/// Whether this thread is one that a test has killed: what unwinding would clean up, a killed process leaves as it is.
#[inline(always)]
pub fn is_killed() -> bool {
    #[cfg(modeled)]
    return death::is_killed();
    #[cfg(not(modeled))]
    false
}

/// Tells the core that this is a loop that waits.
#[inline(always)]
pub fn spin_hint() {
    #[cfg(not(modeled))]
    core::hint::spin_loop();
    #[cfg(modeled)]
    checker::thread::yield_now();
}

#[cfg(modeled)]
mod model {
    extern crate std;
    use super::checker::sync::{Condvar, Mutex};
    use super::{SeqCst, checker};
    use core::cell::Cell;
    use core::sync::atomic::Ordering;

    pub mod death {
        use super::super::checker;
        use super::*;
        checker::thread_local! {
            static STEPS_LEFT: Cell<Option<usize>> = Cell::new(None);
        }
        /// What a dying thread unwinds with.
        pub struct Killed;

        pub fn step() {
            STEPS_LEFT.with(|left| match left.get() {
                None => {}
                Some(0) => std::panic::resume_unwind(std::boxed::Box::new(Killed)),
                Some(n) => left.set(Some(n - 1)),
            });
        }

        pub fn is_killed() -> bool {
            std::thread::panicking() && STEPS_LEFT.with(|left| left.get() == Some(0))
        }

        /// Runs `body` and kills it before its atomic operation number `steps`; tells whether it came to its end.
        pub fn after<R>(steps: usize, body: impl FnOnce() -> R) -> Option<R> {
            STEPS_LEFT.with(|left| left.set(Some(steps)));
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            STEPS_LEFT.with(|left| left.set(None));
            match outcome {
                Ok(value) => Some(value),
                Err(payload) if payload.is::<Killed>() => None,
                Err(payload) => std::panic::resume_unwind(payload),
            }
        }
    }

    macro_rules! atomic {
        ($name:ident, $int:ty) => {
            pub struct $name(checker::sync::atomic::$name);
            impl $name {
                pub fn new(value: $int) -> Self {
                    Self(checker::sync::atomic::$name::new(value))
                }
                pub fn load(&self, order: Ordering) -> $int {
                    death::step();
                    self.0.load(order)
                }
                pub fn store(&self, value: $int, order: Ordering) {
                    death::step();
                    self.0.store(value, order)
                }
                pub fn fetch_add(&self, value: $int, order: Ordering) -> $int {
                    death::step();
                    self.0.fetch_add(value, order)
                }
                pub fn fetch_or(&self, value: $int, order: Ordering) -> $int {
                    death::step();
                    self.0.fetch_or(value, order)
                }
                pub fn fetch_and(&self, value: $int, order: Ordering) -> $int {
                    death::step();
                    self.0.fetch_and(value, order)
                }
                pub fn compare_exchange(
                    &self,
                    current: $int,
                    new: $int,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$int, $int> {
                    death::step();
                    self.0.compare_exchange(current, new, success, failure)
                }
            }
        };
    }
    atomic!(AtomicU32, u32);
    atomic!(AtomicU64, u64);

    /// The checkers have no 128-bit atomics; a lock around the value is one.
    pub struct AtomicU128(Mutex<u128>);

    impl AtomicU128 {
        pub fn new(value: u128) -> Self {
            Self(Mutex::new(value))
        }
        pub fn is_lock_free() -> bool {
            true
        }
        pub fn load(&self, _: Ordering) -> u128 {
            death::step();
            *self.0.lock().unwrap()
        }
        pub fn compare_exchange(
            &self,
            current: u128,
            new: u128,
            _: Ordering,
            _: Ordering,
        ) -> Result<u128, u128> {
            death::step();
            let mut value = self.0.lock().unwrap();
            if *value == current {
                *value = new;
                return Ok(current);
            }
            Err(*value)
        }
    }

    /// A futex for the model: no time-outs, so that a lost wake-up is a deadlock, which the checkers find.
    pub struct Park {
        sleepers: Mutex<usize>,
        bell: Condvar,
    }

    impl Park {
        pub fn new() -> Self {
            Self { sleepers: Mutex::new(0), bell: Condvar::new() }
        }
        pub fn wait(&self, word: &AtomicU32, expected: u32) {
            let mut sleepers = self.sleepers.lock().unwrap();
            if word.load(SeqCst) != expected {
                return;
            }
            *sleepers += 1;
            drop(self.bell.wait(sleepers).unwrap());
        }
        pub fn wake(&self, count: u32) {
            let mut sleepers = self.sleepers.lock().unwrap();
            let woken = (*sleepers).min(count as usize);
            *sleepers -= woken;
            for _ in 0..woken {
                self.bell.notify_one();
            }
        }
    }
}
