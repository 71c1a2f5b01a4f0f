//! Memory shared between processes: sealed memfds, and files of a memory filesystem that are found by name.

use crate::Error;
use crate::layout::Memory;
use core::ptr::NonNull;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A shared, writable mapping, and the descriptor that it came from.
pub struct Mapping {
    base: NonNull<u8>,
    size: usize,
    descriptor: OwnedFd,
}

/// Directory of named queues.
pub const NAMES: &str = "/dev/shm";
const SIZE_MAX: u64 = 1 << 36;

impl Mapping {
    /// New zeroed memory that no peer can shrink: a mapping of shrunk memory kills who touches it.
    pub fn anonymous(size: usize) -> io::Result<Self> {
        let descriptor =
            rustix::fs::memfd_create("polytropo-queue", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&descriptor, size as u64)?;
        rustix::fs::fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::of(descriptor)
    }

    /// Maps what another process made.
    pub fn of(descriptor: OwnedFd) -> io::Result<Self> {
        let size = u64::try_from(rustix::fs::fstat(&descriptor)?.st_size).unwrap_or(0);
        if size == 0 || size > SIZE_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, Error::NotAQueue));
        }
        let size = size as usize;
        // SAFETY: a new mapping, wherever the kernel likes.
        let base = unsafe {
            rustix::mm::mmap(
                core::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &descriptor,
                0,
            )?
        };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, size, descriptor })
    }

    /// Whether no peer can shrink the memory. Take nothing else from a peer that is not trusted.
    pub fn is_sealed(&self) -> bool {
        rustix::fs::fcntl_get_seals(&self.descriptor).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
    }

    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `of` with this size; whoever uses the memory borrows from this value.
        // A failure would only leave the mapping in place.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.size) };
    }
}

// SAFETY: the mapping belongs to the value, and what lies in it is used through atomics, or copied as bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

// SAFETY: mapped readable and writable in `of`, at page boundaries, until `drop`.
unsafe impl Memory for Mapping {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
    fn size(&self) -> usize {
        self.size
    }
}

/// The file of a named queue. Names are of letters, digits, `.`, `_` and `-`.
pub fn path_of(name: &str) -> io::Result<PathBuf> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.len() > 200 || !name.bytes().all(good) {
        let sentence = "a queue's name has 1 to 200 letters, digits, dots, underscores and hyphens";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, sentence));
    }
    Ok(Path::new(NAMES).join(std::format!("polytropo-queue.{name}")))
}

/// Makes named memory: `build` gets it before anyone can find it. Fails if the name is taken.
pub fn create_named<R>(
    name: &str,
    size: usize,
    build: impl FnOnce(Mapping) -> io::Result<R>,
) -> io::Result<R> {
    let path = path_of(name)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let descriptor = rustix::fs::open(NAMES, flags, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::ftruncate(&descriptor, size as u64)?;
    let built = build(Mapping::of(descriptor.try_clone()?)?)?;
    let source = std::format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&descriptor));
    rustix::fs::linkat(rustix::fs::CWD, source, rustix::fs::CWD, &path, rustix::fs::AtFlags::SYMLINK_FOLLOW)?;
    Ok(built)
}

/// Opens named memory.
pub fn open_named(name: &str) -> io::Result<Mapping> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Mapping::of(rustix::fs::open(path_of(name)?, flags, Mode::empty())?)
}

/// Takes the name away. Who has the queue open keeps it.
pub fn unlink_named(name: &str) -> io::Result<()> {
    Ok(rustix::fs::unlink(path_of(name)?)?)
}
