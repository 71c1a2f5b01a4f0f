//! The program's side of the private path: requests, and reads of cached bytes, through memory shared with the service.
//!
//! Made to live inside of programs that know nothing of it: no standard library, no thread-local storage, no allocator (one
//! mapping of its own holds what it keeps), no lock (a signal handler may come in at any place), system calls made by hand. All
//! operations may be called from many threads at once.
//!
//! Start at [`Channel::connect`]. A channel belongs to one process: its memory is not inherited by fork(2), after which a child has to call
//! [`Channel::forget_in_child`] on what it inherited and connect anew.
#![no_std]

mod answers;
mod arena;
mod changes;
mod channel;
mod connect;
mod copies;
mod directories;
mod entry;
mod files;
mod listings;
mod lookups;
mod operations;
mod posts;
mod questions;
mod small;
mod spin;
pub mod sys;
mod windows;

pub use changes::Time;
pub use channel::{Channel, Counters};
pub use connect::Refused;
pub use directories::{Listed, Name};
pub use files::File;
pub use lookups::PATH_BYTES_MAX;
pub use operations::{At, Opened};
pub use polytropo_wire::channel::TOLD;
pub use polytropo_wire::hello::Verdict;
pub use polytropo_wire::message::Attributes;

/// Why an operation was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// As the system call would have failed.
    Errno(i32),
    /// Not this path's business: ask the kernel.
    Kernel,
    /// The service is gone or has given this channel up, and did nothing: ask the kernel from now on, or connect anew.
    Gone,
    /// It is gone, and may have done what it was at, as nothing forbade.
    GoneAmid(Amid),
}

/// How far a service came that died of a change of names, or in the middle of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amid {
    /// It began at that time, in nanoseconds since 1970, and nobody knows whether it did it.
    Begun { at_ns: u64 },
    /// It did it, and made this inode, or none (0).
    Done { inode: u64 },
}

pub type Result<T> = core::result::Result<T, Error>;

pub const EINTR: i32 = 4;
pub const EBADF: i32 = 9;
pub const EAGAIN: i32 = 11;
pub const ENOMEM: i32 = 12;
pub const EIO: i32 = 5;
pub const EINVAL: i32 = 22;
pub const ENAMETOOLONG: i32 = 36;
pub const EPROTO: i32 = 71;
