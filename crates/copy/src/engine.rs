//! A plan at work: one indirect call a copy.

use crate::features::Features;
use crate::plan::{CLASS_BYTES_MIN, CLASSES, Context, Plan, SITUATIONS, Situation, class_of};
use crate::variant::{Move, Variant};

/// Words of a plan in shared memory, for one [`Context`].
pub const WORDS: usize = SITUATIONS.len() * CLASSES;

#[cfg(target_arch = "x86_64")]
mod emitted {
    use super::WORDS;
    use crate::code::{Code, CodeError, CopyFunction};
    use crate::features::Features;
    use crate::variant::Variant;

    pub use crate::code::{CopyFunction as Function, library};

    /// Copies by a plan. Holds its own code.
    pub struct Engine {
        pub(super) table: [CopyFunction; WORDS],
        _code: Option<Code>,
    }

    impl Engine {
        /// memcpy(3) for everything.
        pub const fn library() -> Self {
            Self { table: [library; WORDS], _code: None }
        }

        pub(super) fn emitted(
            cells: &[Variant; WORDS],
            features: Features,
            seal: bool,
        ) -> Result<Self, CodeError> {
            if cells.iter().all(|variant| *variant == Variant::LIBRARY) {
                return Ok(Self::library());
            }
            // Plans hold few variants, most of them in several cells.
            let mut distinct = [Variant::LIBRARY; WORDS];
            let mut count = 0;
            for variant in cells {
                if !distinct[..count].contains(variant) {
                    distinct[count] = *variant;
                    count += 1;
                }
            }
            let mut functions = [library as CopyFunction; WORDS];
            let code = Code::new(distinct[..count].iter().copied(), features, seal, |index, function| {
                functions[index] = function;
            })?;
            let mut table = [library as CopyFunction; WORDS];
            for (place, variant) in table.iter_mut().zip(cells) {
                let index = distinct[..count].iter().position(|other| other == variant);
                *place = functions[index.unwrap_or_default()];
            }
            Ok(Self { table, _code: Some(code) })
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod emitted {
    use super::WORDS;
    use crate::features::Features;
    use crate::variant::Variant;

    pub type Function = unsafe extern "C" fn(*mut u8, *const u8, usize);

    pub unsafe extern "C" fn library(destination: *mut u8, source: *const u8, size_bytes: usize) {
        // SAFETY: the caller vouches for the ranges.
        unsafe { core::ptr::copy_nonoverlapping(source, destination, size_bytes) }
    }

    /// Copies by memcpy(3): there is no emitter for this architecture.
    pub struct Engine {
        pub(super) table: [Function; WORDS],
    }

    impl Engine {
        pub const fn library() -> Self {
            Self { table: [library; WORDS] }
        }

        pub(super) fn emitted(
            _: &[Variant; WORDS],
            _: Features,
            _: bool,
        ) -> Result<Self, core::convert::Infallible> {
            Ok(Self::library())
        }
    }
}

use emitted::library;
pub use emitted::{Engine, Function};

#[cfg(target_arch = "x86_64")]
pub type EngineError = crate::code::CodeError;
#[cfg(not(target_arch = "x86_64"))]
pub type EngineError = core::convert::Infallible;

impl Engine {
    /// Emits the code of `plan`. Maps executable memory and seals it, so it belongs before a system call filter that forbids that;
    /// the memory stays for the life of the process.
    pub fn new(plan: &Plan, context: Context, features: Features) -> Result<Self, EngineError> {
        let cell = |index: usize| plan.get(context, SITUATIONS[index / CLASSES].0, index % CLASSES);
        Self::emitted(&core::array::from_fn(cell), features, true)
    }

    /// Of words that somebody else wrote, as [`Plan::words`] tells them. What makes no sense, cannot be run here or must not be used in
    /// that context becomes memcpy(3). Nothing is sealed: the code goes with the engine.
    pub fn of_words(
        word: impl Fn(usize) -> u32,
        context: Context,
        features: Features,
    ) -> Result<Self, EngineError> {
        let cell = |index: usize| {
            let fits = |v: &Variant| context == Context::Plain || v.clobbers().vector_registers == 0;
            let found = Variant::from_word(word(index)).filter(|v| v.moves != Move::Library && fits(v));
            found.filter(|variant| variant.runs_on(features)).unwrap_or(Variant::LIBRARY)
        };
        Self::emitted(&core::array::from_fn(cell), features, false)
    }

    /// What copies `size_bytes` best. It copies any number of bytes rightly, so pieces of one long copy may go through it.
    #[inline]
    pub fn function(&self, size_bytes: usize, situation: Situation) -> Function {
        if size_bytes < CLASS_BYTES_MIN {
            return library;
        }
        self.table[situation as usize * CLASSES + class_of(size_bytes)]
    }

    /// # Safety
    /// `source` may be read and `destination` written for `size_bytes`, and they do not overlap.
    #[inline]
    pub unsafe fn copy(
        &self,
        destination: *mut u8,
        source: *const u8,
        size_bytes: usize,
        situation: Situation,
    ) {
        // SAFETY: the caller vouches for the ranges.
        unsafe { self.function(size_bytes, situation)(destination, source, size_bytes) }
    }
}

impl Plan {
    /// The plan for one context, to be handed to others.
    pub fn words(&self, context: Context) -> [u32; WORDS] {
        let cell = |index: usize| self.get(context, SITUATIONS[index / CLASSES].0, index % CLASSES);
        core::array::from_fn(|index| cell(index).to_word())
    }
}
