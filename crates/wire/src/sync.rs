//! The one place from which epochs and cached answers take their atomics, so that the model checker runs the real code:
//! `--cfg modeled --cfg loom`, as `make loom` does.

pub use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicU64, fence};
#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU64, fence};
