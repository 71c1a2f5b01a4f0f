//! A plan at work: one indirect call a copy.

use crate::plan::{CLASS_BYTES_MIN, Situation};
use core::ptr;

#[cfg(target_arch = "x86_64")]
mod emitted {
    use super::{CLASS_BYTES_MIN, Situation};
    use crate::code::{Code, CodeError, CopyFunction};
    use crate::features::Features;
    use crate::plan::{CLASSES, Context, Plan, SITUATIONS, class_of};

    /// Copies by a plan. Holds its own code.
    pub struct Engine {
        table: [[CopyFunction; CLASSES]; SITUATIONS.len()],
        _code: Code,
    }

    unsafe extern "sysv64" fn unset(_: *mut u8, _: *const u8, _: usize) {}

    impl Engine {
        /// Emits the code of `plan`. Maps executable memory and seals it, so it belongs before a system call filter that forbids that;
        /// the memory stays for the life of the process.
        pub fn new(plan: &Plan, context: Context, features: Features) -> Result<Self, CodeError> {
            let mut table = [[unset as CopyFunction; CLASSES]; SITUATIONS.len()];
            let cells = (0..SITUATIONS.len() * CLASSES)
                .map(|cell| plan.get(context, SITUATIONS[cell / CLASSES].0, cell % CLASSES));
            let code = Code::new(cells, features, true, |cell, function| {
                table[cell / CLASSES][cell % CLASSES] = function;
            })?;
            Ok(Self { table, _code: code })
        }

        /// # Safety
        /// `source` may be read and `destination` written for `size_bytes`, and they do not overlap.
        #[inline]
        pub unsafe fn copy_long(
            &self,
            destination: *mut u8,
            source: *const u8,
            size_bytes: usize,
            s: Situation,
        ) {
            debug_assert!(size_bytes >= CLASS_BYTES_MIN);
            // SAFETY: an emitted copy; the caller vouches for the ranges.
            unsafe { self.table[s as usize][class_of(size_bytes)](destination, source, size_bytes) }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod emitted {
    use super::{Situation, ptr};
    use crate::features::Features;
    use crate::plan::{Context, Plan};

    /// Copies as the compiler does: there is no emitter for this architecture.
    pub struct Engine;

    impl Engine {
        pub fn new(_: &Plan, _: Context, _: Features) -> Result<Self, core::convert::Infallible> {
            Ok(Self)
        }

        /// # Safety
        /// `source` may be read and `destination` written for `size_bytes`, and they do not overlap.
        #[inline]
        pub unsafe fn copy_long(
            &self,
            destination: *mut u8,
            source: *const u8,
            size_bytes: usize,
            _: Situation,
        ) {
            // SAFETY: the caller vouches for the ranges.
            unsafe { ptr::copy_nonoverlapping(source, destination, size_bytes) }
        }
    }
}

pub use emitted::Engine;

impl Engine {
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
        if size_bytes < CLASS_BYTES_MIN {
            // SAFETY: the caller vouches for the ranges.
            unsafe { ptr::copy_nonoverlapping(source, destination, size_bytes) }
        } else {
            // SAFETY: as above.
            unsafe { self.copy_long(destination, source, size_bytes, situation) }
        }
    }
}
