//! Opens that the kernel asks for: each is counted ([`Modes`]) and answered with the way that its bytes go.

use std::os::fd::AsFd;
use std::sync::Arc;

use parking_lot::Mutex;
use polytropo_libservices::{HandleId, Libservice, NodeId, OpenFlags, Opened};
use rustc_hash::FxHashMap;

use super::abi::{self, FileOpenFlags};
use super::backings::Backings;
use super::registrar::Registrar;
use super::renewed::RenewedNodes;
use crate::doors::modes::{Access, Decision, Door, Modes, Ticket, Way, Wish};
use crate::state::{Bytes, Kind, Listed, OpenRecord, OpenTable, Through};

const SHARDS: usize = 16;

/// How files are passed through.
#[derive(Clone)]
pub struct Passthrough {
    pub registrar: Arc<dyn Registrar>,
    /// Smaller files are read faster through the kernel's cache of this mount, once they are in it.
    pub size_min_bytes: u64,
}

impl std::fmt::Debug for Passthrough {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passthrough").field("size_min_bytes", &self.size_min_bytes).finish_non_exhaustive()
    }
}

/// An open file of a program.
struct Granted {
    ticket: Ticket,
    /// It names the node's registered file.
    bound: bool,
    _listed: Option<Listed>,
}

/// The open files of one door, by handle.
pub struct Opens {
    modes: Arc<Modes>,
    passing: Option<(Backings, u64)>,
    pub renewed: RenewedNodes,
    granted: [Mutex<FxHashMap<HandleId, Granted>>; SHARDS],
    open_table: Option<Arc<OpenTable>>,
    directories: Mutex<FxHashMap<HandleId, Listed>>,
}

/// Who opens.
#[derive(Clone, Copy)]
pub struct Opener {
    /// The program's thread.
    pub thread: u32,
    pub uid: u32,
    pub gid: u32,
    /// The inode's number as the kernel knows it; where a name is made with an open file, the directory's.
    pub kernel_node: u64,
}

/// Who opens what.
pub struct Opening<'a> {
    pub stack: &'a dyn Libservice,
    pub node: NodeId,
    pub opened: &'a Opened,
    pub flags: OpenFlags,
    /// Through an inode of the kernel that another one has replaced, since there is no name to find that by.
    pub replaced: bool,
    /// The kernel is about to run it.
    pub executes: bool,
    pub opener: Opener,
    /// The kernel may keep what it has cached.
    pub keep_cache: bool,
}

impl Opens {
    pub fn new(
        modes: Arc<Modes>,
        passthrough: Option<Passthrough>,
        open_table: Option<Arc<OpenTable>>,
    ) -> Self {
        let passing = passthrough.map(|pass| (Backings::new(pass.registrar), pass.size_min_bytes));
        let granted = std::array::from_fn(|_| Mutex::default());
        let (renewed, directories) = Default::default();
        Self { modes, passing, renewed, granted, open_table, directories }
    }

    /// The node of an open file that a channel hands to the kernel under this name.
    pub fn handed(&self, name: &[u8]) -> Option<NodeId> {
        self.modes.handed.take(name)
    }

    /// The answer to an open. `None`: the kernel's inode is bound to a file that no longer has the bytes; the node has a
    /// new number from now on.
    pub fn grant(&self, opening: &Opening<'_>) -> Option<abi::OpenOut> {
        let Opening { node, opened, flags, .. } = *opening;
        if opening.replaced {
            return Some(self.grant_apart(opening));
        }
        let access = access(flags);
        let id = if access == Access::Read { self.bind(opening) } else { None };
        let wish = Wish { door: Door::Fuse, access, immutable: id.is_some(), executes: opening.executes };
        let (decision, ticket) = self.modes.open(node, wish);
        let bound = matches!(decision, Decision::Open(Way::Passthrough));
        if id.is_some() && !bound {
            self.unbind(node);
        }
        let Some(ticket) = ticket else {
            self.modes.renew(node);
            self.renewed.add(node, opening.opener.thread);
            return None;
        };
        let mut out = FileOpenFlags::empty();
        if opened.direct || ticket.way() == Way::Direct {
            out |= FileOpenFlags::DIRECT_IO | FileOpenFlags::PARALLEL_DIRECT_WRITES;
        }
        if bound {
            out |= FileOpenFlags::PASSTHROUGH;
        } else {
            // What is written by requests the kernel learns a moment later.
            let kept = opened.keep_cache && opening.keep_cache && self.modes.users(node).direct == 0;
            out.set(FileOpenFlags::KEEP_CACHE, kept);
        }
        self.keep(opening, ticket, id.filter(|_| bound));
        Some(answer(opened, out, id.filter(|_| bound)))
    }

    /// An open of an inode that was replaced: by requests, so that it meets the node's bytes. While old opens bind the inode to
    /// their file, this one has to name it too; only maps show it.
    fn grant_apart(&self, opening: &Opening<'_>) -> abi::OpenOut {
        let Opening { node, opened, flags, .. } = *opening;
        let id = self.passing.as_ref().and_then(|(backings, _)| backings.take_used(node));
        let ticket = self.modes.open_apart(node, flags.contains(OpenFlags::WRITE));
        self.keep(opening, ticket, id);
        let mut out = FileOpenFlags::DIRECT_IO | FileOpenFlags::PARALLEL_DIRECT_WRITES;
        out.set(FileOpenFlags::PASSTHROUGH, id.is_some());
        answer(opened, out, id)
    }

