//! A window: one file's cached bytes in a file of the service's private tmpfs, which programs map read-only.
//!
//! First a [`Header`], then a word for each block, then, at the next multiple of 2 MiB, the bytes themselves. A reader loads the size and
//! a block's word, copies, and loads both again: what it copied counts if the block was resident and neither has changed.
//! Only the service writes. It makes a block not resident before it changes or drops the bytes, and resident with another
//! generation after they are there ([`View`]).

mod view;

use crate::sync::{AtomicU32, AtomicU64};

pub use view::{Changes, Found, View};

pub const MAGIC: u64 = u64::from_le_bytes(*b"POLYWIND");
pub const BLOCK_BYTES: u64 = 64 << 10;
/// The blocks' words begin here.
pub const WORDS_AT: u64 = 4096;
const ALIGNMENT: u64 = 2 << 20;
/// Largest file that gets a window: its words fit into 64 MiB.
pub const FILE_BYTES_MAX: u64 = 512 << 30;

/// The size word while the file's size is not known: ask the service.
pub const SIZE_UNKNOWN: u64 = u64::MAX;
/// Bit of a block's word: readers may believe the bytes.
pub const RESIDENT: u64 = 1;
/// Bit of a block's word: the bytes are in place, for the service to know. Without `RESIDENT` the block is hidden.
pub const KEPT: u64 = 2;
/// The rest of a word is the block's generation.
pub const ONE_GENERATION: u64 = 4;

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

    fn header(size_bytes: u64) -> Header {
        Header {
            magic: AtomicU64::new(MAGIC),
            version: AtomicU32::new(crate::VERSION),
            retired: AtomicU32::new(0),
            capacity_bytes: AtomicU64::new(2 * BLOCK_BYTES),
            size_bytes: AtomicU64::new(size_bytes),
        }
    }

    #[test]
    fn reads_what_is_there_and_says_what_is_not() {
        let (header, words) = (header(BLOCK_BYTES + 5), [AtomicU64::new(RESIDENT | KEPT), AtomicU64::new(0)]);
        let (view, mut changes) = (View::new(&header, &words), Changes::default());
        let read = |count, offset| {
            let mut parts = 0;
            (view.read(count, offset, |done, at, part| parts += done + at as usize + part), parts)
        };
        assert_eq!(read(10, 7), (Found::Bytes(10), 17));
        assert_eq!(read(10, BLOCK_BYTES + 5), (Found::Bytes(0), 0));
        assert_eq!(read(10, u64::MAX), (Found::Bytes(0), 0));
        assert_eq!(read(10, BLOCK_BYTES - 4).0, Found::Missing(BLOCK_BYTES));
        assert_eq!(view.fill(&changes, 0, 1, || Ok::<(), ()>(())), Ok(true));
        assert_eq!(read(100, BLOCK_BYTES - 4).0, Found::Bytes(9));
        assert_eq!(view.fill(&changes, 1, 1, || Ok::<(), ()>(())), Ok(false), "it changed");
        assert_eq!(view.fill(&changes, 0, 2, || Ok::<(), ()>(())), Ok(false), "there is no such block");
        assert!(view.hide(&changes, 0) && !view.hide(&changes, 0));
        assert_eq!(read(1, 0).0, Found::Missing(0));
        assert!(view.show_again(&changes, 0) && view.show_again(&changes, 0));
        assert_eq!(read(1, 0).0, Found::Bytes(1));
        assert!(view.hide(&changes, 0) && view.take_back(&changes, 0) && !view.take_back(&changes, 0));
        assert!(!view.show_again(&changes, 0), "its bytes are not in place any more");
        assert_eq!(read(1, 0).0, Found::Missing(0));
        view.forget(&mut changes);
        assert!(!view.is_resident(0) && !view.set_size(&changes, 0, 5) && view.set_size(&changes, 1, 5));
        assert_eq!(read(1, 0).0, Found::Missing(0));
        view.retire(&mut changes);
        assert_eq!(read(1, 0).0, Found::Retired);
    }

    #[test]
    fn a_size_beyond_the_window_is_not_believed() {
        let (header, words) = (header(2 * BLOCK_BYTES), [AtomicU64::new(RESIDENT)]);
        let found = View::new(&header, &words).read(1, 0, |_, _, _| panic!("nothing to copy"));
        assert_eq!(found, Found::Stale);
    }

    #[test]
    fn what_changes_meanwhile_does_not_count() {
        let (header, words) = (header(5), [AtomicU64::new(RESIDENT | KEPT)]);
        let (view, changes) = (View::new(&header, &words), Changes::default());
        let again = || {
            assert!(view.hide(&changes, 0) && view.show_again(&changes, 0));
        };
        assert_eq!(view.read(5, 0, |_, _, _| again()), Found::Missing(0));
        let cut = |_: usize, _: u64, _: usize| assert!(view.set_size(&changes, 0, 4));
        assert_eq!(view.read(5, 0, cut), Found::Stale);
        assert_eq!(view.read(5, 0, |_, _, _| {}), Found::Bytes(4));
    }
}
