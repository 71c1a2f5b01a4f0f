//! One program at this door: who it is, its memory, its open files.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use polytropo_libservices::{Attr, Caller, Errno, HandleId, NodeId, OpenFlags};
use polytropo_wire::message::FILES_MAX;
use rustc_hash::FxHashSet;

use super::Shared;
use super::ahead::Order;
use super::answers::{Answers, Rights};
use super::grants::Grant;
use super::memory::ChannelMemory;
use super::posted::Draining;
use super::walk::{Failure, Ground, fail};
use crate::custody;
use crate::doors::handed::Given;
use crate::doors::modes::Ticket;
use crate::epochs::Notes;
use crate::held::LateError;
use crate::state::{self, Listed, OpenRecord};
use crate::windows::Holder;

const WRITE_THROUGH: OpenFlags = OpenFlags::SYNC.union(OpenFlags::DSYNC);

/// What was opened.
pub enum Kind {
    File(HandleId),
    Directory(HandleId),
    /// O_PATH: a place, nothing more.
    Place,
}

/// An open file. Lives as long as anybody uses it; then it is released and its look-up given back.
pub struct OpenFile {
    door: Arc<Shared>,
    pub node: NodeId,
    pub kind: Kind,
    pub flags: OpenFlags,
    /// Counts it among the inode's open files.
    ticket: Option<Ticket>,
    /// What it is read from.
    pub window: Holder,
    grant: Mutex<Option<Arc<Grant>>>,
    /// Writes that waited since the last grant, and how many it takes to the next.
    waited: AtomicU32,
    patience: AtomicU32,
    /// Bytes posted since the last grant.
    posted_bytes: AtomicU64,
    /// Of writes that had returned.
    pub late: Arc<LateError>,
    listed: OnceLock<Listed>,
}

/// Writes after which a file that others keep looking at is granted once more.
const PATIENCE_MAX: u32 = 1024;
/// Writes that wait before a file is granted that was just made. Most are written once, and a grant costs the keeper's being told twice.
const PATIENCE_OF_NEW: u32 = 2;
/// A grant under which so much was posted was worth its while.
const PAID_BYTES: u64 = 1 << 20;

impl OpenFile {
    /// Takes over one look-up of `node`.
    pub fn new(
        door: Arc<Shared>,
        node: NodeId,
        kind: Kind,
        flags: OpenFlags,
        ticket: Option<Ticket>,
    ) -> Self {
        Self {
            door,
            node,
            kind,
            flags,
            ticket,
            window: Holder::default(),
            grant: Mutex::new(None),
            waited: AtomicU32::new(0),
            patience: AtomicU32::new(1),
            posted_bytes: AtomicU64::new(0),
            late: Arc::default(),
            listed: OnceLock::new(),
        }
    }

    /// It was made by this open.
    pub fn made_now(self) -> Self {
        self.patience.store(PATIENCE_OF_NEW, Relaxed);
        self
    }

    /// A write has to wait. True if that is often enough to go for a grant.
    pub fn waits(&self) -> bool {
        self.waited.fetch_add(1, Relaxed) + 1 >= self.patience.load(Relaxed)
    }

    /// Somebody looked at the file: the next grant takes longer, since withdrawing is dear.
    pub fn lose_patience(&self) {
        self.waited.store(0, Relaxed);
        let longer = match self.posted_bytes.swap(0, Relaxed) {
            PAID_BYTES.. => 1,
            // Nothing had to be applied: as when a program that makes a file has the kernel look it up at once.
            0 => self.patience.load(Relaxed).saturating_mul(2),
            _ => self.patience.load(Relaxed).saturating_mul(4),
        };
        self.patience.store(longer.min(PATIENCE_MAX), Relaxed);
    }

    pub fn count_posted(&self, bytes: u64) {
        self.posted_bytes.fetch_add(bytes, Relaxed);
    }

