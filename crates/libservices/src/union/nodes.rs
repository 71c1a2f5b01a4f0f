//! The node table: the inodes of the union, by their own number and by the layers' inodes that they are made of.
//!
//! A node lives as long as somebody refers to it: a door (its look-ups keep it in `by_id`), an open file, or a
//! node below it. What it holds of the layers goes with it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use super::layers::{Held, Key, Origin};
use super::lower_names::LowerNames;
use super::partial::{Bytes, Partial};
use crate::name::Name;
use crate::numbers::first_number;
use crate::types::{Attr, NodeId, Timestamp};

const SHARDS: usize = 64;
/// Bound on climbing from a node to the root.
pub const DEPTH_MAX: usize = 8192;

/// What a node is made of.
pub struct Stack {
    /// The topmost first, never empty. A directory merges all; of anything else only the first counts, a second is the
    /// lower inode that it was copied from.
    pub parts: Vec<Arc<Held>>,
    /// Of a directory: the path in the lowers that it merges with, when that is not its own.
    pub redirect: Option<Box<[u8]>>,
}

impl Stack {
    pub fn top(&self) -> &Arc<Held> {
        &self.parts[0]
    }

    pub fn upper(&self) -> Option<&Arc<Held>> {
        self.parts.first().filter(|part| part.is_upper())
    }

    pub fn lowers(&self) -> &[Arc<Held>] {
        if self.upper().is_some() { &self.parts[1..] } else { &self.parts }
    }
}

/// A name of a node.
#[derive(Clone)]
pub struct Place {
    pub parent: Arc<Node>,
    pub name: Box<Name>,
}

/// One live inode of the union. Numbers are never used twice.
pub struct Node {
    pub id: NodeId,
    pub ino: u64,
    /// `S_IFMT` bits.
    pub kind: u32,
    /// The lower inode that it is, or that it was copied from.
    pub origin: Option<Origin>,
    /// Changes only under the lock of the id's shard.
    lookups: AtomicU64,
    /// Under which it stands in `by_key`.
    keys: Mutex<Vec<Key>>,
    stack: RwLock<Arc<Stack>>,
    /// The stack begins with the upper; never taken back.
    raised: AtomicBool,
    place: Mutex<Option<Place>>,
    /// Held while it is copied to the upper.
    pub copying: Mutex<()>,
    /// Of a directory: held shared to look at its names, exclusively to change them. The order of all locks is in
    /// the module's documentation.
    pub entries: RwLock<()>,
    /// A directory that was removed.
    dead: AtomicBool,
    /// Of a directory: entries of its upper part may carry an origin.
    pub impure: AtomicBool,
    /// How many names of a lower inode were hidden.
    pub names_removed: AtomicU32,
    /// How many names the union has for an inode of the link index.
    pub links: Mutex<Option<u32>>,
    /// How many open files the union has of it.
    pub open_files: AtomicU32,
    /// Times that were set when neither name nor open file led to a lower inode any more: the kernel writes such back when it
    /// lets go of one. No copy is made for them.
    pub last_times: Mutex<LastTimes>,
    /// Its name in the upper is not yet known to be durable.
    pub fresh: AtomicBool,
    /// Which layers hold the bytes of a file on the upper.
    pub bytes: Bytes,
    pub lower_names: Mutex<LowerNames>,
    table: Weak<Nodes>,
}

#[derive(Clone, Copy, Default)]
pub struct LastTimes {
    pub atime: Option<Timestamp>,
    pub mtime: Option<Timestamp>,
}

/// What a new node begins with.
pub struct Seed {
    pub ino: u64,
    pub kind: u32,
    pub origin: Option<Origin>,
    pub stack: Stack,
    pub impure: bool,
    pub links: Option<u32>,
    pub names_removed: u32,
}

impl Node {
    pub fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub fn stack(&self) -> Arc<Stack> {
        self.stack.read().clone()
    }

    pub fn is_raised(&self) -> bool {
        self.raised.load(Acquire)
    }

    pub fn upper(&self) -> Option<Arc<Held>> {
        if self.is_raised() { self.stack.read().upper().cloned() } else { None }
    }

    pub fn place(&self) -> Option<Place> {
        self.place.lock().clone()
    }

    pub fn is_at(&self, parent: &Arc<Node>, name: &Name) -> bool {
        self.place.lock().as_ref().is_some_and(|at| Arc::ptr_eq(&at.parent, parent) && *at.name == *name)
    }

