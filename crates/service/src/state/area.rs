//! The memory itself, as worker and keeper map it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::{Relaxed, Release};

use super::layout::*;
use crate::sealed::{self, Mapping};

/// Made by the keeper, for one door. Pages are allocated as they are touched.
pub fn make(door: u64) -> rustix::io::Result<OwnedFd> {
    let descriptor = sealed::make("polytropo-state", TOTAL_BYTES)?;
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
    mapping: Mapping,
}

impl Area {
    /// EINVAL for what has another size.
    pub fn map(descriptor: impl AsFd, writable: bool) -> rustix::io::Result<Self> {
        Ok(Self { mapping: Mapping::of(descriptor, TOTAL_BYTES, writable)? })
    }

    pub fn header(&self) -> &Header {
        // SAFETY: begins the mapping, page-aligned, and is made of atomics.
        unsafe { self.mapping.base().cast().as_ref() }
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
        unsafe { self.mapping.base().add(start).cast::<T>().add(index).as_ref() }
    }
}
