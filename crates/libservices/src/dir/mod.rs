//! `dir`: a directory of the host.
//!
//! **Confinement.** Everything is reached from the root's descriptor by openat2(2), one component at a time; no
//! path is ever resolved by string, no link followed, no mount entered.
//!
//! **Nodes.** A look-up costs one statx(2) and no descriptor: a node remembers its inode (device, number, birth
//! time) and the name it was seen under, and is opened through its parent when something needs it. What was
//! opened is compared with what was remembered; ESTALE when it is another inode. O_PATH descriptors are kept within the
//! process's budget. A name that goes away through us first pins its inode's descriptor, so an
//! unlinked inode lives until it is forgotten; a name that others take away (`Shared`) makes the node ESTALE once its
//! descriptor was evicted.
//!
//! **From O_PATH to the inode.** The kernel cannot open an O_PATH descriptor for reading, nor get at its extended
//! attributes. Both go through a descriptor of `/proc/self/fd`, which the process keeps from its start
//! ([`keep_proc_self_fd`]); it needs no /proc at run time. Owners, times and links use AT_EMPTY_PATH, modes
//! fchmodat2(2) (Linux 6.6), else the same way. Without a procfs, files are opened by name and compared afterwards,
//! and what has lost its name cannot be opened again.
//!
//! **Special files** are made and shown, never opened.

mod attributes;
mod create;
mod descriptors;
mod files;
mod identity;
mod listing;
mod names;
mod nodes;
mod sys;
#[cfg(test)]
mod tests;
mod xattrs;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use parking_lot::RwLock;
use rustix::fs::{Mode, OFlags};

use crate::capabilities::{Capabilities, Coherence};
use crate::error::{Attempt, Errno, Error, Result};
use crate::handles::Handles;
use crate::libservice::{Libservice, Observer};
use crate::name::Name;
use crate::notices::Notices;
use crate::stack::{DirCoherence, DirLayer};
use crate::types::*;

use descriptors::{Budget, Descriptor};
use files::File;
use listing::Listing;
use nodes::{Node, Nodes, Sighting};
use sys::{InodeKey, Stat};

pub use sys::keep_proc_self_fd;

/// Bound on climbing from a node to the root.
const DEPTH_MAX: usize = 8192;

/// A directory of the host as a libservice.
pub struct Dir {
    nodes: Nodes,
    files: Handles<File>,
    listings: Handles<Listing>,
    notices: Notices,
    /// Held shared while names move, so that one who did not find a name can wait until the move is recorded.
    moves: RwLock<()>,
    mount: u64,
    /// Birth times change when an overlay copies a file up, so there they do not tell inodes apart.
    compare_birth: bool,
    network_host: bool,
    /// Bytes that reached the device come before names that change later, also in a power cut.
    ordered_host: bool,
    read_only: bool,
    coherence: Coherence,
    /// The ids that the kernel gives to what this process makes.
    own_ids: (u32, u32),
    may_chown: bool,
}

impl Dir {
    /// Serves the directory `root` (any descriptor of it, O_PATH or not). ENOTDIR when it is something else.
    pub fn new(root: OwnedFd, config: &DirLayer) -> Result<Self> {
        Self::with_budget(root, config, Budget::of_process())
    }

    fn with_budget(root: OwnedFd, config: &DirLayer, budget: Arc<Budget>) -> Result<Self> {
        let mut stat = sys::stat_fd(&root).attempt("look at the root of a directory layer")?;
        if !stat.attr.is_dir() {
            return Err(Error::new(Errno::NOTDIR, "serve something that is no directory"));
        }
        let host = rustix::fs::fstatfs(&root).attempt("look at the filesystem of a directory layer")?;
        let compare_birth = !host_types::OVERLAYS.contains(&host.f_type);
        if !compare_birth {
            stat.key.born = None;
        }
        Ok(Self {
            mount: stat.mount,
            nodes: Nodes::new(root, &stat, budget),
            files: Handles::default(),
            listings: Handles::default(),
            notices: Notices::default(),
            moves: RwLock::new(()),
            compare_birth,
            network_host: host_types::NETWORK.contains(&host.f_type),
            ordered_host: host_types::ORDERED.contains(&host.f_type),
            read_only: config.read_only,
            coherence: match config.coherence {
                DirCoherence::Immutable => Coherence::Immutable,
                DirCoherence::Exclusive => Coherence::Exclusive,
                DirCoherence::Shared => Coherence::Shared,
            },
            own_ids: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
            may_chown: identity::may_chown(),
        })
    }