    pub fn posted_bytes(&self) -> u64 {
        self.posted_bytes.load(Relaxed)
    }

    /// Given back when the file is closed.
    pub fn keep_grant(&self, grant: Arc<Grant>) {
        *self.grant.lock() = Some(grant);
    }

    /// Writes it down for a worker to come, before the program hears of it.
    fn list(&self, caller: &Caller, number: u64) {
        let Some(table) = &self.door.open_table else { return };
        let (kind, handle) = match self.kind {
            Kind::File(handle) => (state::Kind::File, handle.0),
            Kind::Directory(handle) => (state::Kind::Directory, handle.0),
            Kind::Place => (state::Kind::Place, 0),
        };
        let record = OpenRecord {
            node: self.node.0,
            kernel_node: 0,
            handle,
            flags: self.flags,
            kind,
            through: state::Through::Channel,
            bytes: if self.ticket.is_some() { state::Bytes::Window } else { state::Bytes::None },
            uid: caller.uid,
            gid: caller.gid,
            pid: caller.pid,
            backing: 0,
            lookups: 1,
            number,
            inode: self.handle().and_then(|handle| self.door.stack.host_inode(handle)),
        };
        if let Some(listed) = table.list(&record) {
            // It has one number only.
            let _ = self.listed.set(listed);
        }
    }

    /// The open regular file. As the kernel answers for what is none.
    pub fn file(&self) -> Result<HandleId, Failure> {
        match self.kind {
            Kind::File(handle) => Ok(handle),
            Kind::Directory(_) => fail(Errno::ISDIR, "read or write a directory"),
            Kind::Place => fail(Errno::BADF, "read or write a place"),
        }
    }

    pub fn handle(&self) -> Option<HandleId> {
        match self.kind {
            Kind::File(handle) => Some(handle),
            _ => None,
        }
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        let stack = &self.door.stack;
        if let (Some(held), Kind::File(_)) = (&self.door.held, &self.kind)
            && self.flags.contains(OpenFlags::WRITE)
        {
            held.end(self.node);
        }
        if let (Some(grants), Some(grant)) = (&self.door.grants, self.grant.get_mut().take()) {
            grants.give_back(self.node, &grant);
        }
        if let Some(ticket) = self.ticket {
            self.door.modes.release(self.node, ticket);
        }
        match self.kind {
            Kind::File(handle) => stack.release(self.node, handle),
            Kind::Directory(handle) => stack.releasedir(self.node, handle),
            Kind::Place => {}
        }
        if !self.door.windows.leave(self.node, &mut self.window) {
            stack.forget(self.node, 1);
        }
    }
}

/// Open files by number: an index below `FILES_MAX`, and above it a count of the times that the place was taken.
#[derive(Default)]
struct Files {
    places: Vec<Place>,
    vacant: Vec<u16>,
}

#[derive(Default)]
struct Place {
    times: u64,
    file: Option<Arc<OpenFile>>,
}

const INDEX_BITS: u32 = 16;
const _: () = assert!(FILES_MAX <= 1 << INDEX_BITS);

impl Files {
    fn insert(&mut self, file: Arc<OpenFile>) -> Result<u64, Failure> {
        let index = match self.vacant.pop() {
            Some(index) => usize::from(index),
            None if self.places.len() < FILES_MAX => {
                self.places.push(Place::default());
                self.places.len() - 1
            }
            // Through the kernel there may be room yet.
            None => return Err(Failure::Kernel),
        };
        let place = &mut self.places[index];
        place.times += 1;
        place.file = Some(file);
        Ok(place.times << INDEX_BITS | index as u64)
    }

    fn place(&mut self, number: u64) -> Option<&mut Place> {
        let index = usize::try_from(number & ((1 << INDEX_BITS) - 1)).ok()?;
        self.places.get_mut(index).filter(|place| place.times == number >> INDEX_BITS)
    }

