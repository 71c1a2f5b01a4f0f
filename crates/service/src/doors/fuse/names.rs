//! Operations on names and attributes.

use polytropo_libservices::{
    Attr, Capabilities, Entry, Errno, Error, Name, NodeId, RenameFlags, Result, SetAttr, SetTime, Timestamp,
    XattrFlags,
};

use super::abi::{self, InitFlags, SetattrValid};
use super::reply::Reply;
use super::request::{Arguments, checked_node};
use super::session::Operation;

const FILE_CAPABILITIES: &[u8] = b"security.capability";
/// `FUSE_SETXATTR_ACL_KILL_SGID`
const ACL_KILL_SGID: u32 = 1;

impl Operation<'_> {
    /// Answers with an entry, which then counts as looked up.
    pub(super) fn put_entry(&self, name: &[u8], entry: &Entry, reply: &mut Reply<'_>) -> Result<()> {
        self.session.told.hold(entry.node);
        let out = self.entry_out(entry);
        self.hold(&out, name, entry, reply.held);
        reply.put(&out)
    }

    /// A name in this operation's directory, which the kernel will know something of.
    pub(super) fn take_name<'n>(&self, a: &mut Arguments<'n>) -> Result<&'n Name> {
        let name = a.take_name()?;
        self.session.told.name(self.node, name.as_bytes());
        Ok(name)
    }

    pub(super) fn lookup(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let name = a.take_name()?;
        if self.node == NodeId::ROOT
            && let Some(node) = self.session.opens.handed(name.as_bytes())
        {
            return self.put_handed(node, reply);
        }
        self.session.told.name(self.node, name.as_bytes());
        match self.stack().lookup(&self.caller, self.node, name) {
            Err(e) if e.is(Errno::NOENT) && !self.agreed.timeouts.negative.is_zero() => {
                reply.nothing_there = true;
                reply.put(&self.agreed.timeouts.negative_out())
            }
            found => self.put_entry(name.as_bytes(), &found?, reply),
        }
    }

    /// Answers with a node by a name that is good this once.
    fn put_handed(&self, node: NodeId, reply: &mut Reply<'_>) -> Result<()> {
        let entry = self.stack().look_up_again(&self.caller, node)?;
        if entry.attr.file_type() != libc::S_IFREG {
            // The kernel would move a directory here from its own place.
            self.stack().forget(node, 1);
            return Err(Error::new(Errno::NOENT, "find what is no file by a name that was handed out"));
        }
        self.session.told.hold(node);
        let out = abi::EntryOut { entry_valid: 0, entry_valid_nsec: 0, ..self.entry_out(&entry) };
        // It has no name that a later worker could find it by.
        self.hold(&out, b"", &entry, reply.held);
        reply.put(&out)
    }

    pub(super) fn getattr(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::GetattrIn = a.take()?;
        let attr = self.attributes(asked.getattr_flags, asked.fh)?;
        reply.put(&self.timeouts().attr_out(&attr))
    }

    fn attributes(&self, getattr_flags: u32, fh: u64) -> Result<Attr> {
        let fh = (getattr_flags & abi::GETATTR_FH != 0).then_some(fh);
        self.file_if_open(fh, |handle| self.stack().getattr(&self.caller, self.node, handle))
    }

    pub(super) fn statx(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::StatxIn = a.take()?;
        let attr = self.attributes(asked.getattr_flags, asked.fh)?;
        reply.put(&self.timeouts().statx_out(&attr))
    }

    pub(super) fn setattr(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::SetattrIn = a.take()?;
        let (changes, fh) = changes(&asked);
        let set = || {
            self.file_if_open(fh, |handle| self.stack().setattr(&self.caller, self.node, handle, &changes))
        };
        let changes_mtime = changes.mtime.is_some() || changes.size_bytes.is_some();
        let attr = match changes_mtime && self.agreed.writeback() {
            true => self.session.times.set(self.node, || set().map(|attr| (attr.mtime, attr)))?,
            false => set()?,
        };
        reply.put(&self.timeouts().attr_out(&attr))
    }

    pub(super) fn readlink(self, reply: &mut Reply<'_>) -> Result<()> {
        let target = self.stack().readlink(&self.caller, self.node)?;
        reply.put_bytes(&target)
    }

    pub(super) fn symlink(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let name = self.take_name(a)?;
        let target = a.take_string()?;
        let entry = self.make_new(name, || self.stack().symlink(&self.caller, self.node, name, target))?;
        self.put_entry(name.as_bytes(), &entry, reply)
    }

    pub(super) fn mknod(mut self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::MknodIn = a.take()?;
        self.caller.umask = asked.umask;
        let name = self.take_name(a)?;
        let entry = self.make_new(name, || {
            self.stack().mknod(&self.caller, self.node, name, asked.mode, asked.rdev.into())
        })?;
        self.put_entry(name.as_bytes(), &entry, reply)
    }

    pub(super) fn mkdir(mut self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::MkdirIn = a.take()?;
        self.caller.umask = asked.umask;
        let name = self.take_name(a)?;
        let entry = self.make_new(name, || self.stack().mkdir(&self.caller, self.node, name, asked.mode))?;
        self.put_entry(name.as_bytes(), &entry, reply)
    }

    pub(super) fn link(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::LinkIn = a.take()?;
        let from = checked_node(&self.session.numbers, asked.oldnodeid)?;
        let name = self.take_name(a)?;
        let entry = self.make(name, || self.stack().link(&self.caller, from, self.node, name))?;
        self.put_entry(name.as_bytes(), &entry, reply)
    }

    pub(super) fn unlink(self, a: &mut Arguments<'_>) -> Result<()> {
        let name = self.take_name(a)?;
        self.take_away(name, Errno::NOENT, || self.stack().unlink(&self.caller, self.node, name))
    }

    pub(super) fn rmdir(self, a: &mut Arguments<'_>) -> Result<()> {
        let name = self.take_name(a)?;
        self.take_away(name, Errno::NOENT, || self.stack().rmdir(&self.caller, self.node, name))
    }

    pub(super) fn rename(self, a: &mut Arguments<'_>) -> Result<()> {
        let asked: abi::RenameIn = a.take()?;
        self.rename_to(asked.newdir, RenameFlags::empty(), a)
    }

    pub(super) fn rename2(self, a: &mut Arguments<'_>) -> Result<()> {
        let asked: abi::Rename2In = a.take()?;
        let flags = RenameFlags::from_bits(asked.flags)
            .ok_or_else(|| Error::new(Errno::INVAL, "rename with flags that are not known"))?;
        self.rename_to(asked.newdir, flags, a)
    }

    fn rename_to(self, new_directory: u64, flags: RenameFlags, a: &mut Arguments<'_>) -> Result<()> {
        let new_parent = checked_node(&self.session.numbers, new_directory)?;
        let (name, new_name) = (self.take_name(a)?, a.take_name()?);
        self.session.told.name(new_parent, new_name.as_bytes());
        self.move_name(name, (new_directory, new_parent), new_name, flags)
    }

    pub(super) fn statfs(self, reply: &mut Reply<'_>) -> Result<()> {
        let found = self.stack().statfs(&self.caller, self.node)?;
        reply.put(&abi::StatfsOut {
            blocks: found.blocks,
            bfree: found.blocks_free,
            bavail: found.blocks_available,
            files: found.files,
            ffree: found.files_free,
            bsize: found.block_size_bytes,
            namelen: found.name_len_max,
            frsize: found.block_size_bytes,
            ..Default::default()
        })
    }

    pub(super) fn getxattr(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        self.need(Capabilities::XATTRS)?;
        let asked: abi::GetxattrIn = a.take()?;
        let name = a.take_string()?;
        // The kernel asks this of every file at its first write.
        if name == FILE_CAPABILITIES {
            self.session.written.mark(self.node);
            if self.session.open_files.is_bare(self.node) {
                return Err(Error::new(Errno::NODATA, "look for capabilities of a new file"));
            }
        }
        let value = self.stack().getxattr(&self.caller, self.node, name)?;
        put_sized(&value, asked.size, reply)
    }

    pub(super) fn listxattr(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        self.need(Capabilities::XATTRS)?;
        let asked: abi::GetxattrIn = a.take()?;
        let names = self.stack().listxattr(&self.caller, self.node)?;
        put_sized(&names, asked.size, reply)
    }

    pub(super) fn setxattr(self, a: &mut Arguments<'_>) -> Result<()> {
        self.need(Capabilities::XATTRS)?;
        let asked: abi::SetxattrInShort = a.take()?;
        let extended = self.agreed.flags.contains(InitFlags::SETXATTR_EXT);
        let kill_sgid = extended && a.take::<abi::SetxattrInMore>()?.setxattr_flags & ACL_KILL_SGID != 0;
        let name = a.take_string()?;
        let value = a.take_bytes(asked.size as usize)?;
        let flags = XattrFlags::from_bits(asked.flags).ok_or_else(|| {
            Error::new(Errno::INVAL, "set an extended attribute with flags that are not known")
        })?;
        self.session.open_files.no_longer_bare(self.node);
        self.change(Errno::EXIST, || self.stack().setxattr(&self.caller, self.node, name, value, flags))?;
        if kill_sgid { self.kill_setgid() } else { Ok(()) }
    }

    /// An access ACL set by somebody outside of the file's group takes the setgid bit away.
    fn kill_setgid(&self) -> Result<()> {
        let mode = self.stack().getattr(&self.caller, self.node, None)?.mode;
        if mode & libc::S_ISGID == 0 {
            return Ok(());
        }
        let changes = SetAttr { mode: Some(mode & 0o7777 & !libc::S_ISGID), ..SetAttr::default() };
        self.stack().setattr(&self.caller, self.node, None, &changes).map(drop)
    }

    pub(super) fn removexattr(self, a: &mut Arguments<'_>) -> Result<()> {
        self.need(Capabilities::XATTRS)?;
        let name = a.take_string()?;
        self.change(Errno::NODATA, || self.stack().removexattr(&self.caller, self.node, name))
    }
}

