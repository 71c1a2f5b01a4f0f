//! The trait that every storage function implements and every door speaks.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::capabilities::{Capabilities, Coherence};
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// One stackable storage function.
///
/// Operations follow FUSE's low-level ones: inodes, not paths. A layer that stands on another
/// names it in [`below`](Libservice::below) and overrides only what it changes; every other operation goes
/// straight through, node and handle numbers included.
///
/// Permissions are checked above (by the kernel for the FUSE door): a libservice trusts `Caller` to be allowed,
/// and uses it for ownership of what it creates. All operations may be called from many threads at once.
///
/// Look-up counts: every [`Entry`] returned holds one look-up of its node until `forget`.
pub trait Libservice: Send + Sync {
    /// The libservice that this one stands on, when it passes operations through.
    fn below(&self) -> Option<&dyn Libservice> {
        None
    }

    /// A short word for logs and statistics: `dir`, `union`.
    fn kind(&self) -> &'static str;

    fn capabilities(&self) -> Capabilities {
        self.below().map_or(Capabilities::empty(), |below| below.capabilities())
    }

    fn coherence(&self) -> Coherence {
        self.below().map_or(Coherence::Shared, |below| below.coherence())
    }

    /// ENOENT when there is no such name.
    fn lookup(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<Entry> {
        pass(self.below())?.lookup(caller, parent, name)
    }

    /// One more look-up of a node that somebody holds.
    fn look_up_again(&self, caller: &Caller, node: NodeId) -> Result<Entry> {
        pass(self.below())?.look_up_again(caller, node)
    }

    /// Drops `count` look-ups of `node`. Never fails; an unknown node is ignored.
    fn forget(&self, node: NodeId, count: u64) {
        if let Some(below) = self.below() {
            below.forget(node, count);
        }
    }

    /// `handle`, when given, is an open file of `node` and works also after its last name is gone.
    fn getattr(&self, caller: &Caller, node: NodeId, handle: Option<HandleId>) -> Result<Attr> {
        pass(self.below())?.getattr(caller, node, handle)
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<HandleId>,
        changes: &SetAttr,
    ) -> Result<Attr> {
        pass(self.below())?.setattr(caller, node, handle, changes)
    }

    fn readlink(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        pass(self.below())?.readlink(caller, node)
    }

    /// Makes a regular file, FIFO, socket or device node. `mode` holds the type; `caller.umask` is still to
    /// be applied (a default ACL of the parent replaces it). The same holds for `mkdir`, `create`, `tmpfile`.
    fn mknod(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32, rdev: u64) -> Result<Entry> {
        pass(self.below())?.mknod(caller, parent, name, mode, rdev)
    }

    fn mkdir(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32) -> Result<Entry> {
        pass(self.below())?.mkdir(caller, parent, name, mode)
    }

    fn symlink(&self, caller: &Caller, parent: NodeId, name: &Name, target: &[u8]) -> Result<Entry> {
        pass(self.below())?.symlink(caller, parent, name, target)
    }

    fn link(&self, caller: &Caller, node: NodeId, new_parent: NodeId, new_name: &Name) -> Result<Entry> {
        pass(self.below())?.link(caller, node, new_parent, new_name)
    }

    fn unlink(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<()> {
        pass(self.below())?.unlink(caller, parent, name)
    }

    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<()> {
        pass(self.below())?.rmdir(caller, parent, name)
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
        pass(self.below())?.rename(caller, parent, name, new_parent, new_name, flags)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<Opened> {
        pass(self.below())?.open(caller, node, flags)
    }

    /// Makes and opens a regular file, or opens the one that stands there (unless `EXCLUSIVE`: EEXIST).
    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        pass(self.below())?.create(caller, parent, name, mode, flags)
    }

    /// Makes and opens a file without a name (O_TMPFILE); `link` may name it later.
    fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        pass(self.below())?.tmpfile(caller, parent, mode, flags)
    }

    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    fn read(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        pass(self.below())?.read(caller, node, handle, offset, buffer)
    }

    /// Writes all of `data` or says how much. With `APPEND` in the open flags `offset` is ignored.
    fn write(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        pass(self.below())?.write(caller, node, handle, offset, data)
    }

    /// A descriptor of the process was closed: report what failed since the last report, once.
    fn flush(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        pass(self.below())?.flush(caller, node, handle)
    }

    fn fsync(&self, caller: &Caller, node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        pass(self.below())?.fsync(caller, node, handle, data_only)
    }

    /// Sees to it that no power cut shows a later change of names without the bytes written so far. fsync does that and
    /// more, and is what a libservice does that has nothing cheaper.
    fn order(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        self.fsync(caller, node, handle, false)
    }

    /// Begins what `order` waits for, so that other things can be done meanwhile. It need not do anything.
    fn begin_order(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        self.below().map_or(Ok(()), |below| below.begin_order(caller, node, handle))
    }

    /// Ends an open file. Never fails: errors were reported by `flush` and `fsync`.
    fn release(&self, node: NodeId, handle: HandleId) {
        if let Some(below) = self.below() {
            below.release(node, handle);
        }
    }

    fn opendir(&self, caller: &Caller, node: NodeId) -> Result<HandleId> {
        pass(self.below())?.opendir(caller, node)
    }

    /// Feeds entries from `offset` (0: the beginning, which also reads the directory anew) until the sink is full
    /// or the directory ends. `.` and `..` are not fed.
    fn readdir(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirSink<'_>,
    ) -> Result<()> {
        pass(self.below())?.readdir(caller, node, handle, offset, sink)
    }

    /// `readdir` with a look-up of each name.
    fn readdir_plus(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirPlusSink<'_>,
    ) -> Result<()> {
        pass(self.below())?.readdir_plus(caller, node, handle, offset, sink)
    }

    fn fsyncdir(&self, caller: &Caller, node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        pass(self.below())?.fsyncdir(caller, node, handle, data_only)
    }

    fn releasedir(&self, node: NodeId, handle: HandleId) {
        if let Some(below) = self.below() {
            below.releasedir(node, handle);
        }
    }

    fn statfs(&self, caller: &Caller, node: NodeId) -> Result<StatFs> {
        pass(self.below())?.statfs(caller, node)
    }

    /// ENODATA when there is no such attribute.
    fn getxattr(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<Vec<u8>> {
        pass(self.below())?.getxattr(caller, node, name)
    }

    /// Names, each ended by a NUL, as listxattr(2) gives them.
    fn listxattr(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        pass(self.below())?.listxattr(caller, node)
    }

    fn setxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        pass(self.below())?.setxattr(caller, node, name, value, flags)
    }

    fn removexattr(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<()> {
        pass(self.below())?.removexattr(caller, node, name)
    }

    fn fallocate(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        mode: FallocateMode,
        offset: u64,
        length: u64,
    ) -> Result<()> {
        pass(self.below())?.fallocate(caller, node, handle, mode, offset, length)
    }

    /// ENXIO past the end.
    fn seek(&self, caller: &Caller, node: NodeId, handle: HandleId, offset: u64, to: SeekTo) -> Result<u64> {
        pass(self.below())?.seek(caller, node, handle, offset, to)
    }

    /// Copies within this libservice; says how many bytes were copied.
    fn copy_range(
        &self,
        caller: &Caller,
        from: (NodeId, HandleId, u64),
        to: (NodeId, HandleId, u64),
        length: u64,
    ) -> Result<u64> {
        pass(self.below())?.copy_range(caller, from, to, length)
    }

    /// The file of the host that holds this open file's bytes, where there is one: a layer above may copy from
    /// it in the kernel. `None` is always a correct answer.
    fn host_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        let _ = handle;
        None
    }

    /// The file of the host whose bytes are those of this open file, and never change: a door may have the kernel use it in
    /// place of this libservice. `None` is always a correct answer, and the right one for a layer that looks at what is read.
    fn immutable_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        let _ = handle;
        None
    }