    fn remove(&mut self, number: u64) -> Option<Arc<OpenFile>> {
        let file = self.place(number)?.file.take()?;
        self.vacant.push((number & ((1 << INDEX_BITS) - 1)) as u16);
        Some(file)
    }
}

/// Which thread serves a channel: at most one at a time.
#[derive(Default)]
pub struct Turn(AtomicU32);

const NOBODYS: u32 = 0;
const TAKEN: u32 = 1;
/// Taken, and nobody else looks at the channel.
const LEFT_TO_HOLDER: u32 = 2;

impl Turn {
    pub fn take(&self) -> bool {
        self.0.load(Relaxed) == NOBODYS && self.0.compare_exchange(NOBODYS, TAKEN, Acquire, Relaxed).is_ok()
    }

    /// True if the channel has to be looked at again, for the others have stopped to.
    pub fn give_back(&self) -> bool {
        self.0.swap(NOBODYS, AcqRel) == LEFT_TO_HOLDER
    }

    /// If a thread has the channel it is to see to it that the channel is looked at afterwards. False if none has.
    pub fn leave_to_holder(&self) -> bool {
        match self.0.compare_exchange(TAKEN, LEFT_TO_HOLDER, AcqRel, Acquire) {
            Ok(_) => true,
            Err(found) => found == LEFT_TO_HOLDER,
        }
    }
}

/// Who connected, and to what: checked by the keeper.
pub struct Peer {
    pub caller: Caller,
    /// The mount was seen read-only.
    pub read_only: bool,
    /// The mount is the root directory of the process.
    pub is_root: bool,
    /// Paths, relative to the mount's root, where something else is mounted.
    pub covered: Vec<Vec<u8>>,
    pub device: u64,
    pub mount_id: u64,
    /// Hang up when the process ends, becomes another program, or sees other mounts.
    pub socket: OwnedFd,
    pub process: OwnedFd,
    pub mounts: OwnedFd,
}

/// A connected program.
pub struct Client {
    pub memory: ChannelMemory,
    pub bell: OwnedFd,
    pub peer: Peer,
    pub door: Arc<Shared>,
    /// Each is looked up once.
    pub covered: FxHashSet<NodeId>,
    /// Their inodes.
    pub covered_inos: FxHashSet<u64>,
    /// Shared with programs of the same rights; None: there is no room for it.
    pub answers: Option<Arc<Answers>>,
    pub turn: Turn,
    pub(super) order: Order,
    /// The keeper has the memory, for the case that this process dies.
    kept: Option<custody::Channel>,
    files: Mutex<Files>,
    /// Names by which the kernel may find files of it.
    pub(super) given: Mutex<Given>,
    /// Some file was opened so that each write waits for the disk.
    any_writes_through: AtomicBool,
    pub(super) draining: Draining,
    pub(super) posts_applied: AtomicU64,
    /// Something was applied that the kernel may have cached.
    pub(super) heard_by_kernel: AtomicBool,
    watches: AtomicBool,
}

impl Client {
    pub fn new(
        (memory, kept): (ChannelMemory, Option<custody::Channel>),
        bell: OwnedFd,
        peer: Peer,
        door: Arc<Shared>,
        (covered, covered_inos): (FxHashSet<NodeId>, FxHashSet<u64>),
    ) -> Self {
        let rights = Rights::of(&peer, covered_inos.iter().copied());
        let answers = door.memories.as_ref().and_then(|memories| memories.of(rights));
        Self {
            kept,
            memory,
            bell,
            peer,
            answers,
            door,
            covered,
            covered_inos,
            turn: Turn::default(),
            order: Order::default(),
            files: Mutex::default(),
            given: Mutex::default(),
            any_writes_through: AtomicBool::new(false),
            draining: Draining::default(),
            posts_applied: AtomicU64::new(0),
            heard_by_kernel: AtomicBool::new(false),
            watches: AtomicBool::new(false),
        }
    }

