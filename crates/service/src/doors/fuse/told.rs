//! Which names and inodes the kernel may know of, of those that others change.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use polytropo_libservices::{Name, NodeId};
use polytropo_wire::sync::AtomicU64;
use rustc_hash::FxHashMap;

use super::marks::Slots;

const SHARDS: usize = 32;
/// 1 MiB, of which only those pages are there on which a name was marked.
const NAMES: usize = 1 << 17;

/// An inode that the kernel holds.
#[derive(Clone, Copy, Default)]
struct Inode {
    lookups: u64,
    /// Times that something of it was told since the last notice.
    told: u32,
}

/// What one door told its kernel.
pub struct Told {
    names: Slots,
    inodes: Vec<Mutex<FxHashMap<NodeId, Inode>>>,
    /// Another worker told it, nobody knows what.
    everything: AtomicBool,
    secret: RandomState,
}

impl Default for Told {
    fn default() -> Self {
        // Zeroed by the allocator, which does not touch large memory for that.
        let zeros = Box::into_raw(vec![0u64; NAMES].into_boxed_slice());
        const _: () = assert!(align_of::<AtomicU64>() == align_of::<u64>());
        // SAFETY: the box's own memory, which nobody else has; an atomic has the size and all the values of its integer, and its alignment here.
        let slots = unsafe { Box::from_raw(zeros as *mut [AtomicU64]) };
        Self {
            names: Slots::new(slots),
            inodes: (0..SHARDS).map(|_| Mutex::default()).collect(),
            everything: AtomicBool::new(false),
            secret: RandomState::new(),
        }
    }
}

impl Told {
    fn shard(&self, node: NodeId) -> &Mutex<FxHashMap<NodeId, Inode>> {
        &self.inodes[node.0 as usize % SHARDS]
    }

    fn key(&self, parent: NodeId, name: &[u8]) -> u64 {
        self.secret.hash_one((parent.0, name))
    }

    /// The kernel knows what a dead worker told it.
    pub fn everything(&self) {
        self.everything.store(true, Ordering::SeqCst);
    }

    /// Before a name is looked up for the kernel, or made or taken away by it.
    pub fn name(&self, parent: NodeId, name: &[u8]) {
        self.names.mark(self.key(parent, name));
    }

    /// Before the kernel is told anything of a node that it named.
    pub fn inode(&self, node: NodeId) {
        let mut shard = self.shard(node).lock();
        let inode = shard.entry(node).or_default();
        inode.told = inode.told.wrapping_add(1).max(1);
    }

    /// The kernel is about to hold one more look-up of a node. What it is told was looked at before: if `looked` is another by now, that
    /// may be out of date.
    pub fn hold(&self, node: NodeId) {
        let mut shard = self.shard(node).lock();
        let inode = shard.entry(node).or_default();
        inode.told = inode.told.wrapping_add(1).max(1);
        inode.lookups += 1;
    }

    /// The kernel has dropped look-ups.
    pub fn forget(&self, node: NodeId, count: u64) {
        if node == NodeId::ROOT {
            return;
        }
        let mut shard = self.shard(node).lock();
        if let Some(inode) = shard.get_mut(&node) {
            inode.lookups = inode.lookups.saturating_sub(count);
            if inode.lookups == 0 {
                shard.remove(&node);
            }
        }
    }

    /// See [`Slots::looked`].
    pub fn looked(&self) -> u64 {
        self.names.looked()
    }

    /// After a change of names or inodes, before it is asked which of them the kernel may know.
    pub fn look(&self) {
        self.names.look();
    }

    pub fn knows_name(&self, parent: NodeId, name: &Name) -> bool {
        self.everything.load(Ordering::SeqCst) || self.names.is_marked(self.key(parent, name.as_bytes()))
    }

    pub fn knows_inode(&self, node: NodeId) -> bool {
        let known = || self.shard(node).lock().get(&node).is_some_and(|inode| inode.told != 0);
        self.everything.load(Ordering::SeqCst) || known()
    }

    /// The kernel has the node, or an answer about it on its way.
    pub fn is_held(&self, node: NodeId) -> bool {
        self.shard(node).lock().get(&node).is_some_and(|inode| inode.lookups != 0)
    }

    /// Before a notice of the name is sent.
    pub fn forget_name(&self, parent: NodeId, name: &Name) {
        self.names.clear(self.key(parent, name.as_bytes()));
    }

    /// Before a notice of all that the kernel knows of the node: what `outdated` is to be given.
    pub fn begin_outdating(&self, node: NodeId) -> u32 {
        self.shard(node).lock().get(&node).map_or(0, |inode| inode.told)
    }

    /// The kernel took the notice. What it was told meanwhile it may have kept.
    pub fn outdated(&self, node: NodeId, told: u32) {
        if let Some(inode) = self.shard(node).lock().get_mut(&node)
            && inode.told == told
        {
            inode.told = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> &Name {
        Name::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn names_are_known_from_look_up_to_notice() {
        let told = Told::default();
        let directory = NodeId(7);
        assert!(!told.knows_name(directory, name("a")));
        told.name(directory, b"a");
        assert!(told.knows_name(directory, name("a")));
        assert!(!told.knows_name(directory, name("b")) && !told.knows_name(NodeId(8), name("a")));
        told.forget_name(directory, name("a"));
        assert!(!told.knows_name(directory, name("a")));
    }

    #[test]
    fn names_that_meet_stay_known() {
        let slots = Slots::new(Box::new([AtomicU64::new(0)]));
        slots.mark(5);
        slots.clear(6);
        assert!(slots.is_marked(5) && !slots.is_marked(6));
        slots.mark(6);
        slots.clear(5);
        slots.clear(6);
        assert!(slots.is_marked(5) && slots.is_marked(6) && slots.is_marked(7));
    }

    #[test]
    fn inodes_are_known_until_forgotten_or_outdated() {
        let told = Told::default();
        let node = NodeId(9);
        assert!(!told.knows_inode(node));
        told.hold(node);
        told.hold(node);
        assert!(told.knows_inode(node));
        let before = told.begin_outdating(node);
        told.inode(node);
        told.outdated(node, before);
        assert!(told.knows_inode(node), "it was told of meanwhile");
        told.outdated(node, told.begin_outdating(node));
        assert!(!told.knows_inode(node) && told.is_held(node));
        told.inode(node);
        told.forget(node, 1);
        assert!(told.knows_inode(node));
        told.forget(node, 1);
        assert!(!told.knows_inode(node) && !told.is_held(node));
        told.everything();
        assert!(told.knows_inode(node) && told.knows_name(node, name("x")));
    }
}
