//! Telling the kernel what others changed.
//!
//! The kernel holds the lock of a directory while it waits for our answer about it, and wants the same lock to drop a
//! name: a thread that answers requests must never notify. So notices go into a queue, and a thread of its own,
//! which holds no lock and which nobody waits for, sends them.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use polytropo_libservices::{Change, DoorId, Errno, Name, NodeId, Observer};
use rustc_hash::{FxHashMap, FxHashSet};
use zerocopy::IntoBytes;

use super::abi::{InvalEntryOut, InvalInodeOut, notify};
use super::device::Device;
use super::parted;
use super::session::Session;
use super::told::Told;

/// Names that may wait; beyond it all names are taken back at once.
const NAMES_MAX: usize = 65_536;
/// How long it is waited for an inode that the kernel is about to make: these and what lies between, 100 ms together.
const NAP_MIN: Duration = Duration::from_micros(50);
const NAP_MAX: Duration = Duration::from_millis(52);

/// What waits to be sent. Each thing waits once, however often it changed.
#[derive(Default)]
struct Pending {
    /// As many as the stack has nodes, at the most. Of each the bytes from the first that changed to the last.
    inodes: FxHashMap<u64, Range<u64>>,
    names: FxHashSet<(u64, Box<Name>)>,
    all_names: bool,
    ended: bool,
    /// Batches that were taken to be sent, and of those that were.
    taken: u64,
    sent: u64,
}

impl Pending {
    fn add(&mut self, change: Change<'_>) {
        match change {
            Change::Inode { node } => self.add_bytes(node, 0..u64::MAX),
            Change::Bytes { node, offset, length } => {
                self.add_bytes(node, offset..offset.saturating_add(length));
            }
            // Of what it has no node for it has nothing to forget.
            Change::Elsewhere => {}
            Change::Entry { .. } if self.all_names => {}
            Change::Entry { parent, name } => {
                self.names.insert((parent.0, name.to_boxed()));
                if self.names.len() > NAMES_MAX {
                    self.names = FxHashSet::default();
                    self.all_names = true;
                }
            }
        }
    }

    fn add_bytes(&mut self, node: NodeId, changed: Range<u64>) {
        let known = self.inodes.entry(node.0).or_insert_with(|| changed.clone());
        *known = known.start.min(changed.start)..known.end.max(changed.end);
    }

    fn is_empty(&self) -> bool {
        self.inodes.is_empty() && self.names.is_empty() && !self.all_names
    }
}

/// The queue of one door.
#[derive(Default)]
pub struct Queue {
    pending: Mutex<Pending>,
    more: Condvar,
    /// A batch was sent.
    sent: Condvar,
}

impl Queue {
    fn add(&self, change: Change<'_>) {
        self.pending.lock().add(change);
        self.more.notify_one();
    }

    pub fn outdate(&self, node: NodeId) {
        self.add(Change::Inode { node });
    }

    /// Returns when all that waits now was sent. Not for threads that answer requests: notices may wait for them.
    pub fn wait_sent(&self) {
        let mut pending = self.pending.lock();
        // What waits goes with the next batch, what does not with the last that was taken.
        let batch = pending.taken + u64::from(!pending.is_empty());
        while pending.sent < batch && !pending.ended {
            self.sent.wait(&mut pending);
        }
    }
}

/// What the stack tells of changes. Holds the queue weakly, because stacks outlive doors.
struct Listener {
    door: DoorId,
    told: Arc<Told>,
    queue: Weak<Queue>,
}

impl Observer for Listener {
    fn changed(&self, change: Change<'_>, origin: DoorId) {
        if origin == self.door {
            return;
        }
        self.told.look();
        let known = match change {
            Change::Inode { node } | Change::Bytes { node, .. } => self.told.knows_inode(node),
            Change::Entry { parent, name } => self.told.knows_name(parent, name),
            Change::Elsewhere => false,
        };
        if let (true, Some(queue)) = (known, self.queue.upgrade()) {
            queue.add(change);
        }
    }

