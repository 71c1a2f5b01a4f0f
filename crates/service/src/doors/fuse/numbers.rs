//! Which of the stack's nodes and open files the kernel means by a number, and the other way round.
//!
//! They are the stack's own numbers, but for what the kernel learnt from a worker that is dead: that has other numbers now, and the kernel
//! keeps the old ones. What the kernel holds of nodes is written down for the next worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;
use polytropo_libservices::{Entry, HandleId, Name, NodeId, first_number};
use rustc_hash::FxHashMap;

use super::renewed::RenewedNodes;
use crate::state::{DoorState, Seen};

/// The numbers of one door.
#[derive(Default)]
pub struct Numbers {
    state: Option<Arc<DoorState>>,
    recovered: RwLock<Recovered>,
    /// Spares the lock where there are none, which is the rule.
    count: AtomicUsize,
}

/// Kept for the life of the door: as many as its predecessor had nodes and open files.
#[derive(Default)]
struct Recovered {
    nodes: FxHashMap<u64, (NodeId, Lookups)>,
    numbers: FxHashMap<NodeId, u64>,
    handles: FxHashMap<u64, HandleId>,
}

/// Look-ups that the kernel holds and the stack knows nothing of.
struct Lookups(std::sync::atomic::AtomicU64);

impl Lookups {
    /// Takes off as many of `count` as there are; gives back the rest.
    fn take(&self, count: u64) -> u64 {
        let taken = |left: u64| Some(left.saturating_sub(count));
        match self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, taken) {
            Ok(left) | Err(left) => count.saturating_sub(left),
        }
    }
}

impl Numbers {
    pub fn new(state: Option<Arc<DoorState>>) -> Self {
        Self { state, ..Self::default() }
    }

    /// The node that the kernel means. `None` for one of a dead worker that was not found again.
    pub fn node(&self, number: u64) -> Option<NodeId> {
        let node = RenewedNodes::inward(number);
        if node == NodeId::ROOT || node.0 >= first_number() {
            return Some(node);
        }
        self.recovered.read().nodes.get(&node.0).map(|(node, _)| *node)
    }

    /// The number that the kernel knows the node by, apart from renewals.
    pub fn of_node(&self, node: NodeId) -> u64 {
        if self.count.load(Ordering::Acquire) == 0 {
            return node.0;
        }
        self.recovered.read().numbers.get(&node).copied().unwrap_or(node.0)
    }

    /// The open file that the kernel means.
    pub fn handle(&self, number: u64) -> HandleId {
        if number == 0 || number >= first_number() {
            return HandleId(number);
        }
        // Of one that was not opened again the stack knows nothing.
        self.recovered.read().handles.get(&number).copied().unwrap_or(HandleId(number))
    }

    /// The kernel is about to hear of a node by `number`: one more look-up. What has no name is seen under an empty one.
    pub fn seen(&self, number: u64, (parent, name): (u64, &[u8]), entry: &Entry) {
        let Some(state) = &self.state else { return };
        let (ino, file_type) = (entry.attr.ino, entry.attr.mode & libc::S_IFMT);
        let linked = entry.attr.nlink > 1 && file_type != libc::S_IFDIR;
        state.nodes.seen(&Seen { number, parent, name, ino, file_type, linked });
    }

    /// The kernel dropped look-ups. Returns the node and how many the stack is to drop.
    pub fn forget(&self, number: u64, count: u64) -> Option<(NodeId, u64)> {
        if let Some(state) = &self.state {
            state.nodes.forget(number, count);
        }
        let node = RenewedNodes::inward(number);
        if node.0 >= first_number() || node == NodeId::ROOT {
            return Some((node, count));
        }
        self.recovered.read().nodes.get(&node.0).map(|(node, extra)| (*node, extra.take(count)))
    }

    pub fn moved(&self, number: u64, from: (u64, &Name), to: (u64, &Name)) {
        if let Some(state) = &self.state {
            state.nodes.moved(number, from, to);
        }
    }

    /// Whether moves have to be told.
    pub fn are_kept(&self) -> bool {
        self.state.is_some()
    }

    /// The kernel holds `lookups` of `node` by a number of a dead worker's; the stack holds one.
    pub fn recover_node(&self, number: u64, node: NodeId, lookups: u64) {
        let mut recovered = self.recovered.write();
        recovered.nodes.insert(number, (node, Lookups(lookups.saturating_sub(1).into())));
        recovered.numbers.entry(node).or_insert(number);
        self.count.store(recovered.nodes.len(), Ordering::Release);
    }

    pub fn recovered_nodes(&self) -> Vec<NodeId> {
        self.recovered.read().numbers.keys().copied().collect()
    }

    pub fn recover_handle(&self, number: u64, handle: HandleId) {
        self.recovered.write().handles.insert(number, handle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn look_ups_of_a_dead_worker_are_dropped_before_those_of_the_stack() {
        let lookups = Lookups(5.into());
        assert_eq!((lookups.take(3), lookups.take(3), lookups.take(3)), (0, 1, 3));
    }
}
