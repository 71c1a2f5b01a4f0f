//! The stack as everybody sees it but the open files of the channel that may write without waiting: permissions to do so are withdrawn
//! before anything of the file is told or changed.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use polytropo_libservices::*;

use super::grants::Grants;

/// A layer over a stack.
pub struct Guard {
    below: Arc<dyn Libservice>,
    grants: Arc<Grants>,
}

impl Guard {
    pub fn new(below: Arc<dyn Libservice>, grants: Arc<Grants>) -> Self {
        Self { below, grants }
    }

    /// What was looked at before the withdrawal is looked at again.
    fn renewed(&self, caller: &Caller, mut entry: Entry) -> Result<Entry> {
        if self.grants.withdraw(entry.node) {
            match self.below.getattr(caller, entry.node, None) {
                Ok(attr) => entry.attr = attr,
                Err(error) => {
                    self.below.forget(entry.node, 1);
                    return Err(error);
                }
            }
        }
        Ok(entry)
    }

    fn before(&self, node: NodeId) {
        self.grants.withdraw(node);
    }
}

impl Libservice for Guard {
    fn below(&self) -> Option<&dyn Libservice> {
        Some(&*self.below)
    }

    fn kind(&self) -> &'static str {
        self.below.kind()
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<Entry> {
        let entry = self.below.lookup(caller, parent, name)?;
        self.renewed(caller, entry)
    }

    fn look_up_again(&self, caller: &Caller, node: NodeId) -> Result<Entry> {
        let entry = self.below.look_up_again(caller, node)?;
        self.renewed(caller, entry)
    }

    fn getattr(&self, caller: &Caller, node: NodeId, handle: Option<HandleId>) -> Result<Attr> {
        self.before(node);
        self.below.getattr(caller, node, handle)
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<HandleId>,
        changes: &SetAttr,
    ) -> Result<Attr> {
        self.before(node);
        self.below.setattr(caller, node, handle, changes)
    }

    fn link(&self, caller: &Caller, node: NodeId, new_parent: NodeId, new_name: &Name) -> Result<Entry> {
        self.before(node);
        let entry = self.below.link(caller, node, new_parent, new_name)?;
        self.renewed(caller, entry)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<Opened> {
        self.before(node);
        self.below.open(caller, node, flags)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        if flags.contains(OpenFlags::TRUNCATE) && self.grants.any() {
            // What was posted comes before the cut.
            if let Ok(there) = self.below.lookup(caller, parent, name) {
                self.grants.withdraw(there.node);
                self.below.forget(there.node, 1);
            }
        }
        let (entry, opened) = self.below.create(caller, parent, name, mode, flags)?;
        let node = entry.node;
        match self.renewed(caller, entry) {
            Ok(entry) => Ok((entry, opened)),
            Err(error) => {
                self.below.release(node, opened.handle);
                Err(error)
            }
        }
    }

    fn read(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        self.before(node);
        self.below.read(caller, node, handle, offset, buffer)
    }

    fn write(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        self.before(node);
        self.below.write(caller, node, handle, offset, data)
    }

    fn fsync(&self, caller: &Caller, node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.before(node);
        self.below.fsync(caller, node, handle, data_only)
    }

    fn readdir_plus(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirPlusSink<'_>,
    ) -> Result<()> {
        let mut renewing = |entry: DirEntry<'_>, found: Option<&Entry>| match found {
            Some(found) if self.grants.withdraw(found.node) => {
                let attr = self.below.getattr(caller, found.node, None);
                let renewed = attr.ok().map(|attr| Entry { attr, ..found.clone() });
                sink(entry, Some(renewed.as_ref().unwrap_or(found)))
            }
            found => sink(entry, found),
        };
        self.below.readdir_plus(caller, node, handle, offset, &mut renewing)
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
        self.before(node);
        self.below.fallocate(caller, node, handle, mode, offset, length)
    }

    fn seek(&self, caller: &Caller, node: NodeId, handle: HandleId, offset: u64, to: SeekTo) -> Result<u64> {
        self.before(node);
        self.below.seek(caller, node, handle, offset, to)
    }

    fn copy_range(
        &self,
        caller: &Caller,
        from: (NodeId, HandleId, u64),
        to: (NodeId, HandleId, u64),
        length: u64,
    ) -> Result<u64> {
        self.before(from.0);
        self.before(to.0);
        self.below.copy_range(caller, from, to, length)
    }

    fn host_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        self.below.host_file(handle)
    }

    fn immutable_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        self.below.immutable_file(handle)
    }

    fn content(&self, handle: HandleId) -> Option<ContentId> {
        self.below.content(handle)
    }
}
