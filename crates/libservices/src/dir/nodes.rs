//! The node table: which inodes of the host are known, by what number, and how to reach them again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};

use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use super::descriptors::{Budget, Descriptor};
use super::sys::{InodeKey, Stat};
use crate::name::Name;
use crate::types::NodeId;

const SHARDS: usize = 64;

/// One live inode. Numbers are never used twice.
pub struct Node {
    pub id: NodeId,
    pub key: InodeKey,
    /// `S_IFMT` bits of the host's inode; never change in an inode's life.
    pub host_type: u32,
    /// Both counts change only under the lock of the key's shard.
    lookups: AtomicU64,
    children: AtomicU64,
    place: Mutex<Place>,
    slot: Mutex<Slot>,
    used: AtomicBool,
    /// In the clock of the budget.
    queued: AtomicBool,
    /// What is known of setuid and setgid bits; see `Privileges`.
    privileges: AtomicU8,
}

/// Where the inode was seen last.
#[derive(Clone)]
pub struct Sighting {
    pub parent: Arc<Node>,
    pub name: Box<Name>,
}

#[derive(Default)]
struct Place {
    seen: Option<Sighting>,
    /// Out of the table: nothing may be held for it any more.
    dead: bool,
}

#[derive(Default)]
struct Slot {
    descriptor: Option<Arc<Descriptor>>,
    /// No name leads here any more: the descriptor is the only way to the inode.
    pinned: bool,
}

/// Whether a file carries setuid or setgid bits, as far as known: spares ordinary writes a statx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privileges {
    Unknown,
    Absent,
    Present,
}

impl Node {
    fn new(id: NodeId, stat: &Stat) -> Arc<Self> {
        Arc::new(Self {
            id,
            key: stat.key,
            host_type: stat.attr.file_type(),
            lookups: AtomicU64::new(0),
            children: AtomicU64::new(0),
            place: Mutex::default(),
            slot: Mutex::default(),
            used: AtomicBool::new(false),
            queued: AtomicBool::new(false),
            privileges: AtomicU8::new(Privileges::Unknown as u8),
        })
    }

    pub fn is_dir(&self) -> bool {
        self.host_type == libc::S_IFDIR
    }

    /// The cached descriptor, O_PATH or better.
    pub fn descriptor(&self) -> Option<Arc<Descriptor>> {
        let found = self.slot.lock().descriptor.clone();
        if found.is_some() {
            self.used.store(true, Relaxed);
        }
        found
    }

    pub fn sighting(&self) -> Option<Sighting> {
        self.place.lock().seen.clone()
    }

    pub fn privileges(&self) -> Privileges {
        match self.privileges.load(Relaxed) {
            1 => Privileges::Absent,
            2 => Privileges::Present,
            _ => Privileges::Unknown,
        }
    }

    pub fn set_privileges(&self, known: Privileges) {
        self.privileges.store(known as u8, Relaxed);
    }

    /// Keeps the descriptor until the node is forgotten or seen under a name again.
    pub fn pin(&self) {
        self.slot.lock().pinned = true;
    }

    /// For the clock: whether it was used since the last time asked.
    pub fn take_used(&self) -> bool {
        self.used.swap(false, Relaxed)
    }

    /// For the clock: says whether it held the node already.
    pub fn set_queued(&self, queued: bool) -> bool {
        self.queued.swap(queued, Relaxed)
    }

    /// Gives up the descriptor unless it is pinned. Says whether it did.
    pub fn evict(&self) -> bool {
        let taken = {
            let mut slot = self.slot.lock();
            if slot.pinned { None } else { slot.descriptor.take() }
        };
        taken.is_some()
    }
}

/// All nodes of one directory tree.
pub struct Nodes {
    root: Arc<Node>,
    next_id: AtomicU64,
    by_key: Vec<Mutex<FxHashMap<InodeKey, Arc<Node>>>>,
    by_id: Vec<RwLock<FxHashMap<u64, Arc<Node>>>>,
    budget: Arc<Budget>,
}

enum Release {
    Lookups(u64),
    Child,
}

impl Nodes {
    /// A table that knows the root, for good.
    pub fn new(root: std::os::fd::OwnedFd, stat: &Stat, budget: Arc<Budget>) -> Self {
        let node = Node::new(NodeId::ROOT, stat);
        node.lookups.store(1, Relaxed);
        *node.slot.lock() = Slot { descriptor: Some(budget.count(root)), pinned: true };
        let nodes = Self {
            root: node.clone(),
            next_id: AtomicU64::new(NodeId::ROOT.0 + 1),
            by_key: (0..SHARDS).map(|_| Mutex::default()).collect(),
            by_id: (0..SHARDS).map(|_| RwLock::default()).collect(),
            budget,
        };
        nodes.key_shard(&stat.key).lock().insert(stat.key, node.clone());
        nodes.id_shard(node.id).write().insert(node.id.0, node);
        nodes
    }

    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    pub fn get(&self, id: NodeId) -> Option<Arc<Node>> {
        if id == NodeId::ROOT {
            return Some(self.root.clone());
        }
        self.id_shard(id).read().get(&id.0).cloned()
    }

    /// The node of an inode, if it is known.
    pub fn find(&self, key: &InodeKey) -> Option<Arc<Node>> {
        self.key_shard(key).lock().get(key).cloned()
    }

