//! The channel door: requests of programs through memory shared with each of them.
//!
//! A program connects at the keeper, which checks who it is; the worker makes its channel ([`memory`]) and serves it ([`driver`]).
//! A request is copied out of the channel, done ([`operations`]; paths by [`walk`], rights by [`permissions`]) and answered there.

mod ahead;
mod answers;
mod arrivals;
mod changes;
mod client;
mod driver;
#[cfg(test)]
mod fuzz;
mod grants;
mod guard;
mod hall;
mod holding;
mod kept;
mod listing;
mod listings;
mod memory;
mod names;
mod operations;
mod permissions;
mod placement;
mod posted;
mod sharing;
mod walk;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use polytropo_libservices::{
    Attr, Caller, Capabilities, Change, Coherence, DoorId, Libservice, NodeId, Observer,
};

use polytropo_wire::copies::Counts;
use polytropo_wire::epochs::EVERYTHING;

use super::modes::{Access, Decision, Door, Mode, Modes, Ticket, Users, Watcher, Wish};
use crate::copies::Tally;
use crate::custody::Custodian;
use crate::epochs::Epochs;
use crate::held::{self, Held, HeldLayer};
use crate::state::OpenTable;
use crate::windows::{Place, Store, Windows};
use answers::Memories;
use driver::Driver;
use kept::Kept;
use listings::Listings;
use walk::Failure;

pub use client::Peer;
pub use grants::Grants;
pub use guard::Guard;
pub use hall::ChannelStatistics;

/// How long a program that begins to watch files waits for changes that are under way.
const CHANGES_TIME_MAX: Duration = Duration::from_secs(10);

/// In the number of a channel door, which else is that of the kernel's door beside it.
pub const CHANNEL_DOOR: u32 = 1 << 31;

/// How a door works.
pub struct ChannelOptions {
    /// Who has which inode open, at all doors of the stack.
    pub modes: Arc<Modes>,
    /// The FUSE door counts its open files in `modes`. If not, nobody knows what the kernel holds back of files that can be written.
    pub kernel_tells: bool,
    /// The kernel holds back nothing that programs write, but for shared maps.
    pub written_through: bool,
    pub windows: WindowAccess,
    /// Waits until the kernel was told of all changes so far.
    pub settle: Option<Settle>,
    /// Where files may be written without waiting; None: nowhere.
    pub posting: Option<Posting>,
    /// Has the keeper know of channels.
    pub custodian: Option<Arc<Custodian>>,
    /// Where open files are written down for a worker to come.
    pub open_table: Option<Arc<OpenTable>>,
}

pub struct Posting {
    /// Shared with the `Guard` by which all other doors see the stack.
    pub grants: Arc<Grants>,
    /// Has the kernel forget what it knows of an inode, before the next `settle` returns.
    pub outdate: Outdate,
    /// The door of that kernel, which need not be told of changes of what it does not cache.
    pub kernel_door: DoorId,
    /// Where posted bytes are held; None: nowhere, they go to the layers at once.
    pub held: Option<Arc<Held>>,
}

pub type Outdate = Box<dyn Fn(NodeId) + Send + Sync>;

pub type Settle = Box<dyn Fn() + Send + Sync>;

/// Where windows are.
pub struct WindowAccess {
    pub store: Arc<Store>,
    /// Where programs find those of this door; None if they cannot.
    pub place: Option<Arc<Place>>,
    /// The same directory, through a read-only mount.
    pub shown: Option<OwnedFd>,
}

/// What all threads of a door share.
pub struct Shared {
    /// As everybody sees it.
    pub stack: Arc<dyn Libservice>,
    /// The same stack.
    pub epochs: Arc<Epochs>,
    /// For what a program does with its own open files. Shows what is held of them.
    pub own: Arc<dyn Libservice>,
    pub grants: Option<Arc<Grants>>,
    pub held: Option<Arc<Held>>,
    pub custodian: Option<Arc<Custodian>>,
    outdate: Option<Outdate>,
    kernel_door: Option<DoorId>,
    /// Bytes that were posted.
    grown: AtomicU64,
    looked_for_room: Mutex<Option<(Instant, bool)>>,
    /// Programs that watch files.
    watchers: Mutex<u32>,
    watched: AtomicBool,
    /// Held by requests that change something, see `begin_change`.
    changing: RwLock<()>,
    pub id: DoorId,
    pub modes: Arc<Modes>,
    pub windows: Windows,
    pub shown: Option<OwnedFd>,
    /// Nothing can change while the stack is served.
    pub immutable: bool,
    pub read_only: bool,
    /// Files are asked for by requests each time, since others change them.
    pub others_change: bool,
    kernel_tells: bool,
    /// Files are read here, though nobody says who else has them open: what others write comes through the service at once.
    reads_alone: bool,
    settle: Option<Settle>,
    kept: Kept,
    listings: Listings,
    /// None: nothing may be kept.
    memories: Option<Memories>,
    /// Attributes of the root, and what the counter of everything was when they were looked at.
    root: Mutex<Option<(u64, Attr)>>,
    pub open_table: Option<Arc<OpenTable>>,
}

