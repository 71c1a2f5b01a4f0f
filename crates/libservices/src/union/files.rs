//! Open files. A handle of the union leads to a layer's by way of [`File`], so that a file opened before it was copied
//! up shows what is written afterwards.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

use parking_lot::{Mutex, RwLock};

use super::Union;
use super::copy_up::Use;
use super::layers::{OpenDir, OpenFile};
use super::nodes::{DEPTH_MAX, Node};
use super::partial::Partial;
use crate::error::{Errno, Error, Result};
use crate::types::*;

/// Most that is copied between layers in one go.
const COPY_MAX_BYTES: u64 = 1 << 20;

/// One open file of the union.
pub struct File {
    pub(super) node: Arc<Node>,
    pub(super) flags: OpenFlags,
    target: RwLock<Arc<OpenFile>>,
    /// Of a file of which the upper holds a part: where the others are.
    lower: Mutex<Option<Arc<OpenFile>>>,
}

impl File {
    fn new(node: &Arc<Node>, flags: OpenFlags, open: OpenFile) -> Self {
        node.open_files.fetch_add(1, Relaxed);
        Self { node: node.clone(), flags, target: RwLock::new(Arc::new(open)), lower: Mutex::default() }
    }

    /// The open file of the lower that holds what the upper lacks.
    pub(super) fn lower(&self, own: &Caller, partial: &Partial) -> Result<Arc<OpenFile>> {
        if let Some(open) = &*self.lower.lock() {
            return Ok(open.clone());
        }
        let opened = OpenFile::open(own, &partial.lower, OpenFlags::READ | OpenFlags::NOATIME)?.0;
        Ok(self.lower.lock().get_or_insert(Arc::new(opened)).clone())
    }
}

impl Drop for File {
    fn drop(&mut self) {
        self.node.open_files.fetch_sub(1, Relaxed);
    }
}

impl Union {
    pub(super) fn open_file(&self, caller: &Caller, node: &Arc<Node>, flags: OpenFlags) -> Result<Opened> {
        let refused = match node.kind {
            libc::S_IFREG => None,
            libc::S_IFDIR => Some((Errno::ISDIR, "open a directory as a file")),
            libc::S_IFLNK => Some((Errno::LOOP, "open a symbolic link")),
            _ => Some((Errno::NXIO, "open a special file")),
        };
        if let Some((errno, attempt)) = refused {
            return Err(Error::new(errno, attempt));
        }
        let flags = flags - OpenFlags::EXCLUSIVE;
        let changes = flags.intersects(OpenFlags::WRITE | OpenFlags::TRUNCATE);
        let held = if changes {
            self.raise_for(node, if flags.contains(OpenFlags::TRUNCATE) { Use::Cut(0) } else { Use::Bytes })?
        } else {
            node.stack().top().clone()
        };
        let open = || OpenFile::open(&self.inside(caller), &held, flags);
        let truncates = flags.contains(OpenFlags::TRUNCATE);
        if !truncates && held.is_upper() {
            // Tells now what reading and writing would.
            self.settle_file(node)?;
        }
        let (open, opened) = if truncates { self.cutting(node, 0, open)? } else { open()? };
        if truncates {
            self.notices.inode(caller, node.id);
        }
        Ok(self.opened(node, open, opened, flags))
    }

    pub(super) fn opened(
        &self,
        node: &Arc<Node>,
        open: OpenFile,
        opened: Opened,
        flags: OpenFlags,
    ) -> Opened {
        let flags = flags - (OpenFlags::TRUNCATE | OpenFlags::EXCLUSIVE);
        Opened { handle: self.files.insert(File::new(node, flags, open)), ..opened }
    }

    /// The layer's open file behind a handle, which moves to the upper once its node has.
    pub(super) fn current(&self, caller: &Caller, handle: HandleId) -> Result<(Arc<File>, Arc<OpenFile>)> {
        let file = self.files.get(handle)?;
        let open = file.target.read().clone();
        if open.held.is_upper() || !file.node.is_raised() {
            return Ok((file, open));
        }
        let mut target = file.target.write();
        if !target.held.is_upper() {
            if let Some(upper) = file.node.upper() {
                *target = Arc::new(OpenFile::open(caller, &upper, file.flags)?.0);
            }
        }
        let open = target.clone();
        drop(target);
        Ok((file, open))
    }

    pub(super) fn read_file(
        &self,
        caller: &Caller,
        handle: HandleId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        let (file, open) = self.current(caller, handle)?;
        self.read_open(caller, (&file, &open), offset, buffer)
    }

    pub(super) fn write_file(
        &self,
        caller: &Caller,
        handle: HandleId,
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        let (file, open) = self.current(caller, handle)?;
        let written = self.write_open(&self.inside(caller), (&file, &open), offset, data)?;
        match file.flags.contains(OpenFlags::APPEND) {
            true => self.notices.inode(caller, file.node.id),
            false => self.notices.bytes(caller, file.node.id, offset, written as u64),
        }
        Ok(written)
    }

    pub(super) fn flush_file(&self, caller: &Caller, handle: HandleId) -> Result<()> {
        let (_, open) = self.current(caller, handle)?;
        open.service().flush(caller, open.held.node, open.handle)
    }