    fn is_gone(&self) -> bool {
        self.queue.strong_count() == 0
    }
}

/// The thread that sends.
pub struct Notifier {
    queue: Arc<Queue>,
    told: Arc<Told>,
    /// Gives back what must not be dropped there.
    thread: Option<JoinHandle<Sender>>,
}

impl Notifier {
    pub fn start(session: Arc<Session>, device: &Device) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let sender = Sender { session: session.clone(), queue: queue.clone() };
        let name = format!("fuse{}.notify", session.door.0);
        let thread = parted::spawn(name, device, move |device| {
            sender.run(device);
            sender
        })?;
        let outdated = Arc::downgrade(&queue);
        // Set once: a session has one notifier.
        let _ = session.outdated.set(Box::new(move |node| {
            if let Some(queue) = outdated.upgrade() {
                queue.add(Change::Inode { node });
            }
        }));
        let (door, told) = (session.door, session.told.clone());
        session.stack.observe(Arc::new(Listener { door, told, queue: Arc::downgrade(&queue) }));
        Ok(Self { queue, told: session.told.clone(), thread: Some(thread) })
    }

    pub fn outdate(&self, node: NodeId) {
        self.queue.outdate(node);
    }

    pub fn queue(&self) -> Weak<Queue> {
        Arc::downgrade(&self.queue)
    }

    pub fn told(&self) -> Arc<Told> {
        self.told.clone()
    }

    /// Ends the thread. The threads that answer requests must still run: a notice that is under way may wait for them.
    pub fn end(&mut self) {
        self.queue.pending.lock().ended = true;
        self.queue.more.notify_one();
        self.queue.sent.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic was logged by the panic hook already.
            let _ = thread.join();
        }
    }
}

struct Sender {
    session: Arc<Session>,
    queue: Arc<Queue>,
}

impl Sender {
    fn run(&self, device: &Device) {
        loop {
            let batch = {
                let mut pending = self.queue.pending.lock();
                while pending.is_empty() && !pending.ended {
                    self.queue.more.wait(&mut pending);
                }
                if pending.ended {
                    return;
                }
                let taken = pending.taken + 1;
                let next = Pending { taken, sent: pending.sent, ..Pending::default() };
                std::mem::replace(&mut *pending, next)
            };
            self.send(device, batch);
            self.queue.pending.lock().sent += 1;
            self.queue.sent.notify_all();
        }
    }

    fn send(&self, device: &Device, batch: Pending) {
        if batch.all_names {
            self.forget_all_names(device);
        }
        let numbers = &self.session.numbers;
        for (parent, name) in &batch.names {
            self.session.told.forget_name(NodeId(*parent), name);
            let name = name.as_bytes();
            let parent = numbers.of_node(NodeId(*parent));
            let out = InvalEntryOut { parent, namelen: name.len() as u32, flags: 0 };
            self.notify(device, notify::INVAL_ENTRY, &[out.as_bytes(), name, b"\0"]);
        }
        for (node, changed) in &batch.inodes {
            let node = NodeId(*node);
            let told = self.session.told.begin_outdating(node);
            let taken = self.forget_node(device, node, changed);
            // Of an inode that it is only about to hear of it has not taken it.
            if taken && *changed == (0..u64::MAX) {
                self.session.told.outdated(node, told);
            }
        }
    }

    /// True if the kernel took all notices of a node. An answer that tells of it for the first time may be on its way, with attributes of before
    /// the change: the kernel makes the inode when who asked has read it. If that does not come to pass soon (who asked is frozen), later
    /// changes are told again all the same.
    fn forget_node(&self, device: &Device, node: NodeId, changed: &Range<u64>) -> bool {
        let mut nap = NAP_MIN;
        loop {
            let first = self.session.numbers.of_node(node);
            let mut taken = [self.forget_inode(device, first, changed); 2];
            let second = self.session.number_of(node);
            if second != first {
                taken[1] = self.forget_inode(device, second, changed);
            }
            let is_awaited = taken == [false; 2] && self.session.told.is_held(node);
            if !is_awaited || nap > NAP_MAX || self.queue.pending.lock().ended {
                return taken == [true; 2];
            }
            std::thread::sleep(nap);
            nap *= 2;
        }
    }

