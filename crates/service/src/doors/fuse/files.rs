//! Operations on open files.

use polytropo_libservices::{
    Capabilities, Entry, Errno, Error, FallocateMode, HandleId, NodeId, OpenFlags, Opened, Result, SeekTo,
    SetAttr, SetTime,
};

use super::abi::{self, FileOpenFlags};
use super::opens::{Opener, Opening};
use super::renewed::OldInode;
use super::reply::{Held, Reply};
use super::request::{Arguments, checked_node};
use super::session::Operation;

/// How often bytes that are written back are tried again after EINTR and EAGAIN.
const INTERRUPTIONS_MAX: usize = 16;

impl Operation<'_> {
    /// Runs `operation` on the open file that the kernel names, or on the door's own where it names none.
    fn on_file<T>(
        &self,
        (node, fh): (NodeId, u64),
        access: OpenFlags,
        operation: impl FnOnce(HandleId) -> Result<T>,
    ) -> Result<T> {
        if fh != 0 || !self.agreed.stateless_open() {
            return operation(self.session.numbers.handle(fh));
        }
        let file = self.session.open_files.get(&self.caller, node, access)?;
        operation(file.handle)
    }

    /// The open file that the kernel names, or the door's own if there is one.
    pub(super) fn file_if_open<T>(
        &self,
        fh: Option<u64>,
        operation: impl FnOnce(Option<HandleId>) -> Result<T>,
    ) -> Result<T> {
        if fh.is_some_and(|fh| fh != 0) || !self.agreed.stateless_open() {
            return operation(fh.map(|fh| self.session.numbers.handle(fh)));
        }
        let file = self.session.open_files.present(self.node);
        operation(file.as_ref().map(|file| file.handle))
    }

    pub(super) fn opener(&self) -> Opener {
        let (uid, gid) = (self.caller.uid, self.caller.gid);
        Opener { thread: self.header.pid, uid, gid, kernel_node: self.header.nodeid }
    }

    /// What the kernel is told of an open file of `node`. `None`: the node has a new number (see [`Opens::grant`]).
    fn grant(
        &self,
        (node, opened): (NodeId, &Opened),
        flags: OpenFlags,
        (replaced, executes): (bool, bool),
    ) -> Option<abi::OpenOut> {
        let keep_cache = self.agreed.exclusive();
        let mut opener = self.opener();
        if node != self.node {
            opener.kernel_node = self.number_of(node);
        }
        let opening =
            Opening { stack: self.stack(), node, opened, flags, replaced, executes, opener, keep_cache };
        let granted = self.session.opens.grant(&opening);
        if granted.is_none() {
            self.session.tell_outdated(node);
        }
        granted
    }

    /// What the layers are to open. With write-back the kernel fills up partial pages by reading. Of files that
    /// nobody else changes it knows the size, and places what is appended itself.
    fn open_flags(&self, asked: u32) -> OpenFlags {
        let mut flags = open_flags(asked);
        if self.agreed.stateless_open() {
            // All who open this inode share one open file; syncing is up to the kernel.
            flags &= OpenFlags::READ | OpenFlags::WRITE | OpenFlags::TRUNCATE | OpenFlags::EXCLUSIVE;
        }
        if self.agreed.writeback() && flags.contains(OpenFlags::WRITE) {
            flags |= OpenFlags::READ;
        }
        if self.kernel_places_appends() {
            // It also writes mapped pages through whatever open file it finds, and these must not be appended.
            flags -= OpenFlags::APPEND;
        }
        flags
    }

    /// Runs `open` with what write-back wants; if that much is not permitted to the service, with what was asked for.
    fn with_open_flags<T>(&self, asked: u32, open: impl Fn(OpenFlags) -> Result<T>) -> Result<T> {
        let wanted = self.open_flags(asked);
        match open(wanted) {
            Err(e) if e.is(Errno::ACCESS) && wanted != open_flags(asked) => open(open_flags(asked)),
            done => done,
        }
    }

    pub(super) fn open(mut self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        if self.agreed.stateless_open() {
            return Err(Error::new(Errno::NOSYS, "open a file where that is not needed"));
        }
        let asked: abi::OpenIn = a.take()?;
        if asked.open_flags & abi::OPEN_KILL_SUIDGID != 0 {
            self.drop_fsetid();
        }
        let replaced = self.is_replaced();
        let renewed = &self.session.opens.renewed;
        if replaced {
            if renewed.open_of_old(self.node, self.header.pid) == OldInode::LookAgain {
                return Err(stale());
            }
            if open_flags(asked.flags).contains(OpenFlags::WRITE) && self.session.opens.is_bound(self.node) {
                return Err(Error::new(Errno::TXTBSY, "write by an inode whose former bytes are in use"));
            }
        } else {
            renewed.open_of_new(self.node, self.header.pid);
        }
        let (opened, flags) = self.with_open_flags(asked.flags, |flags| {
            Ok((self.stack().open(&self.caller, self.node, flags)?, flags))
        })?;
        reply.held.push(Held::File(self.node, opened.handle));
        let executes = asked.flags & abi::OPENED_TO_EXECUTE != 0;
        let out = self.grant((self.node, &opened), flags, (replaced, executes)).ok_or_else(stale)?;
        reply.put(&out)
    }

    /// A file and its open file in one answer.
    fn put_opened_entry(
        &self,
        name: &[u8],
        entry: &Entry,
        opened: Opened,
        flags: OpenFlags,
        reply: &mut Reply<'_>,
    ) -> Result<()> {
        if self.agreed.stateless_open() {
            // The kernel would never say that it is closed.
            self.session.open_files.keep_made(entry.node, opened.handle, flags);
            let mut flags = FileOpenFlags::KEEP_CACHE;
            if opened.direct {
                flags |= FileOpenFlags::DIRECT_IO | FileOpenFlags::PARALLEL_DIRECT_WRITES;
            }
            self.put_entry(name, entry, reply)?;
            return reply.put(&abi::OpenOut { fh: 0, open_flags: flags.bits(), backing_id: 0 });
        }
        reply.held.push(Held::File(entry.node, opened.handle));
        // A file that stood there already may have to be shown by another inode of the kernel, which this answer names.
        let grant = || self.grant((entry.node, &opened), flags, (false, false));
        let Some(out) = grant().or_else(grant) else {
            self.stack().forget(entry.node, 1);
            return Err(stale());
        };
        self.put_entry(name, entry, reply)?;
        reply.put(&out)
    }

    pub(super) fn create(mut self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::CreateIn = a.take()?;
        let name = self.take_name(a)?;
        self.caller.umask = asked.umask;
        if asked.open_flags & abi::OPEN_KILL_SUIDGID != 0 {
            self.drop_fsetid();
        }
        let (entry, opened, flags) = self.with_open_flags(asked.flags, |flags| {
            let create = |flags| self.stack().create(&self.caller, self.node, name, asked.mode, flags);
            let (entry, opened) = self.make_open(name, flags, create)?;
            Ok((entry, opened, flags))
        })?;
        self.put_opened_entry(name.as_bytes(), &entry, opened, flags, reply)
    }

    pub(super) fn tmpfile(mut self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        self.need(Capabilities::TMPFILE)?;
        let asked: abi::CreateIn = a.take()?;
        self.caller.umask = asked.umask;
        let unlinkable = asked.flags & libc::O_EXCL as u32 != 0;
        let (entry, opened, flags) = self.with_open_flags(asked.flags, |mut flags| {
            flags.remove(OpenFlags::EXCLUSIVE | OpenFlags::TRUNCATE);
            flags.set(OpenFlags::UNLINKABLE, unlinkable);
            let (entry, opened) = self.stack().tmpfile(&self.caller, self.node, asked.mode, flags)?;
            Ok((entry, opened, flags))
        })?;
        self.put_opened_entry(&[], &entry, opened, flags, reply)
    }

    pub(super) fn read(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::ReadIn = a.take()?;
        let room = reply.room(asked.size as usize);
        let count = self.on_file((self.node, asked.fh), OpenFlags::READ, |handle| {
            self.stack().read(&self.caller, self.node, handle, asked.offset, room)
        })?;
        reply.filled(count);
        Ok(())
    }

    pub(super) fn write(mut self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::WriteIn = a.take()?;
        if asked.write_flags & abi::WRITE_KILL_SUIDGID != 0 {
            self.drop_fsetid();
        }
        let data = a.take_bytes(asked.size as usize)?;
        let late = asked.write_flags & abi::WRITE_CACHE != 0;
        let write = || {
            if late && !self.kernel_places_appends() {
                return self.write_pages(asked.fh, asked.offset, data);
            }
            self.on_file((self.node, asked.fh), OpenFlags::WRITE, |handle| {
                let write = || self.stack().write(&self.caller, self.node, handle, asked.offset, data);
                if late && self.agreed.writeback() { self.keeping_mtime(handle, write) } else { write() }
            })
        };
        let written = if late { uninterrupted(write) } else { write() };
        if let (true, Err(error)) = (late, &written) {
            self.session.late_errors.tell(self.session.door, self.node, error);
        }
        let count = written?;
        reply.put(&abi::WriteOut { size: count.min(data.len()) as u32, padding: 0 })
    }

    /// Where others write too, through channels, the size that the kernel knows may be old; but then it asks for opens.
    fn kernel_places_appends(&self) -> bool {
        self.agreed.exclusive() && (self.agreed.writeback() || self.agreed.stateless_open())
    }

    fn keeping_mtime<T>(&self, handle: HandleId, write: impl FnOnce() -> Result<T>) -> Result<T> {
        let look = || Ok(self.stack().getattr(&self.caller, self.node, Some(handle))?.mtime);
        let put_back = |mtime| {
            let changes = SetAttr { mtime: Some(SetTime::At(mtime)), ..SetAttr::default() };
            self.stack().setattr(&self.caller, self.node, Some(handle), &changes).map(drop)
        };
        self.session.times.keep(self.node, look, write, put_back)
    }

    /// Writes mapped pages through an open file of their own: the one that the kernel names may be open for appending.
    fn write_pages(&self, fh: u64, offset: u64, data: &[u8]) -> Result<usize> {
        let Ok(opened) = self.stack().open(&self.caller, self.node, OpenFlags::WRITE) else {
            // Removed by others, so that the open file is all there is.
            return self.stack().write(
                &self.caller,
                self.node,
                self.session.numbers.handle(fh),
                offset,
                data,
            );
        };
        let written = self.stack().write(&self.caller, self.node, opened.handle, offset, data);
        self.stack().release(self.node, opened.handle);
        written
    }

    pub(super) fn flush(self, a: &mut Arguments<'_>) -> Result<()> {
        if self.agreed.capabilities.contains(Capabilities::STATELESS_OPEN) {
            return Err(Error::new(Errno::NOSYS, "flush where there is nothing to report"));
        }
        let asked: abi::FlushIn = a.take()?;
        self.stack().flush(&self.caller, self.node, self.session.numbers.handle(asked.fh))
    }

    pub(super) fn fsync(self, a: &mut Arguments<'_>) -> Result<()> {
        let asked: abi::FsyncIn = a.take()?;
        let data_only = asked.fsync_flags & abi::FSYNC_FDATASYNC != 0;
        self.on_file((self.node, asked.fh), OpenFlags::READ, |handle| {
            self.stack().fsync(&self.caller, self.node, handle, data_only)
        })
    }

    pub(super) fn release(self, a: &mut Arguments<'_>) -> Result<()> {
        let asked: abi::ReleaseIn = a.take()?;
        // Made before the kernel learnt that it need not say this.
        if asked.fh == 0 && self.agreed.stateless_open() {
            return Ok(());
        }
        self.session.release(self.node, self.session.numbers.handle(asked.fh));
        Ok(())
    }

    pub(super) fn fallocate(self, a: &mut Arguments<'_>) -> Result<()> {
        self.need(Capabilities::FALLOCATE)?;
        let asked: abi::FallocateIn = a.take()?;
        let mode = FallocateMode::from_bits(asked.mode)
            .ok_or_else(|| Error::new(Errno::OPNOTSUPP, "allocate space in a way that is not known"))?;
        self.on_file((self.node, asked.fh), OpenFlags::WRITE, |handle| {
            self.stack().fallocate(&self.caller, self.node, handle, mode, asked.offset, asked.length)
        })
    }

    pub(super) fn lseek(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        self.need(Capabilities::SPARSE_SEEK)?;
        let asked: abi::LseekIn = a.take()?;
        let to = match asked.whence as i32 {
            libc::SEEK_DATA => SeekTo::Data,
            libc::SEEK_HOLE => SeekTo::Hole,
            _ => return Err(Error::new(Errno::INVAL, "seek in a way that is the kernel's own")),
        };
        // Space without data may have got some through a mapping.
        let solid = if self.agreed.writeback() { self.session.solid_size_bytes(self.node) } else { None };
        if let Some(size_bytes) = solid.filter(|&size_bytes| asked.offset < size_bytes) {
            let offset = if to == SeekTo::Data { asked.offset } else { size_bytes };
            return reply.put(&abi::LseekOut { offset });
        }
        let offset = self.on_file((self.node, asked.fh), OpenFlags::READ, |handle| {
            self.stack().seek(&self.caller, self.node, handle, asked.offset, to)
        })?;
        reply.put(&abi::LseekOut { offset })
    }

    /// The older form answers in 32 bits.
    pub(super) fn copy_file_range(
        self,
        a: &mut Arguments<'_>,
        reply: &mut Reply<'_>,
        wide: bool,
    ) -> Result<()> {
        self.need(Capabilities::COPY_RANGE)?;
        let asked: abi::CopyFileRangeIn = a.take()?;
        if asked.flags != 0 {
            return Err(Error::new(Errno::INVAL, "copy a range with flags that are not known"));
        }
        let length = if wide { asked.len } else { asked.len.min(u64::from(u32::MAX) & !4095) };
        let target = checked_node(&self.session.numbers, asked.nodeid_out)?;
        if let Some(journal) = self.journal {
            journal.is_about(asked.nodeid_out);
        }
        let bytes_copied = self.on_file((target, asked.fh_out), OpenFlags::WRITE, |to| {
            self.on_file((self.node, asked.fh_in), OpenFlags::READ, |from| {
                let (from, to) = ((self.node, from, asked.off_in), (target, to, asked.off_out));
                self.stack().copy_range(&self.caller, from, to, length)
            })
        })?;
        if wide {
            reply.put(&abi::CopyFileRangeOut { bytes_copied })
        } else {
            reply.put(&abi::WriteOut { size: bytes_copied.min(length) as u32, padding: 0 })
        }
    }
}

