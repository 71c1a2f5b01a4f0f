//! Memory that processes share and none can shrink, so that a mapping of it is never beyond the file's end.

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

/// The same, which from here on nobody can write but through the mapping that is returned, however it is opened: not by write(2), by mapping, by
/// punching holes.
pub fn make_shown(name: &str, bytes: usize) -> rustix::io::Result<(OwnedFd, Mapping)> {
    let descriptor = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&descriptor, bytes as u64)?;
    rustix::fs::fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW)?;
    let mapping = Mapping::of(&descriptor, bytes, true)?;
    rustix::fs::fcntl_add_seals(&descriptor, SealFlags::FUTURE_WRITE | SealFlags::SEAL)?;
    Ok((descriptor, mapping))
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

    /// Has the first `bytes` allocated, which are zeroes and nobody else has yet: a program that read one first would pay for it.
    pub fn allocate(&self, bytes: usize) {
        for at in (0..bytes.min(self.bytes)).step_by(4096) {
            // SAFETY: within the mapping, aligned.
            unsafe { self.base.add(at).cast::<u64>().write_volatile(0) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `of`; whoever uses it borrows from this value. A failure would only leave it mapped.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
