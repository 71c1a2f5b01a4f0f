//! Open files that belong to the door, not to a program.
//!
//! Where it makes no difference to the stack, the kernel opens files without asking (`NO_OPEN_SUPPORT`): it then names no
//! open file when it reads or writes, and never says that one is closed. The door opens the inode at its first use and
//! keeps it open while there is room, at most until the kernel forgets the inode.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use polytropo_libservices::{Caller, Errno, HandleId, Libservice, NodeId, OpenFlags, Result};
use rustc_hash::FxHashMap;

const SHARDS: usize = 16;
/// Open files kept, all shards together; less where the process may not have so many.
const KEPT_MAX: usize = 2_048;
/// The share of the process's limit of descriptors that is taken.
const LIMIT_DIVISOR: u64 = 8;

/// One open file; released when its last user is done.
pub struct OpenFile {
    stack: Arc<dyn Libservice>,
    node: NodeId,
    pub handle: HandleId,
    flags: OpenFlags,
    /// Made by this door, and no extended attribute was set since.
    bare: AtomicBool,
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.stack.release(self.node, self.handle);
    }
}

#[derive(Default)]
struct Shard {
    files: FxHashMap<NodeId, Arc<OpenFile>>,
    /// In the order in which they were opened; some may be gone.
    order: VecDeque<NodeId>,
}

/// The open files of one door.
pub struct OpenFiles {
    stack: Arc<dyn Libservice>,
    shards: [Mutex<Shard>; SHARDS],
    kept_max_per_shard: usize,
}

impl OpenFiles {
    pub fn new(stack: Arc<dyn Libservice>) -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let share =
            limit.map_or(KEPT_MAX, |limit| usize::try_from(limit / LIMIT_DIVISOR).unwrap_or(KEPT_MAX));
        Self {
            stack,
            shards: std::array::from_fn(|_| Mutex::default()),
            kept_max_per_shard: (share.min(KEPT_MAX) / SHARDS).max(1),
        }
    }

    /// The node, open for what `access` says; opened now if it was not.
    pub fn get(&self, caller: &Caller, node: NodeId, access: OpenFlags) -> Result<Arc<OpenFile>> {
        if let Some(found) = self.shard(node).lock().files.get(&node) {
            if found.flags.contains(access) {
                return Ok(found.clone());
            }
        }
        // What can be written is opened for reading too, so that one open file does for both.
        let flags = access | OpenFlags::READ;
        let (opened, flags) = match self.stack.open(caller, node, flags) {
            Err(e) if e.is(Errno::ACCESS) && flags != access => {
                (self.stack.open(caller, node, access)?, access)
            }
            done => (done?, flags),
        };
        let bare = AtomicBool::new(false);
        Ok(self.keep(OpenFile { stack: self.stack.clone(), node, handle: opened.handle, flags, bare }))
    }

    /// Takes over a handle of a file that was just made.
    pub fn keep_made(&self, node: NodeId, handle: HandleId, flags: OpenFlags) {
        let bare = AtomicBool::new(true);
        self.keep(OpenFile { stack: self.stack.clone(), node, handle, flags, bare });
    }

    /// The file has no extended attribute that was not there from the beginning.
    pub fn is_bare(&self, node: NodeId) -> bool {
        self.present(node).is_some_and(|file| file.bare.load(Ordering::Acquire))
    }

    /// Before an extended attribute is set.
    pub fn no_longer_bare(&self, node: NodeId) {
        if let Some(file) = self.present(node) {
            file.bare.store(false, Ordering::Release);
        }
    }

    fn keep(&self, file: OpenFile) -> Arc<OpenFile> {
        let file = Arc::new(file);
        let node = file.node;
        // Released after the lock.
        let mut dropped = Vec::new();
        {
            let mut shard = self.shard(node).lock();
            match shard.files.insert(node, file.clone()) {
                Some(replaced) => dropped.push(replaced),
                None => shard.order.push_back(node),
            }
            while shard.order.len() > self.kept_max_per_shard {
                let Some(oldest) = shard.order.pop_front() else { break };
                dropped.extend(shard.files.remove(&oldest));
            }
        }
        file
    }

    /// The node's open file, if there is one.
    pub fn present(&self, node: NodeId) -> Option<Arc<OpenFile>> {
        self.shard(node).lock().files.get(&node).cloned()
    }

    /// Closes the node's open file, if there is one.
    pub fn forget(&self, node: NodeId) {
        let removed = {
            let mut shard = self.shard(node).lock();
            let removed = shard.files.remove(&node);
            if removed.is_some() {
                shard.order.retain(|&other| other != node);
            }
            removed
        };
        drop(removed);
    }

    fn shard(&self, node: NodeId) -> &Mutex<Shard> {
        &self.shards[node.0 as usize % SHARDS]
    }
}
