//! Relaxed concurrent queues: bounded, many producers and many consumers, inside a process or in memory that processes share
//! without trusting each other. `README.md` tells which queue to take and what each one promises; `LAYOUT.md` draws the memory.
//!
//! - [`Rcqs`]: 40 bits an item, one word a slot, lock-free.
//! - [`Rcqd`]: 64 bits an item, changed by double-width compare-and-swap.
//! - [`Rcqb`]: items of any size up to one that is set when the queue is made.
#![no_std]

#[cfg(feature = "alloc")]
extern crate alloc;
#[cfg(any(feature = "std", modeled))]
extern crate std;

pub mod bytes;
pub mod cell;
pub mod handle;
#[cfg(all(feature = "std", not(modeled)))]
pub mod identity;
pub mod lane;
pub mod lanes;
#[cfg(not(modeled))]
pub mod layout;
#[cfg(modeled)]
pub mod model;
pub mod operation;
pub mod pool;
#[cfg(all(feature = "std", not(modeled)))]
pub mod shm;
pub mod sync;
#[cfg_attr(modeled, allow(dead_code, reason = "the model has its own futexes"))]
mod sys;
pub mod wait;
#[cfg(not(modeled))]
pub mod words;

#[cfg(not(modeled))]
pub use bytes::Rcqb;
pub use handle::Handle;
#[cfg(all(feature = "alloc", not(modeled)))]
pub use layout::Heap;
#[cfg(not(modeled))]
pub use layout::{Borrowed, Config, Memory};
pub use wait::Deadline;
#[cfg(not(modeled))]
pub use words::{Rcqd, Rcqs};

/// Why an operation on a queue was not done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    Full,
    Empty,
    /// Closed, and for a dequeue: nothing is left, and nothing will come.
    Closed,
    TimedOut,
    /// The item is larger than the queue's items.
    TooLarge,
    /// The memory is damaged, by a peer or by accident: give the queue up.
    Corrupt,
    /// A number of the configuration is out of its range, or the memory is too small for it or in use.
    Invalid,
    NotAQueue,
    OtherVersion,
    /// This processor has no double-width compare-and-swap.
    Unsupported,
    NoMemory,
    /// All places for participants are taken.
    TooManyParticipants,
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Full => "the queue is full",
            Self::Empty => "the queue is empty",
            Self::Closed => "the queue is closed",
            Self::TimedOut => "the deadline passed before the operation could be done",
            Self::TooLarge => "the item is larger than the queue's items",
            Self::Corrupt => "the queue's memory is damaged; make a new queue",
            Self::Invalid => {
                "the queue cannot be made so: capacity and lanes are powers of two, at least two slots a lane, at most 2^20 \
                 slots, 64 lanes, 16 MiB an item, in zeroed memory that is large enough"
            }
            Self::NotAQueue => "the memory does not hold a queue of this kind",
            Self::OtherVersion => "the queue was made by another version of this library; update the older side",
            Self::Unsupported => "this processor has no double-width compare-and-swap; use RCQS or RCQB",
            Self::NoMemory => "there is not enough memory for the queue",
            Self::TooManyParticipants => "all places for participants are taken; make the queue with more of them",
        })
    }
}

impl core::error::Error for Error {}

/// What a queue has done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    pub enqueued: u64,
    pub dequeued: u64,
    pub sleeps: u64,
    pub wakes: u64,
    pub spins_in_vain: u64,
    pub lost_enqueues: u64,
    pub lost_dequeues: u64,
    pub rescued: u64,
}
