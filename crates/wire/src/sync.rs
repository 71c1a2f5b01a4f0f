//! The one place from which windows, epochs and cached answers take their atomics, so that the model checker runs the real code:
//! `--cfg modeled --cfg loom`, as `make loom` does. Under it a test may plant a fault, to see that the model finds it.

pub use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicU32, AtomicU64, fence};
#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, AtomicU64, fence};

/// What windows and shared answers could do wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    ReaderLooksOnce,
    ReaderWithoutFence,
    ReaderForgetsSize,
    WordWithoutFence,
    SameGeneration,
    WordBeforeBytes,
    FillAfterChange,
    SizeAfterChange,
    SizeKept,
    BlocksKept,
    HiddenKept,
    ChangeUncounted,
    AnswerToldAfterwards,
    AnswerWriterWithoutFence,
    AnswerReaderWithoutFence,
    AnswerLookedAtOnce,
    AnswerOfAnother,
}

/// Never, but where a test of the model planted it.
#[cfg(not(loom))]
#[inline(always)]
pub const fn has(_fault: Fault) -> bool {
    false
}

#[cfg(loom)]
pub use planted::{has, plant};

#[cfg(loom)]
mod planted {
    extern crate std;
    use super::Fault;
    use core::cell::Cell;

    // Loom's threads are all one thread of the system.
    std::thread_local! {
        static PLANTED: Cell<Option<Fault>> = const { Cell::new(None) };
    }

    pub fn has(fault: Fault) -> bool {
        PLANTED.get() == Some(fault)
    }

    pub fn plant(fault: Option<Fault>) {
        PLANTED.set(fault);
    }
}
