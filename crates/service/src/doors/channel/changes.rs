//! Changes of bytes and attributes.

use std::sync::Arc;

use polytropo_libservices::{
    Attr, Caller, Capabilities, Errno, FallocateMode, FsCapabilities, HandleId, NodeId, OpenFlags, SetAttr,
    SetTime, Timestamp,
};
use polytropo_wire::channel::AREA_BYTES;

use super::client::OpenFile;
use super::operations::{Done, FOLLOW, NO_FOLLOW, Work, told_late};
use super::permissions::{self, WRITE, has, in_group, is_owner};
use super::walk::{Failure, fail};

const AS_IT_IS: u32 = u32::MAX;

impl Work<'_> {
    /// EROFS for a mount that is seen read-only.
    pub(super) fn may_change(&self) -> Done {
        if self.client.peer.read_only { fail(Errno::ROFS, "write through a read-only mount") } else { Ok(()) }
    }

    fn writable(&self, at: usize) -> Result<(Arc<OpenFile>, HandleId), Failure> {
        let file = self.client.file(self.word(at))?;
        let handle = file.file()?;
        if !file.flags.contains(OpenFlags::WRITE) {
            return fail(Errno::BADF, "write to a file that is open for reading only");
        }
        self.door.may_serve(file.node)?;
        Ok((file, handle))
    }

    pub(super) fn write(&mut self) -> Done {
        let (file, handle) = self.writable(0)?;
        told_late(&file)?;
        let (offset, count) = (self.word(1), self.word(2));
        let end = i64::try_from(offset).ok().and_then(|at| at.checked_add(i64::try_from(count).ok()?));
        let Some(count) = usize::try_from(count).ok().filter(|c| *c <= AREA_BYTES && end.is_some()) else {
            return fail(Errno::INVAL, "write so much, or at such an offset");
        };
        // Copied first: the program may change them meanwhile.
        let bytes = &mut self.desk.bytes[..count];
        if self.client.memory.take(self.request.slot, 0, bytes).is_none() {
            return fail(Errno::INVAL, "take bytes from a request");
        }
        let grant = (count > 0 && file.waits())
            .then(|| self.door.begin_grant(self.client, self.request.words[0], &file))
            .flatten();
        let written = self.door.own.write(&self.client.peer.caller, file.node, handle, offset, bytes);
        if let Ok(count) = &written {
            // What is appended is not to be appended twice. Nothing tells of a worker that is killed between the write and this: its program has
            // the kernel append once more.
            self.client.memory.progress(self.request.slot, Some(&[*count as u64]));
        }
        if grant.is_some() {
            self.door.outdate(file.node);
        }
        self.door.settle();
        if let (Some(grants), Some(grant)) = (&self.door.grants, grant) {
            if written.is_ok() && grants.publish(self.client, &grant) {
                file.keep_grant(grant);
            } else {
                grants.give_back(file.node, &grant);
            }
        }
        self.reply[0] = written? as u64;
        Ok(())
    }

    pub(super) fn truncate(&mut self) -> Done {
        let (file, handle) = match self.writable(0) {
            Err(Failure::Error(error)) if error.is(Errno::BADF) => return fail(Errno::INVAL, "set a size"),
            found => found?,
        };
        self.set_size(file.node, Some(handle), self.word(1))
    }

    pub(super) fn truncate_path(&mut self) -> Done {
        self.may_change()?;
        let (node, attr) = self.node_at(FOLLOW)?;
        match attr.file_type() {
            libc::S_IFREG => {}
            libc::S_IFDIR => return fail(Errno::ISDIR, "set the size of a directory"),
            _ => return fail(Errno::INVAL, "set the size of what is no file"),
        }
        permissions::check(&*self.door.stack, self.caller(), node.node(), &attr, WRITE)?;
        self.door.may_write()?;
        self.door.may_serve(node.node())?;
        if self.door.modes.users(node.node()).executing > 0 {
            // Which says ETXTBSY.
            return Err(Failure::Kernel);
        }
        self.set_size(node.node(), None, self.word(2))
    }

    fn set_size(&self, node: NodeId, handle: Option<HandleId>, size_bytes: u64) -> Done {
        if i64::try_from(size_bytes).is_err() {
            return fail(Errno::INVAL, "set such a size");
        }
        let changes = SetAttr {
            size_bytes: Some(size_bytes),
            kill_privileges: !has(self.caller(), FsCapabilities::FSETID),
            ..SetAttr::default()
        };
        self.set(node, handle, &changes)
    }

    fn set(&self, node: NodeId, handle: Option<HandleId>, changes: &SetAttr) -> Done {
        let stack = if handle.is_some() { &self.door.own } else { &self.door.stack };
        stack.setattr(self.caller(), node, handle, changes)?;
        self.door.settle();
        Ok(())
    }

    /// fallocate(2), in the ways that FUSE knows, too; it says for itself what is wrong with others.
    pub(super) fn allocate(&mut self) -> Done {
        let known = FallocateMode::KEEP_SIZE | FallocateMode::PUNCH_HOLE | FallocateMode::ZERO_RANGE;
        let mode = FallocateMode::from_bits(self.word32(1)?).filter(|mode| known.contains(*mode));
        let can = self.door.stack.capabilities().contains(Capabilities::FALLOCATE);
        let Some(mode) = mode.filter(|_| can) else { return Err(Failure::Kernel) };
        let (file, handle) = self.writable(0)?;
        told_late(&file)?;
        let (offset, length) = (self.word(2), self.word(3));
        let end = offset.checked_add(length).is_some_and(|end| i64::try_from(end).is_ok());
        if !end || length == 0 {
            return Err(Failure::Kernel);
        }
        let allocated = self.door.own.fallocate(self.caller(), file.node, handle, mode, offset, length);
        self.door.settle();
        Ok(allocated?)
    }

    pub(super) fn sync(&mut self) -> Done {
        let file = self.client.file(self.word(0))?;
        let data_only = self.word(1) == 1;
        match file.kind {
            super::client::Kind::File(handle) => {
                // What was written through maps is with the kernel.
                self.door.may_write()?;
                self.door.may_serve(file.node)?;
                let synced = self.door.own.fsync(self.caller(), file.node, handle, data_only);
                told_late(&file)?;
                Ok(synced?)
            }
            super::client::Kind::Directory(handle) => {
                Ok(self.door.stack.fsyncdir(self.caller(), file.node, handle, data_only)?)
            }
            super::client::Kind::Place => fail(Errno::BADF, "sync a place"),
        }
    }

    /// What the path in the request's first words leads to, with its flags at `flags_at`.
    fn node_by_flags(&self, flags_at: usize) -> Result<(Owned<'_>, Attr), Failure> {
        let flags = self.word32(flags_at)? as i32;
        self.node_at(if flags & libc::AT_SYMLINK_NOFOLLOW != 0 { NO_FOLLOW } else { FOLLOW })
    }

    fn node_at(&self, last: super::walk::Last) -> Result<(Owned<'_>, Attr), Failure> {
        let target = self.walk(0, 0, last)?;
        let (node, attr) = target.existing()?;
        let attr = attr.clone();
        Ok((Owned { node, _target: target }, attr))
    }

    pub(super) fn change_mode(&mut self) -> Done {
        self.may_change()?;
        let mut mode = self.word32(2)? & 0o7777;
        let (node, attr) = self.node_by_flags(3)?;
        if attr.file_type() == libc::S_IFLNK {
            return fail(Errno::OPNOTSUPP, "change the mode of a link");
        }
        let caller = self.caller();
        if !is_owner(caller, &attr) {
            return fail(Errno::PERM, "change the mode of somebody else's file");
        }
        if !in_group(caller, attr.gid) && !has(caller, FsCapabilities::FSETID) {
            mode &= !libc::S_ISGID;
        }
        self.set(node.node(), None, &SetAttr { mode: Some(mode), ..SetAttr::default() })
    }

    pub(super) fn change_owner(&mut self) -> Done {
        self.may_change()?;
        let (uid, gid) = (self.word32(2)?, self.word32(3)?);
        let (node, attr) = self.node_by_flags(4)?;
        let caller = self.caller();
        may_give(caller, &attr, uid, gid)?;
        let given = |id: u32| (id != AS_IT_IS).then_some(id);
        let changes = SetAttr {
            uid: given(uid),
            gid: given(gid),
            kill_privileges: !attr.is_dir(),
            ..SetAttr::default()
        };
        self.set(node.node(), None, &changes)
    }

    pub(super) fn change_times(&mut self) -> Done {
        self.may_change()?;
        let (node, attr) = self.node_by_flags(6)?;
        if attr.file_type() == libc::S_IFREG {
            // While the kernel holds back writes the times are its own.
            self.door.may_serve(node.node())?;
        }
        let (atime, mtime) = (time_of(self.word(2), self.word(3))?, time_of(self.word(4), self.word(5))?);
        let caller = self.caller();
        let both_now = (atime, mtime) == (Some(SetTime::Now), Some(SetTime::Now));
        if (atime, mtime) == (None, None) {
            return Ok(());
        }
        if !is_owner(caller, &attr) {
            if !both_now {
                return fail(Errno::PERM, "set the times of somebody else's file");
            }
            permissions::check(&*self.door.stack, caller, node.node(), &attr, WRITE)?;
        }
        self.set(node.node(), None, &SetAttr { atime, mtime, ..SetAttr::default() })
    }
}

