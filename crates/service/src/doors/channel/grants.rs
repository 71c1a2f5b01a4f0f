//! Who may write without waiting, and who makes them wait again.
//!
//! A grant stands from before the program may see its permit until all that it posted is applied. While it stands, nobody else caches
//! anything of the file: the kernel was told to forget it, and every other way to the file goes by `withdraw` first.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use polytropo_libservices::NodeId;
use rustc_hash::FxHashMap;

use super::client::Client;
use crate::custody::Permit;

/// A program's right to write a file without waiting.
pub struct Grant {
    client: Weak<Client>,
    /// The file's number in its channel.
    number: u64,
    withdrawn: AtomicBool,
    /// The keeper knows of it.
    kept: Mutex<Option<Permit>>,
}

impl Grant {
    /// Until all that was posted is applied.
    pub fn keep(&self, permit: Permit) {
        *self.kept.lock() = Some(permit);
    }
}

/// The grants of one stack. All doors of the stack share it.
#[derive(Default)]
pub struct Grants {
    count: AtomicUsize,
    by_node: Mutex<FxHashMap<NodeId, Arc<Grant>>>,
    /// All that ever had a grant, by where they are.
    clients: Mutex<FxHashMap<usize, Weak<Client>>>,
}

impl Grants {
    pub fn any(&self) -> bool {
        self.count.load(SeqCst) != 0
    }

    /// From now on others withdraw it before they look. None if there is one already.
    pub fn begin(&self, node: NodeId, client: &Arc<Client>, number: u64) -> Option<Arc<Grant>> {
        self.clients.lock().entry(Arc::as_ptr(client).addr()).or_insert_with(|| Arc::downgrade(client));
        let (client, withdrawn, kept) = (Arc::downgrade(client), AtomicBool::new(false), Mutex::default());
        let grant = Arc::new(Grant { client, number, withdrawn, kept });
        let mut by_node = self.by_node.lock();
        if by_node.contains_key(&node) {
            return None;
        }
        // Whoever does not see the count has looked before us, which who calls this takes care of.
        self.count.fetch_add(1, SeqCst);
        by_node.insert(node, grant.clone());
        Some(grant)
    }

    /// The program may use it. False if it was withdrawn meanwhile.
    pub fn publish(&self, client: &Client, grant: &Grant) -> bool {
        let _by_node = self.by_node.lock();
        if grant.withdrawn.load(Relaxed) {
            return false;
        }
        client.memory.permit(grant.number);
        true
    }

    /// Before anybody but the program's own open file looks at the file or changes it: what was posted is applied, and the program waits from
    /// now on. True if there was something to withdraw.
    pub fn withdraw(&self, node: NodeId) -> bool {
        if !self.any() {
            return false;
        }
        let found = {
            let by_node = self.by_node.lock();
            by_node.get(&node).inspect(|grant| grant.withdrawn.store(true, Relaxed)).cloned()
        };
        let Some(grant) = found else { return false };
        if let Some(client) = grant.client.upgrade() {
            client.memory.withdraw(grant.number);
            client.drain();
            if let Some(held) = &client.door.held {
                held.end(node);
            }
            if let Ok(file) = client.file(grant.number) {
                file.lose_patience();
            }
        }
        self.remove(node, &grant);
        true
    }

    fn remove(&self, node: NodeId, grant: &Arc<Grant>) {
        let mut by_node = self.by_node.lock();
        if by_node.get(&node).is_some_and(|found| Arc::ptr_eq(found, grant)) {
            by_node.remove(&node);
            self.count.fetch_sub(1, AcqRel);
        }
        drop(by_node);
        let kept = grant.kept.lock().take();
        drop(kept);
    }

    /// Gives one back whose file is closed, or that was never published.
    pub fn give_back(&self, node: NodeId, grant: &Arc<Grant>) {
        grant.withdrawn.store(true, Relaxed);
        if let Some(client) = grant.client.upgrade() {
            client.memory.withdraw(grant.number);
        }
        self.remove(node, grant);
    }

    /// Space runs short: nobody gets by without waiting. What was posted already finds the space that was held ready for it.
    pub fn withdraw_all(&self) {
        // Clients are let go of without the lock: the last to do so gives back the grants of its files.
        let granted: Vec<_> = {
            let by_node = self.by_node.lock();
            by_node.values().for_each(|grant| grant.withdrawn.store(true, Relaxed));
            by_node.values().filter_map(|grant| Some((grant.client.upgrade()?, grant.number))).collect()
        };
        granted.iter().for_each(|(client, number)| client.memory.withdraw(*number));
    }

    /// Applies what lies about, also of those whose last grant was withdrawn while they posted.
    pub fn drain_all(&self) {
        let clients: Vec<_> = self.clients.lock().values().filter_map(Weak::upgrade).collect();
        for client in clients.into_iter().filter(|client| client.has_posts()) {
            client.drain();
        }
    }

    /// The client is no more.
    pub fn leave(&self, client: &Client) {
        self.clients.lock().remove(&std::ptr::from_ref(client).addr());
    }

    pub fn count(&self) -> usize {
        self.count.load(Acquire)
    }
}