    pub(super) fn sync_file(&self, caller: &Caller, handle: HandleId, data_only: bool) -> Result<()> {
        let (file, open) = self.current(caller, handle)?;
        // fdatasync(2) leaves attributes out, and the record is one.
        let unsynced = &file.node.bytes.unsynced;
        let recorded = open.held.is_upper() && unsynced.swap(false, AcqRel);
        let done = open.service().fsync(caller, open.held.node, open.handle, data_only && !recorded);
        if done.is_err() && recorded {
            unsynced.store(true, Release);
        }
        done?;
        if recorded {
            self.settle_file(&file.node)?;
        }
        self.sync_names(&file.node)
    }

    /// Orders what is loose of a file, which by now is mostly done.
    fn settle_file(&self, node: &Node) -> Result<()> {
        match self.partial(node)? {
            Some(partial) if partial.has_loose() => {
                let _alone = partial.filling.write();
                self.settle_blocks(node, &partial)
            }
            _ => Ok(()),
        }
    }

    /// A file that was copied up stood under a durable name before: its new name, and those of directories copied up
    /// for it, have to be durable as well.
    pub(super) fn sync_names(&self, node: &Arc<Node>) -> Result<()> {
        let mut at = node.clone();
        for _ in 0..DEPTH_MAX {
            if !at.fresh.load(Acquire) {
                return Ok(());
            }
            let Some(place) = at.place() else { return Ok(()) };
            if let Some(upper) = place.parent.upper() {
                OpenDir::open(&self.own, &upper)?.sync(&self.own, false)?;
            }
            at.fresh.store(false, Release);
            at = place.parent;
        }
        Ok(())
    }

    pub(super) fn allocate(
        &self,
        caller: &Caller,
        handle: HandleId,
        mode: FallocateMode,
        (offset, length): (u64, u64),
    ) -> Result<()> {
        let (file, open) = self.current(caller, handle)?;
        let inside = self.inside(caller);
        match self.partial_of(&file, &open)? {
            Some(partial) => {
                self.allocate_merged(&inside, (&file, &open, &partial), mode, (offset, length))?;
            }
            None => {
                open.service().fallocate(&inside, open.held.node, open.handle, mode, offset, length)?;
            }
        }
        self.notices.inode(caller, file.node.id);
        Ok(())
    }

    pub(super) fn seek_sparse(
        &self,
        caller: &Caller,
        handle: HandleId,
        offset: u64,
        to: SeekTo,
    ) -> Result<u64> {
        let (file, open) = self.current(caller, handle)?;
        match self.partial_of(&file, &open)? {
            Some(partial) => self.seek_merged(caller, (&file, &open, &partial), offset, to),
            None => open.service().seek(caller, open.held.node, open.handle, offset, to),
        }
    }

    /// Between layers by hand, a bounded piece at a time.
    pub(super) fn copy_between(
        &self,
        caller: &Caller,
        from: (HandleId, u64),
        to: (HandleId, u64),
        length: u64,
    ) -> Result<u64> {
        let (read, source) = self.current(caller, from.0)?;
        let (file, target) = self.current(caller, to.0)?;
        let apart = self.partial_of(&read, &source)?.is_some() || self.partial_of(&file, &target)?.is_some();
        if apart || source.held.layer.ordinal != target.held.layer.ordinal {
            let length = length.min(COPY_MAX_BYTES);
            let ends = (((&*read, &*source), from.1), ((&*file, &*target), to.1));
            let copied = self.copy_piece(&self.inside(caller), ends.0, ends.1, length)?;
            self.notices.inode(caller, file.node.id);
            return Ok(copied);
        }
        let copied = target.service().copy_range(
            &self.inside(caller),
            (source.held.node, source.handle, from.1),
            (target.held.node, target.handle, to.1),
            length,
        )?;
        self.notices.inode(caller, file.node.id);
        Ok(copied)
    }

    pub(super) fn file_of_host(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        let (file, open) = self.current(&self.own, handle).ok()?;
        // A part of the bytes is not the file.
        self.partial_of(&file, &open).ok()?.is_none().then(|| open.service().host_file(open.handle))?
    }

    /// What was copied up has left its lower.
    pub(super) fn immutable_file_of_host(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        let (_, open) = self.current(&self.own, handle).ok()?;
        if open.held.is_upper() { None } else { open.service().immutable_file(open.handle) }
    }

    /// The upper belongs to this union alone, and what it has of a partial file is not the whole.
    pub(super) fn content_below(&self, handle: HandleId) -> Option<ContentId> {
        let (_, open) = self.current(&self.own, handle).ok()?;
        if open.held.is_upper() { None } else { open.service().content(open.handle) }
    }

    pub(super) fn content_of_node(&self, node: NodeId) -> Option<Content> {
        let node = self.nodes.get(node).filter(|node| node.kind == libc::S_IFREG)?;
        let held = node.stack().top().clone();
        if held.is_upper() { None } else { held.service().content_of(held.node) }
    }

    pub(super) fn host_inode_below(&self, handle: HandleId) -> Option<HostInode> {
        let (_, open) = self.current(&self.own, handle).ok()?;
        open.service().host_inode(open.handle)
    }

    /// The handle of the layer that `held` is of, for operations that may use one.
    pub(super) fn handle_in_upper(&self, caller: &Caller, handle: Option<HandleId>) -> Option<Arc<OpenFile>> {
        let (_, open) = self.current(caller, handle?).ok()?;
        open.held.is_upper().then_some(open)
    }
}
