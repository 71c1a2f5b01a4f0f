//! Windows: cached bytes of files, in files of a private tmpfs that programs map read-only. Only the service changes them.
//!
//! What programs read here the service does not see, so what goes first when room is needed is what came first.

mod budget;
mod file;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use polytropo_libservices::{Attempt, Caller, Errno, Error, HandleId, Libservice, NodeId, Result};
use polytropo_wire::window::{BLOCK_BYTES, FILE_BYTES_MAX, Geometry};
use rustc_hash::FxHashMap;

pub use budget::Budget;
pub use file::Window;

/// Windows of one door, in use or not: each is a descriptor.
const WINDOWS_MAX: usize = 512;
/// Blocks read ahead of a program that reads in order.
const AHEAD_BLOCKS: u64 = 16;
/// How often a fill is begun anew because the file changes under it.
const FILLS_MAX: u32 = 4;

/// The windows of one door.
pub struct Windows {
    stack: Arc<dyn Libservice>,
    /// Where their files are made; None: there are none.
    directory: Option<OwnedFd>,
    budget: Arc<Budget>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    windows: FxHashMap<NodeId, Arc<Window>>,
    /// Counts uses, to know which window was used last.
    uses: u64,
}

impl Windows {
    pub fn new(stack: Arc<dyn Libservice>, directory: Option<OwnedFd>, budget: Arc<Budget>) -> Self {
        Self { stack, directory, budget, table: Mutex::default() }
    }

    /// Whether a file of `size_bytes` may have a window.
    pub fn serves(&self, size_bytes: u64) -> bool {
        self.directory.is_some() && size_bytes <= FILE_BYTES_MAX
    }

    /// Makes the bytes at `offset` of an open file resident, and some beyond if the file is read in order. `buffer` has room
    /// for a block.
    pub fn fetch(
        &self,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<Arc<Window>> {
        let caller = Caller::service();
        for _ in 0..FILLS_MAX {
            let window = self.window(node, handle, &caller)?;
            let Some(size_bytes) = self.known_size(&window, handle, &caller)? else { continue };
            let first = offset / BLOCK_BYTES;
            let end = size_bytes.div_ceil(BLOCK_BYTES).min(window.blocks());
            let ahead = if window.is_in_order(first) { AHEAD_BLOCKS } else { 1 };
            let mut filled = true;
            for block in first..end.min(first.saturating_add(ahead)) {
                if !window.is_resident(block) {
                    filled = self.fill(&window, handle, block, &caller, buffer)?;
                }
                if !filled {
                    break;
                }
            }
            if filled {
                return Ok(window);
            }
        }
        Err(Error::new(Errno::AGAIN, "fill a window of a file that changes all the time"))
    }

    /// The node's window, with room for the whole file.
    fn window(&self, node: NodeId, handle: HandleId, caller: &Caller) -> Result<Arc<Window>> {
        let found = {
            let mut table = self.table.lock();
            table.uses += 1;
            let uses = table.uses;
            table.windows.get(&node).inspect(|window| window.use_at(uses)).cloned()
        };
        if let Some(found) = found.filter(|window| !window.is_retired()) {
            return Ok(found);
        }
        let Some(directory) = &self.directory else {
            return Err(Error::new(Errno::NOSPC, "make a window where there are none"));
        };
        let size_bytes = self.stack.getattr(caller, node, Some(handle))?.size_bytes;
        // Room to grow by half, so that a growing file does not get a window for each block.
        let room = size_bytes.saturating_add(size_bytes / 2).min(FILE_BYTES_MAX).max(size_bytes);
        let geometry =
            Geometry::of(room).ok_or_else(|| Error::new(Errno::FBIG, "make a window of so large a file"))?;
        let made = Window::make(directory, node, geometry, self.budget.clone()).attempt("make a window")?;
        let (window, dropped) = self.table.lock().keep(node, Arc::new(made));
        // Outside of the lock: their look-ups are given back.
        for window in dropped {
            self.discard(&window);
        }
        Ok(window)
    }

    /// The file's size as the window tells it; None if the file was changed meanwhile. Retires a window that is too small.
    fn known_size(&self, window: &Arc<Window>, handle: HandleId, caller: &Caller) -> Result<Option<u64>> {
        if let Some(size_bytes) = window.size_bytes() {
            return Ok(Some(size_bytes));
        }
        let changes = window.changes();
        let size_bytes = self.stack.getattr(caller, window.node(), Some(handle))?.size_bytes;
        if size_bytes > window.capacity_bytes() {
            window.retire();
            return Ok(None);
        }
        Ok(window.set_size(size_bytes, changes).then_some(size_bytes))
    }

    /// False if the file was changed meanwhile.
    fn fill(
        &self,
        window: &Arc<Window>,
        handle: HandleId,
        block: u64,
        caller: &Caller,
        buffer: &mut [u8],
    ) -> Result<bool> {
        self.budget.reserve(window, block);
        let changes = window.changes();
        let buffer = buffer.get_mut(..BLOCK_BYTES as usize);
        let buffer =
            buffer.ok_or_else(|| Error::new(Errno::INVAL, "fill a window through a small buffer"))?;
        let count = self.stack.read(caller, window.node(), handle, block * BLOCK_BYTES, buffer)?;
        // Beyond the end there are zeros, should the file grow.
        buffer[count..].fill(0);
        let filled = window.fill(block, buffer, changes).attempt("allocate a block of a window")?;
        Ok(filled)
    }

    /// The file's bytes or attributes changed.
    pub fn changed(&self, node: NodeId) {
        let window = self.table.lock().windows.get(&node).cloned();
        if let Some(window) = window {
            window.invalidate();
        }
    }

    /// Nobody may read the node's window any more: the kernel has the file.
    pub fn retire(&self, node: NodeId) {
        let window = self.table.lock().windows.remove(&node);
        if let Some(window) = window {
            self.discard(&window);
        }
    }

    fn discard(&self, window: &Window) {
        window.retire();
        if let Some(directory) = &self.directory {
            window.unlink(directory);
        }
        for _ in 0..window.take_lookups() {
            self.stack.forget(window.node(), 1);
        }
    }

    /// Gives one look-up of the node to its window, which keeps the node's number from being used for another; false if there is no
    /// window.
    pub fn adopt_lookup(&self, window: &Window) -> bool {
        let table = self.table.lock();
        let current = table.windows.get(&window.node()).is_some_and(|kept| std::ptr::eq(&**kept, window));
        if current && window.lookups() == 0 {
            window.add_lookup();
            return true;
        }
        false
    }
}

impl Table {
    /// Keeps a window, or tells the one that somebody else made meanwhile; and what had to go for it.
    fn keep(&mut self, node: NodeId, made: Arc<Window>) -> (Arc<Window>, Vec<Arc<Window>>) {
        let mut dropped = Vec::new();
        if let Some(found) = self.windows.get(&node) {
            if !found.is_retired() {
                // The one just made has no name anybody knows.
                dropped.push(made);
                return (found.clone(), dropped);
            }
        }
        made.use_at(self.uses);
        dropped.extend(self.windows.insert(node, made.clone()));
        if self.windows.len() > WINDOWS_MAX {
            let oldest =
                self.windows.iter().min_by_key(|(_, window)| window.last_use()).map(|(node, _)| *node);
            dropped.extend(oldest.and_then(|node| self.windows.remove(&node)));
        }
        (made, dropped)
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        let windows = std::mem::take(&mut self.table.get_mut().windows);
        for window in windows.into_values() {
            self.discard(&window);
        }
    }
}
