//! Slabs: small files that never change, cached once for all doors of a worker.
//!
//! A file is known by the inode of the layer that holds its bytes, as shared windows are. Files lie one behind the other in slabs of a
//! block's size, which count among the blocks of the cache's budget and go by its policy. Since the service sees each use, the policy works by the
//! file: what is used in the hidden end of a queue, or comes again soon after it went, goes to a slab of the main queue. No program ever maps a slab:
//! it holds files that this one or that one may not read.

mod layer;
mod memory;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::hash::{BuildHasher, BuildHasherDefault};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::{Condvar, Mutex};
use polytropo_libservices::{Content, ContentId, Result};
use rustc_hash::{FxHashMap, FxHashSet, FxHasher};
use serde::Serialize;

use crate::windows::{Admission, Budget, Owner, SLABS_NUMBER};
use memory::{SLAB_BYTES, Slab, Vacant};

pub use layer::SmallFiles;

/// What a file takes beside its bytes, in the tables here. It is counted as a part of its slab, whose last pages stay unused for it.
const BESIDE_BYTES: usize = 192;
/// The largest file that fits.
pub const FILE_BYTES_MAX: u64 = (SLAB_BYTES - BESIDE_BYTES) as u64;
/// Slabs of each kind that are filled at a time: the larger files leave gaps that smaller ones find.
const OPEN_MAX: usize = 4;
/// With a smaller cache there are none.
const BUDGET_BYTES_MIN: u64 = 16 * SLAB_BYTES as u64;
/// Files that went are remembered, as many as there are but not fewer.
const GHOSTS_MIN: usize = 256;

/// See the module.
pub struct Slabs {
    budget: Arc<Budget>,
    inner: Mutex<Inner>,
    /// Somebody is done with filling.
    filled: Condvar,
    /// Held by who makes a slab: others wait and use it.
    making: Mutex<()>,
    vacant: Arc<Vacant>,
    hits: AtomicU64,
    fills: AtomicU64,
}

#[derive(Default)]
struct Inner {
    files: FxHashMap<ContentId, Place>,
    slabs: FxHashMap<u64, Filled>,
    /// Slabs that have room, of files that are new and of those that were used again.
    open: [VecDeque<u64>; 2],
    filling: FxHashSet<ContentId>,
    ghosts: Ghosts,
    last_slab: u64,
    bytes: u64,
    evictions: u64,
}

#[derive(Clone, Copy)]
struct Place {
    slab: u64,
    at: usize,
    bytes: usize,
}

struct Filled {
    slab: Arc<Slab>,
    files: Vec<ContentId>,
    /// Where the next file's bytes go.
    end: usize,
    /// With what the files take beside their bytes.
    counted: usize,
    hidden: bool,
    admission: Admission,
}

/// Files that were evicted without having been used again, by a hash.
#[derive(Default)]
struct Ghosts {
    known: FxHashSet<u64>,
    order: VecDeque<u64>,
}

/// What is there, and what became of reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SlabStatistics {
    /// Of the cache.
    pub slab_bytes: u64,
    pub files: u64,
    /// Of these files.
    pub file_bytes: u64,
    /// Reads that were answered from here.
    pub hits: u64,
    /// Files read from the layers below.
    pub fills: u64,
    /// Files that had to go.
    pub evictions: u64,
}

impl Slabs {
    /// None where the cache is too small for it.
    pub fn new(budget: Arc<Budget>) -> Option<Arc<Self>> {
        (budget.bytes_max() >= BUDGET_BYTES_MIN).then(|| {
            Arc::new(Self {
                budget,
                inner: Mutex::default(),
                filled: Condvar::new(),
                making: Mutex::new(()),
                vacant: Arc::default(),
                hits: AtomicU64::new(0),
                fills: AtomicU64::new(0),
            })
        })
    }

    /// Whether such a file is kept here.
    pub fn serves(content: &Content) -> bool {
        content.size_bytes <= FILE_BYTES_MAX
    }

    pub fn contains(&self, content: &Content) -> bool {
        self.inner.lock().files.contains_key(&content.id)
    }

