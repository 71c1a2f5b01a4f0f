//! Owners, modes and device numbers kept in extended attributes, for services that may not chown.
//!
//! Stands on a layer whose inodes all belong to the service's own user, and shows them with the owners and modes
//! that `user.polytropo.stat` tells (ARCHITECTURE.md, "Ownership in extended attributes"). Device nodes, FIFOs and sockets
//! are empty regular files below. What the host's kernel does of itself for real owners is done here: setgid
//! directories, umask and default ACLs, dropping of setuid bits and file capabilities on writes.
//!
//! A file that is being made has no record for a moment, and belongs to 0:0 with mode 0600: more closed than what it
//! becomes, never more open.

mod acl;
mod attributes;
mod cache;
mod make;
mod record;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::capabilities::{Capabilities, Coherence};
use crate::error::{Errno, Error, Result};
use crate::libservice::Libservice;
use crate::name::Name;
use crate::types::*;

use cache::Cache;
use record::{Record, STAT};

const LOCKS: usize = 64;

/// See the module.
pub struct Owners {
    below: Arc<dyn Libservice>,
    cache: Cache,
    /// A record is read, changed and written under its node's lock.
    locks: Vec<Mutex<()>>,
    /// Who owns everything below: this process.
    own_ids: (u32, u32),
}

impl Owners {
    pub fn new(below: Arc<dyn Libservice>) -> Self {
        Self {
            below,
            cache: Cache::default(),
            locks: (0..LOCKS).map(|_| Mutex::default()).collect(),
            own_ids: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
        }
    }

    /// The caller as the layer below knows it.
    fn own(&self, caller: &Caller) -> Caller {
        Caller { uid: self.own_ids.0, gid: self.own_ids.1, umask: 0, ..caller.clone() }
    }

    fn lock(&self, node: NodeId) -> parking_lot::MutexGuard<'_, ()> {
        self.locks[node.0 as usize % LOCKS].lock()
    }

    /// The record of an inode that has the attributes `host` below.
    fn record(&self, caller: &Caller, node: NodeId, host: &Attr) -> Result<Record> {
        if host.file_type() == libc::S_IFLNK {
            return Ok(Record::of_host(host));
        }
        if let Some((changed, record)) = self.cache.get(node) {
            if changed == host.ctime || self.below.coherence() != Coherence::Shared {
                return Ok(record);
            }
        }
        let read_at = self.cache.now(node);
        let record = match self.below.getxattr(caller, node, STAT) {
            Ok(value) => Record::parse(&value, host),
            Err(e) if e.is(Errno::NODATA) || e.is(Errno::OPNOTSUPP) => None,
            Err(e) => return Err(e),
        };
        let record = record.unwrap_or_else(|| Record::of_host(host));
        self.cache.keep(node, read_at, host.ctime, record);
        Ok(record)
    }

    /// The record of a node by its number alone.
    fn record_of(&self, caller: &Caller, node: NodeId) -> Result<Record> {
        if let (Some((_, record)), true) = (self.cache.get(node), self.below.coherence() != Coherence::Shared)
        {
            return Ok(record);
        }
        let host = self.below.getattr(caller, node, None)?;
        self.record(caller, node, &host)
    }

    fn put_record(&self, caller: &Caller, node: NodeId, record: Record) -> Result<()> {
        self.cache.drop(node);
        let value = record.to_value();
        let done = self.below.setxattr(caller, node, STAT, value.as_bytes(), XattrFlags::empty());
        self.cache.drop(node);
        done
    }

    fn show(&self, caller: &Caller, node: NodeId, host: Attr) -> Result<Attr> {
        Ok(self.record(caller, node, &host)?.show(host))
    }

    fn show_entry(&self, caller: &Caller, entry: Entry) -> Result<Entry> {
        match self.show(caller, entry.node, entry.attr) {
            Ok(attr) => Ok(Entry { attr, ..entry }),
            Err(e) => {
                self.below.forget(entry.node, 1);
                Err(e)
            }
        }
    }
}

