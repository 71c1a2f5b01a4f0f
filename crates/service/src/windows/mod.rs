//! Windows: cached bytes of files, in files of a private tmpfs that programs map read-only. Only the service changes them.
//!
//! A window belongs to the inode of the layer that holds the bytes where these never change, and all doors share it; else to one door's
//! node. Programs are told that they read the wrong window by its end: when a file of one door gets bytes of its own, the shared window is
//! *retired* and others make a new one.

mod ahead;
mod behind;
mod budget;
mod file;
mod policy;
mod store;

use std::sync::Arc;

use parking_lot::Mutex;
use polytropo_copy::plan::Situation;
use polytropo_libservices::{Caller, Errno, Error, HandleId, Libservice, NodeId, Result};
use polytropo_wire::window::{BLOCK_BYTES, FILE_BYTES_MAX};
use rustc_hash::FxHashMap;

use crate::copies::Tally;
use ahead::{Ahead, Plan};
use behind::BytesRead;

pub use budget::{Admission, Budget, Owner, SLABS_NUMBER, Use, WindowStatistics};
pub use file::Window;
pub use store::{Place, Store};

/// Windows of one door's own, in use or not: each is a descriptor.
const WINDOWS_MAX: usize = 512;
/// Of all blocks, the part that may be read ahead at a time.
const AHEAD_SHARE: u64 = 8;
/// How often a fill is begun anew because the file changes under it.
const FILLS_MAX: u32 = 4;

/// The windows of one door.
pub struct Windows {
    stack: Arc<dyn Libservice>,
    store: Arc<Store>,
    /// None: the door has no windows.
    place: Option<Arc<Place>>,
    table: Mutex<Table>,
    /// Counts what is copied at this door.
    tally: Arc<Tally>,
}

#[derive(Default)]
struct Table {
    own: FxHashMap<NodeId, Arc<Window>>,
    /// What open files of the door were told to read.
    held: FxHashMap<NodeId, Held>,
    /// Counts uses, to know which window was used last.
    uses: u64,
}

struct Held {
    window: Arc<Window>,
    files: usize,
}

/// An open file's window, and how it is read.
#[derive(Default)]
pub struct Holder {
    window: Mutex<Option<Arc<Window>>>,
    ahead: Mutex<Ahead>,
}

impl Windows {
    pub fn new(stack: Arc<dyn Libservice>, store: Arc<Store>, place: Option<Arc<Place>>) -> Self {
        Self { stack, store, place, table: Mutex::default(), tally: Arc::default() }
    }

    pub fn tally(&self) -> &Arc<Tally> {
        &self.tally
    }

    /// Whether a file of `size_bytes` may have a window.
    pub fn serves(&self, size_bytes: u64) -> bool {
        self.place.is_some() && size_bytes <= FILE_BYTES_MAX
    }

    /// Makes the bytes at `offset` of an open file resident, and of `wanted` bytes as many as one does at a time, or more if there is an
    /// order in what is read. `buffer` has room
    /// for a block. Tells the window's name.
    pub fn fetch(
        &self,
        (node, handle): (NodeId, HandleId),
        holder: &Holder,
        (offset, wanted): (u64, u64),
        buffer: &mut [u8],
    ) -> Result<[u64; 2]> {
        let Some(place) = &self.place else {
            return Err(Error::new(Errno::NOSPC, "make a window where there are none"));
        };
        let caller = Caller::service();
        let ahead_max = self.store.budget().blocks_max() / AHEAD_SHARE;
        let blocks = (offset % BLOCK_BYTES).saturating_add(wanted).div_ceil(BLOCK_BYTES);
        let plan = holder.ahead.lock().plan(offset / BLOCK_BYTES, blocks, ahead_max);
        for _ in 0..FILLS_MAX {
            let content = self.stack.content(handle);
            let size = || Ok(self.stack.getattr(&caller, node, Some(handle))?.size_bytes);
            let window = match content {
                Some(content) => self.store.shared(content, size)?,
                None => self.own(node, size)?,
            };
            self.hold(node, holder, &window);
            // Of changes after this the window is told. One before it shows now.
            if self.stack.content(handle) != content {
                continue;
            }
            let filled = self.fill(&window, (node, handle), plan, &caller, buffer)?;
            if let Some(bytes) = filled.filter(|bytes| !bytes.is_empty() && content.is_some()) {
                behind::drop_from_host(&*self.stack, handle, bytes);
            }
            if filled.is_some() {
                if let Some(name) = window.name_at(place)? {
                    return Ok(name);
                }
            }
        }
        Err(Error::new(Errno::AGAIN, "fill a window of a file that changes all the time"))
    }

