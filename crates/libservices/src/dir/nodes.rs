//! The node table: which inodes of the host are known, by what number, and how to reach them again.

use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed},
};

use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use super::descriptors::{Budget, Descriptor};
use super::sys::{InodeKey, Stat};
use crate::name::Name;
use crate::numbers::first_number;
use crate::types::NodeId;

const SHARDS: usize = 64;

/// One live inode. Numbers are never used twice.
pub struct Node {
    pub id: NodeId,
    pub key: InodeKey,
    /// `S_IFMT` bits of the host's inode; never change in an inode's life.
    pub host_type: u32,
    /// When it became known. Of an immutable directory's file that is its size.
    pub first_size_bytes: u64,
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
    /// It could be opened for reading.
    read: AtomicBool,
    /// Held alone while setuid and setgid bits change, or are gone for a moment (`Dir::change_bytes`); shared by those
    /// who look at them and who change bytes of a file without any.
    pub bits: RwLock<()>,
}

/// Where the inode was seen last.
#[derive(Clone)]
pub struct Sighting {
    pub parent: Arc<Node>,
    pub name: Box<Name>,
}

impl Sighting {
    fn is(&self, parent: &Arc<Node>, name: &Name) -> bool {
        Arc::ptr_eq(&self.parent, parent) && *self.name == *name
    }
}

