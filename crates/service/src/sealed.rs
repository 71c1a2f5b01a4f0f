//! Memory that keeper and worker share and neither can shrink, so that a mapping of it is never beyond the file's end.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Made of zeroes. Pages are allocated as they are touched, at the cost of who touches them.
pub fn make(name: &str, bytes: usize) -> rustix::io::Result<OwnedFd> {
    let descriptor = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&descriptor, bytes as u64)?;
    rustix::fs::fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(descriptor)
}

/// A mapping of the whole, page-aligned, as long as the value lives.
pub struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the value, and only its address is told.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// EINVAL for what has another size, or could be shrunk.
    pub fn of(descriptor: impl AsFd, bytes: usize, writable: bool) -> rustix::io::Result<Self> {
        let seals = rustix::fs::fcntl_get_seals(&descriptor)?;
        let size = rustix::fs::fstat(&descriptor)?.st_size;
        if size != bytes as i64 || !seals.contains(SealFlags::SHRINK) {
            return Err(Errno::INVAL);
        }
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping, wherever the kernel likes; it can never be beyond the file's end, which is sealed.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, descriptor, 0)?
        };
        Ok(Self { base: NonNull::new(base.cast()).ok_or(Errno::NOMEM)?, bytes })
    }

    pub fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `of`; whoever uses it borrows from this value. A failure would only leave it mapped.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
