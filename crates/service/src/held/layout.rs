//! Where things lie in the memory of held writes. Byte by byte in STATE.md.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::mm::Advice;

use crate::sealed::{self, Mapping};

pub const MAGIC: u64 = u64::from_le_bytes(*b"POLYHELD");
pub const VERSION: u32 = 1;
pub const PAGE_BYTES: usize = 4096;
/// 32 MiB.
pub const PAGES: usize = 8192;
pub const ENTRIES_AT: usize = 4096;
/// Where the bytes begin: at a multiple of the largest page.
pub const BYTES_AT: usize = 2 << 20;
pub const TOTAL_BYTES: usize = BYTES_AT + PAGES * PAGE_BYTES;

#[repr(C)]
pub struct Header {
    pub magic: AtomicU64,
    pub version: AtomicU32,
    pub page_bytes: AtomicU32,
    pub pages: AtomicU64,
    pub door: AtomicU64,
}

/// What one page holds: so many bytes of one page of a file.
#[repr(C, align(32))]
pub struct Entry {
    /// The file's key, or 0: the page is free. Stored last.
    pub key: AtomicU64,
    /// Where in the file the page begins.
    pub offset: AtomicU64,
    /// The bytes that count: the first in the low half, the end in the high one.
    pub range: AtomicU64,
    reserved: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == ENTRY_BYTES && ENTRIES_AT + PAGES * ENTRY_BYTES <= BYTES_AT);
pub const ENTRY_BYTES: usize = 32;

pub fn range_word(from: u32, end: u32) -> u64 {
    u64::from(from) | u64::from(end) << 32
}

/// Made by the keeper, for one door. Pages are allocated as the worker touches them, at its cost.
pub fn make(door: u64) -> rustix::io::Result<OwnedFd> {
    let descriptor = sealed::make("polytropo-held", TOTAL_BYTES)?;
    let area = Area::map(&descriptor)?;
    let header = area.header();
    header.version.store(VERSION, Relaxed);
    header.page_bytes.store(PAGE_BYTES as u32, Relaxed);
    header.pages.store(PAGES as u64, Relaxed);
    header.door.store(door, Relaxed);
    header.magic.store(MAGIC, Release);
    Ok(descriptor)
}

/// A mapping of the whole.
pub struct Area {
    mapping: Mapping,
}

impl Area {
    /// EINVAL for what has another size, or could be shrunk.
    pub fn map(descriptor: impl AsFd) -> rustix::io::Result<Self> {
        Ok(Self { mapping: Mapping::of(descriptor, TOTAL_BYTES, true)? })
    }

    pub fn header(&self) -> &Header {
        // SAFETY: begins the mapping, page-aligned, and is made of atomics.
        unsafe { self.mapping.base().cast().as_ref() }
    }

    pub fn entry(&self, page: usize) -> &Entry {
        assert!(page < PAGES);
        // SAFETY: all entries lie in the mapping, aligned, and are made of atomics.
        unsafe { self.mapping.base().add(ENTRIES_AT).cast::<Entry>().add(page).as_ref() }
    }

    /// Where a page's bytes lie.
    pub fn page(&self, page: usize) -> NonNull<u8> {
        assert!(page < PAGES);
        // SAFETY: all pages lie in the mapping.
        unsafe { self.mapping.base().add(BYTES_AT + page * PAGE_BYTES) }
    }

    /// Allocates pages, so that using them neither fails nor faults.
    pub fn populate(&self, first: usize, count: usize) -> rustix::io::Result<()> {
        assert!(first + count <= PAGES);
        let (at, bytes) = (self.page(first).as_ptr().cast(), count * PAGE_BYTES);
        // SAFETY: a part of the mapping; nothing is taken away.
        unsafe { rustix::mm::madvise(at, bytes, Advice::LinuxPopulateWrite) }
    }

    /// Gives back the memory of pages that hold nothing.
    pub fn give_back(&self, first: usize, count: usize) -> rustix::io::Result<()> {
        assert!(first + count <= PAGES);
        let (at, bytes) = (self.page(first).as_ptr().cast(), count * PAGE_BYTES);
        // SAFETY: a part of the mapping, which reads as zeroes afterwards; nobody refers to its bytes.
        unsafe { rustix::mm::madvise(at, bytes, Advice::LinuxRemove) }
    }
}
