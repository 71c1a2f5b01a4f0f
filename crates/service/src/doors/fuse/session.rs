//! From a message to the operation and back: which function answers what.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use polytropo_libservices::{
    Caller, Capabilities, DoorId, Entry, Errno, Error, FsCapabilities, HandleId, Libservice, NodeId, Result,
    privileges,
};

use super::FuseOptions;
use super::abi::{self, InHeader, opcode};
use super::init::{self, Negotiated, Offer};
use super::late_errors::LateErrors;
use super::numbers::Numbers;
use super::open_directories::OpenDirectories;
use super::open_files::OpenFiles;
use super::opens::Opens;
use super::reply::{Held, Reply, Timeouts};
use super::request::{Arguments, Request, checked_node};
use super::times::Times;
use super::told::Told;
use super::written::Written;
use crate::state::{Agreed, Begun, JournalSlot};
use rustc_hash::FxHashMap;

/// What all threads of a door share.
pub struct Session {
    pub stack: Arc<dyn Libservice>,
    pub door: DoorId,
    pub options: FuseOptions,
    pub open_files: OpenFiles,
    pub open_directories: OpenDirectories,
    pub opens: Opens,
    pub numbers: Numbers,
    pub late_errors: LateErrors,
    pub times: Times,
    pub written: Written,
    /// Shared with the thread that sends notices.
    pub told: Arc<Told>,
    /// Has the kernel told that what it knows of a node is out of date.
    pub outdated: OnceLock<Box<dyn Fn(NodeId) + Send + Sync>>,
    negotiated: OnceLock<Negotiated>,
    panicked: AtomicBool,
    /// What dead workers were doing, by the request.
    begun: OnceLock<FxHashMap<u64, Begun>>,
    /// Largest payload of the rings that stand ready.
    ring_payload_bytes: Option<usize>,
}

/// What is to be sent back.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// The kernel expects none.
    Silence,
    /// What stands in the reply's buffer.
    Payload,
    Error(Errno),
}

/// One request while it is worked on.
pub struct Operation<'a> {
    pub session: &'a Session,
    pub agreed: &'a Negotiated,
    pub header: InHeader,
    pub node: NodeId,
    pub caller: Caller,
    /// To tell whether anything was changed by others since the request was begun.
    pub looked: u64,
    /// Where this thread writes down what must not be done twice.
    pub journal: Option<&'a JournalSlot>,
    /// What a dead worker has done of this same request.
    pub past: Option<Begun>,
}

/// What a thread brings along.
pub struct Own {
    /// Its own empty list.
    no_groups: Arc<[u32]>,
    journal: Option<Arc<JournalSlot>>,
    introduced: Cell<bool>,
}

impl Own {
    pub fn new(session: &Session) -> Self {
        let state = session.options.state.as_ref();
        let journal = state.and_then(|state| state.journal_slot());
        Self { no_groups: Arc::from([]), journal, introduced: Cell::new(false) }
    }

    /// What this thread's journal has to know is told to it. On the thread itself.
    fn introduce(&self) {
        if let (false, Some(journal)) = (self.introduced.replace(true), &self.journal) {
            privileges::tell(journal.clone());
        }
    }

    /// The kernel has taken the answer to the last request.
    pub fn answered(&self) {
        if let Some(journal) = &self.journal {
            journal.answered();
        }
    }
}

impl Session {
    pub fn new(stack: Arc<dyn Libservice>, door: DoorId, options: FuseOptions) -> Self {
        let open_files = OpenFiles::new(stack.clone());
        let open_directories = OpenDirectories::new(stack.clone());
        let modes = options.modes.clone().unwrap_or_default();
        let opens = Opens::new(
            modes,
            options.passthrough.clone(),
            options.state.as_ref().map(|state| state.opens.clone()),
        );
        let numbers = Numbers::new(options.state.clone());
        Self {
            stack,
            door,
            options,
            open_files,
            open_directories,
            opens,
            numbers,
            late_errors: LateErrors::default(),
            times: Times::default(),
            written: Written::default(),
            told: Arc::default(),
            outdated: OnceLock::new(),
            negotiated: OnceLock::new(),
            panicked: AtomicBool::new(false),
            begun: OnceLock::new(),
            ring_payload_bytes: None,
        }
    }

    /// Offers the kernel to work over rings with payloads of so many bytes.
    pub fn offering_rings(self, payload_bytes: Option<usize>) -> Self {
        Self { ring_payload_bytes: payload_bytes, ..self }
    }

