//! How much memory all windows of a service take together.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use polytropo_wire::window::BLOCK_BYTES;

use super::file::Window;

/// The blocks of all windows, in the order in which they came.
pub struct Budget {
    blocks_max: usize,
    resident: Mutex<VecDeque<(Weak<Window>, u64)>>,
}

impl Budget {
    pub fn new(bytes: u64) -> Arc<Self> {
        let blocks_max = usize::try_from(bytes / BLOCK_BYTES).unwrap_or(usize::MAX).max(4);
        Arc::new(Self { blocks_max, resident: Mutex::default() })
    }

    /// Makes room for one more block and counts it.
    pub fn reserve(&self, window: &Arc<Window>, block: u64) {
        let mut evicted = Vec::new();
        {
            let mut resident = self.resident.lock();
            while resident.len() >= self.blocks_max {
                evicted.extend(resident.pop_front());
            }
            resident.push_back((Arc::downgrade(window), block));
        }
        for (window, block) in evicted {
            if let Some(window) = window.upgrade() {
                window.evict(block);
            }
        }
    }

    /// Windows that are gone take no room.
    pub fn forget_gone(&self) {
        self.resident.lock().retain(|(window, _)| window.strong_count() > 0);
    }
}