    /// The node's window, with room for the whole file.
    fn own(&self, node: NodeId, size_bytes: impl FnOnce() -> Result<u64>) -> Result<Arc<Window>> {
        let found = {
            let mut table = self.table.lock();
            table.uses += 1;
            let uses = table.uses;
            table.own.get(&node).inspect(|window| window.use_at(uses)).cloned()
        };
        if let Some(found) = found.filter(|window| !window.is_retired()) {
            return Ok(found);
        }
        let size_bytes = size_bytes()?;
        // Room to grow by half, so that a growing file does not get a window for each block.
        let room = size_bytes.saturating_add(size_bytes / 2).min(FILE_BYTES_MAX).max(size_bytes);
        let made = self.store.make(Some(node), room)?;
        let (window, dropped) = self.table.lock().keep(node, made);
        // Outside of the lock: their look-ups are given back.
        for window in dropped {
            self.discard(&window);
        }
        Ok(window)
    }

    /// Remembers what an open file is told to read. What its node's files read before has to go, if it is not told of the node's changes.
    fn hold(&self, node: NodeId, holder: &Holder, window: &Arc<Window>) {
        let mut table = self.table.lock();
        let held = table.held.entry(node).or_insert_with(|| Held { window: window.clone(), files: 0 });
        if !Arc::ptr_eq(&held.window, window) {
            if held.window.is_shared() {
                held.window.retire();
            }
            held.window = window.clone();
        }
        if holder.window.lock().replace(window.clone()).is_none() {
            held.files += 1;
        }
    }

    /// An open file is closed. True if its look-up of the node is kept: by its window, so that opening again finds that, and
    /// the node's number is not used for another.
    pub fn leave(&self, node: NodeId, holder: &mut Holder) -> bool {
        let Some(window) = holder.window.get_mut().take() else { return false };
        let mut table = self.table.lock();
        if let Some(held) = table.held.get_mut(&node) {
            held.files -= 1;
            if held.files == 0 {
                table.held.remove(&node);
            }
        }
        let kept = table.own.get(&node).is_some_and(|own| Arc::ptr_eq(own, &window));
        if kept && window.lookups() == 0 {
            window.add_lookup();
            return true;
        }
        false
    }

    /// Makes blocks resident; None if the file changed meanwhile. Tells which part of the file was read for it.
    fn fill(
        &self,
        window: &Arc<Window>,
        file: (NodeId, HandleId),
        plan: Plan,
        caller: &Caller,
        buffer: &mut [u8],
    ) -> Result<Option<BytesRead>> {
        let Some(size_bytes) = self.known_size(window, file, caller)? else { return Ok(None) };
        let mut read = BytesRead::default();
        let end = size_bytes.div_ceil(BLOCK_BYTES).min(window.blocks());
        for (n, block) in plan.blocks(end).enumerate() {
            // To show what nobody asked for would count as a use of it.
            let there = window.is_resident(block) || (n > 0 && window.is_hidden(block));
            if there || self.store.budget().ask(window, block) {
                continue;
            }
            if !self.fill_block(window, file, block, caller, buffer)? {
                return Ok(None);
            }
            read.add(block * BLOCK_BYTES, BLOCK_BYTES);
        }
        Ok(Some(read))
    }