    /// Remembers one of its names; must be called under the parent's `entries`.
    pub fn set_place(self: &Arc<Self>, parent: &Arc<Node>, name: &Name) {
        if self.id == NodeId::ROOT || self.is_at(parent, name) {
            return;
        }
        if self.is_dir() && parent.lies_below(self) {
            // Somebody else moved directories about below us: what was seen earlier is out of date.
            parent.clear_place();
        }
        let old = self.place.lock().replace(Place { parent: parent.clone(), name: name.to_boxed() });
        drop(old);
    }

    pub fn clear_place(&self) {
        let old = self.place.lock().take();
        drop(old);
    }

    /// One of its names is gone.
    pub fn lost_name(self: &Arc<Self>, parent: &Arc<Node>, name: &Name) {
        if self.is_at(parent, name) {
            self.clear_place();
        }
    }

    /// Whether `other` is this node or one of the directories above it.
    pub fn lies_below(self: &Arc<Self>, other: &Arc<Node>) -> bool {
        let mut at = self.clone();
        for _ in 0..DEPTH_MAX {
            if Arc::ptr_eq(&at, other) {
                return true;
            }
            let Some(place) = at.place() else { return false };
            at = place.parent;
        }
        true
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Acquire)
    }

    pub fn bury(&self) {
        self.dead.store(true, Release);
        self.clear_place();
    }

    pub fn set_redirect(&self, redirect: Box<[u8]>) {
        let mut stack = self.stack.write();
        *stack = Arc::new(Stack { parts: stack.parts.clone(), redirect: Some(redirect) });
    }

    /// The layers' attributes as the union shows them.
    pub fn shown(&self, mut attr: Attr) -> Attr {
        attr.ino = self.ino;
        attr.blocks_512 += if self.is_raised() { self.bytes.lower_blocks_512() } else { 0 };
        if self.is_dir() {
            if self.is_dead() {
                attr.nlink = 0;
            } else if self.stack.read().parts.len() > 1 {
                // Nobody counted; 1 is what filesystems say who do not count.
                attr.nlink = 1;
            }
        } else if let Some(links) = *self.links.lock() {
            attr.nlink = links;
        } else if !self.is_raised() {
            attr.nlink = attr.nlink.saturating_sub(self.names_removed.load(Relaxed));
            self.with_last_times(&mut attr);
        }
        attr
    }

    pub fn with_last_times(&self, attr: &mut Attr) {
        let last = *self.last_times.lock();
        attr.atime = last.atime.unwrap_or(attr.atime);
        attr.mtime = last.mtime.unwrap_or(attr.mtime);
    }

    fn take_parent(&mut self) -> Option<Arc<Node>> {
        self.place.get_mut().take().map(|place| place.parent)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(table) = self.table.upgrade() {
            for key in std::mem::take(self.keys.get_mut()) {
                table.remove_key(key, self);
            }
        }
        // Not by recursion: a chain of parents may be longer than the stack is deep.
        let mut parent = self.take_parent();
        while let Some(node) = parent.and_then(Arc::into_inner) {
            let mut node = node;
            parent = node.take_parent();
        }
    }
}

/// All nodes of one union.
pub struct Nodes {
    root: std::sync::OnceLock<Arc<Node>>,
    next_id: AtomicU64,
    by_key: Vec<Mutex<FxHashMap<Key, Weak<Node>>>>,
    by_id: Vec<Mutex<FxHashMap<u64, Arc<Node>>>>,
}

impl Nodes {
    pub fn new(root: Seed) -> Arc<Self> {
        let nodes = Arc::new(Self {
            root: std::sync::OnceLock::new(),
            next_id: AtomicU64::new(NodeId::ROOT.0),
            by_key: (0..SHARDS).map(|_| Mutex::default()).collect(),
            by_id: (0..SHARDS).map(|_| Mutex::default()).collect(),
        });
        let root = nodes.intern(root);
        nodes.root.get_or_init(|| root);
        nodes.next_id.fetch_max(first_number(), Relaxed);
        nodes
    }

    pub fn root(&self) -> &Arc<Node> {
        self.root.get().expect("set when the table was made")
    }

    pub fn get(&self, id: NodeId) -> Option<Arc<Node>> {
        if id == NodeId::ROOT {
            return Some(self.root().clone());
        }
        self.id_shard(id).lock().get(&id.0).cloned()
    }

    pub fn by_key(&self, key: Key) -> Option<Arc<Node>> {
        self.key_shard(key).lock().get(&key)?.upgrade()
    }