impl Shared {
    fn new(epochs: Arc<Epochs>, options: ChannelOptions, id: DoorId) -> Arc<Self> {
        // Those of a dead worker's time are never known to have ended.
        let watchers = u32::from(options.open_table.as_ref().is_some_and(|table| table.is_watched()));
        let stack: Arc<dyn Libservice> = epochs.clone();
        let WindowAccess { store, place, shown } = options.windows;
        let coherence = stack.coherence();
        // What others change cannot be kept.
        let place = place.filter(|_| coherence != Coherence::Shared);
        // Only where nobody but this service writes, and the kernel tells of what it has open.
        let posting = options.posting.filter(|_| options.kernel_tells && coherence == Coherence::Exclusive);
        let (grants, outdate, kernel_door, held) = match posting {
            Some(posting) => {
                (Some(posting.grants), Some(posting.outdate), Some(posting.kernel_door), posting.held)
            }
            None => (None, None, None, None),
        };
        let own: Arc<dyn Libservice> = match &held {
            Some(held) => Arc::new(HeldLayer::new(stack.clone(), held.clone())),
            None => stack.clone(),
        };
        let guarded: Arc<dyn Libservice> = match &grants {
            Some(grants) => Arc::new(Guard::new(stack.clone(), grants.clone())),
            None => stack.clone(),
        };
        let memories = epochs.table().map(|_| Memories::new(store.budget().clone()));
        let shared = Arc::new(Self {
            windows: Windows::new(own.clone(), store, place),
            shown,
            immutable: coherence == Coherence::Immutable,
            read_only: !stack.capabilities().contains(Capabilities::WRITE),
            others_change: coherence == Coherence::Shared,
            kernel_tells: options.kernel_tells,
            reads_alone: options.written_through
                && !options.kernel_tells
                && coherence == Coherence::Exclusive,
            settle: options.settle,
            kept: Kept::default(),
            listings: Listings::default(),
            memories,
            root: Mutex::default(),
            open_table: options.open_table,
            custodian: options.custodian,
            modes: options.modes,
            epochs,
            grants,
            held,
            outdate,
            kernel_door,
            grown: AtomicU64::new(0),
            looked_for_room: Mutex::new(None),
            watchers: Mutex::new(watchers),
            watched: AtomicBool::new(watchers != 0),
            changing: RwLock::new(()),
            own,
            stack: guarded,
            id,
        });
        if let Some(held) = &shared.held {
            let door = Arc::downgrade(&shared);
            held.tell_of_losses(Box::new(move |node| {
                if let Some(shared) = door.upgrade() {
                    shared.windows.changed(node);
                }
            }));
        }
        shared.epochs.begin_doors(shared.doors());
        shared.stack.observe(Arc::new(Listener(Arc::downgrade(&shared))));
        let watcher: Weak<Shared> = Arc::downgrade(&shared);
        if !shared.modes.watch(watcher) {
            log::debug!("channel door {}: another door of the stack watches its modes", id.0);
        }
        shared
    }

    /// This one, and the kernel's.
    fn doors(&self) -> [DoorId; 2] {
        [self.id, DoorId(self.id.0 & !CHANNEL_DOOR)]
    }

    /// Whether files may be made here: their bytes can be written by nobody whom the door does not hear of.
    pub fn makes_files(&self) -> bool {
        self.others_change || self.kernel_tells
    }

    /// The root as walks begin there: its inode and rights are as they are, sizes and times may be as they were.
    pub fn root_for_walks(&self, caller: &Caller) -> polytropo_libservices::Result<Attr> {
        let sample = || self.epochs.table().and_then(|table| table.sample(EVERYTHING));
        let before = sample();
        if let (Some(before), Some((looked, attr))) = (before, &*self.root.lock())
            && *looked == before
        {
            return Ok(attr.clone());
        }
        let attr = self.stack.getattr(caller, NodeId::ROOT, None)?;
        // Whoever changes the rights of a directory counts everything.
        if let Some(before) = before.filter(|before| sample() == Some(*before)) {
            *self.root.lock() = Some((before, attr.clone()));
        }
        Ok(attr)
    }

    /// There is a kernel's door that has the same files, and names handed to it.
    pub fn tells_kernel(&self) -> bool {
        self.kernel_tells
    }

    /// After a change: returns when what the kernel cached of it is gone.
    pub fn settle(&self) {
        if let Some(settle) = &self.settle {
            settle();
        }
    }

    /// The kernel is to know nothing of `node` when the next `settle` returns.
    pub fn outdate(&self, node: NodeId) {
        if let Some(outdate) = &self.outdate {
            outdate(node);
        }
    }

