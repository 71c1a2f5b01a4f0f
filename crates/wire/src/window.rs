//! A window: one file's cached bytes in a file of the service's private tmpfs, which programs map read-only.
//!
//! First a [`Header`], then a word for each block, then, at the next multiple of 2 MiB, the bytes themselves. A reader loads the size and
//! a block's word, copies, and loads both again: what it copied counts if the block was resident and neither has changed.
//! Only the service writes. It makes a block not resident before it changes or drops the bytes, and resident with another
//! generation after they are there.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

pub const MAGIC: u64 = u64::from_le_bytes(*b"POLYWIND");
pub const BLOCK_BYTES: u64 = 64 << 10;
/// The blocks' words begin here.
pub const WORDS_AT: u64 = 4096;
const ALIGNMENT: u64 = 2 << 20;
/// Largest file that gets a window: its words fit into 64 MiB.
pub const FILE_BYTES_MAX: u64 = 512 << 30;

/// The size word while the file's size is not known: ask the service.
pub const SIZE_UNKNOWN: u64 = u64::MAX;
/// Bit of a block's word; the rest is its generation.
pub const RESIDENT: u64 = 1;
pub const ONE_GENERATION: u64 = 2;

#[repr(C, align(128))]
pub struct Header {
    pub magic: AtomicU64,
    pub version: AtomicU32,
    /// Not 0: the window is given up; ask for another.
    pub retired: AtomicU32,
    /// Bytes that the window has room for; never changes.
    pub capacity_bytes: AtomicU64,
    /// Bytes of the file, or [`SIZE_UNKNOWN`].
    pub size_bytes: AtomicU64,
}

/// Where things lie in a window with room for `capacity_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub capacity_bytes: u64,
}

impl Geometry {
    /// None above [`FILE_BYTES_MAX`]. Room is made for whole blocks, at least one.
    pub fn of(bytes: u64) -> Option<Self> {
        let capacity_bytes = bytes.max(1).checked_next_multiple_of(BLOCK_BYTES)?;
        (capacity_bytes <= FILE_BYTES_MAX).then_some(Self { capacity_bytes })
    }

    pub fn blocks(self) -> u64 {
        self.capacity_bytes / BLOCK_BYTES
    }

    /// Where the bytes begin.
    pub fn bytes_at(self) -> u64 {
        (WORDS_AT + self.blocks() * 8).next_multiple_of(ALIGNMENT)
    }

    pub fn total_bytes(self) -> u64 {
        self.bytes_at() + self.capacity_bytes
    }
}

/// Copies bytes of one block if they are valid: `copy` is called between the two looks. Sound only as a hint of what to do next;
/// what was copied counts if this tells true.
#[inline]
pub fn read_block(word: &AtomicU64, size: &AtomicU64, expected_size: u64, copy: impl FnOnce()) -> bool {
    let before = word.load(Ordering::Acquire);
    if before & RESIDENT == 0 {
        return false;
    }
    copy();
    // The copy's loads come before the second looks.
    fence(Ordering::Acquire);
    word.load(Ordering::Relaxed) == before && size.load(Ordering::Relaxed) == expected_size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lays_windows_out() {
        let small = Geometry::of(0).unwrap();
        assert_eq!((small.capacity_bytes, small.blocks(), small.bytes_at()), (BLOCK_BYTES, 1, ALIGNMENT));
        let large = Geometry::of(FILE_BYTES_MAX).unwrap();
        assert!(large.bytes_at() >= WORDS_AT + large.blocks() * 8);
        assert_eq!(Geometry::of(FILE_BYTES_MAX + 1), None);
        assert_eq!(Geometry::of(u64::MAX), None);
    }

    #[test]
    fn what_changes_meanwhile_does_not_count() {
        let (word, size) = (AtomicU64::new(RESIDENT), AtomicU64::new(5));
        assert!(read_block(&word, &size, 5, || {}));
        assert!(!read_block(&word, &size, 5, || word.store(ONE_GENERATION | RESIDENT, Ordering::Relaxed)));
        assert!(!read_block(&word, &size, 5, || size.store(4, Ordering::Relaxed)));
        word.store(0, Ordering::Relaxed);
        assert!(!read_block(&word, &size, 4, || panic!("not resident")));
    }
}