    /// The kernel has agreed to work over rings.
    pub fn over_rings(&self) -> bool {
        self.negotiated.get().is_some_and(|agreed| agreed.flags.contains(abi::InitFlags::OVER_IO_URING))
    }

    /// The protocol's version agreed on; 0 before INIT.
    pub fn minor(&self) -> u32 {
        self.negotiated.get().map_or(0, |agreed| agreed.minor)
    }

    #[cfg(test)]
    pub fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::Relaxed)
    }

    /// The kernel holds back writes.
    pub fn writes_ahead(&self) -> bool {
        self.negotiated.get().is_some_and(|agreed| agreed.writeback())
    }

    /// Where the file of the request has data and holes cannot be told yet: programs may have written what the stack does not
    /// have.
    pub fn must_ask_late(&self, header: &InHeader) -> bool {
        header.opcode == opcode::LSEEK
            && self.writes_ahead()
            && checked_node(&self.numbers, header.nodeid)
                .is_ok_and(|node| self.solid_size_bytes(node).is_none())
    }

    /// The size of a file without holes, of which programs have written nothing that the stack does not have.
    pub fn solid_size_bytes(&self, node: NodeId) -> Option<u64> {
        let agreed = self.negotiated.get()?;
        // The kernel tells of first writes by asking for an attribute, if it asks for any.
        if !agreed.capabilities.contains(Capabilities::XATTRS) || self.written.may_be(node) {
            return None;
        }
        let attr = catch_unwind(AssertUnwindSafe(|| self.stack.getattr(&Caller::service(), node, None)));
        let attr = attr.ok()?.ok()?;
        (attr.blocks_512.saturating_mul(512) >= attr.size_bytes).then_some(attr.size_bytes)
    }

    /// Does what `request` asks for.
    pub fn answer(&self, request: Request<'_>, reply: &mut Reply<'_>, own: &Own) -> Answer {
        let header = request.header;
        let done = catch_unwind(AssertUnwindSafe(|| self.dispatch(request, reply, own)));
        let done = done.unwrap_or_else(|_| {
            if !self.panicked.swap(true, Ordering::Relaxed) {
                log::error!(
                    "FUSE door {}: a layer of the stack panicked in {} of node {}; the program got EIO, and later \
                     panics are not logged",
                    self.door.0,
                    opcode::name(header.opcode),
                    header.nodeid,
                );
            }
            Err(Error::new(Errno::IO, "run an operation"))
        });
        match done {
            Ok(answer) => answer,
            Err(error) => {
                self.abandon(reply.held);
                log::trace!("{} of node {}: {error}", opcode::name(header.opcode), header.nodeid);
                match header.opcode {
                    opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => Answer::Silence,
                    _ => Answer::Error(error.errno()),
                }
            }
        }
    }

    /// Gives back what a kernel that never got the answer does not hold.
    pub fn abandon(&self, held: &mut Vec<Held>) {
        for held in held.drain(..).rev() {
            match held {
                Held::LookUp(number) => self.forget(number, 1),
                Held::File(node, handle) => self.release(node, handle),
                Held::Directory(node, handle) => self.release_directory(node, handle),
            }
        }
    }

    fn dispatch(&self, request: Request<'_>, reply: &mut Reply<'_>, own: &Own) -> Result<Answer> {
        let Request { header, mut arguments } = request;
        match header.opcode {
            opcode::INIT => {
                return self.init(&mut arguments, reply).map(|()| Answer::Payload);
            }
            opcode::FORGET => {
                let forget: abi::ForgetIn = arguments.take()?;
                self.forget(header.nodeid, forget.nlookup);
                return Ok(Answer::Silence);
            }
            opcode::BATCH_FORGET => {
                self.forget_batch(&mut arguments)?;
                return Ok(Answer::Silence);
            }
            // What a layer does cannot be broken off half-way: ENOSYS makes the kernel stop asking.
            opcode::INTERRUPT => return Ok(Answer::Error(Errno::NOSYS)),
            opcode::DESTROY => return Ok(Answer::Payload),
            _ => {}
        }
        let agreed = self.negotiated.get().ok_or_else(|| Error::new(Errno::PROTO, "work before INIT"))?;
        let past = self.past_of(header.unique);
        own.introduce();
        if let Some(journal) = &own.journal {
            journal.take_up(header.nodeid, past.as_ref());
            if !journal.may_do(header.unique & !opcode::RESENT) {
                reply.given_up = true;
                log::error!(
                    "FUSE door {}: {} of node {} is answered EIO, since several workers died of it",
                    self.door.0,
                    opcode::name(header.opcode),
                    header.nodeid
                );
                return Err(Error::new(Errno::IO, "do what several workers died of"));
            }
        }
        let node = checked_node(&self.numbers, header.nodeid)?;
        self.told.inode(node);
        let operation = Operation {
            session: self,
            agreed,
            header,
            node,
            looked: self.told.looked(),
            caller: self.caller(&header, &own.no_groups),
            journal: own.journal.as_deref(),
            past,
        };
        let changed_behind = operation.is_replaced()
            && matches!(
                header.opcode,
                opcode::WRITE | opcode::FALLOCATE | opcode::SETATTR | opcode::SETXATTR
            );
        let done = operation.run(arguments, reply).map(|()| Answer::Payload);
        if changed_behind {
            self.tell_outdated(node);
        }
        done
    }

    fn caller(&self, header: &InHeader, no_groups: &Arc<[u32]>) -> Caller {
        Caller {
            uid: header.uid,
            gid: header.gid,
            groups: no_groups.clone(),
            // The kernel has checked what the program may do; where a capability makes a difference to the layers
            // (FSETID), it says so in the request.
            capabilities: FsCapabilities::all(),
            umask: 0,
            pid: header.pid,
            door: self.door,
        }
    }

    /// Goes on with what was agreed on with the kernel before.
    pub fn resume(&self, agreed: Agreed) {
        let (capabilities, coherence) = (self.stack.capabilities(), self.stack.coherence());
        let agreed = init::resume(agreed, capabilities, coherence, &self.options);
        // Set once: who resumes is asked nothing before.
        let _ = self.negotiated.set(agreed);
    }

    /// What dead workers were doing when they died.
    pub fn was_begun(&self, begun: Vec<Begun>) {
        let by_request = begun.into_iter().map(|begun| (begun.intent.unique, begun)).collect();
        let _ = self.begun.set(by_request);
    }

    /// What a dead worker has done of a request that is sent again.
    fn past_of(&self, unique: u64) -> Option<Begun> {
        if unique & opcode::RESENT == 0 {
            return None;
        }
        self.begun.get()?.get(&(unique & !opcode::RESENT)).cloned()
    }

    fn init(&self, arguments: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let offer = Offer::take(arguments)?;
        let (out, agreed) = init::negotiate(
            &offer,
            self.stack.capabilities(),
            self.stack.coherence(),
            &self.options,
            self.ring_payload_bytes,
        )?;
        if let Some(state) = &self.options.state {
            state.agree(Agreed { minor: agreed.minor, flags: agreed.flags.bits() });
        }
        self.negotiated
            .set(agreed)
            .map_err(|_| Error::new(Errno::PROTO, "begin a connection a second time"))?;
        self.written.begin();
        log::debug!(
            "FUSE door {}: {}.{} {:?}, {:?}",
            self.door.0,
            out.major,
            out.minor,
            agreed.flags,
            agreed.coherence
        );
        reply.put(&out)
    }

    /// Has the kernel ask again for what it knows of the node's inodes; not at once, since this is a thread that answers.
    pub fn tell_outdated(&self, node: NodeId) {
        if let Some(outdated) = self.outdated.get() {
            outdated(node);
        }
    }

    pub fn release(&self, node: NodeId, handle: HandleId) {
        self.opens.release(node, handle);
        self.stack.release(node, handle);
    }

    pub fn release_directory(&self, node: NodeId, handle: HandleId) {
        self.opens.release_directory(handle);
        self.stack.releasedir(node, handle);
    }

    /// The number by which the kernel is to know `node`.
    pub fn number_of(&self, node: NodeId) -> u64 {
        self.opens.renewed.outward(node, self.numbers.of_node(node))
    }

    fn forget(&self, nodeid: u64, count: u64) {
        if let Some((node, count)) = self.numbers.forget(nodeid, count).filter(|_| nodeid != 0) {
            self.open_files.forget(node);
            self.open_directories.forget(node);
            self.opens.forget(node);
            self.told.forget(node, count);
            self.stack.forget(node, count);
        }
    }

    fn forget_batch(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let batch: abi::BatchForgetIn = arguments.take()?;
        for _ in 0..batch.count {
            // Ends at the latest with the message.
            let one: abi::ForgetOne = arguments.take()?;
            self.forget(one.nodeid, one.nlookup);
        }
        Ok(())
    }
}

