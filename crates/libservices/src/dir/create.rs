//! Making inodes, with the caller as their owner.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};

use super::attributes::own;
use super::descriptors::Descriptor;
use super::files::host_flags;
use super::nodes::Node;
use super::{Dir, identity, stale, sys};
use crate::error::{Attempt, Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// setuid, setgid, sticky: given only once the owner is right.
const SPECIAL_BITS: u32 = 0o7000;
/// A name that comes and goes under `create` is given up on after this many tries.
const CREATE_TRIES_MAX: usize = 16;

impl Dir {
    pub(super) fn make_node(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        rdev: u64,
    ) -> Result<Entry> {
        // mknod(2): no type means a regular file.
        let mode = if mode & libc::S_IFMT == 0 { mode | libc::S_IFREG } else { mode };
        self.make(caller, parent, name, mode, |directory, host_mode| {
            let file_type = FileType::from_raw_mode(mode);
            fs::mknodat(directory, name.as_bytes(), file_type, host_mode, rdev)
        })
    }

    pub(super) fn make_dir(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32) -> Result<Entry> {
        self.make(caller, parent, name, libc::S_IFDIR | mode & 0o7777, |directory, host_mode| {
            fs::mkdirat(directory, name.as_bytes(), host_mode)
        })
    }

    pub(super) fn make_symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        target: &[u8],
    ) -> Result<Entry> {
        self.make(caller, parent, name, libc::S_IFLNK | 0o777, |directory, _| {
            fs::symlinkat(target, directory, name.as_bytes())
        })
    }

    /// Makes `name` by `host` (under the caller's umask), then gives it to the caller.
    fn make(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        host: impl FnOnce(&Descriptor, Mode) -> rustix::io::Result<()>,
    ) -> Result<Entry> {
        self.writable()?;
        let parent = self.node(parent)?;
        let directory = self.reach(&parent)?;
        let seen_at = self.nodes.now();
        self.as_caller(caller, || host(&directory, sys::permissions(mode & 0o777))).attempt("make a name")?;
        let stat = self.give_by_name(caller, &directory, name, mode).inspect_err(|_| {
            let flags =
                if mode & libc::S_IFMT == libc::S_IFDIR { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            // Best effort: the error that is reported is the one that made this necessary.
            let _ = fs::unlinkat(&*directory, name.as_bytes(), flags);
        })?;
        self.notices.entry(caller, parent.id, name);
        Ok(self.entry(&stat, &parent, name, seen_at))
    }

    /// Runs `make` so that the kernel gives what it makes to the caller, by the caller's umask. Where the ids cannot be
    /// taken on, `give` does it afterwards.
    pub(super) fn as_caller<T>(
        &self,
        caller: &Caller,
        make: impl FnOnce() -> rustix::io::Result<T>,
    ) -> rustix::io::Result<T> {
        identity::with_ids((caller.uid, caller.gid), self.own_ids, || sys::with_umask(caller.umask, make))
    }

    fn give_by_name(
        &self,
        caller: &Caller,
        directory: &Descriptor,
        name: &Name,
        mode: u32,
    ) -> Result<sys::Stat> {
        let stat = self.stat_name(directory, name).attempt("look at what was made")?;
        if !self.needs_giving(caller, &stat, mode) {
            return Ok(stat);
        }
        let open = || sys::open_name(directory, name, OFlags::PATH, Mode::empty());
        let fd = self.with_room(open).attempt("open what was made")?;
        let opened = self.stat_fd(&fd).attempt("look at what was made")?;
        // Somebody else may have put another file under the name: never give away what we did not make.
        let links = if opened.attr.is_dir() { 0..=2 } else { 1..=1 };
        let ours = opened.key == stat.key
            && opened.attr.file_type() == mode & libc::S_IFMT
            && [self.own_ids.0, caller.uid].contains(&opened.attr.uid)
            && links.contains(&opened.attr.nlink);
        if !ours {
            return Err(stale(Errno::STALE));
        }
        self.give(caller, directory, &fd, &opened, mode)
    }

    fn needs_giving(&self, caller: &Caller, stat: &sys::Stat, mode: u32) -> bool {
        let special = mode & SPECIAL_BITS & !stat.attr.mode != 0 && mode & libc::S_IFMT != libc::S_IFLNK;
        special || stat.attr.uid != caller.uid || stat.attr.gid != caller.gid
    }

    /// Sets owner, then the bits that a change of owner would drop. The group stays where the parent gave it.
    fn give(
        &self,
        caller: &Caller,
        directory: &Descriptor,
        fd: &OwnedFd,
        stat: &sys::Stat,
        mode: u32,
    ) -> Result<sys::Stat> {
        if !self.needs_giving(caller, stat, mode) {
            return Ok(stat.clone());
        }
        let uid = (stat.attr.uid != caller.uid).then_some(caller.uid);
        let gid = if stat.attr.gid == caller.gid || self.group_inherited(directory, stat)? {
            None
        } else {
            Some(caller.gid)
        };
        if uid.is_some() || gid.is_some() {
            own(fd, uid, gid).attempt("give what was made to its owner")?;
        }
        let special = mode & SPECIAL_BITS & !stat.attr.mode;
        if special != 0 && stat.attr.file_type() != libc::S_IFLNK {
            // The mode that the kernel made of umask or ACL, and what was left out at first.
            sys::chmod_fd(fd, stat.attr.mode & 0o7777 | special).attempt("set the special mode bits")?;
        }
        self.stat_fd(fd).attempt("look at what was made")
    }

    /// Whether the kernel gave the parent's group: any other group than our own came from there.
    fn group_inherited(&self, directory: &Descriptor, stat: &sys::Stat) -> Result<bool> {
        if stat.attr.gid != self.own_ids.1 {
            return Ok(true);
        }
        let parent = self.stat_fd(directory).attempt("look at the parent")?;
        Ok(parent.attr.mode & libc::S_ISGID != 0)
    }

    pub(super) fn make_link(
        &self,
        caller: &Caller,
        node: NodeId,
        new_parent: NodeId,
        new_name: &Name,
    ) -> Result<Entry> {
        self.writable()?;
        let (node, parent) = (self.node(node)?, self.node(new_parent)?);
        if node.is_dir() {
            return Err(Error::new(Errno::PERM, "give a directory a second name"));
        }
        let (fd, directory) = (self.reach(&node)?, self.reach(&parent)?);
        let seen_at = self.nodes.now();
        sys::link_fd(&*fd, &*directory, new_name).attempt("link")?;
        let stat = self.stat_fd(&*fd).attempt("look at a linked file")?;
        self.notices.inode(caller, node.id);
        self.notices.entry(caller, parent.id, new_name);
        Ok(self.entry(&stat, &parent, new_name, seen_at))
    }

    pub(super) fn create_file(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let parent = self.node(parent)?;
        for _ in 0..CREATE_TRIES_MAX {
            match self.create_new(caller, &parent, name, mode, flags) {
                Err(e) if e.is(Errno::EXIST) && !flags.contains(OpenFlags::EXCLUSIVE) => {}
                done => return done,
            }
            match self.open_present(caller, &parent, name, flags) {
                Err(e) if e.is(Errno::NOENT) || e.is(Errno::STALE) => {}
                done => return done,
            }
        }
        Err(Error::new(Errno::STALE, "create a name that comes and goes"))
    }

    fn open_present(
        &self,
        caller: &Caller,
        parent: &Arc<Node>,
        name: &Name,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let mut entry = self.look_up(parent, name)?;
        let node = self.node(entry.node)?;
        let opened = self.open_file(caller, &node, flags);
        if opened.is_err() {
            self.nodes.forget(entry.node, 1);
        }
        let opened = opened?;
        if flags.contains(OpenFlags::TRUNCATE) {
            entry.attr = self.attributes(entry.node, Some(opened.handle))?;
        }
        Ok((entry, opened))
    }

    fn create_new(
        &self,
        caller: &Caller,
        parent: &Arc<Node>,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let directory = self.reach(parent)?;
        if self.read_only {
            // What stands there may be opened.
            self.stat_name(&*directory, name).map_err(|errno| match errno {
                Errno::NOENT => Error::new(Errno::ROFS, "create a file in a read-only layer"),
                errno => Error::new(errno, "look up a name"),
            })?;
            return Err(Error::new(Errno::EXIST, "create a file in a read-only layer"));
        }
        let host = host_flags(flags) | OFlags::CREATE | OFlags::EXCL;
        let open = || sys::open_name(&*directory, name, host, sys::permissions(mode & 0o777));
        let seen_at = self.nodes.now();
        let fd = self.as_caller(caller, || self.with_room(open)).attempt("create a file")?;
        let stat = self.take_over(caller, &directory, &fd, mode).inspect_err(|_| {
            // Best effort: the error that is reported is the one that made this necessary.
            let _ = fs::unlinkat(&*directory, name.as_bytes(), AtFlags::empty());
        })?;
        let entry = self.entry(&stat, parent, name, seen_at);
        self.notices.entry(caller, parent.id, name);
        let node = self.node(entry.node)?;
        Ok((entry, self.opened(Some(fd), &node, flags)))
    }

    pub(super) fn make_tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        self.writable()?;
        if !flags.contains(OpenFlags::WRITE) {
            return Err(Error::new(Errno::INVAL, "make a file without a name that cannot be written"));
        }
        let parent = self.node(parent)?;
        let directory = self.reach(&parent)?;
        let mut host = host_flags(flags) | OFlags::TMPFILE;
        host.set(OFlags::EXCL, flags.contains(OpenFlags::UNLINKABLE));
        let open = || sys::open_self(&*directory, host, sys::permissions(mode & 0o777));
        let fd = self.as_caller(caller, || self.with_room(open)).attempt("make a file without a name")?;
        let stat = self.take_over(caller, &directory, &fd, mode)?;
        let way = self.with_room(|| rustix::io::fcntl_dupfd_cloexec(&fd, 0)).attempt("keep a file")?;
        let node = self.nodes.look_up(&stat);
        self.nodes.install(&node, way);
        node.pin();
        let entry = Entry { node: node.id, generation: 0, attr: stat.attr };
        Ok((entry, self.opened(Some(fd), &node, flags)))
    }

    fn take_over(
        &self,
        caller: &Caller,
        directory: &Descriptor,
        fd: &OwnedFd,
        mode: u32,
    ) -> Result<sys::Stat> {
        let stat = self.stat_fd(fd.as_fd()).attempt("look at what was made")?;
        self.give(caller, directory, fd, &stat, libc::S_IFREG | mode & 0o7777)
    }
}