    /// The program watches files, until its channel ends: whatever changes from now on the kernel is to see.
    pub(super) fn watch(&self) {
        if !self.watches.swap(true, Relaxed) {
            self.door.watched_by(true);
        }
        self.door.await_changes();
        if let Some(grants) = &self.door.grants {
            grants.withdraw_all();
            grants.drain_all();
        }
    }

    /// Whether the keeper knows of an open file that may be written without waiting. Where there is no keeper, nobody need.
    pub(super) fn has_kept(&self, grant: &Grant, number: u64, file: &OpenFile) -> bool {
        let Some(kept) = &self.kept else { return true };
        let host = file.handle().and_then(|handle| self.door.stack.host_file(handle));
        let appends = file.flags.contains(OpenFlags::APPEND);
        let permit = kept.permit(number, appends, host.as_ref().map(|file| file.as_fd()));
        permit.map(|permit| grant.keep(permit)).is_some()
    }

    pub fn ground<'a>(&'a self, notes: Option<&'a Notes<'a>>) -> Ground<'a> {
        Ground {
            notes,
            stack: &*self.door.stack,
            caller: &self.peer.caller,
            covered: &self.covered,
            is_root: self.peer.is_root,
            kept: &self.door.kept,
        }
    }

    pub fn file(&self, number: u64) -> Result<Arc<OpenFile>, Failure> {
        let found = self.files.lock().place(number).and_then(|place| place.file.clone());
        match found {
            Some(file) => Ok(file),
            None => fail(Errno::BADF, "use a file that is not open"),
        }
    }

    /// What tells of the program's requests and of its end.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 4] {
        let peer = &self.peer;
        [self.bell.as_fd(), peer.socket.as_fd(), peer.process.as_fd(), peer.mounts.as_fd()]
    }

    /// Whether each write to the file waits for the disk.
    pub fn writes_through(&self, number: u64) -> bool {
        self.any_writes_through.load(Relaxed)
            && self.file(number).is_ok_and(|file| file.flags.intersects(WRITE_THROUGH))
    }

    pub fn insert(&self, file: Arc<OpenFile>) -> Result<u64, Failure> {
        if file.flags.intersects(WRITE_THROUGH) {
            self.any_writes_through.store(true, Relaxed);
        }
        let number = self.files.lock().insert(file.clone())?;
        file.list(&self.peer.caller, number);
        Ok(number)
    }

    pub fn close(&self, number: u64) -> Result<(), Failure> {
        let removed = self.files.lock().remove(number);
        match removed {
            // Released after the lock.
            Some(file) => {
                drop(file);
                Ok(())
            }
            None => fail(Errno::BADF, "close a file that is not open"),
        }
    }

    /// The channel ends: from now on every write waits, in vain, and what was posted is applied.
    pub fn stop_posting(&self) {
        let numbers: Vec<u64> = {
            let files = self.files.lock();
            let open = files.places.iter().enumerate().filter(|(_, place)| place.file.is_some());
            open.map(|(index, place)| place.times << INDEX_BITS | index as u64).collect()
        };
        numbers.into_iter().for_each(|number| self.memory.withdraw(number));
        self.drain();
    }

    /// Where a path begins: the root, or an open file of this client.
    pub fn start(&self, at: u64) -> Result<(NodeId, Attr), Failure> {
        let (caller, stack) = (&self.peer.caller, &self.door.stack);
        if at == 0 {
            return Ok((NodeId::ROOT, self.door.root_for_walks(caller)?));
        }
        let file = self.file(at)?;
        Ok((file.node, stack.getattr(caller, file.node, file.handle())?))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if self.watches.load(Relaxed) {
            self.door.watched_by(false);
        }
        if let Some(grants) = &self.door.grants {
            grants.leave(self);
        }
        self.memory.end();
        self.given.get_mut().all().for_each(|words| self.door.modes.handed.take_back(words));
        for node in self.covered.drain() {
            self.door.stack.forget(node, 1);
        }
    }
}
