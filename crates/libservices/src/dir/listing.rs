//! Reading directories, by the host's own cookies.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{self, OFlags, RawDir, SeekFrom};

use super::nodes::Node;
use super::{Dir, stale, sys};
use crate::error::{Attempt, Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

const BUFFER_SIZE_BYTES: usize = 32 * 1024;

/// One open directory.
pub struct Listing {
    host: OwnedFd,
    node: Arc<Node>,
    /// One reader at a time: the host's position is shared.
    batch: Mutex<Batch>,
}

/// Entries that the host gave and that were not taken yet.
#[derive(Default)]
struct Batch {
    entries: std::collections::VecDeque<Held>,
    /// The offset of the first entry in `entries`.
    position: u64,
}

struct Held {
    next_offset: u64,
    ino: u64,
    file_type: u32,
    name: Box<Name>,
}

impl Dir {
    pub(super) fn open_listing(&self, node: NodeId) -> Result<HandleId> {
        let node = self.node(node)?;
        if !node.is_dir() {
            return Err(Error::new(Errno::NOTDIR, "list something that is no directory"));
        }
        let host = self.open_directory(&node)?;
        Ok(self.listings.insert(Listing { host, node, batch: Mutex::default() }))
    }

    fn open_directory(&self, node: &Arc<Node>) -> Result<OwnedFd> {
        let fd = self.reach(node)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let opened = self.with_room(|| sys::open_self(&*fd, flags, rustix::fs::Mode::empty()));
        match opened {
            Err(Errno::NOENT) => Err(stale(Errno::NOENT)),
            done => done.attempt("open a directory"),
        }
    }

    pub(super) fn list(&self, handle: HandleId, offset: u64, sink: &mut DirSink<'_>) -> Result<()> {
        let listing = self.listings.get(handle)?;
        listing.feed(offset, |held| sink(held.entry()))
    }

    pub(super) fn list_plus(&self, handle: HandleId, offset: u64, sink: &mut DirPlusSink<'_>) -> Result<()> {
        let listing = self.listings.get(handle)?;
        listing.feed(offset, |held| {
            let found = self.look_up(&listing.node, &held.name).ok();
            let taken = sink(held.entry(), found.as_ref());
            if let (false, Some(found)) = (taken, &found) {
                self.nodes.forget(found.node, 1);
            }
            taken
        })
    }

    pub(super) fn sync_listing(&self, handle: HandleId, data_only: bool) -> Result<()> {
        let listing = self.listings.get(handle)?;
        let done = if data_only { fs::fdatasync(&listing.host) } else { fs::fsync(&listing.host) };
        done.attempt("make a directory durable")
    }
}

impl Held {
    fn entry(&self) -> DirEntry<'_> {
        DirEntry { next_offset: self.next_offset, ino: self.ino, file_type: self.file_type, name: &self.name }
    }
}

impl Listing {
    /// Feeds entries from `offset` on until `take` refuses one or the directory ends.
    fn feed(&self, offset: u64, mut take: impl FnMut(&Held) -> bool) -> Result<()> {
        let mut batch = self.batch.lock();
        if offset == 0 || offset != batch.position {
            fs::seek(&self.host, SeekFrom::Start(offset)).attempt("move in a directory")?;
            *batch = Batch { position: offset, ..Batch::default() };
        }
        loop {
            while let Some(held) = batch.entries.front() {
                if !take(held) {
                    return Ok(());
                }
                batch.position = held.next_offset;
                batch.entries.pop_front();
            }
            if !self.fill(&mut batch)? {
                return Ok(());
            }
        }
    }

    /// Reads on from where the host stands. Says whether there was anything more.
    fn fill(&self, batch: &mut Batch) -> Result<bool> {
        let mut buffer = [const { MaybeUninit::uninit() }; BUFFER_SIZE_BYTES];
        let mut entries = RawDir::new(&self.host, &mut buffer);
        let mut any = false;
        while let Some(entry) = entries.next() {
            let entry = entry.attempt("read a directory")?;
            any = true;
            // `.` and `..` are the door's.
            if let Ok(name) = Name::new(entry.file_name().to_bytes()) {
                batch.entries.push_back(Held {
                    next_offset: entry.next_entry_cookie(),
                    ino: entry.ino(),
                    file_type: entry.file_type().as_raw_mode(),
                    name: name.to_boxed(),
                });
            }
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(any)
    }
}