    /// Counts one more open file of `node`, if the kernel has not got it.
    pub fn enter(&self, node: NodeId, wanted: u32) -> Result<Ticket, Failure> {
        self.may_serve(node)?;
        if wanted & permissions::WRITE != 0 {
            self.may_write()?;
        }
        let access = match wanted {
            permissions::READ => Access::Read,
            permissions::WRITE => Access::WriteOnly,
            _ => Access::ReadWrite,
        };
        let wish = Wish { door: Door::Channel, access, immutable: self.immutable, executes: false };
        match self.modes.open(node, wish) {
            (Decision::Open(_), Some(ticket)) => Ok(ticket),
            _ => Err(Failure::Kernel),
        }
    }

    /// Whether somebody has the kernel tell of changes.
    pub fn is_watched(&self) -> bool {
        self.watched.load(Ordering::SeqCst)
    }

    /// To be held while a request changes something. Not while somebody has the kernel tell of changes: it is to make them then.
    fn begin_change(&self) -> Result<RwLockReadGuard<'_, ()>, Failure> {
        // Looked at once more with the lock; before it so that those who are refused do not wait for who watches.
        if self.is_watched() {
            return Err(Failure::Kernel);
        }
        let under_way = self.changing.read();
        if self.is_watched() { Err(Failure::Kernel) } else { Ok(under_way) }
    }

    /// After `watched_by`: returns when all changes are done that were let through before. What hangs below keeps who watches so long only.
    fn await_changes(&self) {
        if self.changing.try_write_for(CHANGES_TIME_MAX).is_none() {
            log::warn!(
                "channel door {}: a program watches files, and is not told of a change that hangs",
                self.id.0
            );
        }
    }

    /// One more program watches files, or one fewer.
    fn watched_by(&self, more: bool) {
        let mut watchers = self.watchers.lock();
        *watchers = if more { *watchers + 1 } else { watchers.saturating_sub(1) };
        self.watched.store(*watchers != 0, Ordering::SeqCst);
        if let Some(table) = &self.open_table {
            table.say_watched(*watchers != 0);
        }
    }

    /// Whether all open files are known. Of stacks that others change the kernel always asks for opens, and holds back only what is
    /// written through maps.
    pub fn counts_files(&self) -> bool {
        self.kernel_tells || self.others_change
    }

    /// Refuses to change bytes beside maps that nobody told of, and of programs that may be running.
    pub fn may_write(&self) -> Result<(), Failure> {
        if self.reads_alone { Err(Failure::Kernel) } else { Ok(()) }
    }

    /// Refuses inodes whose truth is the kernel's page cache.
    pub fn may_serve(&self, node: NodeId) -> Result<(), Failure> {
        if self.immutable {
            return Ok(());
        }
        if !(self.counts_files() || self.reads_alone) || self.modes.users(node).mode() == Some(Mode::Kernel) {
            return Err(Failure::Kernel);
        }
        Ok(())
    }
}

/// Hears of changes through other doors. Holds the door weakly, because stacks outlive doors.
struct Listener(Weak<Shared>);

impl Observer for Listener {
    fn changed(&self, change: Change<'_>, _origin: DoorId) {
        // What this door changed itself is no exception: told before it is acknowledged.
        if let (Change::Inode { node } | Change::Bytes { node, .. }, Some(shared)) =
            (change, self.0.upgrade())
            && !held::is_writing_back(node)
        {
            shared.windows.changed(node);
        }
    }

    fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.kept.give_back(&*self.stack);
        self.epochs.end_doors(self.doors());
    }
}

impl Watcher for Shared {
    fn joined(&self, node: NodeId, mode: Mode, _users: Users) {
        if let Some(grants) = &self.grants {
            grants.withdraw(node);
        }
        if mode == Mode::Kernel {
            // What comes to be written through maps is told by nobody.
            drop(self.epochs.changing(node));
            self.windows.retire(node);
        }
    }
}

/// The channels of one stack.
pub struct ChannelDoor {
    driver: Mutex<Driver>,
    held: Option<Arc<Held>>,
    tally: Arc<Tally>,
    stopped: AtomicBool,
}

impl ChannelDoor {
    pub fn start(epochs: Arc<Epochs>, options: ChannelOptions, id: DoorId) -> io::Result<Self> {
        let shared = Shared::new(epochs, options, id);
        let tally = shared.windows.tally().clone();
        let held = shared.held.clone();
        Ok(Self { held, driver: Mutex::new(Driver::start(shared)?), tally, stopped: AtomicBool::new(false) })
    }

    /// Serves a program. It is told by a welcome on its socket, from a thread of the door.
    pub fn connect(&self, peer: Peer) {
        self.driver.lock().connect(peer);
    }

    pub fn statistics(&self) -> ChannelStatistics {
        self.driver.lock().statistics()
    }

    /// What was copied, by the service and by programs.
    pub fn copied(&self) -> Counts {
        self.tally.counts()
    }

    /// Ends all channels; programs go through the kernel.
    pub fn stop(&self) {
        if !self.stopped.swap(true, Ordering::Relaxed) {
            self.driver.lock().stop();
            if let Some(held) = &self.held {
                held.flush_all();
            }
        }
    }
}

impl Drop for ChannelDoor {
    fn drop(&mut self) {
        self.stop();
    }
}
