//! How bytes are copied on the path: the plan that the service gives to programs, and what was copied.
//!
//! What words of a plan mean is `crates/copy`'s business; zero is memcpy(3).

use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::{AtomicU32, AtomicU64};

/// Hot, fresh, handed, relayed, cold, read.
pub const SITUATIONS: usize = 6;
/// Classes of a plan: 64 bytes to 64 MiB and more.
pub const CLASSES: usize = 21;
/// Sizes that are counted apart, by their highest bit: 1 byte to 64 MiB and more.
pub const SIZES: usize = 27;

/// A word for each situation and class.
#[repr(C)]
pub struct PlanWords {
    /// For code that may use vector registers.
    pub plain: [AtomicU32; SITUATIONS * CLASSES],
    /// For code that must give them back.
    pub keep: [AtomicU32; SITUATIONS * CLASSES],
}

/// How many copies there were, by situation and size.
#[repr(C)]
pub struct Copied {
    counts: [[AtomicU64; SIZES]; SITUATIONS],
}

pub type Counts = [[u64; SIZES]; SITUATIONS];

impl Default for Copied {
    fn default() -> Self {
        Self { counts: [const { [const { AtomicU64::new(0) }; SIZES] }; SITUATIONS] }
    }
}

impl Copied {
    /// Counts one copy. Without a locked instruction, so two threads at once may count one: these are weights, not accounts.
    #[inline]
    pub fn add(&self, situation: usize, size_bytes: usize) {
        let size = (usize::BITS - 1 - (size_bytes | 1).leading_zeros()) as usize;
        if let Some(count) = self.counts.get(situation).map(|sizes| &sizes[size.min(SIZES - 1)]) {
            count.store(count.load(Relaxed).wrapping_add(1), Relaxed);
        }
    }

    /// Adds what was counted elsewhere.
    pub fn add_all(&self, counts: &Counts) {
        for (place, count) in self.counts.iter().flatten().zip(counts.iter().flatten()) {
            place.fetch_add(*count, Relaxed);
        }
    }

    pub fn counts(&self) -> Counts {
        core::array::from_fn(|situation| {
            core::array::from_fn(|size| self.counts[situation][size].load(Relaxed))
        })
    }
}