/// Nobody waits for bytes that are written back and could ask again: the kernel would keep EINTR for the next fsync(2) or
/// syncfs(2), of a program that was not interrupted.
fn uninterrupted<T>(mut write: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 0..INTERRUPTIONS_MAX {
        match write() {
            Err(e) if e.is(Errno::INTR) || e.is(Errno::AGAIN) => {}
            done => return done,
        }
    }
    Err(Error::new(Errno::IO, "write back what is interrupted again and again"))
}

/// The kernel looks the name up again and comes back with another inode.
fn stale() -> Error {
    Error::new(Errno::STALE, "open a file by an inode that another one has replaced")
}

/// Flags of open(2) as the layers know them.
fn open_flags(asked: u32) -> OpenFlags {
    let asked = asked as i32;
    let mut flags = match asked & libc::O_ACCMODE {
        libc::O_RDONLY => OpenFlags::READ,
        libc::O_WRONLY => OpenFlags::WRITE,
        _ => OpenFlags::READ | OpenFlags::WRITE,
    };
    for (bits, flag) in [
        (libc::O_APPEND, OpenFlags::APPEND),
        (libc::O_TRUNC, OpenFlags::TRUNCATE),
        (libc::O_EXCL, OpenFlags::EXCLUSIVE),
        (libc::O_DIRECT, OpenFlags::DIRECT),
        (libc::O_SYNC, OpenFlags::SYNC),
        (libc::O_DSYNC, OpenFlags::DSYNC),
        (libc::O_NOATIME, OpenFlags::NOATIME),
    ] {
        flags.set(flag, asked & bits == bits);
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_flags_of_open() {
        let cases = [
            (libc::O_RDONLY, OpenFlags::READ),
            (libc::O_WRONLY | libc::O_APPEND, OpenFlags::WRITE | OpenFlags::APPEND),
            (libc::O_RDWR | libc::O_DSYNC, OpenFlags::READ | OpenFlags::WRITE | OpenFlags::DSYNC),
            (libc::O_SYNC, OpenFlags::READ | OpenFlags::SYNC | OpenFlags::DSYNC),
        ];
        for (asked, flags) in cases {
            assert_eq!(open_flags(asked as u32), flags);
        }
    }
}
