//! How this side copies: by the plan that the service put into the channel. Everything copied is counted there.

use core::sync::atomic::Ordering::Relaxed;

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

/// Reads the plan. Where its code cannot be made, memcpy(3) serves.
pub fn engine_of(header: &Header) -> Engine {
    let PlanWords { plain, keep } = &header.plan.0;
    let words = if CONTEXT == Context::Keep { keep } else { plain };
    if words.iter().all(|word| word.load(Relaxed) == 0) {
        return Engine::library();
    }
    let word = |index: usize| words[index].load(Relaxed);
    Engine::of_words(word, CONTEXT, Features::detect()).unwrap_or(Engine::library())
}

impl Channel {
    /// By what copies of that size are made; None for what the plan says and cannot be.
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
        self.header().copied.0.add(situation as usize, count);
        // SAFETY: the caller's word.
        unsafe { self.engine.copy(to, from, count, situation) }
    }

    /// What copies pieces of `count` bytes, for those who copy them piece by piece and count the whole.
    #[inline]
    pub(crate) fn copier(&self, count: usize, situation: Situation) -> Function {
        self.engine.function(count, situation)
    }

    #[inline]
    pub(crate) fn count_copy(&self, count: usize, situation: Situation) {
        self.header().copied.0.add(situation as usize, count);
    }
}
