//! Records by node, so that not every look-up reads an attribute.

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use super::record::Record;
use crate::types::{NodeId, Timestamp};

const SHARDS: usize = 64;
/// Bound on the records of one shard; a full one starts anew.
const SHARD_RECORDS_MAX: usize = 2048;

#[derive(Default)]
struct Shard {
    records: FxHashMap<u64, (Timestamp, Record)>,
    /// Counts changes of records: what was read before one is not kept after it.
    changes: u64,
}

pub struct Cache {
    shards: Vec<Mutex<Shard>>,
}

/// When a record was read from below.
#[derive(Clone, Copy)]
pub struct Moment(u64);

impl Default for Cache {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }
}

impl Cache {
    /// The record, and the inode's change time when it was read.
    pub fn get(&self, node: NodeId) -> Option<(Timestamp, Record)> {
        self.shard(node).lock().records.get(&node.0).copied()
    }

    pub fn now(&self, node: NodeId) -> Moment {
        Moment(self.shard(node).lock().changes)
    }

    /// Keeps what was read from below, unless a record changed since `read_at`.
    pub fn keep(&self, node: NodeId, read_at: Moment, changed: Timestamp, record: Record) {
        let mut shard = self.shard(node).lock();
        if shard.changes == read_at.0 {
            if shard.records.len() >= SHARD_RECORDS_MAX {
                shard.records.clear();
            }
            shard.records.insert(node.0, (changed, record));
        }
    }

    /// The record is about to change, or just did.
    pub fn drop(&self, node: NodeId) {
        let mut shard = self.shard(node).lock();
        shard.changes += 1;
        shard.records.remove(&node.0);
    }

    pub fn forget(&self, node: NodeId) {
        self.shard(node).lock().records.remove(&node.0);
    }

    fn shard(&self, node: NodeId) -> &Mutex<Shard> {
        &self.shards[node.0 as usize % SHARDS]
    }
}