    /// Whether opens bind the node's former inode to their file. The kernel would then open that for writing too.
    pub fn is_bound(&self, node: NodeId) -> bool {
        self.passing.as_ref().is_some_and(|(backings, _)| backings.is_used(node))
    }

    /// The number of the file that the kernel may use for this open, if there is one. To be given back by `unbind`.
    fn bind(&self, opening: &Opening<'_>) -> Option<u32> {
        let (backings, size_min_bytes) = self.passing.as_ref()?;
        if opening.flags.contains(OpenFlags::TRUNCATE) || !self.renewed.has_room(opening.node) {
            return None;
        }
        // The layer's file need not even be opened. Bytes that nobody ever changes are that file's.
        if opening.stack.content(opening.opened.handle).is_some()
            && let Some(id) = backings.take_known(opening.node)
        {
            return Some(id);
        }
        let file = opening.stack.immutable_file(opening.opened.handle)?;
        // A size that cannot be told is the door's least worry then.
        let size = rustix::fs::fstat(&*file).map_or(0, |stat| stat.st_size as u64);
        if size < *size_min_bytes { None } else { backings.take(opening.node, file.as_fd()) }
    }

    fn unbind(&self, node: NodeId) {
        if let Some((backings, _)) = &self.passing {
            backings.release(node);
        }
    }

    fn keep(&self, opening: &Opening<'_>, ticket: Ticket, backing: Option<u32>) {
        let handle = opening.opened.handle;
        let listed = self.open_table.as_ref().and_then(|table| {
            let inode = opening.stack.host_inode(handle);
            let bytes = match ticket.way() {
                Way::Passthrough => Bytes::Passthrough,
                Way::Cached => Bytes::Cached,
                Way::Kernel => Bytes::Kernel,
                Way::Direct => Bytes::Direct,
                Way::Window => Bytes::Window,
            };
            let backing = backing.unwrap_or_default();
            let record = record(&opening.opener, opening.node, handle);
            table.list(&OpenRecord { flags: opening.flags, bytes, backing, inode, ..record })
        });
        let granted = Granted { ticket, bound: backing.is_some(), _listed: listed };
        self.shard(handle).lock().insert(handle, granted);
    }

    /// A program had this open when the worker died that listed it; the kernel goes on with it as it did.
    pub fn adopt(&self, node: NodeId, handle: HandleId, flags: OpenFlags, listed: Listed) {
        let access = access(flags);
        let wish = Wish { door: Door::Fuse, access, immutable: false, executes: false };
        let (_, ticket) = self.modes.open(node, wish);
        // There are no passthrough opens that would stand in the way.
        let ticket = ticket.unwrap_or_else(|| self.modes.open_apart(node, access.writes()));
        let granted = Granted { ticket, bound: false, _listed: Some(listed) };
        self.shard(handle).lock().insert(handle, granted);
    }

    pub fn adopt_directory(&self, handle: HandleId, listed: Listed) {
        self.directories.lock().insert(handle, listed);
    }

    /// A program has opened a directory.
    pub fn list_directory(&self, handle: HandleId, node: NodeId, opener: &Opener) {
        let Some(table) = &self.open_table else { return };
        let listed = table.list(&OpenRecord { kind: Kind::Directory, ..record(opener, node, handle) });
        if let Some(listed) = listed {
            self.directories.lock().insert(handle, listed);
        }
    }

    pub fn release_directory(&self, handle: HandleId) {
        self.directories.lock().remove(&handle);
    }

    /// A program has closed it, or never got the answer.
    pub fn release(&self, node: NodeId, handle: HandleId) {
        let Some(granted) = self.shard(handle).lock().remove(&handle) else { return };
        self.modes.release(node, granted.ticket);
        if granted.bound {
            self.unbind(node);
        }
    }

    /// The kernel dropped look-ups of the node; it has no open file of it if they were the last.
    pub fn forget(&self, node: NodeId) {
        if let Some((backings, _)) = &self.passing {
            backings.forget(node);
        }
    }

    fn shard(&self, handle: HandleId) -> &Mutex<FxHashMap<HandleId, Granted>> {
        &self.granted[handle.0 as usize % SHARDS]
    }
}

fn access(flags: OpenFlags) -> Access {
    match (flags.contains(OpenFlags::READ), flags.contains(OpenFlags::WRITE)) {
        (_, false) => Access::Read,
        (false, true) => Access::WriteOnly,
        (true, true) => Access::ReadWrite,
    }
}

fn record(opener: &Opener, node: NodeId, handle: HandleId) -> OpenRecord {
    OpenRecord {
        node: node.0,
        kernel_node: opener.kernel_node,
        handle: handle.0,
        flags: OpenFlags::READ,
        kind: Kind::File,
        through: Through::Fuse,
        bytes: Bytes::None,
        uid: opener.uid,
        gid: opener.gid,
        pid: opener.thread,
        backing: 0,
        lookups: 0,
        number: 0,
        inode: None,
    }
}

fn answer(opened: &Opened, flags: FileOpenFlags, id: Option<u32>) -> abi::OpenOut {
    abi::OpenOut { fh: opened.handle.0, open_flags: flags.bits(), backing_id: id.unwrap_or_default() as i32 }
}