    /// How many nodes are known, the root included.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.by_id.iter().map(|shard| shard.read().len()).sum()
    }

    /// The node of an inode, known or new, with one more look-up. Ended by `forget`.
    pub fn look_up(&self, stat: &Stat) -> Arc<Node> {
        let mut shard = self.key_shard(&stat.key).lock();
        let node = shard.entry(stat.key).or_insert_with(|| {
            let node = Node::new(NodeId(self.next_id.fetch_add(1, Relaxed)), stat);
            self.id_shard(node.id).write().insert(node.id.0, node.clone());
            node
        });
        node.lookups.fetch_add(1, Relaxed);
        node.clone()
    }

    /// Remembers that `node` was just seen as `name` in `parent`; unpins it.
    pub fn sighted(&self, node: &Arc<Node>, parent: &Arc<Node>, name: &Name) {
        if node.id == NodeId::ROOT {
            return;
        }
        {
            let place = node.place.lock();
            let same = |s: &Sighting| Arc::ptr_eq(&s.parent, parent) && *s.name == *name;
            if place.seen.as_ref().is_some_and(same) {
                drop(place);
                self.unpin(node);
                return;
            }
        }
        self.hold_child(parent);
        let sighting = Sighting { parent: parent.clone(), name: name.to_boxed() };
        let superseded = {
            let mut place = node.place.lock();
            if place.dead { Some(sighting) } else { place.seen.replace(sighting) }
        };
        self.unpin(node);
        if node.is_dir() {
            self.break_cycle(node, parent);
        }
        if let Some(old) = superseded {
            self.release(old.parent, Release::Child);
        }
    }

    /// A name of `node` is gone. If it was the one known, only the descriptor leads to the inode now.
    pub fn lost(&self, node: &Arc<Node>, parent: &Arc<Node>, name: &Name) {
        let old = {
            let mut place = node.place.lock();
            let known = |s: &Sighting| Arc::ptr_eq(&s.parent, parent) && *s.name == *name;
            if place.seen.as_ref().is_none_or(known) { place.seen.take() } else { return }
        };
        node.pin();
        if let Some(old) = old {
            self.release(old.parent, Release::Child);
        }
    }

    /// Caches `fd` as the way to `node`; the one that is cached already wins.
    pub fn install(&self, node: &Arc<Node>, fd: std::os::fd::OwnedFd) -> Arc<Descriptor> {
        let fresh = self.budget.count(fd);
        {
            let mut slot = node.slot.lock();
            if let Some(present) = &slot.descriptor {
                return present.clone();
            }
            slot.descriptor = Some(fresh.clone());
        }
        self.budget.admit(node);
        fresh
    }

    /// Drops `count` look-ups.
    pub fn forget(&self, id: NodeId, count: u64) {
        if id == NodeId::ROOT {
            return;
        }
        if let Some(node) = self.get(id) {
            self.release(node, Release::Lookups(count));
        }
    }

    fn hold_child(&self, parent: &Arc<Node>) {
        let _shard = self.key_shard(&parent.key).lock();
        parent.children.fetch_add(1, Relaxed);
    }

    // A node that nobody refers to leaves the table and lets go of its parent, which may be the next to leave.
    fn release(&self, node: Arc<Node>, what: Release) {
        let mut next = Some((node, what));
        while let Some((node, what)) = next.take() {
            let mut shard = self.key_shard(&node.key).lock();
            let (lookups, children) = match what {
                Release::Lookups(n) => {
                    (node.lookups.load(Relaxed).saturating_sub(n), node.children.load(Relaxed))
                }
                Release::Child => (node.lookups.load(Relaxed), node.children.load(Relaxed).saturating_sub(1)),
            };
            node.lookups.store(lookups, Relaxed);
            node.children.store(children, Relaxed);
            if lookups > 0 || children > 0 {
                return;
            }
            if shard.get(&node.key).is_some_and(|present| Arc::ptr_eq(present, &node)) {
                shard.remove(&node.key);
            }
            self.id_shard(node.id).write().remove(&node.id.0);
            drop(shard);
            let seen = {
                let mut place = node.place.lock();
                place.dead = true;
                place.seen.take()
            };
            next = seen.map(|seen| (seen.parent, Release::Child));
        }
    }

    // When somebody else moved directories about, what was seen at different times may form a circle, which
    // would keep its members for ever. The older sighting is the wrong one.
    fn break_cycle(&self, node: &Arc<Node>, parent: &Arc<Node>) {
        let mut at = parent.clone();
        for _ in 0..super::DEPTH_MAX {
            let Some(seen) = at.sighting() else { return };
            if Arc::ptr_eq(&seen.parent, node) {
                let wrong = at.place.lock().seen.take();
                if let Some(wrong) = wrong {
                    self.release(wrong.parent, Release::Child);
                }
                return;
            }
            at = seen.parent;
        }
    }

    fn unpin(&self, node: &Arc<Node>) {
        let admit = {
            let mut slot = node.slot.lock();
            std::mem::take(&mut slot.pinned) && slot.descriptor.is_some()
        };
        if admit {
            self.budget.admit(node);
        }
    }

    fn key_shard(&self, key: &InodeKey) -> &Mutex<FxHashMap<InodeKey, Arc<Node>>> {
        &self.by_key[(key.ino as usize ^ (key.ino >> 16) as usize) % SHARDS]
    }

    fn id_shard(&self, id: NodeId) -> &RwLock<FxHashMap<u64, Arc<Node>>> {
        &self.by_id[id.0 as usize % SHARDS]
    }
}
