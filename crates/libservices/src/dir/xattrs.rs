//! Extended attributes, POSIX ACLs among them (the host keeps mode and ACL in step).

use rustix::fs::{self, XattrFlags as HostFlags};

use super::nodes::Privileges;
use super::{Dir, sys};
use crate::error::{Errno, Error, Result};
use crate::types::*;

/// What most values and lists fit in.
const FIRST_SIZE_BYTES: usize = 1024;
/// The kernel's own bound on a value and on a list (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const SIZE_MAX_BYTES: usize = 64 * 1024;

impl Dir {
    pub(super) fn attribute(&self, node: NodeId, name: &[u8]) -> Result<Vec<u8>> {
        let fd = self.reach(&self.node(node)?)?;
        read_whole(|buffer| sys::by_proc_name(&*fd, |path| fs::getxattr(path, name, buffer)))
            .map_err(|errno| refused(errno, "read an extended attribute"))
    }

    pub(super) fn attribute_names(&self, node: NodeId) -> Result<Vec<u8>> {
        let fd = self.reach(&self.node(node)?)?;
        read_whole(|buffer| sys::by_proc_name(&*fd, |path| fs::listxattr(path, buffer)))
            .map_err(|errno| refused(errno, "list extended attributes"))
    }

    pub(super) fn set_attribute(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        let flags = HostFlags::from_bits_retain(flags.bits());
        self.change_attribute(caller, node, "set an extended attribute", |path| {
            fs::setxattr(path, name, value, flags)
        })
    }

    pub(super) fn remove_attribute(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<()> {
        self.change_attribute(caller, node, "remove an extended attribute", |path| {
            fs::removexattr(path, name)
        })
    }

    fn change_attribute(
        &self,
        caller: &Caller,
        node: NodeId,
        attempt: &'static str,
        change: impl FnOnce(&str) -> rustix::io::Result<()>,
    ) -> Result<()> {
        self.writable()?;
        let node = self.node(node)?;
        let fd = self.reach(&node)?;
        sys::by_proc_name(&*fd, change).map_err(|errno| refused(errno, attempt))?;
        // An ACL changes the mode, and may drop setgid from it.
        node.set_privileges(Privileges::Unknown);
        self.notices.inode(caller, node.id);
        Ok(())
    }
}

// ENOSYS is what doors take for "never ask again".
fn refused(errno: Errno, attempt: &'static str) -> Error {
    Error::new(if errno == Errno::NOSYS { Errno::OPNOTSUPP } else { errno }, attempt)
}

/// Reads a value that may change its size between two calls.
fn read_whole(mut read: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; FIRST_SIZE_BYTES];
    loop {
        match read(&mut buffer) {
            Ok(size) => {
                buffer.truncate(size);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < SIZE_MAX_BYTES => buffer.resize(SIZE_MAX_BYTES, 0),
            Err(errno) => return Err(errno),
        }
    }
}