    fn node(&self, id: NodeId) -> Result<Arc<Node>> {
        self.nodes.get(id).ok_or_else(|| Error::new(Errno::STALE, "use a node that was forgotten"))
    }

    /// EROFS for changes of a read-only layer.
    fn writable(&self) -> Result<()> {
        if self.read_only { Err(Error::new(Errno::ROFS, "change a read-only layer")) } else { Ok(()) }
    }

    /// statx of an open inode, its identity made comparable.
    fn stat_fd(&self, fd: impl AsFd) -> rustix::io::Result<Stat> {
        sys::stat_fd(fd).map(|stat| self.comparable(stat))
    }

    /// statx of a name. EXDEV when something is mounted there.
    fn stat_name(&self, parent: impl AsFd, name: &Name) -> rustix::io::Result<Stat> {
        let stat = sys::stat_name(parent, name)?;
        if stat.mount != self.mount { Err(Errno::XDEV) } else { Ok(self.comparable(stat)) }
    }

    fn comparable(&self, mut stat: Stat) -> Stat {
        if !self.compare_birth {
            stat.key.born = None;
        }
        stat
    }

    /// A descriptor of the node (O_PATH or better), opened through its parents where it is not cached.
    fn reach(&self, node: &Arc<Node>) -> Result<Arc<Descriptor>> {
        if let Some(found) = node.descriptor() {
            return Ok(found);
        }
        match self.reach_by_name(node) {
            Err(e) if e.is(Errno::STALE) => {
                // A rename or removal of ours may be between its system call and its record: wait and look again.
                drop(self.moves.write());
                if let Some(found) = node.descriptor() {
                    return Ok(found);
                }
                match self.reach_by_name(node) {
                    Err(e) if e.is(Errno::STALE) && node.try_other_name() => self.reach_by_name(node),
                    done => done,
                }
            }
            done => done,
        }
    }

    fn reach_by_name(&self, node: &Arc<Node>) -> Result<Arc<Descriptor>> {
        let (mut at, way) = self.way_to(node)?;
        for (step, name) in way.iter().rev() {
            let open = || sys::open_name(&*at, name, OFlags::PATH, Mode::empty());
            let fd = self.nodes.budget().with_room(open).map_err(stale_if_absent)?;
            let stat = self.stat_fd(&fd).attempt("look at a node")?;
            if stat.key != step.key {
                return Err(stale(Errno::STALE));
            }
            at = self.nodes.install(step, fd);
        }
        Ok(at)
    }

    /// The nearest ancestor that is open, and the steps from `node` up to it.
    #[allow(clippy::type_complexity)]
    fn way_to(&self, node: &Arc<Node>) -> Result<(Arc<Descriptor>, Vec<(Arc<Node>, Box<Name>)>)> {
        let mut way = Vec::new();
        let mut step = node.clone();
        for _ in 0..DEPTH_MAX {
            let Some(Sighting { parent, name }) = step.sighting() else { break };
            way.push((step, name));
            if let Some(open) = parent.descriptor() {
                return Ok((open, way));
            }
            step = parent;
        }
        Err(stale(Errno::STALE))
    }

    /// Runs `open`, making room once if the process is out of descriptors.
    fn with_room<T>(&self, open: impl Fn() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
        self.nodes.budget().with_room(open)
    }
}

fn stale(errno: Errno) -> Error {
    Error::new(errno, "reach a node again")
}

