//! Attributes and extended attributes.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Union;
use super::copy_up::Use;
use super::layers::marks;
use super::nodes::Node;
use crate::error::{Errno, Error, Result};
use crate::types::*;

impl Union {
    pub(super) fn attributes(
        &self,
        caller: &Caller,
        node: &Arc<Node>,
        handle: Option<HandleId>,
    ) -> Result<Attr> {
        if let Some(handle) = handle.filter(|_| !node.is_dir()) {
            if let Ok((_, open)) = self.current(caller, handle) {
                let attr = open.service().getattr(caller, open.held.node, Some(open.handle))?;
                return Ok(node.shown(attr));
            }
        }
        let attr = node.stack().top().attr(caller)?;
        Ok(node.shown(attr))
    }

    pub(super) fn set_attributes(
        &self,
        caller: &Caller,
        node: &Arc<Node>,
        handle: Option<HandleId>,
        changes: &SetAttr,
    ) -> Result<Attr> {
        if let Some(attr) = self.set_last_times(caller, node, changes)? {
            return Ok(attr);
        }
        let new_size = changes.size_bytes.filter(|_| node.kind == libc::S_IFREG);
        let upper = self.raise_for(node, new_size.map_or(Use::Attributes, Use::Cut))?;
        let open = if node.is_dir() { None } else { self.handle_in_upper(caller, handle) };
        let handle = open.as_ref().map(|open| open.handle);
        let set = || upper.service().setattr(&self.inside(caller), upper.node, handle, changes);
        let attr = match new_size {
            Some(size_bytes) => self.cutting(node, size_bytes, set)?,
            None => set()?,
        };
        self.notices.inode(caller, node.id);
        Ok(node.shown(attr))
    }

    /// Times of a lower inode that nothing leads to any more. `None` when there is more to it.
    fn set_last_times(&self, caller: &Caller, node: &Node, changes: &SetAttr) -> Result<Option<Attr>> {
        let times = SetAttr { atime: changes.atime, mtime: changes.mtime, ..SetAttr::default() };
        if node.is_dir() || node.is_raised() || node.open_files.load(Relaxed) > 0 || times != *changes {
            return Ok(None);
        }
        self.work()?;
        let attr = node.stack().top().attr(caller)?;
        if node.shown(attr.clone()).nlink > 0 {
            return Ok(None);
        }
        {
            let mut last = node.last_times.lock();
            last.atime = changes.atime.map(moment).or(last.atime);
            last.mtime = changes.mtime.map(moment).or(last.mtime);
        }
        Ok(Some(node.shown(attr)))
    }

    pub(super) fn get_attribute(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<Vec<u8>> {
        if marks::is_own(name) {
            return Err(Error::new(Errno::NODATA, "read an attribute of the union itself"));
        }
        let node = self.node(node)?;
        let stack = node.stack();
        stack.top().service().getxattr(caller, stack.top().node, name)
    }

    pub(super) fn attribute_names(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        let node = self.node(node)?;
        let stack = node.stack();
        let listed = stack.top().service().listxattr(caller, stack.top().node)?;
        let shown = listed.split_inclusive(|byte| *byte == 0).filter(|name| !marks::is_own(name));
        Ok(shown.flatten().copied().collect())
    }

    pub(super) fn set_attribute(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        let node = self.node(node)?;
        refuse(&node, name)?;
        let upper = self.raise(&node)?;
        upper.service().setxattr(&self.inside(caller), upper.node, name, value, flags)?;
        self.notices.inode(caller, node.id);
        Ok(())
    }

    pub(super) fn remove_attribute(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<()> {
        let node = self.node(node)?;
        refuse(&node, name)?;
        self.work()?;
        // Without this a missing attribute would cost a copy.
        self.get_attribute(caller, node.id, name)?;
        let upper = self.raise(&node)?;
        upper.service().removexattr(&self.inside(caller), upper.node, name)?;
        self.notices.inode(caller, node.id);
        Ok(())
    }
}

fn moment(time: SetTime) -> Timestamp {
    match time {
        SetTime::At(moment) => moment,
        SetTime::Now => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            Timestamp { seconds: now.as_secs() as i64, nanoseconds: now.subsec_nanos() }
        }
    }
}

/// Before anything is copied up in vain.
fn refuse(node: &Node, name: &[u8]) -> Result<()> {
    if marks::is_own(name) {
        return Err(Error::new(Errno::PERM, "change an attribute of the union itself"));
    }
    if name.starts_with(b"user.") && !matches!(node.kind, libc::S_IFREG | libc::S_IFDIR) {
        return Err(Error::new(Errno::PERM, "give a user's attribute to a link or special file"));
    }
    Ok(())
}