/// The size alone when nothing was asked for, else the value if it fits.
fn put_sized(value: &[u8], size: u32, reply: &mut Reply<'_>) -> Result<()> {
    if size == 0 {
        return reply.put(&abi::GetxattrOut { size: value.len() as u32, padding: 0 });
    }
    if value.len() > size as usize {
        return Err(Error::new(Errno::RANGE, "read an extended attribute into too small a buffer"));
    }
    reply.put_bytes(value)
}

fn changes(asked: &abi::SetattrIn) -> (SetAttr, Option<u64>) {
    let valid = SetattrValid::from_bits_truncate(asked.valid);
    let given = |flag| valid.contains(flag);
    let time = |is_given: SetattrValid, is_now: SetattrValid, seconds: u64, nanoseconds: u32| {
        given(is_given).then(|| match given(is_now) {
            true => SetTime::Now,
            false => SetTime::At(Timestamp { seconds: seconds as i64, nanoseconds }),
        })
    };
    let changes = SetAttr {
        mode: given(SetattrValid::MODE).then_some(asked.mode & 0o7777),
        uid: given(SetattrValid::UID).then_some(asked.uid),
        gid: given(SetattrValid::GID).then_some(asked.gid),
        size_bytes: given(SetattrValid::SIZE).then_some(asked.size),
        atime: time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, asked.atime, asked.atimensec),
        mtime: time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, asked.mtime, asked.mtimensec),
        kill_privileges: given(SetattrValid::KILL_SUIDGID),
    };
    (changes, given(SetattrValid::FH).then_some(asked.fh))
}

/// What a directory entry says of the type.
pub fn dirent_type(mode: u32) -> u32 {
    (mode & libc::S_IFMT) >> 12
}

/// The number that a directory entry carries: that of the attributes where they are known.
pub fn dirent_ino(listed: u64, attr: Option<&Attr>) -> u64 {
    attr.map_or(listed, |attr| attr.ino)
}
