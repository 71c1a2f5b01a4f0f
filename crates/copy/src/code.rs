//! Emitted copies in memory that is executable and no more writable.

use crate::emit::{CODE_BYTES_MAX, emit};
use crate::features::Features;
use crate::sys;
use crate::variant::{Move, Variant};
use core::fmt;

/// `(destination, source, size in bytes)`. The ranges must not overlap.
pub type CopyFunction = unsafe extern "sysv64" fn(*mut u8, *const u8, usize);

const ALIGN_BYTES: usize = 64;
const PAGE_BYTES: usize = 4096;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CodeError {
    /// This processor cannot run that variant, or its parameters make no sense together.
    Unsupported(Variant),
    /// The kernel gave no memory, or did not let it be executed (an errno).
    Memory { attempted: &'static str, errno: i32 },
}

impl fmt::Display for CodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(variant) => write!(f, "this processor cannot copy by {}", variant.name()),
            Self::Memory { attempted, errno } => {
                write!(f, "cannot {attempted} memory for copies (errno {errno})")
            }
        }
    }
}

impl core::error::Error for CodeError {}

/// memcpy(3) as this program has it.
///
/// # Safety
/// As of every [`CopyFunction`].
pub unsafe extern "sysv64" fn library(destination: *mut u8, source: *const u8, size_bytes: usize) {
    // SAFETY: the caller vouches for the ranges.
    unsafe { core::ptr::copy_nonoverlapping(source, destination, size_bytes) }
}

/// A mapping of emitted functions. Sealed ones stay for the life of the process.
#[derive(Debug)]
pub struct Code {
    at: *mut u8,
    size_bytes: usize,
    sealed: bool,
}

// SAFETY: the mapping is read-only and executable after it was made; nothing in it changes.
unsafe impl Send for Code {}
// SAFETY: as above.
unsafe impl Sync for Code {}

impl Code {
    /// Emits one function for each variant and tells where each begins, in order, through `placed`.
    pub fn new(
        variants: impl ExactSizeIterator<Item = Variant>,
        features: Features,
        seal: bool,
        mut placed: impl FnMut(usize, CopyFunction),
    ) -> Result<Self, CodeError> {
        let room = variants.len().max(1) * CODE_BYTES_MAX;
        let size_bytes = room.next_multiple_of(PAGE_BYTES);
        let at = sys::map(size_bytes).map_err(|errno| CodeError::Memory { attempted: "map", errno })?;
        let mut code = Self { at, size_bytes, sealed: false };
        let mut used = 0;
        for (index, variant) in variants.enumerate() {
            if variant.moves == Move::Library {
                placed(index, library);
                continue;
            }
            // SAFETY: `used` stays within the mapping: each function takes CODE_BYTES_MAX at most, with its alignment.
            let room = unsafe { core::slice::from_raw_parts_mut(at.add(used), CODE_BYTES_MAX) };
            let length = emit(&variant, features, room).ok_or(CodeError::Unsupported(variant))?;
            // SAFETY: a whole function of this type was emitted there.
            placed(index, unsafe { core::mem::transmute::<*mut u8, CopyFunction>(at.add(used)) });
            used += length.next_multiple_of(ALIGN_BYTES);
        }
        // SAFETY: our mapping; the slices above are gone.
        unsafe { sys::make_executable(at, size_bytes, seal) }
            .map_err(|errno| CodeError::Memory { attempted: "execute", errno })?;
        code.sealed = seal;
        Ok(code)
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        if !self.sealed {
            // SAFETY: our mapping; functions of it are used only while this lives (the contract of `placed`).
            unsafe { sys::unmap(self.at, self.size_bytes) };
        }
    }
}
