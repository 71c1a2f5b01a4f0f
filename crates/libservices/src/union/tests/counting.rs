//! A layer that counts what is held of it: look-ups, open files, open directories.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering::SeqCst};

use super::*;

pub struct Counting {
    below: Arc<dyn Libservice>,
    nodes: Mutex<HashMap<NodeId, i64>>,
    open: AtomicI64,
    pub creates: AtomicUsize,
    pub lookups: AtomicUsize,
}

impl Counting {
    pub fn new(below: Arc<dyn Libservice>) -> Arc<Self> {
        let (nodes, open) = (Mutex::default(), AtomicI64::new(0));
        Arc::new(Self { below, nodes, open, creates: AtomicUsize::new(0), lookups: AtomicUsize::new(0) })
    }

    fn counted(&self, entry: Entry) -> Entry {
        *self.nodes.lock().entry(entry.node).or_insert(0) += 1;
        entry
    }

    /// What is still held: how many nodes, how many open files and directories.
    pub fn held(&self) -> (usize, i64) {
        (self.nodes.lock().len(), self.open.load(SeqCst))
    }
}

impl Libservice for Counting {
    fn below(&self) -> Option<&dyn Libservice> {
        Some(&*self.below)
    }

    fn kind(&self) -> &'static str {
        "counting"
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<Entry> {
        self.lookups.fetch_add(1, SeqCst);
        self.below.lookup(caller, parent, name).map(|entry| self.counted(entry))
    }

    fn forget(&self, node: NodeId, count: u64) {
        if node != NodeId::ROOT {
            let mut nodes = self.nodes.lock();
            let held = nodes.get_mut(&node).expect("forgets what is held only");
            *held -= count as i64;
            assert!(*held >= 0, "forgets more than is held");
            if *held == 0 {
                nodes.remove(&node);
            }
        }
        self.below.forget(node, count);
    }

    fn mknod(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32, rdev: u64) -> Result<Entry> {
        self.below.mknod(caller, parent, name, mode, rdev).map(|entry| self.counted(entry))
    }

    fn mkdir(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32) -> Result<Entry> {
        self.below.mkdir(caller, parent, name, mode).map(|entry| self.counted(entry))
    }

    fn symlink(&self, caller: &Caller, parent: NodeId, name: &Name, target: &[u8]) -> Result<Entry> {
        self.below.symlink(caller, parent, name, target).map(|entry| self.counted(entry))
    }

    fn link(&self, caller: &Caller, node: NodeId, parent: NodeId, name: &Name) -> Result<Entry> {
        self.below.link(caller, node, parent, name).map(|entry| self.counted(entry))
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<Opened> {
        let opened = self.below.open(caller, node, flags)?;
        self.open.fetch_add(1, SeqCst);
        Ok(opened)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let (entry, opened) = self.below.create(caller, parent, name, mode, flags)?;
        self.open.fetch_add(1, SeqCst);
        self.creates.fetch_add(1, SeqCst);
        Ok((self.counted(entry), opened))
    }

    fn release(&self, node: NodeId, handle: HandleId) {
        self.open.fetch_sub(1, SeqCst);
        self.below.release(node, handle);
    }

    fn opendir(&self, caller: &Caller, node: NodeId) -> Result<HandleId> {
        let handle = self.below.opendir(caller, node)?;
        self.open.fetch_add(1, SeqCst);
        Ok(handle)
    }

    fn releasedir(&self, node: NodeId, handle: HandleId) {
        self.open.fetch_sub(1, SeqCst);
        self.below.releasedir(node, handle);
    }
}

/// The layers of a rig, counted.
pub struct Counted {
    pub lowers: Vec<Arc<Counting>>,
    pub upper: Arc<Counting>,
}

impl Counted {
    pub fn of(rig: &Rig) -> (Self, View) {
        let lowers: Vec<_> = rig.lowers().into_iter().map(Counting::new).collect();
        let upper = Counting::new(dir_layer(&rig.upper(""), false, rig.upper_coherence()));
        let below = lowers.iter().map(|lower| lower.clone() as Arc<dyn Libservice>).collect();
        let view = View::of_union(Union::new(below, Some(upper.clone())).unwrap());
        (Self { lowers, upper }, view)
    }

    /// Of lowers nothing; of the upper the four directories of the work area and the whiteout, if there is one.
    pub fn assert_nothing_held(&self) {
        for lower in &self.lowers {
            assert_eq!(lower.held(), (0, 0), "held of a lower");
        }
        let (nodes, open) = self.upper.held();
        assert!((4..=5).contains(&nodes) && open == 0, "held of the upper: {nodes} nodes, {open} open");
    }
}
