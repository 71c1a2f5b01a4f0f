//! The process's budget of cached O_PATH descriptors, shared by all its directories.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use rustix::io::{Errno, Result};

use super::nodes::Node;

/// Descriptors left to open files, doors and the rest of the process: half, and at least this many.
const OTHERS_MIN: usize = 128;
/// Works even under absurd limits: a deep path is walked with two.
const BUDGET_MIN: usize = 16;
/// Bound on the work of one eviction.
const EVICT_STEPS_MAX: usize = 64;
/// How many are closed at once when the process ran out of descriptors.
const RESCUE_COUNT: usize = 32;

/// A cached descriptor; counted until the last user drops it.
pub struct Descriptor {
    fd: OwnedFd,
    budget: Arc<Budget>,
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        self.budget.open.fetch_sub(1, Relaxed);
    }
}

/// Holds the cached descriptors of nodes below a limit, closing those that were not used lately (the clock
/// algorithm: each gets one second chance).
pub struct Budget {
    limit: usize,
    open: AtomicUsize,
    /// Every node with an evictable descriptor, once, and some that are gone.
    clock: Mutex<VecDeque<Weak<Node>>>,
}

impl Budget {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit: limit.max(BUDGET_MIN), open: AtomicUsize::new(0), clock: Mutex::default() })
    }

    /// The one budget of this process, from its limit of open files at the first use.
    pub fn of_process() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Budget>> = OnceLock::new();
        SHARED
            .get_or_init(|| {
                let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
                let limit = usize::try_from(limit.unwrap_or(1 << 20)).unwrap_or(1 << 20);
                Budget::new((limit / 2).min(limit.saturating_sub(OTHERS_MIN)))
            })
            .clone()
    }

    pub fn open_count(&self) -> usize {
        self.open.load(Relaxed)
    }

    pub fn count(self: &Arc<Self>, fd: OwnedFd) -> Arc<Descriptor> {
        self.open.fetch_add(1, Relaxed);
        Arc::new(Descriptor { fd, budget: self.clone() })
    }

    /// Takes note that `node` has a descriptor now, and closes others' if there are too many.
    pub fn admit(&self, node: &Arc<Node>) {
        if !node.set_queued(true) {
            let mut clock = self.clock.lock();
            clock.push_back(Arc::downgrade(node));
            if clock.len() > 2 * self.limit + 1024 {
                clock.retain(|node| node.strong_count() > 0);
            }
        }
        if self.open_count() > self.limit {
            self.evict(1 + self.open_count() - self.limit);
        }
    }

    /// Runs `open`; if the process is out of descriptors, closes some cached ones and runs it once more.
    pub fn with_room<T>(&self, open: impl Fn() -> Result<T>) -> Result<T> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.evict(RESCUE_COUNT);
                open()
            }
            done => done,
        }
    }

    fn evict(&self, count: usize) {
        let mut closed = 0;
        for _ in 0..EVICT_STEPS_MAX.max(2 * count) {
            if closed >= count {
                return;
            }
            let Some(weak) = self.clock.lock().pop_front() else { return };
            // The node may hold the last reference to others: it is dropped with no lock held.
            let Some(node) = weak.upgrade() else { continue };
            if node.take_used() {
                self.clock.lock().push_back(weak);
            } else {
                node.set_queued(false);
                closed += usize::from(node.evict());
            }
        }
    }
}
