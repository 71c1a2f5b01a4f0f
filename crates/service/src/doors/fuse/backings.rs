//! Files of the host that the kernel uses in place of the door (passthrough), by node.
//!
//! A file has to be registered with the connection before an open can name it, which takes rights over the whole machine: whoever
//! has them is the [`Registrar`]. Registrations are kept for the next open, within a bound; one that is in use is never given up, since
//! the kernel refuses a second one for the same inode meanwhile.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use polytropo_libservices::NodeId;
use rustc_hash::FxHashMap;

use super::registrar::Registrar;

/// Registrations kept by one door, those in use included. The registrar has a bound of its own.
pub const BACKINGS_MAX: usize = 4096;

struct Backing {
    id: u32,
    /// Opens that name it.
    users: u32,
    /// Its place in `idle` while nobody does.
    idle_since: u64,
}

#[derive(Default)]
struct Kept {
    by_node: FxHashMap<NodeId, Backing>,
    /// What nobody uses, the oldest first.
    idle: BTreeMap<u64, NodeId>,
    clock: u64,
}

/// The registrations of one door.
pub struct Backings {
    registrar: Arc<dyn Registrar>,
    kept: Mutex<Kept>,
    max: usize,
    complained: AtomicBool,
}

impl Backings {
    pub fn new(registrar: Arc<dyn Registrar>) -> Self {
        Self { registrar, kept: Mutex::default(), max: BACKINGS_MAX, complained: AtomicBool::new(false) }
    }

    /// The number to open `node` with, to be given back with `release`; registers `file` if that was not done. `None`
    /// where it cannot be.
    pub fn take(&self, node: NodeId, file: BorrowedFd<'_>) -> Option<u32> {
        if let Some(id) = self.take_known(node) {
            return Some(id);
        }
        let oldest = self.kept.lock().make_room(self.max)?;
        if let Some(oldest) = oldest {
            self.registrar.unregister(oldest);
        }
        // With no lock held: opens of other nodes need not wait.
        let id = match self.registrar.register(file) {
            Ok(id) => id,
            Err(error) => {
                if !self.complained.swap(true, Ordering::Relaxed) {
                    log::warn!(
                        "FUSE door: a file is not passed through, and later ones that are not are not logged: {error}"
                    );
                }
                return None;
            }
        };
        let (mine, other) = self.kept.lock().add(node, id);
        if let Some(other) = other {
            self.registrar.unregister(other);
        }
        Some(mine)
    }

    /// The same for a node that is registered already.
    pub fn take_known(&self, node: NodeId) -> Option<u32> {
        self.kept.lock().take(node)
    }

    /// The same while the kernel has it in use.
    pub fn take_used(&self, node: NodeId) -> Option<u32> {
        let mut kept = self.kept.lock();
        if kept.is_used(node) { kept.take(node) } else { None }
    }

    pub fn is_used(&self, node: NodeId) -> bool {
        self.kept.lock().is_used(node)
    }

    pub fn release(&self, node: NodeId) {
        self.kept.lock().release(node);
    }

    /// The kernel no longer knows the node, so that no open of it is left.
    pub fn forget(&self, node: NodeId) {
        let id = self.kept.lock().remove_idle(node);
        if let Some(id) = id {
            self.registrar.unregister(id);
        }
    }
}

impl Kept {
    fn take(&mut self, node: NodeId) -> Option<u32> {
        let backing = self.by_node.get_mut(&node)?;
        if backing.users == 0 {
            self.idle.remove(&backing.idle_since);
        }
        backing.users += 1;
        Some(backing.id)
    }

    /// `None` when all are in use; else what has to be given up.
    fn make_room(&mut self, max: usize) -> Option<Option<u32>> {
        if self.by_node.len() < max {
            return Some(None);
        }
        let (_, oldest) = self.idle.pop_first()?;
        Some(self.by_node.remove(&oldest).map(|backing| backing.id))
    }

    /// The number to use, and the one not to use if another thread was faster.
    fn add(&mut self, node: NodeId, id: u32) -> (u32, Option<u32>) {
        if let Some(known) = self.take(node) {
            return (known, Some(id));
        }
        self.by_node.insert(node, Backing { id, users: 1, idle_since: 0 });
        (id, None)
    }

    fn release(&mut self, node: NodeId) {
        let Some(backing) = self.by_node.get_mut(&node) else { return };
        backing.users = backing.users.saturating_sub(1);
        if backing.users == 0 {
            self.clock += 1;
            backing.idle_since = self.clock;
            self.idle.insert(self.clock, node);
        }
    }

    fn is_used(&self, node: NodeId) -> bool {
        self.by_node.get(&node).is_some_and(|backing| backing.users > 0)
    }

    fn remove_idle(&mut self, node: NodeId) -> Option<u32> {
        let backing = self.by_node.get(&node).filter(|backing| backing.users == 0)?;
        self.idle.remove(&backing.idle_since);
        self.by_node.remove(&node).map(|backing| backing.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::io;
    use std::os::fd::AsFd;

    #[derive(Default)]
    struct Book {
        last: Mutex<u32>,
        known: Mutex<HashSet<u32>>,
    }

    impl Registrar for Book {
        fn register(&self, _file: BorrowedFd<'_>) -> io::Result<u32> {
            let mut last = self.last.lock();
            *last += 1;
            self.known.lock().insert(*last);
            Ok(*last)
        }

        fn unregister(&self, id: u32) {
            assert!(self.known.lock().remove(&id));
        }
    }

    #[test]
    fn what_is_in_use_stays_and_the_rest_goes_oldest_first() {
        let book = Arc::new(Book::default());
        let backings = Backings { max: 2, ..Backings::new(book.clone()) };
        let file = tempfile::tempfile().unwrap();
        let take = |node| backings.take(NodeId(node), file.as_fd());
        let first = take(1).unwrap();
        assert_eq!(take(1), Some(first));
        let second = take(2).unwrap();
        assert_eq!(take(3), None);
        backings.release(NodeId(1));
        assert_eq!(take(3), None);
        backings.release(NodeId(1));
        assert_eq!(take(3), Some(3));
        assert_eq!(*book.known.lock(), HashSet::from([second, 3]));
        backings.forget(NodeId(2));
        assert_eq!(book.known.lock().len(), 2);
        backings.release(NodeId(2));
        assert_eq!(take(2), Some(second));
        backings.release(NodeId(2));
        backings.forget(NodeId(2));
        assert_eq!(*book.known.lock(), HashSet::from([3]));
    }
}