// What was there is not there: the node is stale, which is not the same as a missing name.
fn stale_if_absent(errno: Errno) -> Error {
    match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV => stale(Errno::STALE),
        errno => stale(errno),
    }
}

/// Filesystems by the magic numbers of linux/magic.h.
mod host_types {
    pub const OVERLAYS: [rustix::fs::FsWord; 2] = [0x794c_7630, 0x6573_5546];
    /// ext4: extents are recorded before writeback ends, and a commit of the journal flushes the device's cache first.
    pub const ORDERED: [rustix::fs::FsWord; 1] = [0xef53];
    /// Those whose close(2) reports errors of earlier writes: NFS, SMB, CIFS, Ceph, FUSE.
    pub const NETWORK: [rustix::fs::FsWord; 5] = [0x6969, 0xfe53_4d42, 0xff53_4d42, 0x00c3_6400, 0x6573_5546];
}

impl Libservice for Dir {
    fn kind(&self) -> &'static str {
        "dir"
    }

    fn capabilities(&self) -> Capabilities {
        let mut all = Capabilities::all();
        all.set(Capabilities::WRITE, !self.read_only);
        all.set(Capabilities::OWNERS, self.may_chown);
        all.set(Capabilities::STATELESS_OPEN, !self.network_host);
        all
    }

    fn coherence(&self) -> Coherence {
        self.coherence
    }

    fn lookup(&self, _caller: &Caller, parent: NodeId, name: &Name) -> Result<Entry> {
        self.look_up(&self.node(parent)?, name)
    }

    fn look_up_again(&self, _caller: &Caller, node: NodeId) -> Result<Entry> {
        let held = self.node(node)?;
        if !self.nodes.look_up_again(&held) {
            return Err(Error::new(Errno::STALE, "look up a forgotten inode again"));
        }
        match self.attributes(node, None) {
            Ok(attr) => Ok(Entry { node, generation: 0, attr }),
            Err(error) => {
                self.nodes.forget(node, 1);
                Err(error)
            }
        }
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.nodes.forget(node, count);
    }

    fn getattr(&self, _caller: &Caller, node: NodeId, handle: Option<HandleId>) -> Result<Attr> {
        self.attributes(node, handle)
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<HandleId>,
        changes: &SetAttr,
    ) -> Result<Attr> {
        self.set_attributes(caller, node, handle, changes)
    }

    fn readlink(&self, _caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        self.link_target(&self.node(node)?)
    }

    fn mknod(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32, rdev: u64) -> Result<Entry> {
        self.make_node(caller, parent, name, mode, rdev)
    }

    fn mkdir(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32) -> Result<Entry> {
        self.make_dir(caller, parent, name, mode)
    }

    fn symlink(&self, caller: &Caller, parent: NodeId, name: &Name, target: &[u8]) -> Result<Entry> {
        self.make_symlink(caller, parent, name, target)
    }

    fn link(&self, caller: &Caller, node: NodeId, new_parent: NodeId, new_name: &Name) -> Result<Entry> {
        self.make_link(caller, node, new_parent, new_name)
    }

    fn unlink(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<()> {
        self.remove(caller, parent, name, rustix::fs::AtFlags::empty())
    }

    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<()> {
        self.remove(caller, parent, name, rustix::fs::AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        new_parent: NodeId,
        new_name: &Name,
        flags: RenameFlags,
    ) -> Result<()> {
        self.move_name(caller, (parent, name), (new_parent, new_name), flags)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<Opened> {
        self.open_file(caller, &self.node(node)?, flags)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        self.create_file(caller, parent, name, mode, flags)
    }

    fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        self.make_tmpfile(caller, parent, mode, flags)
    }

    fn read(
        &self,
        _caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        self.read_file(handle, offset, buffer)
    }

    fn write(
        &self,
        caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        self.write_file(caller, handle, offset, data)
    }

    fn flush(&self, _caller: &Caller, _node: NodeId, handle: HandleId) -> Result<()> {
        self.flush_file(handle)
    }

    fn fsync(&self, _caller: &Caller, _node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.sync_file(handle, data_only)
    }

    fn order(&self, _caller: &Caller, _node: NodeId, handle: HandleId) -> Result<()> {
        self.order_file(handle)
    }

    fn begin_order(&self, _caller: &Caller, _node: NodeId, handle: HandleId) -> Result<()> {
        self.begin_order_of_file(handle)
    }

    fn release(&self, _node: NodeId, handle: HandleId) {
        drop(self.files.remove(handle));
    }

    fn opendir(&self, _caller: &Caller, node: NodeId) -> Result<HandleId> {
        self.open_listing(node)
    }

    fn readdir(
        &self,
        _caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirSink<'_>,
    ) -> Result<()> {
        self.list(handle, offset, sink)
    }

    fn readdir_plus(
        &self,
        _caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirPlusSink<'_>,
    ) -> Result<()> {
        self.list_plus(handle, offset, sink)
    }

    fn fsyncdir(&self, _caller: &Caller, _node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.sync_listing(handle, data_only)
    }

    fn releasedir(&self, _node: NodeId, handle: HandleId) {
        drop(self.listings.remove(handle));
    }

    fn statfs(&self, _caller: &Caller, _node: NodeId) -> Result<StatFs> {
        self.space()
    }

    fn getxattr(&self, _caller: &Caller, node: NodeId, name: &[u8]) -> Result<Vec<u8>> {
        self.attribute(node, name)
    }

    fn listxattr(&self, _caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        self.attribute_names(node)
    }

    fn setxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        self.set_attribute(caller, node, name, value, flags)
    }

    fn removexattr(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<()> {
        self.remove_attribute(caller, node, name)
    }

    fn fallocate(
        &self,
        caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        mode: FallocateMode,
        offset: u64,
        length: u64,
    ) -> Result<()> {
        self.allocate(caller, handle, mode, (offset, length))
    }

    fn seek(
        &self,
        _caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        offset: u64,
        to: SeekTo,
    ) -> Result<u64> {
        self.seek_sparse(handle, offset, to)
    }

    fn copy_range(
        &self,
        caller: &Caller,
        from: (NodeId, HandleId, u64),
        to: (NodeId, HandleId, u64),
        length: u64,
    ) -> Result<u64> {
        self.copy_between(caller, (from.1, from.2), (to.1, to.2), length)
    }

    fn host_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        let file = self.files.get(handle).ok()?;
        self.host(&file).ok().cloned()
    }

    fn immutable_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        let file = self.files.get(handle).ok()?;
        let unchanging = self.coherence == Coherence::Immutable && !file.flags.contains(OpenFlags::WRITE);
        if unchanging { self.host(&file).ok().cloned() } else { None }
    }

    fn content(&self, handle: HandleId) -> Option<ContentId> {
        let file = self.files.get(handle).ok()?;
        let unchanging = self.coherence == Coherence::Immutable && !file.flags.contains(OpenFlags::WRITE);
        let InodeKey { device, ino, born } = file.node.key;
        // Without a time of birth a number that is used again would look the same.
        born.filter(|_| unchanging).map(|born| ContentId { device, ino, born })
    }

    fn content_of(&self, node: NodeId) -> Option<Content> {
        if self.coherence != Coherence::Immutable {
            return None;
        }
        let node = self.nodes.get(node).filter(|node| node.host_type == libc::S_IFREG)?;
        let InodeKey { device, ino, born } = node.key;
        Some(Content { id: ContentId { device, ino, born: born? }, size_bytes: node.first_size_bytes })
    }

    fn host_inode(&self, handle: HandleId) -> Option<HostInode> {
        let InodeKey { device, ino, born } = self.files.get(handle).ok()?.node.key;
        Some(HostInode { device, ino, born })
    }

    /// Nothing changes through a read-only layer, which may be shared by many stacks that come and go.
    fn observe(&self, observer: Arc<dyn Observer>) {
        if !self.read_only {
            self.notices.add(observer);
        }
    }
}
