//! Nodes for which another inode of the kernel stands than before.
//!
//! While passthrough opens of an inode are there, the kernel uses the file that they were bound to and no other. When the bytes of the node
//! have moved (copy-up), the kernel is given a second number for the node: the old inode keeps the old file for those who
//! have it open, and every new look-up leads to the new one. The door translates; the stack knows one number.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;
use polytropo_libservices::NodeId;
use rustc_hash::FxHashMap;

/// Marks a node's second number. Stacks count their nodes from 1.
const SECOND: u64 = 1 << 63;
/// Renewed nodes that are remembered, 48 bytes each. Beyond it files are not passed through any more.
const RENEWED_MAX: usize = 65_536;

/// What was done for somebody who opened the old inode.
struct Renewed {
    /// The thread that was last sent to look the name up again.
    sent_back: Option<u32>,
}

/// The renewed nodes of one door.
#[derive(Default)]
pub struct RenewedNodes {
    nodes: RwLock<FxHashMap<NodeId, Renewed>>,
    /// Spares the lock where there are none, which is the rule.
    count: AtomicUsize,
}

/// What an open of the old inode is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldInode {
    /// The name leads to the new inode: ESTALE makes the kernel look.
    LookAgain,
    /// It was told so and came back, so there is no name: /proc/self/fd leads to the inode itself.
    HasNoName,
}

impl RenewedNodes {
    /// The number that the kernel is to know the node by; `number` is its first.
    pub fn outward(&self, node: NodeId, number: u64) -> u64 {
        if self.contains(node) { number | SECOND } else { number }
    }

    /// The node behind the kernel's number.
    pub fn inward(number: u64) -> NodeId {
        NodeId(number & !SECOND)
    }

    /// Whether the kernel's `number` of `node` is that of an inode which another one has replaced.
    pub fn is_replaced(&self, node: NodeId, number: u64) -> bool {
        number & SECOND == 0 && self.contains(node)
    }

    fn contains(&self, node: NodeId) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.nodes.read().contains_key(&node)
    }

    /// Whether `node` may be bound to a file: if need be another inode could replace it.
    pub fn has_room(&self, node: NodeId) -> bool {
        node.0 & SECOND == 0 && self.count.load(Ordering::Acquire) < RENEWED_MAX
    }

    /// Gives the node a second number; `thread` is sent to look it up.
    pub fn add(&self, node: NodeId, thread: u32) {
        let mut nodes = self.nodes.write();
        nodes.insert(node, Renewed { sent_back: Some(thread) });
        self.count.store(nodes.len(), Ordering::Release);
    }

    pub fn open_of_old(&self, node: NodeId, thread: u32) -> OldInode {
        let mut nodes = self.nodes.write();
        let Some(renewed) = nodes.get_mut(&node) else { return OldInode::LookAgain };
        if renewed.sent_back.take() == Some(thread) {
            return OldInode::HasNoName;
        }
        renewed.sent_back = Some(thread);
        OldInode::LookAgain
    }

    /// `thread` has found the new inode.
    pub fn open_of_new(&self, node: NodeId, thread: u32) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        if let Some(renewed) = self.nodes.write().get_mut(&node) {
            renewed.sent_back.take_if(|sent| *sent == thread);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told_the_second_number() {
        let renewed = RenewedNodes::default();
        let node = NodeId(5);
        assert!(renewed.outward(node, 5) == 5 && !renewed.is_replaced(node, 5));
        renewed.add(node, 1);
        let second = renewed.outward(node, 5);
        assert_eq!((RenewedNodes::inward(second), RenewedNodes::inward(5)), (node, node));
        assert!(second != 5 && renewed.is_replaced(node, 5) && !renewed.is_replaced(node, second));
        assert_eq!(renewed.outward(NodeId(6), 6), 6);
    }

    #[test]
    fn who_comes_back_without_a_name_is_told_from_who_looks_again() {
        let renewed = RenewedNodes::default();
        let node = NodeId(5);
        renewed.add(node, 1);
        assert_eq!(renewed.open_of_old(node, 1), OldInode::HasNoName);
        assert_eq!(renewed.open_of_old(node, 1), OldInode::LookAgain);
        renewed.open_of_new(node, 1);
        assert_eq!(renewed.open_of_old(node, 1), OldInode::LookAgain);
        assert_eq!(renewed.open_of_old(node, 2), OldInode::LookAgain);
    }
}