#[derive(Default)]
struct Place {
    seen: Option<Sighting>,
    /// Another name of the same file, for when that one goes.
    other: Option<Sighting>,
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
            first_size_bytes: stat.attr.size_bytes,
            lookups: AtomicU64::new(0),
            children: AtomicU64::new(0),
            place: Mutex::default(),
            slot: Mutex::default(),
            used: AtomicBool::new(false),
            queued: AtomicBool::new(false),
            privileges: AtomicU8::new(Privileges::Unknown as u8),
            read: AtomicBool::new(false),
            bits: RwLock::new(()),
        })
    }

    pub fn is_dir(&self) -> bool {
        self.host_type == libc::S_IFDIR
    }

    pub fn was_read(&self) -> bool {
        self.read.load(Relaxed)
    }

    pub fn set_read(&self) {
        self.read.store(true, Relaxed);
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

    /// Takes the file's other name for the one to reach it by. Says whether it has one.
    pub fn try_other_name(&self) -> bool {
        let place = &mut *self.place.lock();
        std::mem::swap(&mut place.seen, &mut place.other);
        if place.seen.is_none() {
            place.seen = place.other.take();
            return false;
        }
        true
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

    /// Remembers what was seen at some time past, unless something later is known.
    pub fn suppose_privileges(&self, seen: Privileges) {
        let (unknown, seen) = (Privileges::Unknown as u8, seen as u8);
        let _ = self.privileges.compare_exchange(unknown, seen, Relaxed, Relaxed);
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

    /// Takes `sighting` for where the node is, unless the node is dead or `outdated` (told whether it can be reached
    /// without): then it is given back. Else gives back the one that it superseded.
    fn record(
        &self,
        sighting: Sighting,
        linked: bool,
        outdated: impl Fn(bool) -> bool,
    ) -> Result<Option<Sighting>, Sighting> {
        let place = &mut *self.place.lock();
        if place.dead || outdated(place.seen.is_some() || self.slot.lock().pinned) {
            return Err(sighting);
        }
        if place.other.as_ref().is_some_and(|other| other.is(&sighting.parent, &sighting.name)) {
            std::mem::swap(&mut place.seen, &mut place.other);
            return Ok(Some(sighting));
        }
        let known = place.seen.replace(sighting);
        if linked && !self.is_dir() && known.is_some() {
            return Ok(std::mem::replace(&mut place.other, known));
        }
        Ok(known)
    }

    /// Strikes out a name; says whether another is known.
    fn strike(&self, parent: &Arc<Node>, name: &Name) -> (Option<Sighting>, bool) {
        let place = &mut *self.place.lock();
        let gone = if place.seen.as_ref().is_some_and(|seen| seen.is(parent, name)) {
            std::mem::replace(&mut place.seen, place.other.take())
        } else if place.other.as_ref().is_some_and(|other| other.is(parent, name)) {
            place.other.take()
        } else {
            None
        };
        (gone, place.seen.is_some())
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
    /// Counts names that went or moved: what was seen before and is recorded after one may be wrong.
    moves: AtomicU64,
}

/// When something was seen; see `Nodes::now`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Moment(u64);

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
            next_id: AtomicU64::new(first_number().max(NodeId::ROOT.0 + 1)),
            by_key: (0..SHARDS).map(|_| Mutex::default()).collect(),
            by_id: (0..SHARDS).map(|_| RwLock::default()).collect(),
            budget,
            moves: AtomicU64::new(0),
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

    /// One more look-up of a node. False if it was forgotten meanwhile.
    pub fn look_up_again(&self, node: &Arc<Node>) -> bool {
        let shard = self.key_shard(&node.key).lock();
        let there = shard.get(&node.key).is_some_and(|present| Arc::ptr_eq(present, node));
        if there {
            node.lookups.fetch_add(1, Relaxed);
        }
        there
    }

    /// To be taken before a name is looked at whose sighting is to be recorded.
    pub fn now(&self) -> Moment {
        Moment(self.moves.load(Acquire))
    }

    /// A name went or moved on the host. To be called after it did and before that is recorded.
    pub fn names_moved(&self) {
        self.moves.fetch_add(1, AcqRel);
    }

    /// Remembers that `node` was seen as `name` in `parent` at `seen_at` or later; unpins it. `linked`: it may have
    /// other names, so the one known is kept too. Nothing is recorded over what is known better, since names moved
    /// in between.
    pub fn sighted(
        &self,
        node: &Arc<Node>,
        (parent, name): (&Arc<Node>, &Name),
        linked: bool,
        seen_at: Moment,
    ) {
        if node.id == NodeId::ROOT {
            return;
        }
        if node.place.lock().seen.as_ref().is_some_and(|seen| seen.is(parent, name)) {
            return self.unpin(node);
        }
        self.hold_child(parent);
        let sighting = Sighting { parent: parent.clone(), name: name.to_boxed() };
        match node.record(sighting, linked, |known| known && self.now() != seen_at) {
            Err(outdated) => self.release(outdated.parent, Release::Child),
            Ok(superseded) => {
                self.unpin(node);
                if node.is_dir() {
                    self.break_cycle(node, parent);
                }
                if let Some(old) = superseded {
                    self.release(old.parent, Release::Child);
                }
            }
        }
    }

    /// A name of `node` is gone. If no other is known, only the descriptor leads to the inode now.
    pub fn lost(&self, node: &Arc<Node>, parent: &Arc<Node>, name: &Name) {
        let (gone, reachable) = node.strike(parent, name);
        if reachable {
            self.unpin(node);
        } else {
            node.pin();
        }
        if let Some(gone) = gone {
            self.release(gone.parent, Release::Child);
        }
    }

    /// `node` was renamed by us.
    pub fn renamed(&self, node: &Arc<Node>, from: (&Arc<Node>, &Name), to: (&Arc<Node>, &Name)) {
        let (gone, reachable) = node.strike(from.0, from.1);
        self.sighted(node, to, reachable, self.now());
        if let Some(gone) = gone {
            self.release(gone.parent, Release::Child);
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

    // A node that nobody refers to leaves the table and lets go of its parents, which may be the next to leave.
    fn release(&self, node: Arc<Node>, what: Release) {
        let mut due = vec![(node, what)];
        while let Some((node, what)) = due.pop() {
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
                continue;
            }
            if shard.get(&node.key).is_some_and(|present| Arc::ptr_eq(present, &node)) {
                shard.remove(&node.key);
            }
            self.id_shard(node.id).write().remove(&node.id.0);
            drop(shard);
            let mut place = node.place.lock();
            place.dead = true;
            let seen = [place.seen.take(), place.other.take()];
            due.extend(seen.into_iter().flatten().map(|seen| (seen.parent, Release::Child)));
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

/// Nodes hold their parents: let go of one after the other, a deep tree would be dropped by deep recursion.
impl Drop for Nodes {
    fn drop(&mut self) {
        for node in self.by_id.iter().flat_map(|shard| shard.read().values().cloned().collect::<Vec<_>>()) {
            let mut place = node.place.lock();
            (place.seen, place.other) = (None, None);
        }
    }
}
