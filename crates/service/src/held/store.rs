//! Takes bytes in.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use polytropo_libservices::{Caller, Errno, Error, HandleId, Libservice, NodeId, OpenFlags, Result};
use rustc_hash::FxHashMap;

use super::bell::Bell;
use super::file::{HeldFile, LateError, Page, Pages};
use super::layout::{Area, PAGE_BYTES, PAGES, range_word};
use crate::windows::{Budget, Use};

/// Files of one door of which something is held: the keeper has a descriptor of each.
pub const FILES_MAX: usize = 128;
/// Pages that are allocated at a time.
const GROW_PAGES: usize = 512;
/// With no more than so many free ones the next are allocated.
const SPARE_PAGES: usize = 256;
/// How often room is made for a piece before it is written at once.
const TRIES_MAX: usize = 3;
/// Of the tenant's cache, the part that may be held.
const CACHE_SHARE: u64 = 4;

/// Has a file in safe-keeping, for the case that this process dies.
pub trait Custodian: Send + Sync {
    fn keep(&self, key: u64, file: BorrowedFd<'_>) -> rustix::io::Result<()>;
    fn let_go(&self, key: u64);
}

/// The held writes of one door.
pub struct Held {
    pub(super) area: Area,
    pub(super) below: Arc<dyn Libservice>,
    custodian: Box<dyn Custodian>,
    budget: Arc<Budget>,
    pub(super) pages_max: usize,
    pub(super) files: Mutex<Files>,
    /// How many files there are, for those who find none.
    count: AtomicUsize,
    pub(super) slots: Mutex<Slots>,
    /// Held while pages are allocated or given back. Taken before `slots`.
    growing: Mutex<()>,
    /// Wakes who looks after it.
    pub(super) bell: Arc<Bell>,
    /// To be told of files whose held bytes are lost.
    pub(super) lost: OnceLock<Lost>,
    pub(super) scratch: Mutex<Vec<u8>>,
}

type Lost = Box<dyn Fn(NodeId) + Send + Sync>;

#[derive(Default)]
pub(super) struct Files {
    pub by_node: FxHashMap<NodeId, Arc<HeldFile>>,
    last_key: u64,
    pub ended: bool,
    pub watched: bool,
}

/// Pages of the memory.
#[derive(Default)]
pub(super) struct Slots {
    free: Vec<u32>,
    /// Those below are allocated.
    pub grown: usize,
    /// What could not be had once is not asked for again.
    refused: bool,
    pub used: usize,
}

/// The place of bytes that are to be held: where they come from, and how many.
#[derive(Clone, Copy)]
pub struct Source {
    pub bytes: NonNull<u8>,
    pub count: usize,
}

/// Bytes now held: at an offset of the file, so many, and the size of the file with them.
pub struct Piece {
    pub offset: u64,
    pub bytes: NonNull<u8>,
    pub count: usize,
    pub size_bytes: u64,
}

enum Took {
    Yes(u32),
    /// What the page holds has to be written first.
    NotBeside,
    NoRoom,
}

impl Held {
    /// None where the tenant has no cache.
    pub fn new(
        memory: &OwnedFd,
        below: Arc<dyn Libservice>,
        budget: Arc<Budget>,
        custodian: Box<dyn Custodian>,
    ) -> rustix::io::Result<Option<Arc<Self>>> {
        let pages_max = usize::try_from(budget.bytes_max() / CACHE_SHARE / PAGE_BYTES as u64);
        let pages_max = pages_max.unwrap_or(PAGES).min(PAGES) / GROW_PAGES * GROW_PAGES;
        if pages_max == 0 {
            return Ok(None);
        }
        Ok(Some(Arc::new(Self {
            area: Area::map(memory)?,
            below,
            custodian,
            budget,
            pages_max,
            files: Mutex::default(),
            count: AtomicUsize::new(0),
            slots: Mutex::default(),
            growing: Mutex::default(),
            bell: Arc::default(),
            lost: OnceLock::new(),
            scratch: Mutex::default(),
        })))
    }

    /// `lost` hears of files whose held bytes could not be written.
    pub fn tell_of_losses(&self, lost: Lost) {
        let _ = self.lost.set(lost);
    }

    /// Bytes that may be held at a time.
    pub fn bytes_max(&self) -> u64 {
        (self.pages_max * PAGE_BYTES) as u64
    }

    pub(super) fn find(&self, node: NodeId) -> Option<Arc<HeldFile>> {
        if self.count.load(Acquire) == 0 {
            return None;
        }
        self.files.lock().by_node.get(&node).cloned()
    }

