//! Tells observers of changes; costs one load while there is none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use crate::libservice::{Change, Observer};
use crate::name::Name;
use crate::types::{Caller, DoorId, NodeId};

#[derive(Default)]
pub struct Notices {
    any: AtomicBool,
    observers: RwLock<Vec<Arc<dyn Observer>>>,
}

impl Notices {
    /// Takes the place of those that are gone: layers outlive the stacks that stand on them.
    pub fn add(&self, observer: Arc<dyn Observer>) {
        let mut observers = self.observers.write();
        observers.retain(|observer| !observer.is_gone());
        observers.push(observer);
        self.any.store(true, Ordering::Release);
    }

    /// Attributes or bytes of an inode changed.
    pub fn inode(&self, caller: &Caller, node: NodeId) {
        self.tell(caller.door, Change::Inode { node });
    }

    /// These bytes of an inode changed, and its attributes with them.
    pub fn bytes(&self, caller: &Caller, node: NodeId, offset: u64, length: u64) {
        self.tell(caller.door, Change::Bytes { node, offset, length });
    }

    /// A name in a directory stands for something else; the directory's times changed with it.
    pub fn entry(&self, caller: &Caller, parent: NodeId, name: &Name) {
        self.tell(caller.door, Change::Entry { parent, name });
        self.tell(caller.door, Change::Inode { node: parent });
    }

    pub fn tell(&self, origin: DoorId, change: Change<'_>) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        for observer in self.observers.read().iter() {
            observer.changed(change, origin);
        }
    }
}
