//! What is held of one file.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Instant;

use parking_lot::Mutex;
use polytropo_libservices::{Caller, Errno, HandleId, NodeId};
use rustc_hash::FxHashMap;

/// A file some of whose bytes are held.
pub struct HeldFile {
    /// Never used again: tells the file to the keeper, and in the entries.
    pub(super) key: u64,
    pub(super) node: NodeId,
    pub(super) handle: HandleId,
    /// Who wrote the bytes, and by whom they are written.
    pub(super) caller: Caller,
    /// The layer ignores offsets: bytes go behind those that are there.
    pub(super) appends: bool,
    pub(super) late: Arc<LateError>,
    /// Held by who writes back. Taken before `pages`.
    pub(super) writing: Mutex<()>,
    pub(super) pages: Mutex<Pages>,
}

impl HeldFile {
    pub fn appends(&self) -> bool {
        self.appends
    }
}

#[derive(Default)]
pub(super) struct Pages {
    /// By their number in the file.
    pub held: FxHashMap<u64, Page>,
    /// With what is held; None where nobody has looked since the file was changed otherwise.
    pub size_bytes: Option<u64>,
    /// When the oldest bytes came.
    pub since: Option<Instant>,
    /// Nothing is held any more, and nothing will be.
    pub ended: bool,
}

/// A page and which of its bytes count.
#[derive(Clone, Copy)]
pub(super) struct Page {
    /// Which page of the memory.
    pub index: u32,
    pub from: u32,
    pub end: u32,
    /// Somebody is writing it back.
    pub leaving: bool,
    /// The first byte that came since.
    pub touched: Option<u32>,
}

/// What became of writes that had returned: told to whoever asks next, once.
#[derive(Default)]
pub struct LateError(AtomicU32);

impl LateError {
    pub fn set(&self, errno: Errno) {
        self.0.store(errno.raw_os_error() as u32, Relaxed);
    }

    /// 0 if there is none.
    pub fn take(&self) -> u32 {
        if self.0.load(Relaxed) == 0 { 0 } else { self.0.swap(0, Relaxed) }
    }
}

impl Page {
    /// Takes on bytes from `from` to `end`. False if others would lie between, which nobody has.
    pub fn join(&mut self, from: u32, end: u32) -> bool {
        if from > self.end || end < self.from {
            return false;
        }
        (self.from, self.end) = (self.from.min(from), self.end.max(end));
        if self.leaving {
            self.touched = Some(self.touched.map_or(from, |touched| touched.min(from)));
        }
        true
    }
}