impl Operation<'_> {
    pub fn stack(&self) -> &dyn Libservice {
        &*self.session.stack
    }

    /// The request names an inode of the kernel that another one has replaced.
    pub fn is_replaced(&self) -> bool {
        self.session.opens.renewed.is_replaced(self.node, self.header.nodeid)
    }

    /// Of an inode that was replaced, nothing is told when it changes.
    pub fn timeouts(&self) -> Timeouts {
        match self.is_replaced() {
            true => Timeouts { attributes: Duration::ZERO, ..self.agreed.timeouts },
            false => self.agreed.timeouts,
        }
    }

    /// The kernel's number of `node`.
    pub fn number_of(&self, node: NodeId) -> u64 {
        self.session.number_of(node)
    }

    /// What the kernel is told of an entry, which counts as told of by now. What others may have changed since it was looked up the kernel is
    /// not to keep: nobody will tell it.
    pub fn entry_out(&self, entry: &Entry) -> abi::EntryOut {
        let timeouts = match self.session.told.looked() == self.looked {
            true => self.agreed.timeouts,
            false => Timeouts::NONE,
        };
        abi::EntryOut { nodeid: self.number_of(entry.node), ..timeouts.entry_out(entry) }
    }

    /// The kernel will hold one more look-up of what `out` tells of, found under `name` in this operation's directory.
    pub fn hold(&self, out: &abi::EntryOut, name: &[u8], entry: &Entry, held: &mut Vec<Held>) {
        // What has no name has no directory either.
        let parent = if name.is_empty() { 0 } else { self.header.nodeid };
        self.session.numbers.seen(out.nodeid, (parent, name), entry);
        held.push(Held::LookUp(out.nodeid));
    }

    /// ENOSYS when the stack cannot do it at all, which the kernel remembers.
    pub fn need(&self, capability: Capabilities) -> Result<()> {
        if self.agreed.capabilities.contains(capability) { Ok(()) } else { Err(unknown()) }
    }

    /// The kernel says that the program may not keep setuid and setgid bits.
    pub fn drop_fsetid(&mut self) {
        self.caller.capabilities.remove(FsCapabilities::FSETID);
    }

    fn run(self, mut a: Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let a = &mut a;
        match self.header.opcode {
            opcode::LOOKUP => self.lookup(a, reply),
            opcode::GETATTR => self.getattr(a, reply),
            opcode::SETATTR => self.setattr(a, reply),
            opcode::STATX => self.statx(a, reply),
            opcode::READLINK => self.readlink(reply),
            opcode::SYMLINK => self.symlink(a, reply),
            opcode::MKNOD => self.mknod(a, reply),
            opcode::MKDIR => self.mkdir(a, reply),
            opcode::UNLINK => self.unlink(a),
            opcode::RMDIR => self.rmdir(a),
            opcode::RENAME => self.rename(a),
            opcode::RENAME2 => self.rename2(a),
            opcode::LINK => self.link(a, reply),
            opcode::OPEN => self.open(a, reply),
            opcode::CREATE => self.create(a, reply),
            opcode::TMPFILE => self.tmpfile(a, reply),
            opcode::READ => self.read(a, reply),
            opcode::WRITE => self.write(a, reply),
            opcode::FLUSH => self.flush(a),
            opcode::FSYNC => self.fsync(a),
            opcode::RELEASE => self.release(a),
            opcode::FALLOCATE => self.fallocate(a),
            opcode::LSEEK => self.lseek(a, reply),
            opcode::COPY_FILE_RANGE => self.copy_file_range(a, reply, false),
            opcode::COPY_FILE_RANGE_64 => self.copy_file_range(a, reply, true),
            opcode::OPENDIR => self.opendir(reply),
            opcode::READDIR => self.readdir(a, reply),
            opcode::READDIRPLUS => self.readdirplus(a, reply),
            opcode::FSYNCDIR => self.fsyncdir(a),
            opcode::RELEASEDIR => self.releasedir(a),
            opcode::STATFS => self.statfs(reply),
            opcode::GETXATTR => self.getxattr(a, reply),
            opcode::LISTXATTR => self.listxattr(a, reply),
            opcode::SETXATTR => self.setxattr(a),
            opcode::REMOVEXATTR => self.removexattr(a),
            // ACCESS: the kernel checks permissions itself (default_permissions). The rest has no meaning here.
            _ => Err(unknown()),
        }
    }
}

fn unknown() -> Error {
    Error::new(Errno::NOSYS, "do what the stack cannot")
}
