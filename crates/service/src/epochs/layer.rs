//! The operations: those that change something are counted, those that name nodes are remembered, the rest goes through.

use std::os::fd::OwnedFd;

use polytropo_libservices::{
    ContentId, DirPlusSink, FallocateMode, HandleId, OpenFlags, Opened, RenameFlags, SetAttr, XattrFlags,
};

use super::*;

impl Epochs {
    fn learnt(&self, entry: Entry) -> Entry {
        self.learn(&entry);
        entry
    }

    /// Of an inode that was just made: what is still told of a removed one that had its number is true no longer.
    fn born(&self, entry: Entry) -> Entry {
        self.learn(&entry);
        drop(self.changing(entry.node));
        entry
    }
}

impl Libservice for Epochs {
    fn below(&self) -> Option<&dyn Libservice> {
        Some(&*self.below)
    }

    fn kind(&self) -> &'static str {
        self.below.kind()
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<Entry> {
        self.below.lookup(caller, parent, name).map(|entry| self.learnt(entry))
    }

    fn look_up_again(&self, caller: &Caller, node: NodeId) -> Result<Entry> {
        self.below.look_up_again(caller, node).map(|entry| self.learnt(entry))
    }

    fn forget(&self, node: NodeId, count: u64) {
        // First: once the layers have forgotten it the number may be another's.
        self.unlearn(node, count);
        self.below.forget(node, count);
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<HandleId>,
        changes: &SetAttr,
    ) -> Result<polytropo_libservices::Attr> {
        let rights = changes.mode.is_some() || changes.uid.is_some() || changes.gid.is_some();
        let _changing = if rights { self.changing_rights(node) } else { self.changing(node) };
        self.below.setattr(caller, node, handle, changes)
    }

    fn mknod(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32, rdev: u64) -> Result<Entry> {
        let _changing = self.changing_names([(parent, name)]);
        self.below.mknod(caller, parent, name, mode, rdev).map(|entry| self.born(entry))
    }

    fn mkdir(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32) -> Result<Entry> {
        let _changing = self.changing_names([(parent, name)]);
        self.below.mkdir(caller, parent, name, mode).map(|entry| self.born(entry))
    }

    fn symlink(&self, caller: &Caller, parent: NodeId, name: &Name, target: &[u8]) -> Result<Entry> {
        let _changing = self.changing_names([(parent, name)]);
        self.below.symlink(caller, parent, name, target).map(|entry| self.learnt(entry))
    }

    fn link(&self, caller: &Caller, node: NodeId, new_parent: NodeId, new_name: &Name) -> Result<Entry> {
        let _changing = (self.changing(node), self.changing_names([(new_parent, new_name)]));
        self.below.link(caller, node, new_parent, new_name).map(|entry| self.learnt(entry))
    }

    // The inode that loses a name here, or is moved, is told of by the layers (`Listener`) before this returns.

    fn unlink(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<()> {
        let _changing = self.changing_names([(parent, name)]);
        self.below.unlink(caller, parent, name)
    }

    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<()> {
        let _changing = self.changing_names([(parent, name)]);
        self.below.rmdir(caller, parent, name)
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
        let _changing = self.changing_names([(parent, name), (new_parent, new_name)]);
        self.below.rename(caller, parent, name, new_parent, new_name, flags)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<Opened> {
        let changes = flags.intersects(OpenFlags::WRITE | OpenFlags::TRUNCATE);
        let _changing = changes.then(|| self.changing(node));
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
        let _changing = self.changing_names([(parent, name)]);
        let (entry, opened) = self.below.create(caller, parent, name, mode, flags)?;
        // Or one that somebody else has just made, and that was cut.
        Ok((self.born(entry), opened))
    }

    fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let (entry, opened) = self.below.tmpfile(caller, parent, mode, flags)?;
        Ok((self.learnt(entry), opened))
    }

    fn write(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        let _changing = self.changing(node);
        self.below.write(caller, node, handle, offset, data)
    }

    fn order(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        self.below.order(caller, node, handle)
    }

    fn readdir_plus(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirPlusSink<'_>,
    ) -> Result<()> {
        self.below.readdir_plus(caller, node, handle, offset, &mut |dir_entry, found| {
            // First: once it was taken, a forget may come at any time.
            found.into_iter().for_each(|entry| self.learn(entry));
            let taken = sink(dir_entry, found);
            if let (false, Some(entry)) = (taken, found) {
                self.unlearn(entry.node, 1);
            }
            taken
        })
    }

    fn setxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        // It may be an ACL.
        let _changing = self.changing_rights(node);
        self.below.setxattr(caller, node, name, value, flags)
    }

    fn removexattr(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<()> {
        let _changing = self.changing_rights(node);
        self.below.removexattr(caller, node, name)
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
        let _changing = self.changing(node);
        self.below.fallocate(caller, node, handle, mode, offset, length)
    }

    fn copy_range(
        &self,
        caller: &Caller,
        from: (NodeId, HandleId, u64),
        to: (NodeId, HandleId, u64),
        length: u64,
    ) -> Result<u64> {
        let _changing = self.changing(to.0);
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
