//! Interception of system calls inside an unmodified program.
//!
//! At start the library finds the `syscall` instructions of the C library and the loader in memory and puts a jump to a
//! trampoline before each that may concern files ([`scan`], [`patch`]). The trampoline asks [`hooks`] whether the call is
//! answered here; if not, it goes back to the very instruction that was there, so that what is passed on is done by the kernel
//! exactly as if nobody had looked.
//!
//! Nothing here uses an allocator, the C library, thread-local storage or vector registers.
#![cfg(all(target_arch = "x86_64", target_pointer_width = "64"))]
#![cfg_attr(not(test), no_std)]

mod bridge;
pub mod decode;
pub mod elf;
mod entry;
mod hooks;
mod initial;
pub mod known;
mod libraries;
mod loaded;
pub mod maps;
mod operations;
mod patch;
pub mod prepared;
pub mod scan;
mod start;
mod sys;
pub mod table;
mod text;
mod trace;

pub use initial::Registers;
pub use start::start;