    /// Reads a file that is here. None: it is not.
    pub fn read(self: &Arc<Self>, content: &Content, offset: u64, buffer: &mut [u8]) -> Option<usize> {
        let (slab, place, hidden) = {
            let inner = self.inner.lock();
            let place = *inner.files.get(&content.id)?;
            let filled = inner.slabs.get(&place.slab)?;
            (filled.slab.clone(), place, filled.hidden)
        };
        let from = usize::try_from(offset).map_or(place.bytes, |offset| offset.min(place.bytes));
        let count = buffer.len().min(place.bytes - from);
        if !slab.take(place.at + from, &mut buffer[..count]) {
            return None;
        }
        self.hits.fetch_add(1, Relaxed);
        if hidden {
            self.move_up(content.id, &slab, place);
        }
        Some(count)
    }

    /// Reads a file, and if need be has it read from below first: all of it, and once, however many ask for it. None: what is below has not the size
    /// that was told.
    pub fn read_or_fill(
        self: &Arc<Self>,
        content: &Content,
        offset: u64,
        buffer: &mut [u8],
        read_all: impl FnOnce(&mut [u8]) -> Result<usize>,
    ) -> Result<Option<usize>> {
        let Some(size) = usize::try_from(content.size_bytes).ok().filter(|_| Self::serves(content)) else {
            return Ok(None);
        };
        let _filling = loop {
            if let Some(count) = self.read(content, offset, buffer) {
                return Ok(Some(count));
            }
            let mut inner = self.inner.lock();
            if inner.files.contains_key(&content.id) {
                continue;
            }
            if inner.filling.insert(content.id) {
                break Filling { slabs: self, id: content.id };
            }
            self.filled.wait(&mut inner);
        };
        self.fills.fetch_add(1, Relaxed);
        if offset == 0 && buffer.len() >= size {
            let all = &mut buffer[..size];
            if read_all(all)? != size {
                return Ok(None);
            }
            self.keep(content.id, all, Admission::New);
            return Ok(Some(size));
        }
        let mut all = vec![0; size];
        if read_all(&mut all)? != size {
            return Ok(None);
        }
        self.keep(content.id, &all, Admission::New);
        let from = usize::try_from(offset).map_or(size, |offset| offset.min(size));
        let count = buffer.len().min(size - from);
        buffer[..count].copy_from_slice(&all[from..from + count]);
        Ok(Some(count))
    }

    /// It is used where it would go next.
    fn move_up(self: &Arc<Self>, id: ContentId, slab: &Slab, place: Place) {
        let mut bytes = vec![0; place.bytes];
        if !slab.take(place.at, &mut bytes) {
            return;
        }
        let mut inner = self.inner.lock();
        // Not if somebody else did meanwhile.
        if inner.files.get(&id).is_some_and(|now| now.slab == place.slab) {
            inner.drop_file(id);
            drop(inner);
            self.keep(id, &bytes, Admission::Used);
        }
    }

    /// Puts a file's bytes into a slab. It may find no room; then it is read from below again.
    fn keep(self: &Arc<Self>, id: ContentId, bytes: &[u8], admission: Admission) {
        let admission = if self.inner.lock().ghosts.take(id) { Admission::Used } else { admission };
        let Some((slab, place)) = self.room_for(bytes.len(), admission) else { return };
        // SAFETY: the range was given to us alone, and nobody knows of it before `files` does.
        if !unsafe { slab.put(place.at, bytes) } {
            return;
        }
        let inner = &mut *self.inner.lock();
        // By now it may have been evicted.
        let Some(filled) = inner.slabs.get_mut(&place.slab) else { return };
        if inner.files.contains_key(&id) {
            return;
        }
        filled.files.push(id);
        inner.files.insert(id, place);
        inner.bytes += place.bytes as u64;
    }