impl Libservice for Owners {
    fn below(&self) -> Option<&dyn Libservice> {
        Some(&*self.below)
    }

    fn kind(&self) -> &'static str {
        self.below.kind()
    }

    fn capabilities(&self) -> Capabilities {
        self.below.capabilities() | Capabilities::OWNERS | Capabilities::SPECIAL_FILES
    }

    fn order(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        self.below.order(caller, node, handle)
    }

    fn begin_order(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        self.below.begin_order(caller, node, handle)
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<Entry> {
        self.show_entry(caller, self.below.lookup(caller, parent, name)?)
    }

    fn look_up_again(&self, caller: &Caller, node: NodeId) -> Result<Entry> {
        self.show_entry(caller, self.below.look_up_again(caller, node)?)
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.cache.forget(node);
        self.below.forget(node, count);
    }

    fn getattr(&self, caller: &Caller, node: NodeId, handle: Option<HandleId>) -> Result<Attr> {
        self.show(caller, node, self.below.getattr(caller, node, handle)?)
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

    fn mknod(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32, rdev: u64) -> Result<Entry> {
        self.make_node(caller, parent, name, mode, rdev)
    }

    fn mkdir(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32) -> Result<Entry> {
        self.make_dir(caller, parent, name, mode)
    }

    fn symlink(&self, caller: &Caller, parent: NodeId, name: &Name, target: &[u8]) -> Result<Entry> {
        let entry = self.below.symlink(&self.own(caller), parent, name, target)?;
        self.show_entry(caller, entry)
    }

    fn link(&self, caller: &Caller, node: NodeId, new_parent: NodeId, new_name: &Name) -> Result<Entry> {
        self.show_entry(caller, self.below.link(caller, node, new_parent, new_name)?)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<Opened> {
        self.before_open(caller, node, flags)?;
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

    fn write(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        self.before_write(caller, node)?;
        self.below.write(caller, node, handle, offset, data)
    }

    /// A regular file below may stand for something else: its type is told by look-ups only.
    fn readdir(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirSink<'_>,
    ) -> Result<()> {
        self.below.readdir(caller, node, handle, offset, &mut |entry| {
            let file_type = if entry.file_type == libc::S_IFREG { 0 } else { entry.file_type };
            sink(DirEntry { file_type, ..entry })
        })
    }

    fn readdir_plus(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirPlusSink<'_>,
    ) -> Result<()> {
        let mut unshown = Vec::new();
        let done = self.below.readdir_plus(caller, node, handle, offset, &mut |dir_entry, found| {
            let shown = found.and_then(|entry| {
                let attr = self.show(caller, entry.node, entry.attr.clone()).ok()?;
                Some(Entry { attr, ..*entry })
            });
            let file_type = shown.as_ref().map_or(0, |entry| entry.attr.file_type());
            let taken = sink(DirEntry { file_type, ..dir_entry }, shown.as_ref());
            if let (true, Some(entry), None) = (taken, found, &shown) {
                unshown.push(entry.node);
            }
            taken
        });
        for node in unshown {
            self.below.forget(node, 1);
        }
        done
    }

    fn getxattr(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<Vec<u8>> {
        self.attribute(caller, node, name)
    }

    fn listxattr(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        self.attribute_names(caller, node)
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
        node: NodeId,
        handle: HandleId,
        mode: FallocateMode,
        offset: u64,
        length: u64,
    ) -> Result<()> {
        self.before_write(caller, node)?;
        self.below.fallocate(caller, node, handle, mode, offset, length)
    }

    fn copy_range(
        &self,
        caller: &Caller,
        from: (NodeId, HandleId, u64),
        to: (NodeId, HandleId, u64),
        length: u64,
    ) -> Result<u64> {
        self.before_write(caller, to.0)?;
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

    fn content_of(&self, node: NodeId) -> Option<Content> {
        self.below.content_of(node)
    }
}

fn hidden() -> Error {
    Error::new(Errno::PERM, "change an attribute that the service keeps for itself")
}