    /// The node whose topmost part is that of `seed`, known or new.
    pub fn intern(self: &Arc<Self>, seed: Seed) -> Arc<Node> {
        let key = seed.stack.top().key();
        // Dropped after the lock: what a seed holds is given back to layers.
        let mut seed = Some(seed);
        let mut shard = self.key_shard(key).lock();
        if let Some(known) = shard.get(&key).and_then(Weak::upgrade) {
            drop(shard);
            return known;
        }
        let seed = seed.take().expect("used once");
        let bytes = Bytes::default();
        if seed.origin.is_none() {
            // Not copied from anywhere.
            bytes.set(None);
        }
        let node = Arc::new(Node {
            id: NodeId(self.next_id.fetch_add(1, Relaxed)),
            ino: seed.ino,
            kind: seed.kind,
            origin: seed.origin,
            lookups: AtomicU64::new(0),
            keys: Mutex::new(vec![key]),
            raised: AtomicBool::new(seed.stack.upper().is_some()),
            stack: RwLock::new(Arc::new(seed.stack)),
            place: Mutex::default(),
            copying: Mutex::default(),
            entries: RwLock::default(),
            dead: AtomicBool::new(false),
            impure: AtomicBool::new(seed.impure),
            names_removed: AtomicU32::new(seed.names_removed),
            links: Mutex::new(seed.links),
            open_files: AtomicU32::new(0),
            last_times: Mutex::default(),
            fresh: AtomicBool::new(false),
            bytes,
            lower_names: Mutex::default(),
            table: Arc::downgrade(self),
        });
        shard.insert(key, Arc::downgrade(&node));
        node
    }

    /// One more look-up of `node`, to be ended by `forget`.
    pub fn remember(&self, node: &Arc<Node>) {
        if node.id == NodeId::ROOT {
            return;
        }
        let mut shard = self.id_shard(node.id).lock();
        if node.lookups.fetch_add(1, Relaxed) == 0 {
            shard.insert(node.id.0, node.clone());
        }
    }

    pub fn forget(&self, id: NodeId, count: u64) {
        let mut shard = self.id_shard(id).lock();
        let Some(node) = shard.get(&id.0) else { return };
        let left = node.lookups.load(Relaxed).saturating_sub(count);
        node.lookups.store(left, Relaxed);
        let gone = if left == 0 { shard.remove(&id.0) } else { None };
        drop(shard);
        drop(gone);
    }

    /// `node` is on the upper from now on, with all its bytes or some.
    pub fn raise(&self, node: &Arc<Node>, upper: Arc<Held>, partial: Option<Arc<Partial>>) {
        self.add_key(node, upper.key());
        node.bytes.unsynced.store(partial.is_some(), Release);
        node.bytes.set(partial);
        let mut stack = node.stack.write();
        let parts = std::iter::once(upper).chain(stack.parts.iter().cloned()).collect();
        *stack = Arc::new(Stack { parts, redirect: stack.redirect.clone() });
        node.raised.store(true, Release);
        drop(stack);
    }

    /// Replaces what lies below the first part, which others changed.
    pub fn restack(&self, node: &Arc<Node>, fresh: Stack) {
        let mut stack = node.stack.write();
        if stack.top().key() != fresh.top().key() {
            return;
        }
        let old = std::mem::replace(&mut *stack, Arc::new(fresh));
        drop(stack);
        *node.lower_names.lock() = LowerNames::default();
        drop(old);
    }

    /// `node` is found by `key` too.
    pub fn add_key(&self, node: &Arc<Node>, key: Key) {
        let mut keys = node.keys.lock();
        if !keys.contains(&key) {
            keys.push(key);
        }
        drop(keys);
        self.key_shard(key).lock().insert(key, Arc::downgrade(node));
    }

    fn remove_key(&self, key: Key, node: &Node) {
        let mut shard = self.key_shard(key).lock();
        // By now it may be another node's.
        if shard.get(&key).is_some_and(|present| std::ptr::eq(present.as_ptr(), node)) {
            shard.remove(&key);
        }
    }

    /// How many nodes are known, the root included.
    #[cfg(test)]
    pub fn len(&self) -> (usize, usize) {
        let by_id: usize = self.by_id.iter().map(|shard| shard.lock().len()).sum();
        (by_id + 1, self.by_key.iter().map(|shard| shard.lock().len()).sum())
    }

    fn key_shard(&self, key: Key) -> &Mutex<FxHashMap<Key, Weak<Node>>> {
        &self.by_key[(key.node.0 as usize ^ usize::from(key.ordinal)) % SHARDS]
    }

    fn id_shard(&self, id: NodeId) -> &Mutex<FxHashMap<u64, Arc<Node>>> {
        &self.by_id[id.0 as usize % SHARDS]
    }
}
