//! Tells programs whether what they were told of names and attributes is still true, by counters in memory that they share.
//!
//! [`Epochs`] stands on top of a stack, below all of its doors: every change passes through it, and is counted before anything of it can
//! be seen. What other stacks change in layers that they share with this one is counted when the layers tell of it, which is before
//! the change is acknowledged.
//!
//! Inodes are known by `st_ino`, which stays the same for an inode however often it is forgotten and looked up again; node numbers do not.

mod layer;
mod notes;
mod table;

use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use polytropo_libservices::{
    Caller, Change, Coherence, DoorId, Entry, Libservice, Name, NodeId, Observer, Result,
};
use polytropo_wire::epochs::{EVERYTHING, Epoch};
use rustc_hash::FxHashMap;

pub use notes::Notes;
pub use table::Table;

const SHARDS: usize = 32;

/// A stack, with counters of its changes.
pub struct Epochs {
    below: Arc<dyn Libservice>,
    /// None: others change the stack unseen, or memory could not be had.
    table: Option<Table>,
    /// Nothing can change, so nothing is counted.
    immutable: bool,
    /// Whose changes all pass through here.
    doors: RwLock<Vec<DoorId>>,
    /// All changes, of whatever.
    changes: Epoch,
    /// Every node that somebody holds.
    nodes: Vec<Mutex<FxHashMap<NodeId, Known>>>,
}

/// A node that somebody holds.
#[derive(Clone, Copy)]
struct Known {
    ino: u64,
    is_directory: bool,
    lookups: u64,
}

impl Epochs {
    pub fn over(below: Arc<dyn Libservice>) -> Arc<Self> {
        let coherence = below.coherence();
        let table = match coherence {
            Coherence::Shared => None,
            Coherence::Immutable | Coherence::Exclusive => Table::new()
                .inspect_err(|errno| log::warn!("programs cannot keep what they look up: {errno}"))
                .ok(),
        };
        let immutable = coherence == Coherence::Immutable;
        let nodes = (0..SHARDS).map(|_| Mutex::default()).collect();
        let made = Arc::new(Self {
            below,
            table,
            immutable,
            doors: RwLock::default(),
            changes: Epoch::default(),
            nodes,
        });
        if made.counts() {
            made.below.observe(Arc::new(Listener(Arc::downgrade(&made))));
            if let Ok(root) = made.below.getattr(&Caller::service(), NodeId::ROOT, None) {
                made.shard(NodeId::ROOT)
                    .lock()
                    .insert(NodeId::ROOT, Known { ino: root.ino, is_directory: true, lookups: 1 });
            }
        }
        made
    }

    /// These doors stand on top: what they change is counted as it passes through.
    pub fn begin_doors(&self, doors: [DoorId; 2]) {
        self.doors.write().extend(doors);
    }

    pub fn end_doors(&self, doors: [DoorId; 2]) {
        self.doors.write().retain(|door| !doors.contains(door));
    }

    /// None: programs must not keep anything.
    pub fn table(&self) -> Option<&Table> {
        self.table.as_ref()
    }

    /// To be compared with itself: while it is the same, and there is one, nothing at all has changed.
    pub fn calm(&self) -> Option<u64> {
        self.changes.sample()
    }

    /// Whether changes are to be counted.
    fn counts(&self) -> bool {
        self.table.is_some() && !self.immutable
    }

    fn shard(&self, node: NodeId) -> &Mutex<FxHashMap<NodeId, Known>> {
        &self.nodes[node.0 as usize % SHARDS]
    }

    fn known(&self, node: NodeId) -> Option<Known> {
        self.shard(node).lock().get(&node).copied()
    }

    /// An entry goes to somebody who will hold it.
    fn learn(&self, entry: &Entry) {
        if self.counts() {
            let known = Known { ino: entry.attr.ino, is_directory: entry.attr.is_dir(), lookups: 0 };
            self.shard(entry.node).lock().entry(entry.node).or_insert(known).lookups += 1;
        }
    }

    fn unlearn(&self, node: NodeId, count: u64) {
        if !self.counts() || node == NodeId::ROOT {
            return;
        }
        let mut shard = self.shard(node).lock();
        let Some(known) = shard.get_mut(&node) else { return };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups == 0 {
            shard.remove(&node);
        }
    }

    /// Begins a change of an inode's attributes, bytes or list of entries. It ends when the value is dropped.
    pub fn changing(&self, node: NodeId) -> Changing<'_> {
        let mut changing = Changing::of(self);
        match self.known(node) {
            _ if !self.counts() => {}
            Some(known) => changing.inode(known.ino),
            None => changing.everything(),
        }
        changing
    }

    /// Begins a change of who may go through a node: of a directory all that lies below is concerned.
    fn changing_rights(&self, node: NodeId) -> Changing<'_> {
        let mut changing = self.changing(node);
        if self.counts() && self.known(node).is_none_or(|known| known.is_directory) {
            changing.everything();
        }
        changing
    }

    /// Begins a change of what names in directories stand for.
    fn changing_names<const N: usize>(&self, names: [(NodeId, &Name); N]) -> Changing<'_> {
        let mut changing = Changing::of(self);
        if let Some(table) = self.table().filter(|_| !self.immutable) {
            for (parent, name) in names {
                match self.known(parent) {
                    Some(known) => {
                        changing.inode(known.ino);
                        changing.counter(table.of_name(known.ino, name));
                    }
                    None => changing.everything(),
                }
            }
        }
        changing
    }
}

/// Counters that one change touches: two directories, two names in them, and everything.
const TOUCHED_MAX: usize = 6;

/// A change that is under way. Ends when it is dropped, also by a panic.
#[must_use = "the change ends when this is dropped"]
pub struct Changing<'a> {
    epochs: &'a Epochs,
    counters: [u16; TOUCHED_MAX],
    count: usize,
}

impl<'a> Changing<'a> {
    fn of(epochs: &'a Epochs) -> Self {
        Self { epochs, counters: [0; TOUCHED_MAX], count: 0 }
    }

    fn counter(&mut self, counter: u16) {
        if let (Some(table), Some(place)) = (self.epochs.table(), self.counters.get_mut(self.count)) {
            if self.count == 0 {
                self.epochs.changes.begin();
            }
            *place = counter;
            self.count += 1;
            table.epoch(counter).begin();
        }
    }

    fn inode(&mut self, ino: u64) {
        if let Some(table) = self.epochs.table() {
            self.counter(table.of_inode(ino));
        }
    }

    fn everything(&mut self) {
        self.counter(EVERYTHING);
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        if let Some(table) = self.epochs.table() {
            self.counters[..self.count].iter().for_each(|counter| table.epoch(*counter).end());
            if self.count > 0 {
                self.epochs.changes.end();
            }
        }
    }
}

/// Hears of what others change in shared layers, and of inodes that lost a name.
struct Listener(Weak<Epochs>);

impl Observer for Listener {
    fn changed(&self, change: Change<'_>, origin: DoorId) {
        let Some(epochs) = self.0.upgrade() else { return };
        let counted = epochs.doors.read().contains(&origin);
        match change {
            // What others change of a directory may be who can go through it.
            Change::Inode { node } if !counted => drop(epochs.changing_rights(node)),
            Change::Inode { node } | Change::Bytes { node, .. } => drop(epochs.changing(node)),
            Change::Entry { parent, name } => drop(epochs.changing_names([(parent, name)])),
            Change::Elsewhere => {
                let mut changing = Changing::of(&epochs);
                changing.everything();
            }
        }
    }

    fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}
