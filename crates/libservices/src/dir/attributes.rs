//! Attributes: reading and changing them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::{self, AtFlags, Gid, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};

use super::nodes::{Node, Privileges};
use super::{Dir, sys};
use crate::error::{Attempt, Errno, Result};
use crate::privileges::{without, witnessed};
use crate::types::*;

impl Dir {
    pub(super) fn attributes(&self, node: NodeId, handle: Option<HandleId>) -> Result<Attr> {
        let file = handle.and_then(|handle| self.files.get(handle).ok());
        if let Some((file, host)) =
            file.as_ref().and_then(|file| file.host_if_open().map(|host| (file, host)))
        {
            let _bits = file.node.bits.read();
            let attr = self.stat_fd(&**host).attempt("look at an open file")?.attr;
            file.node.set_privileges(privileges(&attr));
            return Ok(attr);
        }
        let node = self.node(node)?;
        self.settled_attributes(&node)
    }

    fn settled_attributes(&self, node: &Arc<Node>) -> Result<Attr> {
        let _bits = node.bits.read();
        let attr = self.stat_node(node)?.attr;
        node.set_privileges(privileges(&attr));
        Ok(attr)
    }

    /// What a look-up saw of an inode: again, if its setuid and setgid bits may have been gone for a moment.
    pub(super) fn with_settled_bits(&self, node: &Arc<Node>, seen: &Attr) -> Attr {
        let found = privileges(seen);
        if self.coherence == crate::Coherence::Shared {
            // Others change them too.
            node.set_privileges(found);
        }
        node.suppose_privileges(found);
        match (node.privileges(), found) {
            (Privileges::Present, Privileges::Absent) => {
                self.settled_attributes(node).unwrap_or_else(|_| seen.clone())
            }
            _ => seen.clone(),
        }
    }

    /// statx by the cached descriptor, else by name (no descriptor is made for it), else by reaching it.
    fn stat_node(&self, node: &Arc<Node>) -> Result<sys::Stat> {
        if node.descriptor().is_none() {
            if let Some(seen) = node.sighting() {
                let parent = self.reach(&seen.parent)?;
                match self.stat_name(&*parent, &seen.name) {
                    Ok(stat) if stat.key == node.key => return Ok(stat),
                    _ => {} // moved or gone: `reach` finds out
                }
            }
        }
        let fd = self.reach(node)?;
        self.stat_fd(&*fd).attempt("look at a node")
    }

    pub(super) fn set_attributes(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<HandleId>,
        changes: &SetAttr,
    ) -> Result<Attr> {
        self.writable()?;
        let node = self.node(node)?;
        let file = handle.and_then(|handle| self.files.get(handle).ok());
        if let Some(size_bytes) = changes.size_bytes {
            let own;
            let host = match &file {
                Some(file) if file.flags.contains(OpenFlags::WRITE) => self.host(file)?.as_fd(),
                _ => {
                    own = self.open_host(&node, OFlags::WRONLY)?;
                    own.as_fd()
                }
            };
            match changes.kill_privileges {
                true => truncate(host, size_bytes)?,
                false => self.change_bytes(caller, &node, host, || truncate(host, size_bytes))?,
            }
        }
        let attr = match &file {
            Some(file) => self.change(&node, self.host(file)?.as_fd(), changes)?,
            None => self.change(&node, self.reach(&node)?.as_fd(), changes)?,
        };
        self.notices.inode(caller, node.id);
        Ok(attr)
    }

