//! The memory itself, as worker and keeper map it.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Relaxed, Release};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::layout::*;

/// Made by the keeper, for one door. Pages are allocated as they are touched.
pub fn make(door: u64) -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let descriptor = rustix::fs::memfd_create("polytropo-state", flags)?;
    rustix::fs::ftruncate(&descriptor, TOTAL_BYTES as u64)?;
    // The worker cannot shrink it under the keeper's hands.
    rustix::fs::fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let area = Area::map(&descriptor, true)?;
    let header = area.header();
    header.version.store(VERSION, Relaxed);
    header.entry_bytes.store(size_of::<Entry>() as u32, Relaxed);
    header.capacity.store(CAPACITY as u64, Relaxed);
    header.nodes_capacity.store(NODES_CAPACITY as u64, Relaxed);
    header.door.store(door, Relaxed);
    header.magic.store(MAGIC, Release);
    Ok(descriptor)
}

/// A mapping of the whole area.
pub struct Area {
    base: NonNull<u8>,
}

// SAFETY: the mapping belongs to the value; what lies in it is used through atomics.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// EINVAL for what has another size.
    pub fn map(descriptor: impl AsFd, writable: bool) -> rustix::io::Result<Self> {
        let seals = rustix::fs::fcntl_get_seals(&descriptor)?;
        let size = rustix::fs::fstat(&descriptor)?.st_size;
        if size != TOTAL_BYTES as i64 || !seals.contains(SealFlags::SHRINK) {
            return Err(Errno::INVAL);
        }
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping, wherever the kernel likes; it can never be beyond the file's end, which is sealed.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), TOTAL_BYTES, protection, MapFlags::SHARED, descriptor, 0)?
        };
        Ok(Self { base: NonNull::new(base.cast()).ok_or(Errno::NOMEM)? })
    }

    pub fn header(&self) -> &Header {
        // SAFETY: begins the mapping, page-aligned, and is made of atomics.
        unsafe { self.base.cast().as_ref() }
    }

    pub fn entry(&self, index: usize) -> &Entry {
        self.at(OPENS_START, CAPACITY, index)
    }

    pub fn node(&self, index: usize) -> &Entry {
        self.at(NODES_START, NODES_CAPACITY, index)
    }

    pub fn long_name(&self, index: usize) -> &LongName {
        self.at(LONG_NAMES_START, LONG_NAMES_CAPACITY, index)
    }

    pub fn slot(&self, index: usize) -> &Slot {
        self.at(JOURNAL_START, SLOTS, index)
    }

    /// `T` is made of atomics, its section holds `capacity` of them and begins aligned (`layout` says so to the compiler).
    fn at<T: Section>(&self, start: usize, capacity: usize, index: usize) -> &T {
        assert!(index < capacity);
        // SAFETY: all of the section lies in the mapping, aligned, and is made of atomics.
        unsafe { self.base.add(start).cast::<T>().add(index).as_ref() }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`; whoever uses it borrows from this value. A failure would only leave it mapped.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), TOTAL_BYTES) };
    }
}