    /// Which inode of the host's holds this open file's bytes, where these never change: doors of several stacks cache
    /// them once. `None` is always a correct answer, and the right one for a layer that looks at what is read.
    fn content(&self, handle: HandleId) -> Option<ContentId> {
        let _ = handle;
        None
    }

    /// The same of a regular file that need not be open, with its size, and without asking the host. What is told holds at the moment: until
    /// somebody changes the file. `None` is always a correct answer, and the right one for a layer that looks at what is read.
    fn content_of(&self, node: NodeId) -> Option<Content> {
        let _ = node;
        None
    }

    /// Which inode of the host's this open file is of, at the moment: for telling where it was open.
    fn host_inode(&self, handle: HandleId) -> Option<HostInode> {
        self.below().and_then(|below| below.host_inode(handle))
    }

    /// Tells `observer` of every change from now on. Called with no lock held that an operation may need.
    fn observe(&self, observer: Arc<dyn Observer>) {
        if let Some(below) = self.below() {
            below.observe(observer);
        }
    }
}

/// What changed in a libservice, for those who cache above it.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    /// Attributes or bytes of an inode.
    Inode { node: NodeId },
    /// Attributes of an inode, and of its bytes none but these.
    Bytes { node: NodeId, offset: u64, length: u64 },
    /// What a name in a directory stands for.
    Entry { parent: NodeId, name: &'a Name },
    /// Something that nobody above holds a node of.
    Elsewhere,
}

/// Wants to know of changes. `origin` is the door whose request made the change: its kernel knows already.
/// Must return at once and never call back into the libservice that told it.
pub trait Observer: Send + Sync {
    fn changed(&self, change: Change<'_>, origin: DoorId);

    /// Nobody is there any more to be told: it may be dropped.
    fn is_gone(&self) -> bool {
        false
    }
}

fn pass(below: Option<&dyn Libservice>) -> Result<&dyn Libservice> {
    below.ok_or_else(|| Error::new(Errno::OPNOTSUPP, "use an operation this layer does not have"))
}
