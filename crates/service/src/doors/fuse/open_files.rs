//! Open files that belong to the door, not to a program.
//!
//! Where it makes no difference to the stack, the kernel opens files without asking (`NO_OPEN_SUPPORT`): it then names no
//! open file when it reads or writes, and never says that one is closed. The door opens the inode at its first use and
//! keeps it open while there is room, at most until the kernel forgets the inode.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use polytropo_libservices::{Caller, Errno, HandleId, Libservice, NodeId, OpenFlags, Result};
use rustc_hash::FxHashMap;

const SHARDS: usize = 16;
/// Open files kept by one door, all shards together; less where there are many doors or few descriptors.
const KEPT_MAX: usize = 2_048;
/// The share of the process's limit of descriptors that all doors together take.
const LIMIT_DIVISOR: u64 = 4;

/// Open files kept by all doors of the process, and how many doors there are.
static KEPT: AtomicUsize = AtomicUsize::new(0);
static DOORS: AtomicUsize = AtomicUsize::new(0);

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
        KEPT.fetch_sub(1, Ordering::Relaxed);
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
    /// For all doors.
    kept_max: usize,
}

impl Drop for OpenFiles {
    fn drop(&mut self) {
        DOORS.fetch_sub(1, Ordering::Relaxed);
    }
}

impl OpenFiles {
    pub fn new(stack: Arc<dyn Libservice>) -> Self {
        DOORS.fetch_add(1, Ordering::Relaxed);
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let share = limit.map_or(u64::MAX, |limit| limit / LIMIT_DIVISOR);
        Self {
            stack,
            shards: std::array::from_fn(|_| Mutex::default()),
            kept_max: usize::try_from(share).unwrap_or(usize::MAX),
        }
    }

    /// Whether a shard of so many files has to close some.
    fn too_many(&self, in_shard: usize) -> bool {
        let doors = DOORS.load(Ordering::Relaxed).max(1);
        let own_share = (self.kept_max / doors).min(KEPT_MAX);
        in_shard > (own_share / SHARDS).max(1) || KEPT.load(Ordering::Relaxed) > self.kept_max
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
        KEPT.fetch_add(1, Ordering::Relaxed);
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
            // Of many that are too many only two, since others have to give as well.
            for _ in 0..2 {
                if !self.too_many(shard.order.len()) {
                    break;
                }
                let oldest = shard.order.pop_front();
                dropped.extend(oldest.and_then(|oldest| shard.files.remove(&oldest)));
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A layer that counts open files.
    #[derive(Default)]
    struct Counting(AtomicUsize, AtomicUsize);

    impl Libservice for Counting {
        fn kind(&self) -> &'static str {
            "counting"
        }

        fn open(
            &self,
            _caller: &Caller,
            _node: NodeId,
            _flags: OpenFlags,
        ) -> Result<polytropo_libservices::Opened> {
            self.0.fetch_add(1, Ordering::Relaxed);
            let handle = HandleId(self.1.fetch_add(1, Ordering::Relaxed) as u64 + 1);
            Ok(polytropo_libservices::Opened { handle, keep_cache: true, direct: false })
        }

        fn release(&self, _node: NodeId, _handle: HandleId) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn files_are_opened_once_kept_within_bounds_and_closed() {
        let stack = Arc::new(Counting::default());
        let files = OpenFiles::new(stack.clone());
        let caller = Caller::service();
        let open = |node, access| files.get(&caller, NodeId(node), access).unwrap().handle;
        let first = open(1, OpenFlags::READ);
        assert_eq!(open(1, OpenFlags::READ), first);
        let writable = open(1, OpenFlags::WRITE);
        assert_ne!(writable, first);
        assert_eq!(open(1, OpenFlags::READ), writable);
        assert_eq!(stack.0.load(Ordering::Relaxed), 1);
        for node in 2..20_000 {
            open(node, OpenFlags::READ);
        }
        assert!(stack.0.load(Ordering::Relaxed) <= KEPT_MAX);
        let last = files.present(NodeId(19_999)).unwrap();
        files.forget(NodeId(19_999));
        assert!(files.present(NodeId(19_999)).is_none());
        drop(last);
        drop(files);
        assert_eq!(stack.0.load(Ordering::Relaxed), 0);
    }
}
