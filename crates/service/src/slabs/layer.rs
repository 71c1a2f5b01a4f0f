//! The layer that reads small files of images from slabs, and opens those that are there without the host.
//!
//! It stands on a stack, below the counters of changes and all doors. That a node's bytes are an image's is asked at each read: once it was
//! copied up, the layers below have the bytes, also those of files that were opened before.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use polytropo_libservices::*;

use super::Slabs;

/// See the module.
pub struct SmallFiles {
    below: Arc<dyn Libservice>,
    slabs: Arc<Slabs>,
    open: Handles<Open>,
}

/// A file that was in a slab when it was opened.
struct Open {
    below: Arc<dyn Libservice>,
    node: NodeId,
    content: Content,
    flags: OpenFlags,
    /// The layers' own open file, once it was needed.
    opened: Mutex<Option<HandleId>>,
}

impl Open {
    /// Whether the node's bytes still are those of the image.
    fn is_unchanged(&self) -> bool {
        self.below.content_of(self.node) == Some(self.content)
    }

    fn is_opened(&self) -> bool {
        self.opened.lock().is_some()
    }

    /// The layers' open file, for what only they can do.
    fn handle(&self) -> Result<HandleId> {
        let mut opened = self.opened.lock();
        if let Some(handle) = *opened {
            return Ok(handle);
        }
        let handle = self.below.open(&Caller::service(), self.node, self.flags)?.handle;
        *opened = Some(handle);
        Ok(handle)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(handle) = self.opened.get_mut().take() {
            self.below.release(self.node, handle);
        }
    }
}

impl SmallFiles {
    pub fn over(below: Arc<dyn Libservice>, slabs: Arc<Slabs>) -> Arc<dyn Libservice> {
        Arc::new(Self { below, slabs, open: Handles::apart() })
    }

    /// Of a node that has the bytes of a small file of an image.
    fn content(&self, node: NodeId) -> Option<Content> {
        self.below.content_of(node).filter(Slabs::serves)
    }

    /// One that was opened here; None for the layers' own.
    fn own(&self, handle: HandleId) -> Result<Option<Arc<Open>>> {
        if Handles::<Open>::is_apart(handle) { self.open.get(handle).map(Some) } else { Ok(None) }
    }

    /// The layers' number of an open file.
    fn handle(&self, handle: HandleId) -> Result<HandleId> {
        self.own(handle)?.map_or(Ok(handle), |open| open.handle())
    }

    fn handle_if_any(&self, handle: HandleId) -> Option<HandleId> {
        self.handle(handle).inspect_err(|error| log::debug!("an open file is not told of: {error}")).ok()
    }
}

impl Libservice for SmallFiles {
    fn below(&self) -> Option<&dyn Libservice> {
        Some(&*self.below)
    }

    fn kind(&self) -> &'static str {
        self.below.kind()
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<Opened> {
        let changes = OpenFlags::WRITE | OpenFlags::TRUNCATE;
        if flags.contains(OpenFlags::READ)
            && !flags.intersects(changes)
            && let Some(content) = self.content(node)
            && self.slabs.contains(&content)
        {
            let open = Open { below: self.below.clone(), node, content, flags, opened: Mutex::default() };
            let direct = flags.contains(OpenFlags::DIRECT);
            return Ok(Opened { handle: self.open.insert(open), keep_cache: true, direct });
        }
        self.below.open(caller, node, flags)
    }

    fn read(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        // Larger files are not asked after at each read.
        let content = if offset <= super::FILE_BYTES_MAX { self.content(node) } else { None };
        let own = self.own(handle)?;
        let Some(content) = content else {
            let handle = own.map_or(Ok(handle), |open| open.handle())?;
            return self.below.read(caller, node, handle, offset, buffer);
        };
        let handle = || own.as_ref().map_or(Ok(handle), |open| open.handle());
        let read_all = |all: &mut [u8]| self.below.read(caller, node, handle()?, 0, all);
        match self.slabs.read_or_fill(&content, offset, buffer, read_all)? {
            Some(count) => Ok(count),
            None => self.below.read(caller, node, handle()?, offset, buffer),
        }
    }

    fn getattr(&self, caller: &Caller, node: NodeId, handle: Option<HandleId>) -> Result<Attr> {
        let handle = match handle {
            Some(handle) => match self.own(handle)? {
                Some(open) if !open.is_opened() && open.is_unchanged() => None,
                Some(open) => Some(open.handle()?),
                None => Some(handle),
            },
            None => None,
        };
        self.below.getattr(caller, node, handle)
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<HandleId>,
        changes: &SetAttr,
    ) -> Result<Attr> {
        let handle = handle.map(|handle| self.handle(handle)).transpose()?;
        self.below.setattr(caller, node, handle, changes)
    }

    fn write(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        self.below.write(caller, node, self.handle(handle)?, offset, data)
    }

    fn flush(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        match self.own(handle)? {
            // Nothing was written to it.
            Some(open) if !open.is_opened() => Ok(()),
            _ => self.below.flush(caller, node, self.handle(handle)?),
        }
    }

    fn fsync(&self, caller: &Caller, node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.below.fsync(caller, node, self.handle(handle)?, data_only)
    }

    fn order(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        self.below.order(caller, node, self.handle(handle)?)
    }

    fn begin_order(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        self.below.begin_order(caller, node, self.handle(handle)?)
    }

    fn release(&self, node: NodeId, handle: HandleId) {
        if Handles::<Open>::is_apart(handle) {
            drop(self.open.remove(handle));
        } else {
            self.below.release(node, handle);
        }
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
        self.below.fallocate(caller, node, self.handle(handle)?, mode, offset, length)
    }

    fn seek(&self, caller: &Caller, node: NodeId, handle: HandleId, offset: u64, to: SeekTo) -> Result<u64> {
        self.below.seek(caller, node, self.handle(handle)?, offset, to)
    }

    fn copy_range(
        &self,
        caller: &Caller,
        from: (NodeId, HandleId, u64),
        to: (NodeId, HandleId, u64),
        length: u64,
    ) -> Result<u64> {
        let from = (from.0, self.handle(from.1)?, from.2);
        let to = (to.0, self.handle(to.1)?, to.2);
        self.below.copy_range(caller, from, to, length)
    }

    fn host_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        self.below.host_file(self.handle_if_any(handle)?)
    }

    fn immutable_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        self.below.immutable_file(self.handle_if_any(handle)?)
    }

    fn content(&self, handle: HandleId) -> Option<ContentId> {
        match self.own(handle).ok()? {
            Some(open) if !open.is_opened() && open.is_unchanged() => Some(open.content.id),
            Some(open) => self.below.content(open.handle().ok()?),
            None => self.below.content(handle),
        }
    }

    fn content_of(&self, node: NodeId) -> Option<Content> {
        self.below.content_of(node)
    }

    fn host_inode(&self, handle: HandleId) -> Option<HostInode> {
        match self.own(handle).ok()? {
            Some(open) if !open.is_opened() && open.is_unchanged() => {
                let ContentId { device, ino, born } = open.content.id;
                Some(HostInode { device, ino, born: Some(born) })
            }
            Some(open) => self.below.host_inode(open.handle().ok()?),
            None => self.below.host_inode(handle),
        }
    }
}

#[cfg(test)]
pub(super) fn is_from_slab(handle: HandleId) -> bool {
    Handles::<Open>::is_apart(handle)
}