    /// From now on writes to an open file may be held. None where its bytes lie in no one file of the host, or where there are too many.
    pub fn begin(
        self: &Arc<Self>,
        (node, handle): (NodeId, HandleId),
        flags: OpenFlags,
        caller: &Caller,
        late: &Arc<LateError>,
    ) -> Option<Arc<HeldFile>> {
        if let Some(found) = self.find(node) {
            return (found.handle == handle).then_some(found);
        }
        let host = self.below.host_file(handle)?;
        let mut files = self.files.lock();
        if files.ended || files.by_node.len() >= FILES_MAX || files.by_node.contains_key(&node) {
            return None;
        }
        files.last_key += 1;
        let key = files.last_key;
        use std::os::fd::AsFd;
        if let Err(errno) = self.custodian.keep(key, host.as_fd()) {
            log::warn!("writes are not held, for nobody keeps the file: {errno}");
            files.ended = true;
            return None;
        }
        let file = Arc::new(HeldFile {
            key,
            node,
            handle,
            caller: caller.clone(),
            appends: flags.contains(OpenFlags::APPEND),
            late: late.clone(),
            writing: Mutex::default(),
            pages: Mutex::default(),
        });
        files.by_node.insert(node, file.clone());
        self.count.fetch_add(1, Release);
        self.watch(&mut files);
        Some(file)
    }

    fn size_below(&self, file: &HeldFile) -> Result<u64> {
        Ok(self.below.getattr(&Caller::service(), file.node, Some(file.handle))?.size_bytes)
    }

    /// Nothing of the node is held any more when this returns.
    pub fn end(&self, node: NodeId) {
        let Some(file) = self.find(node) else { return };
        {
            let _writing = file.writing.lock();
            let mut pages = file.pages.lock();
            self.write_back(&file, &mut pages, false);
            pages.ended = true;
        }
        let mut files = self.files.lock();
        if files.by_node.get(&node).is_some_and(|found| Arc::ptr_eq(found, &file)) {
            files.by_node.remove(&node);
            self.count.fetch_sub(1, AcqRel);
            self.custodian.let_go(file.key);
        }
    }

    /// # Safety
    /// `bytes` can be read for as many as `place` says.
    unsafe fn put_piece(
        &self,
        file: &HeldFile,
        pages: &mut Pages,
        number: u64,
        (in_page, count): (usize, usize),
        bytes: NonNull<u8>,
    ) -> Took {
        let (from, end) = (in_page as u32, (in_page + count) as u32);
        let copy = |index: u32| {
            // SAFETY: within the page, which is this file's; the caller's word for the source. Entries tell of the bytes afterwards.
            unsafe {
                let to = self.area.page(index as usize).add(in_page);
                let situation = polytropo_copy::plan::Situation::Fresh;
                crate::copies::copy(to.as_ptr(), bytes.as_ptr(), count, situation);
            }
        };
        if let Some(page) = pages.held.get_mut(&number) {
            let before = (page.from, page.end);
            if !page.join(from, end) {
                return Took::NotBeside;
            }
            copy(page.index);
            if before != (page.from, page.end) {
                self.area.entry(page.index as usize).range.store(range_word(page.from, page.end), Release);
            }
            return Took::Yes(page.index);
        }
        let Some(index) = self.take_slot() else { return Took::NoRoom };
        copy(index);
        let entry = self.area.entry(index as usize);
        entry.offset.store(number * PAGE_BYTES as u64, Relaxed);
        entry.range.store(range_word(from, end), Relaxed);
        entry.key.store(file.key, Release);
        pages.held.insert(number, Page { index, from, end, leaving: false, touched: None });
        if pages.since.is_none() {
            pages.since = Some(Instant::now());
        }
        Took::Yes(index)
    }

    fn take_slot(&self) -> Option<u32> {
        let mut slots = self.slots.lock();
        if slots.free.is_empty() {
            drop(slots);
            self.grow(1);
            slots = self.slots.lock();
        }
        let index = slots.free.pop()?;
        slots.used += 1;
        let (first, half) = (slots.used == 1, slots.used == self.pages_max / 2);
        // Allocated by another thread, before they are needed.
        let more = slots.free.len() == SPARE_PAGES && slots.grown < self.pages_max;
        drop(slots);
        if first || half || more {
            self.bell.ring(!first);
        }
        Some(index)
    }

    pub(super) fn free_slot(&self, index: u32) {
        self.area.entry(index as usize).key.store(0, Release);
        let mut slots = self.slots.lock();
        slots.free.push(index);
        slots.used -= 1;
    }

    /// Has `free_min` pages free, if there is memory for them.
    pub(super) fn grow(&self, free_min: usize) {
        // Allocating takes long, and `slots` is for those who need one.
        let _growing = self.growing.lock();
        let first = {
            let slots = self.slots.lock();
            if slots.free.len() >= free_min || slots.refused || slots.grown >= self.pages_max {
                return;
            }
            slots.grown
        };
        let bytes = (GROW_PAGES * PAGE_BYTES) as u64;
        let populated = match self.budget.take(Use::Held, bytes) {
            true => self.area.populate(first, GROW_PAGES).inspect_err(|errno| {
                log::warn!("no further writes are held, for want of memory: {errno}");
                self.budget.give_back(Use::Held, bytes);
            }),
            false => Err(rustix::io::Errno::NOSPC),
        };
        let mut slots = self.slots.lock();
        if populated.is_err() {
            slots.refused = true;
            return;
        }
        // The lowest first, so that what is written in order lies in order; after those that were used before.
        slots.free.splice(0..0, (first as u32..(first + GROW_PAGES) as u32).rev());
        slots.grown += GROW_PAGES;
    }

