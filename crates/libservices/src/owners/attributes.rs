//! Changing owners and modes, and the attributes that the host would not let us keep under their own names.

use super::acl::{self, Acl};
use super::record::{Record, STAT};
use super::{Owners, hidden};
use crate::error::{Errno, Error, Result};
use crate::types::*;

/// What lies outside of `user.` is kept under this and its name.
const KEPT: &[u8] = b"user.polytropo.xattr.";
const CAPABILITY: &[u8] = b"security.capability";

/// The name under which an attribute outside of `user.` is kept.
pub(super) fn kept(name: &[u8]) -> Vec<u8> {
    [KEPT, name].concat()
}

fn is_ours(name: &[u8]) -> bool {
    name == STAT || name.starts_with(KEPT)
}

fn name_below(name: &[u8]) -> Result<Vec<u8>> {
    if name.starts_with(b"user.") {
        return Ok(name.to_vec());
    }
    let known = name.starts_with(b"security.") || name.starts_with(b"trusted.");
    if known || name == acl::ACCESS || name == acl::DEFAULT {
        return Ok(kept(name));
    }
    Err(Error::new(Errno::OPNOTSUPP, "use an extended attribute of an unknown kind"))
}

impl Owners {
    pub(super) fn set_attributes(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<HandleId>,
        changes: &SetAttr,
    ) -> Result<Attr> {
        if changes.uid == Some(u32::MAX) || changes.gid == Some(u32::MAX) {
            return Err(Error::new(Errno::INVAL, "change the owner"));
        }
        let below = SetAttr { mode: None, uid: None, gid: None, kill_privileges: false, ..changes.clone() };
        if below != SetAttr::default() {
            self.below.setattr(caller, node, handle, &below)?;
        }
        let of_record = changes.mode.is_some() || changes.uid.is_some() || changes.gid.is_some();
        let host = self.below.getattr(caller, node, handle)?;
        // Links keep no owner: who changes it is told that it worked, as unpacking programs expect.
        if !(of_record || changes.kill_privileges) || host.file_type() == libc::S_IFLNK {
            return self.show(caller, node, host);
        }
        {
            let _changing = self.lock(node);
            let record = self.record(caller, node, &host)?;
            self.change_record(caller, node, record, changes)?;
        }
        self.show(caller, node, self.below.getattr(caller, node, handle)?)
    }

    fn change_record(&self, caller: &Caller, node: NodeId, before: Record, changes: &SetAttr) -> Result<()> {
        let mut record = before;
        record.uid = changes.uid.unwrap_or(record.uid);
        record.gid = changes.gid.unwrap_or(record.gid);
        let chown = changes.uid.is_some() || changes.gid.is_some();
        if chown || changes.kill_privileges {
            record.drop_privileges();
            self.drop_capability(caller, node)?;
        }
        if let Some(mode) = changes.mode {
            record.set_permissions(mode);
            if let Some(mut acl) = self.kept_acl(caller, node, acl::ACCESS)? {
                acl.set_permissions(mode);
                let value = acl.to_value();
                self.below.setxattr(caller, node, &kept(acl::ACCESS), &value, XattrFlags::empty())?;
            }
        }
        // Also when nothing changed: chmod(2) and chown(2) set the change time.
        self.put_record(caller, node, record)
    }

    /// Before the bytes of a file change on behalf of `caller`: who may not keep them loses setuid and setgid bits, and
    /// everybody the file's capabilities.
    pub(super) fn before_write(&self, caller: &Caller, node: NodeId) -> Result<()> {
        let record = self.record_of(caller, node)?;
        let mut without = record;
        without.drop_privileges();
        // Only programs have any of them.
        if record.mode & 0o111 != 0 {
            self.drop_capability(caller, node)?;
        }
        if without == record || caller.capabilities.contains(FsCapabilities::FSETID) {
            return Ok(());
        }
        let _changing = self.lock(node);
        let mut record = self.record_of(caller, node)?;
        record.drop_privileges();
        self.put_record(caller, node, record)
    }

    fn drop_capability(&self, caller: &Caller, node: NodeId) -> Result<()> {
        match self.below.removexattr(caller, node, &kept(CAPABILITY)) {
            Err(e) if !e.is(Errno::NODATA) => Err(e),
            _ => Ok(()),
        }
    }

    /// ENXIO for what stands for a device, FIFO or socket.
    pub(super) fn before_open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<()> {
        match self.record_of(caller, node)?.file_type() {
            libc::S_IFREG if flags.contains(OpenFlags::TRUNCATE) => self.before_write(caller, node),
            // The layer below knows what to say of those.
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK => Ok(()),
            _ => Err(Error::new(Errno::NXIO, "open a special file")),
        }
    }

    pub(super) fn kept_acl(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<Option<Acl>> {
        match self.below.getxattr(caller, node, &kept(name)) {
            Ok(value) => Ok(Acl::parse(&value).ok()),
            Err(e) if e.is(Errno::NODATA) || e.is(Errno::OPNOTSUPP) => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(super) fn attribute(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<Vec<u8>> {
        if is_ours(name) {
            return Err(Error::new(Errno::NODATA, "read an extended attribute"));
        }
        self.below.getxattr(caller, node, &name_below(name)?)
    }

    pub(super) fn attribute_names(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        let list = self.below.listxattr(caller, node)?;
        let mut shown = Vec::with_capacity(list.len());
        for name in list.split_inclusive(|&byte| byte == 0) {
            match name.strip_prefix(KEPT) {
                Some(kept) => shown.extend_from_slice(kept),
                None if name.starts_with(b"user.") && name.strip_suffix(b"\0") != Some(STAT) => {
                    shown.extend_from_slice(name);
                }
                // What the host keeps for itself means something else than here.
                None => {}
            }
        }
        Ok(shown)
    }

    pub(super) fn set_attribute(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        if is_ours(name) {
            return Err(hidden());
        }
        let below = name_below(name)?;
        if name == acl::ACCESS {
            return self.set_access_acl(caller, node, &Acl::parse(value)?, flags);
        }
        if name == acl::DEFAULT {
            Acl::parse(value)?;
            if self.record_of(caller, node)?.file_type() != libc::S_IFDIR {
                return Err(Error::new(Errno::ACCESS, "give a default ACL to what is no directory"));
            }
        }
        self.below.setxattr(caller, node, &below, value, flags)
    }

    fn set_access_acl(&self, caller: &Caller, node: NodeId, acl: &Acl, flags: XattrFlags) -> Result<()> {
        let _changing = self.lock(node);
        let mut record = self.record_of(caller, node)?;
        let name = kept(acl::ACCESS);
        if acl.is_minimal() {
            match self.below.removexattr(caller, node, &name) {
                Err(e) if !e.is(Errno::NODATA) => return Err(e),
                _ => {}
            }
        } else {
            self.below.setxattr(caller, node, &name, &acl.to_value(), flags)?;
        }
        record.set_permissions(record.mode & 0o7000 | acl.permissions());
        self.put_record(caller, node, record)
    }

    pub(super) fn remove_attribute(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<()> {
        if is_ours(name) {
            return Err(hidden());
        }
        self.below.removexattr(caller, node, &name_below(name)?)
    }
}