/// A node that a walk holds.
struct Owned<'a> {
    node: NodeId,
    _target: super::walk::Target<'a>,
}

impl Owned<'_> {
    fn node(&self) -> NodeId {
        self.node
    }
}

/// chown(2) by others than root: the owner may give a file to groups of its own.
fn may_give(caller: &Caller, attr: &Attr, uid: u32, gid: u32) -> Done {
    if has(caller, FsCapabilities::CHOWN) {
        return Ok(());
    }
    let same_uid = uid == AS_IT_IS || uid == attr.uid;
    let own_group = gid == AS_IT_IS || gid == attr.gid || in_group(caller, gid);
    if caller.uid == attr.uid && same_uid && own_group {
        return Ok(());
    }
    if uid == AS_IT_IS && gid == AS_IT_IS {
        // Takes setuid and setgid bits away all the same, which may be somebody else's: the kernel says.
        return Err(Failure::Kernel);
    }
    fail(Errno::PERM, "give a file away")
}

fn time_of(seconds: u64, nanoseconds: u64) -> Result<Option<SetTime>, Failure> {
    match nanoseconds as i64 {
        libc::UTIME_OMIT => Ok(None),
        libc::UTIME_NOW => Ok(Some(SetTime::Now)),
        nanoseconds @ 0..1_000_000_000 => {
            let nanoseconds = nanoseconds as u32;
            Ok(Some(SetTime::At(Timestamp { seconds: seconds as i64, nanoseconds })))
        }
        _ => fail(Errno::INVAL, "set such a time"),
    }
}
