//! A stack's own account of a libservice that it shares with other stacks.
//!
//! When a stack ends, the kernel does not forget its inodes one by one, and a service that dies with files open does not
//! close them. What stands for this stack alone goes with it; in a layer that others go on using, its look-ups and open
//! files would stay for good. A lease counts them, and gives back what is left when it is dropped.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::error::Result;
use crate::libservice::Libservice;
use crate::name::Name;
use crate::types::*;

const SHARDS: usize = 32;

/// See the module.
pub struct Lease {
    below: Arc<dyn Libservice>,
    lookups: Vec<Mutex<FxHashMap<u64, u64>>>,
    files: Mutex<FxHashSet<(NodeId, HandleId)>>,
    listings: Mutex<FxHashSet<(NodeId, HandleId)>>,
}

impl Lease {
    pub fn new(below: Arc<dyn Libservice>) -> Self {
        Self {
            below,
            lookups: (0..SHARDS).map(|_| Mutex::default()).collect(),
            files: Mutex::default(),
            listings: Mutex::default(),
        }
    }

    fn held(&self, node: NodeId) -> &Mutex<FxHashMap<u64, u64>> {
        &self.lookups[node.0 as usize % SHARDS]
    }

    fn count(&self, node: NodeId) {
        *self.held(node).lock().entry(node.0).or_default() += 1;
    }

    fn looked_up(&self, entry: Entry) -> Entry {
        self.count(entry.node);
        entry
    }

    fn opened(&self, node: NodeId, opened: Opened) -> Opened {
        self.files.lock().insert((node, opened.handle));
        opened
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        for (node, handle) in self.files.get_mut().drain() {
            self.below.release(node, handle);
        }
        for (node, handle) in self.listings.get_mut().drain() {
            self.below.releasedir(node, handle);
        }
        for shard in &mut self.lookups {
            for (node, count) in shard.get_mut().drain() {
                self.below.forget(NodeId(node), count);
            }
        }
    }
}

impl Libservice for Lease {
    fn below(&self) -> Option<&dyn Libservice> {
        Some(&*self.below)
    }

    fn kind(&self) -> &'static str {
        self.below.kind()
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<Entry> {
        self.below.lookup(caller, parent, name).map(|entry| self.looked_up(entry))
    }

    fn look_up_again(&self, caller: &Caller, node: NodeId) -> Result<Entry> {
        self.below.look_up_again(caller, node).map(|entry| self.looked_up(entry))
    }

    /// Never more than this stack holds.
    fn forget(&self, node: NodeId, count: u64) {
        let count = {
            let mut shard = self.held(node).lock();
            let Some(held) = shard.get_mut(&node.0) else { return };
            let count = count.min(*held);
            *held -= count;
            if *held == 0 {
                shard.remove(&node.0);
            }
            count
        };
        self.below.forget(node, count);
    }

    fn mknod(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32, rdev: u64) -> Result<Entry> {
        self.below.mknod(caller, parent, name, mode, rdev).map(|entry| self.looked_up(entry))
    }

    fn mkdir(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32) -> Result<Entry> {
        self.below.mkdir(caller, parent, name, mode).map(|entry| self.looked_up(entry))
    }

    fn symlink(&self, caller: &Caller, parent: NodeId, name: &Name, target: &[u8]) -> Result<Entry> {
        self.below.symlink(caller, parent, name, target).map(|entry| self.looked_up(entry))
    }

    fn link(&self, caller: &Caller, node: NodeId, new_parent: NodeId, new_name: &Name) -> Result<Entry> {
        self.below.link(caller, node, new_parent, new_name).map(|entry| self.looked_up(entry))
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<Opened> {
        self.below.open(caller, node, flags).map(|opened| self.opened(node, opened))
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let (entry, opened) = self.below.create(caller, parent, name, mode, flags)?;
        let opened = self.opened(entry.node, opened);
        Ok((self.looked_up(entry), opened))
    }

    fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let (entry, opened) = self.below.tmpfile(caller, parent, mode, flags)?;
        let opened = self.opened(entry.node, opened);
        Ok((self.looked_up(entry), opened))
    }

    fn release(&self, node: NodeId, handle: HandleId) {
        if self.files.lock().remove(&(node, handle)) {
            self.below.release(node, handle);
        }
    }

    fn opendir(&self, caller: &Caller, node: NodeId) -> Result<HandleId> {
        let handle = self.below.opendir(caller, node)?;
        self.listings.lock().insert((node, handle));
        Ok(handle)
    }

    fn releasedir(&self, node: NodeId, handle: HandleId) {
        if self.listings.lock().remove(&(node, handle)) {
            self.below.releasedir(node, handle);
        }
    }

    fn readdir_plus(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirPlusSink<'_>,
    ) -> Result<()> {
        self.below.readdir_plus(caller, node, handle, offset, &mut |dir_entry, found| {
            // Counted first: once it was taken, a forget may come at any time.
            if let Some(entry) = found {
                self.count(entry.node);
            }
            let taken = sink(dir_entry, found);
            if let (false, Some(entry)) = (taken, found) {
                let mut shard = self.held(entry.node).lock();
                if let Some(held) = shard.get_mut(&entry.node.0) {
                    *held -= 1;
                    if *held == 0 {
                        shard.remove(&entry.node.0);
                    }
                }
            }
            taken
        })
    }

    fn host_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        self.below.host_file(handle)
    }

    fn immutable_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        self.below.immutable_file(handle)
    }

    fn content(&self, handle: HandleId) -> Option<ContentId> {
        self.below.content(handle)
    }

    fn content_of(&self, node: NodeId) -> Option<Content> {
        self.below.content_of(node)
    }
}