    // Owner before mode, since the kernel drops setuid and setgid bits when the owner changes.
    fn change(&self, node: &Arc<Node>, fd: BorrowedFd<'_>, changes: &SetAttr) -> Result<Attr> {
        let _bits = node.bits.write();
        node.set_privileges(Privileges::Unknown);
        if changes.uid.is_some() || changes.gid.is_some() {
            own(fd, changes.uid, changes.gid).attempt("change the owner")?;
        }
        match changes.mode {
            Some(mode) => sys::chmod_fd(fd, mode).attempt("change the mode")?,
            None if changes.kill_privileges => self.drop_privileges(node, fd)?,
            None => {}
        }
        if changes.atime.is_some() || changes.mtime.is_some() {
            let times = Timestamps {
                last_access: timespec(changes.atime),
                last_modification: timespec(changes.mtime),
            };
            fs::utimensat(fd, c"", &times, AtFlags::EMPTY_PATH).attempt("change times")?;
        }
        let attr = self.stat_fd(fd).attempt("look at a changed file")?.attr;
        node.set_privileges(privileges(&attr));
        Ok(attr)
    }

    /// Drops setuid, and setgid of group-executables, where they are set. (File capabilities the host drops itself.)
    pub(super) fn drop_privileges(&self, node: &Node, fd: BorrowedFd<'_>) -> Result<()> {
        let attr = self.stat_fd(fd).attempt("look for privileges to drop")?.attr;
        if privileges(&attr) == Privileges::Present {
            sys::chmod_fd(fd, without(attr.mode)).attempt("drop setuid and setgid bits")?;
        }
        node.set_privileges(Privileges::Absent);
        Ok(())
    }

    /// Runs `change`, which changes the file's bytes on behalf of `caller`. The host then drops setuid and setgid bits unless
    /// we have CAP_FSETID in its first user namespace, which services never have: a caller who may keep them gets them
    /// back, and nobody else looks at them or writes in between.
    pub(super) fn change_bytes<T>(
        &self,
        caller: &Caller,
        node: &Node,
        fd: BorrowedFd<'_>,
        change: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let bits = node.bits.read();
        let trusted = caller.capabilities.contains(FsCapabilities::FSETID);
        let others_change_modes = self.coherence == crate::Coherence::Shared;
        if node.privileges() == Privileges::Absent && (trusted || !others_change_modes) {
            return change();
        }
        if !trusted {
            self.drop_privileges(node, fd)?;
            return change();
        }
        drop(bits);
        let _bits = node.bits.write();
        let attr = self.stat_fd(fd).attempt("look for privileges to keep")?.attr;
        node.set_privileges(privileges(&attr));
        if privileges(&attr) == Privileges::Absent {
            return change();
        }
        witnessed(attr.mode & 0o7777, || {
            let changed = change();
            self.give_privileges_back(fd, attr.mode & 0o7777)?;
            changed
        })
    }

    fn give_privileges_back(&self, fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
        let now = self.stat_fd(fd).attempt("look for dropped privileges")?.attr.mode & 0o7777;
        if now != mode && now == without(mode) {
            sys::chmod_fd(fd, mode).attempt("give setuid and setgid bits back")?;
        }
        Ok(())
    }
}

/// Changes owner and group; keeps what is `None`.
pub(super) fn own(fd: impl AsFd, uid: Option<u32>, gid: Option<u32>) -> rustix::io::Result<()> {
    // -1 means "leave" to the kernel: an id that no file can have.
    if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
        return Err(Errno::INVAL);
    }
    fs::chownat(fd, c"", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)
}

pub(super) fn truncate(fd: impl AsFd, size_bytes: u64) -> Result<()> {
    if size_bytes > i64::MAX as u64 {
        return Err(crate::Error::new(Errno::FBIG, "make a file longer than any file can be"));
    }
    fs::ftruncate(fd, size_bytes).attempt("change the size")
}

/// Whether there are bits that a write by an ordinary user has to drop.
fn privileges(attr: &Attr) -> Privileges {
    let bits = without(attr.mode) != attr.mode & 0o7777;
    if attr.file_type() == libc::S_IFREG && bits { Privileges::Present } else { Privileges::Absent }
}

fn timespec(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(SetTime::At(t)) => Timespec { tv_sec: t.seconds, tv_nsec: t.nanoseconds.into() },
    }
}