    /// The attributes, and pages with any of these bytes. False if the kernel has no such inode.
    fn forget_inode(&self, device: &Device, number: u64, changed: &Range<u64>) -> bool {
        let out = match (i64::try_from(changed.start), i64::try_from(changed.end)) {
            (Ok(off), Ok(end)) if end > off => InvalInodeOut { ino: number, off, len: end - off },
            // No bytes at all.
            (Ok(_), Ok(_)) => InvalInodeOut { ino: number, off: -1, len: 0 },
            (start, _) => InvalInodeOut { ino: number, off: start.unwrap_or_default(), len: 0 },
        };
        self.notify(device, notify::INVAL_INODE, &[out.as_bytes()])
    }

    fn forget_all_names(&self, device: &Device) {
        if self.session.minor() >= notify::INC_EPOCH_MINOR {
            self.notify(device, notify::INC_EPOCH, &[]);
        } else {
            log::warn!(
                "FUSE door {}: more than {NAMES_MAX} names changed at once; this kernel (FUSE before 7.44) sees some of \
                 them when what it cached expires",
                self.session.door.0,
            );
        }
    }

    /// False if it does not concern anything that the kernel has.
    fn notify(&self, device: &Device, code: i32, parts: &[&[u8]]) -> bool {
        let taken = device.notify(code, parts);
        match taken {
            // Not cached, or the connection is gone.
            Ok(()) | Err(Errno::NOENT | Errno::NODEV | Errno::NOTCONN | Errno::NOTDIR) => {}
            Err(errno) => {
                log::error!(
                    "FUSE door {}: the kernel did not take notice {code}: {errno}",
                    self.session.door.0
                );
            }
        }
        taken.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: usize, pending: &mut Pending) {
        let name = number.to_string();
        pending.add(Change::Entry { parent: NodeId(1), name: Name::new(name.as_bytes()).unwrap() });
    }

    #[test]
    fn what_changes_often_waits_once() {
        let mut pending = Pending::default();
        for _ in 0..10 {
            pending.add(Change::Inode { node: NodeId(7) });
            entry(1, &mut pending);
        }
        assert_eq!((pending.inodes.len(), pending.names.len()), (1, 1));
    }

    #[test]
    fn of_bytes_that_change_those_between_go_too() {
        let mut pending = Pending::default();
        let node = NodeId(7);
        pending.add(Change::Bytes { node, offset: 8192, length: 10 });
        pending.add(Change::Bytes { node, offset: 100, length: 1 });
        assert_eq!(pending.inodes[&7], 100..8202);
        pending.add(Change::Inode { node });
        pending.add(Change::Bytes { node, offset: 5, length: u64::MAX });
        assert_eq!(pending.inodes[&7], 0..u64::MAX);
    }

    #[test]
    fn too_many_names_become_all_names() {
        let mut pending = Pending::default();
        (0..NAMES_MAX).for_each(|number| entry(number, &mut pending));
        assert!(!pending.all_names);
        (NAMES_MAX..NAMES_MAX + 10).for_each(|number| entry(number, &mut pending));
        assert!(pending.all_names && pending.names.is_empty());
    }

    #[test]
    fn a_door_hears_nothing_of_what_it_did_itself() {
        let queue = Arc::new(Queue::default());
        let told = Arc::<Told>::default();
        let listener = Listener { door: DoorId(3), told: told.clone(), queue: Arc::downgrade(&queue) };
        listener.changed(Change::Inode { node: NodeId(7) }, DoorId(4));
        assert!(queue.pending.lock().is_empty(), "the kernel knows nothing of it");
        told.hold(NodeId(7));
        listener.changed(Change::Inode { node: NodeId(7) }, DoorId(3));
        assert!(queue.pending.lock().is_empty());
        listener.changed(Change::Inode { node: NodeId(7) }, DoorId(4));
        assert!(!queue.pending.lock().is_empty());
    }
}