    fn room_for(self: &Arc<Self>, bytes: usize, admission: Admission) -> Option<(Arc<Slab>, Place)> {
        if let Some(found) = self.inner.lock().room_for(bytes, admission) {
            return Some(found);
        }
        let _making = self.making.lock();
        if let Some(found) = self.inner.lock().room_for(bytes, admission) {
            return Some(found);
        }
        let number = {
            let mut inner = self.inner.lock();
            inner.last_slab += 1;
            inner.last_slab
        };
        // With no lock that evicting takes.
        let _reserved = self.budget.reserve(self, number, admission);
        let slab = match Slab::new(&self.vacant) {
            Ok(slab) => Arc::new(slab),
            Err(errno) => {
                log::warn!("memory for small files cannot be had: {errno}");
                self.budget.drop_block(SLABS_NUMBER, number);
                return None;
            }
        };
        let mut inner = self.inner.lock();
        inner.add(number, slab, admission);
        inner.room_for(bytes, admission)
    }

    pub fn statistics(&self) -> SlabStatistics {
        let inner = self.inner.lock();
        SlabStatistics {
            slab_bytes: (inner.slabs.len() * SLAB_BYTES) as u64,
            files: inner.files.len() as u64,
            file_bytes: inner.bytes,
            hits: self.hits.load(Relaxed),
            fills: self.fills.load(Relaxed),
            evictions: inner.evictions,
        }
    }
}

impl Owner for Slabs {
    fn number(&self) -> u64 {
        SLABS_NUMBER
    }

    fn hide(&self, block: u64) {
        if let Some(filled) = self.inner.lock().slabs.get_mut(&block) {
            filled.hidden = true;
        }
    }

    fn evict(&self, block: u64) {
        let gone = self.inner.lock().remove(block);
        if let Some(slab) = gone {
            slab.give_back();
        }
    }
}

/// A file that somebody is reading from below, for all.
struct Filling<'a> {
    slabs: &'a Slabs,
    id: ContentId,
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        self.slabs.inner.lock().filling.remove(&self.id);
        self.slabs.filled.notify_all();
    }
}

impl Inner {
    fn add(&mut self, number: u64, slab: Arc<Slab>, admission: Admission) {
        let (files, end, counted, hidden) = Default::default();
        self.slabs.insert(number, Filled { slab, files, end, counted, hidden, admission });
        let open = &mut self.open[admission as usize];
        open.push_back(number);
        if open.len() > OPEN_MAX {
            open.pop_front();
        }
    }

    /// Takes a range of an open slab.
    fn room_for(&mut self, bytes: usize, admission: Admission) -> Option<(Arc<Slab>, Place)> {
        for number in &self.open[admission as usize] {
            let Some(filled) = self.slabs.get_mut(number) else { continue };
            if filled.hidden || filled.counted + bytes + BESIDE_BYTES > SLAB_BYTES {
                continue;
            }
            let place = Place { slab: *number, at: filled.end, bytes };
            filled.end += bytes;
            filled.counted += bytes + BESIDE_BYTES;
            return Some((filled.slab.clone(), place));
        }
        None
    }

    fn remove(&mut self, number: u64) -> Option<Arc<Slab>> {
        let gone = self.slabs.remove(&number)?;
        self.open.iter_mut().for_each(|open| open.retain(|other| *other != number));
        for id in gone.files {
            if self.files.get(&id).is_none_or(|place| place.slab != number) {
                continue;
            }
            self.drop_file(id);
            self.evictions += 1;
            if gone.admission == Admission::New {
                self.ghosts.add(id, self.files.len().max(GHOSTS_MIN));
            }
        }
        Some(gone.slab)
    }

    fn drop_file(&mut self, id: ContentId) {
        if let Some(place) = self.files.remove(&id) {
            self.bytes -= place.bytes as u64;
        }
    }
}

impl Ghosts {
    fn hash(id: ContentId) -> u64 {
        BuildHasherDefault::<FxHasher>::default().hash_one(id)
    }

    fn add(&mut self, id: ContentId, most: usize) {
        let hash = Self::hash(id);
        if self.known.insert(hash) {
            self.order.push_back(hash);
        }
        while self.order.len() > most {
            let oldest = self.order.pop_front();
            oldest.inspect(|oldest| _ = self.known.remove(oldest));
        }
    }

    /// What is left of it in the order goes with its turn.
    fn take(&mut self, id: ContentId) -> bool {
        self.known.remove(&Self::hash(id))
    }
}
