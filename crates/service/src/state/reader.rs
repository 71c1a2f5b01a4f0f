//! The keeper's side: reads what a worker, alive, dead or hostile, has left.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::fence;

use super::area::Area;
use super::door::{self, Agreed};
use super::layout::{CAPACITY, Entry, MAGIC, OpenRecord, VERSION};
use super::nodes::{self, Nodes};

/// How often an entry is looked at that changes while it is read; a dead worker's do not.
const LOOKS_MAX: u32 = 8;

/// A door's open files, as the keeper sees them.
pub struct StateReader(Area);

/// What was found.
#[derive(Debug, Default)]
pub struct OpenFiles {
    pub files: Vec<OpenRecord>,
    /// Open files for which the table had no room.
    pub untold: u64,
    /// Entries that make no sense: the worker has broken its own area.
    pub damaged: u64,
}

pub(super) enum Found {
    Nothing,
    Whole(OpenRecord),
    Damaged,
}

impl StateReader {
    pub fn new(descriptor: &OwnedFd) -> rustix::io::Result<Self> {
        Ok(Self(Area::map(descriptor, false)?))
    }

    /// None if the header makes no sense, or is of another version.
    pub fn open_files(&self) -> Option<OpenFiles> {
        let header = self.0.header();
        let known = header.magic.load(Acquire) == MAGIC
            && header.version.load(Relaxed) == VERSION
            && header.entry_bytes.load(Relaxed) as usize == size_of::<Entry>()
            && header.capacity.load(Relaxed) == CAPACITY as u64;
        if !known {
            return None;
        }
        let used = usize::try_from(header.used.load(Acquire)).unwrap_or(CAPACITY).min(CAPACITY);
        let mut found = OpenFiles { untold: header.untold.load(Relaxed), ..OpenFiles::default() };
        for index in 0..used {
            match look(self.0.entry(index)) {
                Found::Nothing => {}
                Found::Whole(record) => found.files.push(record),
                Found::Damaged => found.damaged += 1,
            }
        }
        Some(found)
    }

    /// The nodes that the kernel holds.
    pub fn nodes(&self) -> Nodes {
        nodes::read(&self.0)
    }

    /// What the worker has agreed on with the kernel; None before.
    pub fn agreed(&self) -> Option<Agreed> {
        door::agreed(&self.0)
    }
}

pub(super) fn look(entry: &Entry) -> Found {
    for _ in 0..LOOKS_MAX {
        let commit = entry.commit.load(Acquire);
        if commit & 1 == 0 {
            return Found::Nothing;
        }
        let words = std::array::from_fn(|at| entry.words[at].load(Relaxed));
        fence(Acquire);
        if entry.commit.load(Relaxed) == commit {
            return OpenRecord::from_words(&words).map_or(Found::Damaged, Found::Whole);
        }
    }
    Found::Damaged
}
