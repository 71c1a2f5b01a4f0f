//! Changes that others make in the layers, told with the union's node numbers.

use std::sync::{Arc, Weak};

use super::Union;
use super::layers::{Key, Layer, names};
use super::nodes::{Node, Nodes};
use crate::libservice::{Change, Observer};
use crate::notices::Notices;
use crate::types::*;

/// Marks the key of a part that is not the topmost of its node.
const BELOW: u16 = 1 << 15;

struct Relay {
    ordinal: u16,
    nodes: Weak<Nodes>,
    notices: Weak<Notices>,
    /// What this union does in its layers itself it also tells itself.
    own: DoorId,
}

impl Observer for Relay {
    fn changed(&self, change: Change<'_>, origin: DoorId) {
        if origin == self.own {
            return;
        }
        let (Some(nodes), Some(notices)) = (self.nodes.upgrade(), self.notices.upgrade()) else { return };
        match change {
            Change::Inode { node } => match self.find(&nodes, node) {
                Some(node) => notices.tell(origin, Change::Inode { node: node.id }),
                None => notices.tell(origin, Change::Elsewhere),
            },
            Change::Bytes { node, offset, length } => match self.find(&nodes, node) {
                Some(node) => notices.tell(origin, Change::Bytes { node: node.id, offset, length }),
                None => notices.tell(origin, Change::Elsewhere),
            },
            Change::Entry { parent, name } => match self.find(&nodes, parent) {
                Some(parent) => {
                    let name = names::hidden_by(name).unwrap_or(name);
                    notices.tell(origin, Change::Entry { parent: parent.id, name });
                }
                None => notices.tell(origin, Change::Elsewhere),
            },
            Change::Elsewhere => notices.tell(origin, Change::Elsewhere),
        }
    }

    fn is_gone(&self) -> bool {
        self.nodes.strong_count() == 0
    }
}

impl Relay {
    fn find(&self, nodes: &Nodes, node: NodeId) -> Option<Arc<Node>> {
        nodes
            .by_key(Key { ordinal: self.ordinal, node })
            .or_else(|| nodes.by_key(Key { ordinal: self.ordinal | BELOW, node }))
    }
}

impl Union {
    /// Listens to a layer that others may change.
    pub(super) fn listen(&self, layer: &Arc<Layer>) {
        if layer.settled {
            return;
        }
        let (nodes, notices) = (Arc::downgrade(&self.nodes), Arc::downgrade(&self.notices));
        layer.service.observe(Arc::new(Relay { ordinal: layer.ordinal, nodes, notices, own: self.own.door }));
    }

    /// Makes a merged directory known by its lower parts too, where others may change them.
    pub(super) fn watch_lowers(&self, node: &Arc<Node>) {
        for part in node.stack().parts.iter().skip(1).filter(|part| !part.layer.settled) {
            let Key { ordinal, node: below } = part.key();
            self.nodes.add_key(node, Key { ordinal: ordinal | BELOW, node: below });
        }
    }
}