    /// The file's size as the window tells it; None if the file was changed meanwhile. Retires a window that is too small.
    fn known_size(
        &self,
        window: &Arc<Window>,
        (node, handle): (NodeId, HandleId),
        caller: &Caller,
    ) -> Result<Option<u64>> {
        if let Some(size_bytes) = window.size_bytes() {
            return Ok(Some(size_bytes));
        }
        let changes = window.changes();
        let size_bytes = self.stack.getattr(caller, node, Some(handle))?.size_bytes;
        if size_bytes > window.capacity_bytes() {
            window.retire();
            return Ok(None);
        }
        Ok(window.set_size(size_bytes, changes).then_some(size_bytes))
    }

    /// False if the file was changed meanwhile.
    fn fill_block(
        &self,
        window: &Arc<Window>,
        (node, handle): (NodeId, HandleId),
        block: u64,
        caller: &Caller,
        buffer: &mut [u8],
    ) -> Result<bool> {
        let _reserved = self.store.budget().reserve(window, block, Admission::New);
        let changes = window.changes();
        let buffer = buffer.get_mut(..BLOCK_BYTES as usize);
        let buffer =
            buffer.ok_or_else(|| Error::new(Errno::INVAL, "fill a window through a small buffer"))?;
        let count = self.stack.read(caller, node, handle, block * BLOCK_BYTES, buffer)?;
        // Beyond the end there are zeros, should the file grow.
        buffer[count..].fill(0);
        self.tally.add(Situation::Handed, buffer.len());
        window.fill(block, buffer, changes)
    }

    /// The node's own window, for who changes the file.
    pub fn window_of(&self, node: NodeId) -> Option<Arc<Window>> {
        self.table.lock().own.get(&node).cloned()
    }

    /// A file changed, or may have.
    pub fn changed(&self, node: NodeId) {
        let (own, held) = self.table.lock().of(node);
        if let Some(own) = own {
            own.invalidate();
        }
        // Bytes that never change are not this node's any more.
        if let Some(held) = held {
            held.discard();
        }
    }

    /// Nobody may read the node's window any more: the kernel has the file.
    pub fn retire(&self, node: NodeId) {
        let (own, held) = {
            let mut table = self.table.lock();
            let (_, held) = table.of(node);
            (table.own.remove(&node), held)
        };
        if let Some(own) = own {
            self.discard(&own);
        }
        if let Some(held) = held {
            held.discard();
        }
    }

    fn discard(&self, window: &Window) {
        window.discard();
        let Some(node) = window.node() else { return };
        for _ in 0..window.take_lookups() {
            self.stack.forget(node, 1);
        }
    }
}

impl Table {
    /// The node's own window, and the shared one that its open files read.
    fn of(&self, node: NodeId) -> (Option<Arc<Window>>, Option<Arc<Window>>) {
        let held = self.held.get(&node).filter(|held| held.window.is_shared());
        (self.own.get(&node).cloned(), held.map(|held| held.window.clone()))
    }

    /// Keeps a window, or tells the one that somebody else made meanwhile; and what had to go for it.
    fn keep(&mut self, node: NodeId, made: Arc<Window>) -> (Arc<Window>, Vec<Arc<Window>>) {
        let mut dropped = Vec::new();
        if let Some(found) = self.own.get(&node) {
            if !found.is_retired() {
                // The one just made has no name anybody knows.
                dropped.push(made);
                return (found.clone(), dropped);
            }
        }
        made.use_at(self.uses);
        dropped.extend(self.own.insert(node, made.clone()));
        if self.own.len() > WINDOWS_MAX {
            let oldest = self.own.iter().min_by_key(|(_, window)| window.last_use()).map(|(node, _)| *node);
            dropped.extend(oldest.and_then(|node| self.own.remove(&node)));
        }
        (made, dropped)
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        let own = std::mem::take(&mut self.table.get_mut().own);
        for window in own.into_values() {
            self.discard(&window);
        }
        if let Some(place) = &self.place {
            self.store.leave(place);
        }
    }
}
