//! What crosses the border between a program and its service, and nothing of either side's logic but what both must agree on to the
//! last ordering.
//!
//! - [`hello`]: the two messages on the socket, after which it only tells of the other side's end;
//! - [`channel`]: the memory that one process and its service share for requests;
//! - [`message`]: what requests and replies say;
//! - [`copies`]: how bytes are copied there, and which were;
//! - [`window`]: a file's cached bytes, which programs read without asking; how they are read and changed;
//! - [`posts`]: writes that need not wait;
//! - [`listing`]: a directory with all that is in it;
//! - [`answers`]: what programs of the same rights are told once for all;
//! - [`epochs`]: counters of changes, by which programs know whether what they were told is still true.
//!
//! Everything in shared memory is made of atomics, for which every pattern of bits is a value and changes by the other side are
//! no data race. Both sides copy what they read before they look at it. `ARCHITECTURE.md` draws the layouts byte by byte.
#![no_std]

pub mod answers;
pub mod channel;
pub mod copies;
pub mod epochs;
pub mod hello;
pub mod listing;
pub mod message;
pub mod posts;
#[doc(hidden)]
pub mod sync;
pub mod window;

/// Changed with every change of a layout or a meaning; both sides refuse any other.
pub const VERSION: u32 = 5;
