//! One window: its file, its mapping, the state of its blocks.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

use parking_lot::Mutex;
use polytropo_copy::plan::Situation;
use polytropo_libservices::{Attempt, NodeId};
use polytropo_wire::VERSION;
use polytropo_wire::window::{BLOCK_BYTES, Changes, Geometry, Header, MAGIC, SIZE_UNKNOWN, View, WORDS_AT};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::{Errno, Result};
use rustix::mm::{MapFlags, ProtFlags};

use super::budget::{Budget, Owner};
use super::store::Place;

/// A window's file as the service has it.
pub struct Window {
    /// Its name in the store.
    number: u64,
    root: Arc<OwnedFd>,
    /// Where doors show it; None once nobody is to find it any more.
    links: Mutex<Option<Vec<Link>>>,
    /// Of the door that alone has it; None for one that doors share.
    node: Option<NodeId>,
    file: OwnedFd,
    base: NonNull<u8>,
    geometry: Geometry,
    budget: Arc<Budget>,
    /// Held while blocks change their state; counts changes of the file.
    changes: Mutex<Changes>,
    last_use: AtomicU64,
    lookups: AtomicU32,
}

struct Link {
    place: Arc<Place>,
    name: [u64; 2],
}

// SAFETY: the mapping belongs to the value; its words are atomics, and its bytes are written under the lock only.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    pub(super) fn make(
        root: &Arc<OwnedFd>,
        number: u64,
        node: Option<NodeId>,
        geometry: Geometry,
        budget: Arc<Budget>,
    ) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        if !budget.enter(words_bytes(geometry)) {
            return Err(Errno::NOSPC);
        }
        let file = rustix::fs::openat(root, number.to_string(), flags, Mode::from_raw_mode(0o444))
            .inspect_err(|_| budget.leave(number, words_bytes(geometry)))?;
        let made = Self::map(file, root, number, node, geometry, budget.clone());
        if made.is_err() {
            budget.leave(number, words_bytes(geometry));
            let _ = rustix::fs::unlinkat(root, number.to_string(), AtFlags::empty());
        }
        made
    }

    fn map(
        file: OwnedFd,
        root: &Arc<OwnedFd>,
        number: u64,
        node: Option<NodeId>,
        geometry: Geometry,
        budget: Arc<Budget>,
    ) -> Result<Self> {
        let total = usize::try_from(geometry.total_bytes()).map_err(|_| Errno::FBIG)?;
        rustix::fs::ftruncate(&file, geometry.total_bytes())?;
        // What is written through the mapping is allocated before: a full tmpfs is an error then and not the end.
        let words = WORDS_AT + geometry.blocks() * 8;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, words)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, wherever the kernel likes.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), total, protection, MapFlags::SHARED, &file, 0)? };
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        let made = Self {
            number,
            root: root.clone(),
            links: Mutex::new(Some(Vec::new())),
            node,
            file,
            base,
            geometry,
            budget,
            changes: Mutex::default(),
            last_use: AtomicU64::new(0),
            lookups: AtomicU32::new(0),
        };
        let header = made.header();
        header.version.store(VERSION, Relaxed);
        header.capacity_bytes.store(geometry.capacity_bytes, Relaxed);
        header.size_bytes.store(SIZE_UNKNOWN, Relaxed);
        header.magic.store(MAGIC, Release);
        Ok(made)
    }

    pub fn node(&self) -> Option<NodeId> {
        self.node
    }

    /// Its bytes never change, and all doors have it.
    pub fn is_shared(&self) -> bool {
        self.node.is_none()
    }

    /// What programs of a door call it; None once it is given up.
    pub(super) fn name_at(&self, place: &Arc<Place>) -> polytropo_libservices::Result<Option<[u64; 2]>> {
        let mut links = self.links.lock();
        let Some(links) = &mut *links else { return Ok(None) };
        if let Some(link) = links.iter().find(|link| Arc::ptr_eq(&link.place, place)) {
            return Ok(Some(link.name));
        }
        // Names are passwords: who may not list the directory opens only what it was told of.
        let name = random_name().attempt("draw a name")?;
        let own = self.number.to_string();
        rustix::fs::linkat(&self.root, own, &place.directory, text_of(name), AtFlags::empty())
            .attempt("show a window to programs")?;
        links.push(Link { place: place.clone(), name });
        Ok(Some(name))
    }

    /// Programs of that door find it no more.
    pub(super) fn unlink_from(&self, place: &Arc<Place>) {
        let mut links = self.links.lock();
        let Some(links) = &mut *links else { return };
        links.retain(|link| {
            let there = !Arc::ptr_eq(&link.place, place);
            if !there {
                link.remove();
            }
            there
        });
    }

    fn unlink(&self) {
        let Some(links) = self.links.lock().take() else { return };
        links.iter().for_each(Link::remove);
        remove(&self.root, &self.number.to_string());
    }

    /// Gives it up: who reads it asks for another, and nobody finds it.
    pub fn discard(&self) {
        self.retire();
        self.unlink();
        self.punch_all();
        self.budget.drop_blocks(self.number);
    }

    pub fn capacity_bytes(&self) -> u64 {
        self.geometry.capacity_bytes
    }

    pub fn blocks(&self) -> u64 {
        self.geometry.blocks()
    }

    fn header(&self) -> &Header {
        // SAFETY: mapped, page-aligned, longer than the header, made of atomics.
        unsafe { self.base.cast().as_ref() }
    }

    fn view(&self) -> View<'_> {
        // SAFETY: the words of all blocks lie in the mapping, from WORDS_AT on; they are atomics.
        let words = unsafe {
            let first = self.base.add(WORDS_AT as usize).cast::<AtomicU64>();
            std::slice::from_raw_parts(first.as_ptr(), self.blocks() as usize)
        };
        View::new(self.header(), words)
    }

    /// None while it is not known.
    pub fn size_bytes(&self) -> Option<u64> {
        self.view().size_bytes()
    }

    pub fn changes(&self) -> u64 {
        self.changes.lock().count()
    }

    /// False if the file changed since `changes`.
    pub fn set_size(&self, size_bytes: u64, changes: u64) -> bool {
        self.view().set_size(&self.changes.lock(), changes, size_bytes)
    }

    pub fn is_resident(&self, block: u64) -> bool {
        self.view().is_resident(block)
    }

    /// Puts a block's bytes in place; false if the file changed since `changes`.
    pub fn fill(&self, block: u64, bytes: &[u8], changes: u64) -> polytropo_libservices::Result<bool> {
        assert!(bytes.len() as u64 == BLOCK_BYTES && block < self.blocks());
        let at = self.geometry.bytes_at() + block * BLOCK_BYTES;
        self.view().fill(&self.changes.lock(), changes, block, || {
            rustix::fs::fallocate(&self.file, FallocateFlags::empty(), at, BLOCK_BYTES)
                .attempt("allocate a block of a window")?;
            // SAFETY: the range lies in the mapping and is allocated; readers believe none of it before the word says so.
            unsafe {
                let to = self.base.as_ptr().add(at as usize);
                crate::copies::copy(to, bytes.as_ptr(), bytes.len(), Situation::Handed);
            }
            Ok(())
        })
    }

    /// Bytes of the file were changed, and so are those that are in place here. The file has `size_bytes` now.
    ///
    /// # Safety
    /// `bytes` can be read for `count` bytes.
    pub unsafe fn change(&self, offset: u64, bytes: NonNull<u8>, count: usize, size_bytes: u64) {
        let mut changes = self.changes.lock();
        if size_bytes > self.geometry.capacity_bytes {
            // It has outgrown this window.
            return self.view().retire(&mut changes);
        }
        self.view().change(&mut changes, (offset, count as u64), size_bytes, |at, part| {
            // SAFETY: the block is in place and lies in the mapping; readers believe none of it before its word says so.
            unsafe {
                let to = self.base.as_ptr().add((self.geometry.bytes_at() + at) as usize);
                let from = bytes.as_ptr().add((at - offset) as usize);
                crate::copies::copy(to, from, part as usize, Situation::Handed);
            }
        });
    }

    pub fn is_hidden(&self, block: u64) -> bool {
        self.view().is_hidden(block)
    }

    /// False if its bytes are not in place.
    pub fn show_again(&self, block: u64) -> bool {
        self.view().show_again(&self.changes.lock(), block)
    }

    /// Of what programs map, and nobody reads any more.
    fn punch_all(&self) {
        self.punch_range(self.geometry.bytes_at(), self.geometry.capacity_bytes);
    }

    fn punch(&self, block: u64) {
        self.punch_range(self.geometry.bytes_at() + block * BLOCK_BYTES, BLOCK_BYTES);
    }

    fn punch_range(&self, at: u64, bytes: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(errno) = rustix::fs::fallocate(&self.file, flags, at, bytes) {
            log::error!("memory of a window cannot be given back: {errno}");
        }
    }

    /// The file changed, nobody knows where: nothing here counts any more.
    pub fn invalidate(&self) {
        self.view().forget(&mut self.changes.lock());
    }

    /// For good.
    pub fn retire(&self) {
        self.view().retire(&mut self.changes.lock());
    }

    pub fn is_retired(&self) -> bool {
        self.view().is_retired()
    }

    pub fn use_at(&self, time: u64) {
        self.last_use.store(time, Relaxed);
    }

    pub fn last_use(&self) -> u64 {
        self.last_use.load(Relaxed)
    }

    pub fn lookups(&self) -> u32 {
        self.lookups.load(Acquire)
    }

    pub fn add_lookup(&self) {
        self.lookups.fetch_add(1, Release);
    }

    pub fn take_lookups(&self) -> u32 {
        self.lookups.swap(0, Acquire)
    }
}

