//! Open files and directories by number.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::RwLock;
use rustc_hash::FxHashMap;

use crate::error::{Errno, Error, Result};
use crate::numbers::first_number;
use crate::types::HandleId;

const SHARDS: usize = 16;

/// Numbered things of one kind. Numbers are never used twice.
pub struct Handles<T> {
    next: AtomicU64,
    shards: [RwLock<FxHashMap<u64, Arc<T>>>; SHARDS],
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self { next: AtomicU64::new(first_number()), shards: std::array::from_fn(|_| RwLock::default()) }
    }
}

/// Where the numbers begin that a layer gives out itself, beside those of the layers below: half of what one process has.
const APART: u64 = 1 << 39;

impl<T> Handles<T> {
    /// For a layer that passes the numbers of others on as well: its own are never among them.
    pub fn apart() -> Self {
        Self { next: AtomicU64::new(first_number() + APART), ..Self::default() }
    }

    /// Whether a number is one of those that begin apart.
    pub fn is_apart(handle: HandleId) -> bool {
        handle.0.wrapping_sub(first_number()) >= APART
    }

    pub fn insert(&self, value: T) -> HandleId {
        let id = self.next.fetch_add(1, Relaxed);
        self.shard(id).write().insert(id, Arc::new(value));
        HandleId(id)
    }

    /// EBADF when it is not open.
    pub fn get(&self, handle: HandleId) -> Result<Arc<T>> {
        let found = self.shard(handle.0).read().get(&handle.0).cloned();
        found.ok_or_else(|| Error::new(Errno::BADF, "use a handle that is not open"))
    }

    pub fn remove(&self, handle: HandleId) -> Option<Arc<T>> {
        self.shard(handle.0).write().remove(&handle.0)
    }

    fn shard(&self, id: u64) -> &RwLock<FxHashMap<u64, Arc<T>>> {
        &self.shards[id as usize % SHARDS]
    }
}
