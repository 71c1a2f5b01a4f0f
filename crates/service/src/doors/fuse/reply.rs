//! An answer while it is made.

use std::time::Duration;

use polytropo_libservices::{Attr, Entry, Errno, Error, HandleId, NodeId, Result};
use zerocopy::{Immutable, IntoBytes};

use super::abi;

/// What the kernel holds once it has the answer, and nobody holds if it never gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// By the kernel's number.
    LookUp(u64),
    File(NodeId, HandleId),
    Directory(NodeId, HandleId),
}

/// The payload of an answer. Its memory is page-aligned and reused.
pub struct Reply<'a> {
    buffer: &'a mut [u8],
    len: usize,
    pub held: &'a mut Vec<Held>,
    /// The answer is a success to the kernel, but says that there is nothing.
    pub nothing_there: bool,
    /// Workers died of the request.
    pub given_up: bool,
}

impl<'a> Reply<'a> {
    pub fn new(buffer: &'a mut [u8], held: &'a mut Vec<Held>) -> Self {
        held.clear();
        Self { buffer, len: 0, held, nothing_there: false, given_up: false }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// What is left of the buffer, or of `limit` if that is less.
    pub fn room(&mut self, limit: usize) -> &mut [u8] {
        let rest = &mut self.buffer[self.len..];
        let count = rest.len().min(limit);
        &mut rest[..count]
    }

    /// Says that the first `count` bytes of `room` were filled.
    pub fn filled(&mut self, count: usize) {
        self.len = (self.len + count).min(self.buffer.len());
    }

    pub fn put<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<()> {
        self.put_bytes(value.as_bytes())
    }

    pub fn put_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let room = self.room(bytes.len());
        if room.len() < bytes.len() {
            return Err(Error::new(Errno::RANGE, "answer with more than fits"));
        }
        room.copy_from_slice(bytes);
        self.filled(bytes.len());
        Ok(())
    }
}

/// How long the kernel may believe what it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub entry: Duration,
    pub attributes: Duration,
    /// A name that is not there.
    pub negative: Duration,
}

impl Timeouts {
    pub const NONE: Self =
        Self { entry: Duration::ZERO, attributes: Duration::ZERO, negative: Duration::ZERO };

    pub fn entry_out(&self, entry: &Entry) -> abi::EntryOut {
        abi::EntryOut {
            nodeid: entry.node.0,
            generation: entry.generation,
            entry_valid: self.entry.as_secs(),
            entry_valid_nsec: self.entry.subsec_nanos(),
            attr_valid: self.attributes.as_secs(),
            attr_valid_nsec: self.attributes.subsec_nanos(),
            attr: attr(&entry.attr),
        }
    }

    pub fn attr_out(&self, found: &Attr) -> abi::AttrOut {
        abi::AttrOut {
            attr_valid: self.attributes.as_secs(),
            attr_valid_nsec: self.attributes.subsec_nanos(),
            attr: attr(found),
            ..Default::default()
        }
    }

    pub fn negative_out(&self) -> abi::EntryOut {
        abi::EntryOut {
            entry_valid: self.negative.as_secs(),
            entry_valid_nsec: self.negative.subsec_nanos(),
            ..Default::default()
        }
    }

    pub fn statx_out(&self, found: &Attr) -> abi::StatxOut {
        abi::StatxOut {
            attr_valid: self.attributes.as_secs(),
            attr_valid_nsec: self.attributes.subsec_nanos(),
            stat: statx(found),
            ..Default::default()
        }
    }
}

fn attr(found: &Attr) -> abi::Attr {
    abi::Attr {
        ino: found.ino,
        size: found.size_bytes,
        blocks: found.blocks_512,
        // Times before 1970 travel as two's complement.
        atime: found.atime.seconds as u64,
        mtime: found.mtime.seconds as u64,
        ctime: found.ctime.seconds as u64,
        atimensec: found.atime.nanoseconds,
        mtimensec: found.mtime.nanoseconds,
        ctimensec: found.ctime.nanoseconds,
        mode: found.mode,
        nlink: found.nlink,
        uid: found.uid,
        gid: found.gid,
        // The lower half of makedev(3)'s packing is the kernel's own.
        rdev: found.rdev as u32,
        blksize: found.blksize_bytes,
        flags: 0,
    }
}

fn statx(found: &Attr) -> abi::Statx {
    let time = |t: polytropo_libservices::Timestamp| abi::SxTime {
        tv_sec: t.seconds,
        tv_nsec: t.nanoseconds,
        reserved: 0,
    };
    let born = if found.btime.is_some() { libc::STATX_BTIME } else { 0 };
    abi::Statx {
        mask: libc::STATX_BASIC_STATS | born,
        blksize: found.blksize_bytes,
        nlink: found.nlink,
        uid: found.uid,
        gid: found.gid,
        mode: found.mode as u16,
        ino: found.ino,
        size: found.size_bytes,
        blocks: found.blocks_512,
        atime: time(found.atime),
        btime: time(found.btime.unwrap_or_default()),
        ctime: time(found.ctime),
        mtime: time(found.mtime),
        rdev_major: libc::major(found.rdev),
        rdev_minor: libc::minor(found.rdev),
        ..Default::default()
    }
}
