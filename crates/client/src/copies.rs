//! How this side copies: by the plan that the service put into the channel. Everything copied is counted there.

use core::cell::UnsafeCell;
use core::mem::ManuallyDrop;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64};

use polytropo_copy::engine::{Engine, Function, WORDS};
use polytropo_copy::features::Features;
use polytropo_copy::plan::{CLASSES, Context, SITUATIONS, class_of};
use polytropo_copy::variant::Variant;
use polytropo_wire::channel::Header;
use polytropo_wire::copies::{self, PlanWords};

use crate::channel::Channel;

pub use polytropo_copy::plan::Situation;

/// Code that is built without vector registers stands in the place of system calls, which leave them as they are.
const CONTEXT: Context = if cfg!(all(target_arch = "x86_64", not(target_feature = "sse2"))) {
    Context::Keep
} else {
    Context::Plain
};

const _: () = assert!(SITUATIONS.len() == copies::SITUATIONS && CLASSES == copies::CLASSES);
const _: () = assert!(WORDS == copies::SITUATIONS * copies::CLASSES);

/// Making the plan's code takes some 40 us, so it is made when so many bytes were copied: most programs end before.
const WORTHWHILE_BYTES: u64 = 16 << 20;

const WAITING: u32 = 0;
const BEING_MADE: u32 = 1;
const READY: u32 = 2;

/// What copies: memcpy(3) until the plan is worth its code.
pub struct Copies {
    state: AtomicU32,
    copied_bytes: AtomicU64,
    /// Written once, by who set `BEING_MADE`, before `READY`.
    engine: UnsafeCell<ManuallyDrop<Engine>>,
}

// SAFETY: the engine is written by one thread before the others may look, which `state` says.
unsafe impl Sync for Copies {}

impl Copies {
    pub const fn new() -> Self {
        Self {
            state: AtomicU32::new(WAITING),
            copied_bytes: AtomicU64::new(0),
            engine: UnsafeCell::new(ManuallyDrop::new(Engine::library())),
        }
    }

    #[inline]
    fn function(&self, count: usize, situation: Situation) -> Function {
        if self.state.load(Acquire) != READY {
            return Engine::library().function(count, situation);
        }
        // SAFETY: it is not written any more.
        unsafe { &*self.engine.get() }.function(count, situation)
    }

    #[inline]
    fn count(&self, header: &Header, count: usize, situation: Situation) {
        header.copied.0.add(situation as usize, count);
        if self.state.load(Relaxed) == WAITING {
            self.weigh(header, count);
        }
    }

    #[cold]
    fn weigh(&self, header: &Header, count: usize) {
        let copied = self.copied_bytes.fetch_add(count as u64, Relaxed) + count as u64;
        if copied < WORTHWHILE_BYTES
            || self.state.compare_exchange(WAITING, BEING_MADE, Relaxed, Relaxed).is_err()
        {
            return;
        }
        let made = engine_of(header);
        // SAFETY: this thread alone set `BEING_MADE`, and nobody looks before `READY`.
        unsafe { *self.engine.get() = ManuallyDrop::new(made) };
        self.state.store(READY, Release);
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        // In a forked child, one that a thread was about to write stays as it is.
        if *self.state.get_mut() == READY {
            // SAFETY: it is whole, and nobody uses it after this.
            unsafe { ManuallyDrop::drop(self.engine.get_mut()) };
        }
    }
}

/// Reads the plan. Where its code cannot be made, memcpy(3) serves.
fn engine_of(header: &Header) -> Engine {
    let PlanWords { plain, keep } = &header.plan.0;
    let words = if CONTEXT == Context::Keep { keep } else { plain };
    if words.iter().all(|word| word.load(Relaxed) == 0) {
        return Engine::library();
    }
    let word = |index: usize| words[index].load(Relaxed);
    Engine::of_words(word, CONTEXT, Features::detect()).unwrap_or(Engine::library())
}

impl Channel {
    /// Whether enough was copied for the plan to be followed.
    pub fn follows_plan(&self) -> bool {
        self.copies.state.load(Relaxed) == READY
    }

    /// By what, then, copies of that size are made; None for what the plan says and cannot be.
    pub fn variant(&self, size_bytes: usize, situation: Situation) -> Option<Variant> {
        let PlanWords { plain, keep } = &self.header().plan.0;
        let words = if CONTEXT == Context::Keep { keep } else { plain };
        Variant::from_word(words.get(situation as usize * CLASSES + class_of(size_bytes))?.load(Relaxed))
    }

    /// Copies between this program and what it shares with the service.
    ///
    /// # Safety
    /// `from` must be readable and `to` writable for `count` bytes, and they must not overlap.
    #[inline]
    pub(crate) unsafe fn copy(&self, to: *mut u8, from: *const u8, count: usize, situation: Situation) {
        self.count_copy(count, situation);
        // SAFETY: the caller's word.
        unsafe { self.copier(count, situation)(to, from, count) }
    }

    /// What copies pieces of `count` bytes, for those who copy them piece by piece and count the whole.
    #[inline]
    pub(crate) fn copier(&self, count: usize, situation: Situation) -> Function {
        self.copies.function(count, situation)
    }

    #[inline]
    pub(crate) fn count_copy(&self, count: usize, situation: Situation) {
        self.copies.count(self.header(), count, situation);
    }
}
