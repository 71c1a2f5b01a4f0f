//! Open directories that belong to the door, not to a program.
//!
//! Where the kernel opens directories without asking (`NO_OPENDIR_SUPPORT`) and has a listing in memory, listing again takes no
//! request. It names no open directory when it does ask, and never says that one is closed; offsets mean the same through
//! every open directory of a node. So the door opens one where it needs one, and keeps some for the rest of
//! listings that are under way.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use polytropo_libservices::{Caller, HandleId, Libservice, NodeId, Result};

/// Kept by one door; those longest unused give way.
const KEPT_MAX: usize = 64;

/// Closed when its last user is done.
pub struct OpenDirectory {
    stack: Arc<dyn Libservice>,
    node: NodeId,
    pub handle: HandleId,
}

impl Drop for OpenDirectory {
    fn drop(&mut self) {
        self.stack.releasedir(self.node, self.handle);
    }
}

/// The open directories of one door, the latest used last.
pub struct OpenDirectories {
    stack: Arc<dyn Libservice>,
    kept: Mutex<VecDeque<Arc<OpenDirectory>>>,
}

impl OpenDirectories {
    pub fn new(stack: Arc<dyn Libservice>) -> Self {
        Self { stack, kept: Mutex::default() }
    }

    /// One to read `node` with; a listing that begins has its own.
    pub fn get(&self, caller: &Caller, node: NodeId, begins: bool) -> Result<Arc<OpenDirectory>> {
        if !begins {
            let mut kept = self.kept.lock();
            if let Some(at) = kept.iter().rposition(|directory| directory.node == node) {
                let found = kept.remove(at);
                kept.extend(found.clone());
                if let Some(found) = found {
                    return Ok(found);
                }
            }
        }
        let handle = self.stack.opendir(caller, node)?;
        let opened = Arc::new(OpenDirectory { stack: self.stack.clone(), node, handle });
        let given_up = {
            let mut kept = self.kept.lock();
            kept.push_back(opened.clone());
            if kept.len() > KEPT_MAX { kept.pop_front() } else { None }
        };
        // Closed with no lock held.
        drop(given_up);
        Ok(opened)
    }

    /// A listing has come to its end, or the kernel forgets the node.
    pub fn forget(&self, node: NodeId) {
        let closed: VecDeque<_> = {
            let mut kept = self.kept.lock();
            if !kept.iter().any(|directory| directory.node == node) {
                return;
            }
            let (closed, others) = kept.drain(..).partition(|directory| directory.node == node);
            *kept = others;
            closed
        };
        drop(closed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A layer that counts open directories.
    #[derive(Default)]
    struct Counting(AtomicU64, AtomicU64);

    impl Libservice for Counting {
        fn kind(&self) -> &'static str {
            "counting"
        }

        fn opendir(&self, _caller: &Caller, _node: NodeId) -> Result<HandleId> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(HandleId(self.1.fetch_add(1, Ordering::Relaxed) + 1))
        }

        fn releasedir(&self, _node: NodeId, _handle: HandleId) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn listings_go_on_with_the_latest_and_all_are_closed() {
        let stack = Arc::new(Counting::default());
        let directories = OpenDirectories::new(stack.clone());
        let caller = Caller::service();
        let get = |node, begins| directories.get(&caller, NodeId(node), begins).unwrap().handle;
        let first = get(1, true);
        assert_eq!(get(1, false), first);
        let second = get(1, true);
        assert_ne!(second, first);
        assert_eq!(get(1, false), second);
        for node in 2..1_000 {
            get(node, node % 2 == 0);
        }
        assert_eq!(stack.0.load(Ordering::Relaxed), KEPT_MAX as u64);
        directories.forget(NodeId(999));
        assert_eq!(stack.0.load(Ordering::Relaxed), KEPT_MAX as u64 - 1);
        drop(directories);
        assert_eq!(stack.0.load(Ordering::Relaxed), 0);
    }
}
