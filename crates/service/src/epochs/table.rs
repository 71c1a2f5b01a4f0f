//! The table of epochs in memory that programs map and cannot write.

use std::hash::{BuildHasher, RandomState};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Relaxed, Release};

use polytropo_libservices::Name;
use polytropo_wire::VERSION;
use polytropo_wire::epochs::{COUNTERS, COUNTERS_AT, EVERYTHING, Epoch, Header, MAGIC, TOTAL_BYTES};
use rustix::io::Result;

use crate::sealed::{self, Mapping};

/// The counters of one stack.
pub struct Table {
    memory: Mapping,
    descriptor: OwnedFd,
    /// Which inodes share a counter is nobody's to know.
    secret: RandomState,
}

impl Table {
    pub fn new() -> Result<Self> {
        let (descriptor, memory) = sealed::make_shown("polytropo-epochs", TOTAL_BYTES)?;
        memory.allocate(TOTAL_BYTES);
        let made = Self { memory, descriptor, secret: RandomState::new() };
        made.header().version.store(VERSION.into(), Relaxed);
        made.header().counters.store(COUNTERS as u64, Relaxed);
        made.header().magic.store(MAGIC, Release);
        Ok(made)
    }

    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    fn header(&self) -> &Header {
        // SAFETY: the header lies at the mapping's base, page-aligned, and is made of atomics.
        unsafe { self.memory.base().cast().as_ref() }
    }

    pub fn epoch(&self, counter: u16) -> &Epoch {
        assert!(usize::from(counter) < COUNTERS);
        // SAFETY: that many counters lie in the mapping, aligned; they are made of atomics.
        unsafe { self.memory.base().add(COUNTERS_AT).cast::<Epoch>().add(usize::from(counter)).as_ref() }
    }

    /// What an answer may be tagged with; None while a change is under way.
    pub fn sample(&self, counter: u16) -> Option<u64> {
        self.epoch(counter).sample()
    }

    /// The counter of an inode's attributes, and of what a directory lists.
    pub fn of_inode(&self, ino: u64) -> u16 {
        Self::fold(self.secret.hash_one(ino))
    }

    /// The counter of what a name in a directory stands for.
    pub fn of_name(&self, directory_ino: u64, name: &Name) -> u16 {
        Self::fold(self.secret.hash_one((directory_ino, name.as_bytes())))
    }

    fn fold(hash: u64) -> u16 {
        const _: () = assert!(EVERYTHING == 0);
        // Never the one of everything.
        (hash % (COUNTERS as u64 - 1)) as u16 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FallocateFlags, Mode, OFlags};
    use rustix::io::Errno;
    use rustix::mm::{MapFlags, ProtFlags};
    use std::os::fd::AsRawFd;

    /// Also as root, which may open anything again for writing.
    #[test]
    fn nobody_else_can_write_it() {
        let table = Table::new().unwrap();
        let again = format!("/proc/self/fd/{}", table.descriptor().as_raw_fd());
        let Ok(opened) = rustix::fs::open(&again, OFlags::RDWR, Mode::empty()) else { return };
        assert_eq!(rustix::io::pwrite(&opened, b"x", 4096), Err(Errno::PERM));
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(rustix::fs::fallocate(&opened, hole, 4096, 4096), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&opened, 0), Err(Errno::PERM));
        let map = |protection| {
            // SAFETY: a new mapping, wherever the kernel likes; it is never touched.
            unsafe {
                rustix::mm::mmap(std::ptr::null_mut(), 4096, protection, MapFlags::SHARED, &opened, 4096)
            }
        };
        assert_eq!(map(ProtFlags::READ | ProtFlags::WRITE).err(), Some(Errno::PERM));
        let seen = map(ProtFlags::READ).unwrap();
        // SAFETY: the mapping just made.
        let opened_up = unsafe {
            rustix::mm::mprotect(
                seen,
                4096,
                rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE,
            )
        };
        assert_eq!(opened_up, Err(Errno::ACCESS));
        table.epoch(1).begin();
        // SAFETY: mapped for reading, page-aligned.
        assert_ne!(unsafe { seen.cast::<u64>().add(1).read_volatile() }, 0);
    }

    #[test]
    fn counters_are_not_the_one_of_everything() {
        let table = Table::new().unwrap();
        assert!((0..100_000).all(|ino| (1..COUNTERS as u16).contains(&table.of_inode(ino))));
    }
}
