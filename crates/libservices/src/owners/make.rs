//! Making inodes with a record of whose they are.

use super::Owners;
use super::acl::{self, Acl};
use super::attributes::kept;
use super::record::Record;
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// On disk, nobody but the service's user gets at anything.
const FILE_MODE: u32 = 0o600;
const DIR_MODE: u32 = 0o700;

/// A record to be made, and the ACLs that go with it.
struct Birth {
    record: Record,
    access: Option<Acl>,
    default: Option<Acl>,
}

impl Owners {
    pub(super) fn make_node(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        rdev: u64,
    ) -> Result<Entry> {
        let mode = if mode & libc::S_IFMT == 0 { mode | libc::S_IFREG } else { mode };
        let device = matches!(mode & libc::S_IFMT, libc::S_IFCHR | libc::S_IFBLK);
        let birth = self.birth(caller, parent, mode, if device { rdev } else { 0 })?;
        let entry = self.below.mknod(&self.own(caller), parent, name, libc::S_IFREG | FILE_MODE, 0)?;
        let entry = self.record_birth(caller, entry, birth);
        entry.inspect_err(|_| self.unmake(caller, parent, name))
    }

    pub(super) fn make_dir(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32) -> Result<Entry> {
        let birth = self.birth(caller, parent, libc::S_IFDIR | mode & 0o7777, 0)?;
        let entry = self.below.mkdir(&self.own(caller), parent, name, DIR_MODE)?;
        self.record_birth(caller, entry, birth).inspect_err(|_| {
            // Best effort: the error that is reported is the one that made this necessary.
            let _ = self.below.rmdir(caller, parent, name);
        })
    }

    pub(super) fn create_file(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let own = self.own(caller);
        let birth = self.birth(caller, parent, libc::S_IFREG | mode & 0o7777, 0)?;
        match self.below.create(&own, parent, name, FILE_MODE, flags | OpenFlags::EXCLUSIVE) {
            Ok((entry, opened)) => {
                let node = entry.node;
                let entry = self.record_birth(caller, entry, birth).inspect_err(|_| {
                    self.below.release(node, opened.handle);
                    self.unmake(caller, parent, name);
                })?;
                return Ok((entry, opened));
            }
            Err(e) if e.is(Errno::EXIST) && !flags.contains(OpenFlags::EXCLUSIVE) => {}
            Err(e) => return Err(e),
        }
        // What stands there is opened. Should it go in this moment, the layer below makes it, and without a record it is
        // root's: so look first.
        let entry = self.lookup_to_open(caller, parent, name)?;
        let opened = crate::Libservice::open(self, caller, entry.node, flags);
        if opened.is_err() {
            self.below.forget(entry.node, 1);
        }
        let opened = opened?;
        let attr =
            self.show(caller, entry.node, self.below.getattr(caller, entry.node, Some(opened.handle))?)?;
        Ok((Entry { attr, ..entry }, opened))
    }

    fn lookup_to_open(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<Entry> {
        self.below.lookup(caller, parent, name).map_err(|e| match e.errno() {
            // Came and went: the program may try again.
            Errno::NOENT => Error::new(Errno::STALE, "create a name that comes and goes"),
            _ => e,
        })
    }

    pub(super) fn make_tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let birth = self.birth(caller, parent, libc::S_IFREG | mode & 0o7777, 0)?;
        let (entry, opened) = self.below.tmpfile(&self.own(caller), parent, FILE_MODE, flags)?;
        let node = entry.node;
        let entry = self
            .record_birth(caller, entry, birth)
            .inspect_err(|_| self.below.release(node, opened.handle))?;
        Ok((entry, opened))
    }

    /// What the kernel would make of mode, umask, default ACL and setgid bit of the parent.
    fn birth(&self, caller: &Caller, parent: NodeId, mode: u32, rdev: u64) -> Result<Birth> {
        let above = self.record_of(caller, parent)?;
        let is_dir = mode & libc::S_IFMT == libc::S_IFDIR;
        let mut record = Record { mode, uid: caller.uid, gid: caller.gid, rdev };
        if above.mode & libc::S_ISGID != 0 {
            record.gid = above.gid;
            record.mode |= if is_dir { libc::S_ISGID } else { 0 };
        }
        let Some(default) = self.kept_acl(caller, parent, acl::DEFAULT)? else {
            record.mode &= !(caller.umask & 0o777);
            return Ok(Birth { record, access: None, default: None });
        };
        let access = default.inherited(record.mode & 0o777);
        record.mode = record.mode & !0o777 | access.permissions();
        let access = (!access.is_minimal()).then_some(access);
        Ok(Birth { record, access, default: is_dir.then_some(default) })
    }

    /// Writes down what was made. On failure the look-up is dropped.
    fn record_birth(&self, caller: &Caller, entry: Entry, birth: Birth) -> Result<Entry> {
        let write = || {
            for (name, acl) in [(acl::ACCESS, &birth.access), (acl::DEFAULT, &birth.default)] {
                if let Some(acl) = acl {
                    let value = acl.to_value();
                    self.below.setxattr(caller, entry.node, &kept(name), &value, XattrFlags::empty())?;
                }
            }
            self.put_record(caller, entry.node, birth.record)?;
            // The change time moved.
            self.below.getattr(caller, entry.node, None)
        };
        match write() {
            Ok(host) => Ok(Entry { attr: birth.record.show(host), ..entry }),
            Err(e) => {
                self.below.forget(entry.node, 1);
                Err(e)
            }
        }
    }

    fn unmake(&self, caller: &Caller, parent: NodeId, name: &Name) {
        // Best effort: the error that is reported is the one that made this necessary.
        let _ = self.below.unlink(caller, parent, name);
    }
}