impl Owner for Window {
    fn number(&self) -> u64 {
        self.number
    }

    /// Readers have to ask for the block.
    fn hide(&self, block: u64) {
        self.view().hide(&self.changes.lock(), block);
    }

    fn evict(&self, block: u64) {
        let changes = self.changes.lock();
        self.view().take_back(&changes, block);
        self.punch(block);
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.unlink();
        // SAFETY: mapped in `map` with this size; whoever uses it borrows from this value. A failure would only leave it mapped.
        let _ =
            unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.geometry.total_bytes() as usize) };
        // Programs may still map the file: what they do not map, and what nobody reads, is freed.
        self.punch_all();
        log::trace!("window {} is gone", self.number);
        self.budget.leave(self.number, words_bytes(self.geometry));
    }
}

/// What is allocated with the window, in whole pages.
fn words_bytes(geometry: Geometry) -> u64 {
    (WORDS_AT + geometry.blocks() * 8).next_multiple_of(4096)
}

impl Link {
    fn remove(&self) {
        remove(&self.place.directory, &text_of(self.name));
    }
}

fn remove(directory: &OwnedFd, name: &str) {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => log::error!("a window cannot be removed: {errno}"),
    }
}

fn random_name() -> Result<[u64; 2]> {
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let (low, high) = random.split_at(8);
    Ok([low, high].map(|half| half.iter().fold(0, |word: u64, byte| word << 8 | u64::from(*byte))))
}

/// 32 hexadecimal digits.
fn text_of(name: [u64; 2]) -> String {
    format!("{:016x}{:016x}", name[0], name[1])
}