    /// Has pages at hand for what comes, once something came.
    pub(super) fn grow_ahead(&self) {
        if self.slots.lock().grown > 0 {
            self.grow(SPARE_PAGES);
        }
    }

    /// Gives memory back while nothing is held.
    pub(super) fn shrink(&self) {
        let _growing = self.growing.lock();
        let mut slots = self.slots.lock();
        if slots.used > 0 || slots.grown == 0 {
            return;
        }
        match self.area.give_back(0, slots.grown) {
            Ok(()) => {
                self.budget.give_back(Use::Held, (slots.grown * PAGE_BYTES) as u64);
                *slots = Slots::default();
            }
            Err(errno) => log::error!("memory of held writes cannot be given back: {errno}"),
        }
    }
}

/// Puts bytes of one file in, one write after the other. Nobody else looks at what is held of it meanwhile, but to write it back when there is
/// no room.
pub struct Putting<'a> {
    held: &'a Held,
    file: &'a HeldFile,
    pages: MutexGuard<'a, Pages>,
}

impl<'a> Putting<'a> {
    pub fn begin(held: &'a Held, file: &'a HeldFile) -> Self {
        Self { held, file, pages: file.pages.lock() }
    }

    /// Where a write at `offset` goes.
    pub fn place(&mut self, offset: u64) -> Result<u64> {
        let size = match self.pages.size_bytes {
            Some(size) => size,
            None => self.held.size_below(self.file)?,
        };
        self.pages.size_bytes = Some(size);
        Ok(if self.file.appends { size } else { offset })
    }

    /// Holds bytes, as a write at `offset`, and tells `see` of each piece that is in place. They may change while they are copied.
    ///
    /// # Safety
    /// `from.bytes` can be read for `from.count` bytes.
    pub unsafe fn put(&mut self, offset: u64, from: Source, see: impl Fn(Piece)) -> Result<()> {
        let begin = self.place(offset)?;
        let end = begin.checked_add(from.count as u64).filter(|end| i64::try_from(*end).is_ok());
        if end.is_none() {
            return Err(Error::new(Errno::FBIG, "write beyond the largest file"));
        }
        let mut done = 0;
        while done < from.count {
            let at = begin + done as u64;
            let in_page = (at % PAGE_BYTES as u64) as usize;
            let count = (PAGE_BYTES - in_page).min(from.count - done);
            // SAFETY: within the caller's bytes.
            unsafe { self.put_piece(at, Source { bytes: from.bytes.add(done), count }, &see)? };
            done += count;
        }
        Ok(())
    }

    /// # Safety
    /// As `put`.
    unsafe fn put_piece(&mut self, at: u64, from: Source, see: &impl Fn(Piece)) -> Result<()> {
        let (held, file) = (self.held, self.file);
        let (number, in_page) = (at / PAGE_BYTES as u64, (at % PAGE_BYTES as u64) as usize);
        for _ in 0..TRIES_MAX {
            if self.pages.ended {
                break;
            }
            // SAFETY: the caller's word.
            match unsafe { held.put_piece(file, &mut self.pages, number, (in_page, from.count), from.bytes) }
            {
                Took::Yes(index) => {
                    // SAFETY: within the page.
                    let bytes = unsafe { held.area.page(index as usize).add(in_page) };
                    see(self.piece(at, bytes, from.count));
                    return Ok(());
                }
                // The size is what it was: nobody else puts anything in.
                Took::NotBeside => MutexGuard::unlocked(&mut self.pages, || held.flush_file(file)),
                Took::NoRoom => MutexGuard::unlocked(&mut self.pages, || held.make_room(file)),
            }
        }
        // There is no memory for it, so it is written at once.
        let mut copy = vec![0; from.count];
        // SAFETY: the caller's word; any bytes will do.
        unsafe { std::ptr::copy_nonoverlapping(from.bytes.as_ptr(), copy.as_mut_ptr(), from.count) };
        MutexGuard::unlocked(&mut self.pages, || {
            held.flush_file(file);
            held.write_through(file, at, &copy)
        })?;
        see(self.piece(at, NonNull::from(&mut copy[..]).cast(), from.count));
        Ok(())
    }

    fn piece(&mut self, offset: u64, bytes: NonNull<u8>, count: usize) -> Piece {
        let size_bytes = self.pages.size_bytes.unwrap_or(0).max(offset + count as u64);
        self.pages.size_bytes = Some(size_bytes);
        Piece { offset, bytes, count, size_bytes }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Whoever began to hold has a reference, so nothing is held.
        self.shrink();
        self.bell.ring(true);
    }
}
