//! Waiting: a bounded spin if the peer runs on another CPU, then a futex.
//!
//! An event is one word: bit 0 says that someone may sleep, the rest counts wake-ups. A sleeper sets the bit, looks once more at
//! the queue, and sleeps while the word is unchanged. A waker looks at the bit after it has published its change; if it is set,
//! it clears it, counts up, and wakes as many as it made work for. Others may still sleep while the bit is clear: so who comes
//! back from a sleep sets the bit again before it looks, and if there is more to do than it took, wakes the next one. Nobody
//! ever takes back a registration, so participants that die in their sleep leave nothing behind but one vain wake-up; and a burst
//! costs one system call, not one an item.
//!
//! A sleeper that is woken and killed before it acts has swallowed a wake-up. Therefore no sleep is longer than
//! [`NAP_NS`]: then the sleeper looks for itself.

use crate::lanes::Lanes;
use crate::sync::{AcqRel, AtomicU32, AtomicU64, Relaxed, SeqCst, fence_after_update, spin_hint};
use crate::{cell::Cell, sys};

/// The longest sleep without a look at the queue.
pub const NAP_NS: u64 = 100_000_000;
/// Bounds of the spin, in turns of the spin loop (tens of nanoseconds each).
const SPIN_MIN: u32 = 4;
const SPIN_FIRST: u32 = 256;
const SPIN_MAX: u32 = 512;

/// When a waiting operation gives up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Deadline {
    Never,
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    At(u64),
}

impl Deadline {
    pub fn after(timeout: core::time::Duration) -> Self {
        let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        Self::At(sys::now_ns().saturating_add(timeout_ns))
    }

    /// The earlier of two.
    pub fn min(self, other: Self) -> Self {
        match (self, other) {
            (Self::At(one), Self::At(two)) => Self::At(one.min(two)),
            (Self::Never, one) | (one, Self::Never) => one,
        }
    }

    pub fn has_passed(self) -> bool {
        match self {
            Self::Never => false,
            Self::At(time_ns) => sys::now_ns() >= time_ns,
        }
    }

    #[cfg(not(modeled))]
    fn next_nap_end_ns(self) -> u64 {
        let nap = sys::now_ns().saturating_add(NAP_NS);
        match self {
            Self::Never => nap,
            Self::At(time_ns) => nap.min(time_ns),
        }
    }
}

const SLEEPERS: u32 = 1;
const ONE_WAKE: u32 = 2;

#[repr(C)]
#[cfg_attr(not(modeled), derive(Default))]
pub struct Event {
    word: AtomicU32,
    #[cfg(modeled)]
    park: crate::sync::Park,
}

impl Event {
    #[cfg(modeled)]
    pub fn new() -> Self {
        Self { word: AtomicU32::new(0), park: crate::sync::Park::new() }
    }

    /// Wakes up to `count` sleepers. To be called after the change that they wait for was published by a
    /// read-modify-write of the caller.
    #[inline]
    pub fn notify(&self, count: usize, statistics: &Statistics) {
        fence_after_update();
        if self.word.load(Relaxed) & SLEEPERS != 0 {
            self.wake(u32::try_from(count).unwrap_or(u32::MAX), statistics);
        }
    }

    #[cold]
    fn wake(&self, count: u32, statistics: &Statistics) {
        let mut word = self.word.load(Relaxed);
        loop {
            if word & SLEEPERS == 0 {
                // Another has just cleared it, after our change; whom it wakes sees our change too.
                return;
            }
            let cleared = word.wrapping_add(ONE_WAKE) & !SLEEPERS;
            match self.word.compare_exchange(word, cleared, AcqRel, Relaxed) {
                Ok(_) => break,
                Err(now) => word = now,
            }
        }
        self.futex_wake(count);
        statistics.wakes.fetch_add(1, Relaxed);
    }

    pub fn wake_all(&self) {
        self.word.fetch_add(ONE_WAKE, AcqRel);
        self.futex_wake(u32::MAX);
    }

    /// Says that the caller is about to sleep. It must look at the queue once more, and then sleep on what this returned.
    pub fn prepare(&self) -> u32 {
        let seen = self.word.fetch_or(SLEEPERS, SeqCst) | SLEEPERS;
        fence_after_update();
        seen
    }

    /// Tells whether the nap came to its end by itself.
    pub fn sleep(&self, prepared: u32, deadline: Deadline, statistics: &Statistics) -> bool {
        statistics.sleeps.fetch_add(1, Relaxed);
        #[cfg(not(modeled))]
        return sys::futex_wait(&self.word, prepared, deadline.next_nap_end_ns());
        #[cfg(modeled)]
        {
            let _ = deadline;
            self.park.wait(&self.word, prepared);
            false
        }
    }

    fn futex_wake(&self, count: u32) {
        #[cfg(not(modeled))]
        sys::futex_wake(&self.word, count);
        #[cfg(modeled)]
        self.park.wake(count);
    }
}

/// What all participants wait for, on a line that hardly ever changes while nobody waits.
#[repr(C, align(128))]
#[cfg_attr(not(modeled), derive(Default))]
pub struct Events {
    pub closed: AtomicU32,
    /// Dequeues wait here.
    pub items: Event,
    /// Enqueues wait here.
    pub spaces: Event,
}

/// Counters off the fast path.
#[repr(C, align(128))]
#[cfg_attr(not(modeled), derive(Default))]
pub struct Statistics {
    pub sleeps: AtomicU64,
    pub wakes: AtomicU64,
    pub spins_in_vain: AtomicU64,
    /// Items whose enqueue died before it was done: they were never in the queue.
    pub lost_enqueues: AtomicU64,
    /// Items that a participant had taken and not finished when it died.
    pub lost_dequeues: AtomicU64,
    /// Items that a dead participant had finished and not published: they were delivered.
    pub rescued: AtomicU64,
}

/// How long one participant spins: longer after success, shorter after failure.
#[derive(Clone, Copy)]
pub struct Spin {
    budget: u32,
    skipped: u32,
}

impl Default for Spin {
    fn default() -> Self {
        Self { budget: SPIN_FIRST, skipped: 0 }
    }
}

impl Spin {
    /// Spins until `ready`, at most for the budget; false if it did not come.
    pub fn run(&mut self, statistics: &Statistics, mut ready: impl FnMut() -> bool) -> bool {
        if self.budget == SPIN_MIN && self.skipped < 32 {
            self.skipped += 1;
            return ready();
        }
        self.skipped = 0;
        for _ in 0..self.budget {
            if ready() {
                self.budget = (self.budget * 2).min(SPIN_MAX);
                return true;
            }
            spin_hint();
        }
        self.budget = (self.budget / 2).max(SPIN_MIN);
        statistics.spins_in_vain.fetch_add(1, Relaxed);
        false
    }
}

/// Whether an enqueuer (a dequeuer) was last seen on another CPU than `cpu`: only then can spinning help.
pub fn peer_elsewhere<C: Cell>(lanes: &Lanes<'_, C>, cpu: u32, of_enqueuers: bool) -> bool {
    lanes.controls.iter().any(|control| {
        let index = if of_enqueuers { &control.tail } else { &control.head };
        let peer = index.cpu.load(Relaxed);
        peer != 0 && peer != cpu
    })
}
