//! Open files: bytes, holes, durability.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::fs::{self, FallocateFlags, Mode, OFlags, SeekFrom};

use super::attributes::truncate;
use super::nodes::Node;
use super::{Dir, stale, stale_if_absent, sys};
use crate::capabilities::Coherence;
use crate::error::{Attempt, Errno, Error, Result};
use crate::types::*;

/// One open regular file.
pub struct File {
    /// Opened at its first use where that comes to the same; see [`Dir::host`].
    host: OnceLock<Arc<OwnedFd>>,
    pub node: Arc<Node>,
    pub flags: OpenFlags,
}

impl File {
    pub(super) fn host_if_open(&self) -> Option<&Arc<OwnedFd>> {
        self.host.get()
    }
}

/// Flags of the host's open file. `DIRECT` is kept above: what callers hand us need not be aligned, so the host
/// is always asked through its cache. `TRUNCATE` waits until it is sure what was opened.
pub(super) fn host_flags(flags: OpenFlags) -> OFlags {
    let mut host = match (flags.contains(OpenFlags::READ), flags.contains(OpenFlags::WRITE)) {
        (_, false) => OFlags::RDONLY,
        (false, true) => OFlags::WRONLY,
        (true, true) => OFlags::RDWR,
    };
    for (flag, value) in [
        (OpenFlags::APPEND, OFlags::APPEND),
        (OpenFlags::SYNC, OFlags::SYNC),
        (OpenFlags::DSYNC, OFlags::DSYNC),
        (OpenFlags::NOATIME, OFlags::NOATIME),
    ] {
        host.set(value, flags.contains(flag));
    }
    host
}

/// Offsets of the kernel are signed.
fn check_range(offset: u64, length: u64) -> Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(Error::new(Errno::INVAL, "use a range beyond the largest file")),
    }
}

fn write_all(host: &OwnedFd, offset: u64, data: &[u8]) -> Result<usize> {
    let mut done = 0;
    while done < data.len() {
        // Of a file opened to append, the kernel ignores the offset.
        match rustix::io::pwrite(host, &data[done..], offset.wrapping_add(done as u64)) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(_) if done > 0 => break,
            Err(errno) => return Err(Error::new(errno, "write a file")),
        }
    }
    Ok(done)
}

impl Dir {
    pub(super) fn open_file(&self, caller: &Caller, node: &Arc<Node>, flags: OpenFlags) -> Result<Opened> {
        if flags.intersects(OpenFlags::WRITE | OpenFlags::TRUNCATE) {
            self.writable()?;
        } else if self.coherence == Coherence::Immutable && node.was_read() {
            // Most opens of an image's files never come here to read: the kernel has the bytes, or the layer's file itself.
            return Ok(self.opened(None, node, flags));
        }
        let host = self.open_host(node, host_flags(flags))?;
        if flags.contains(OpenFlags::TRUNCATE) {
            self.change_bytes(caller, node, host.as_fd(), || match flags.contains(OpenFlags::WRITE) {
                true => truncate(&host, 0),
                false => truncate(self.open_host(node, OFlags::WRONLY)?, 0),
            })?;
            self.notices.inode(caller, node.id);
        }
        if self.coherence == Coherence::Immutable && !flags.contains(OpenFlags::WRITE) {
            node.set_read();
        }
        Ok(self.opened(Some(host), node, flags))
    }

    pub(super) fn opened(&self, host: Option<OwnedFd>, node: &Arc<Node>, flags: OpenFlags) -> Opened {
        let host = host.map_or_else(OnceLock::new, |host| OnceLock::from(Arc::new(host)));
        let file = File { host, node: node.clone(), flags };
        Opened {
            handle: self.files.insert(file),
            keep_cache: self.coherence != Coherence::Shared,
            direct: flags.contains(OpenFlags::DIRECT),
        }
    }

    /// The host's open file.
    pub(super) fn host<'a>(&self, file: &'a File) -> Result<&'a Arc<OwnedFd>> {
        if let Some(host) = file.host.get() {
            return Ok(host);
        }
        let host = self.open_host(&file.node, host_flags(file.flags))?;
        Ok(file.host.get_or_init(|| Arc::new(host)))
    }

    /// Opens a regular file of the host. Nothing else is ever opened: to open a device is to act on it.
    pub(super) fn open_host(&self, node: &Arc<Node>, flags: OFlags) -> Result<OwnedFd> {
        match node.host_type {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(Error::new(Errno::ISDIR, "open a directory as a file")),
            libc::S_IFLNK => return Err(Error::new(Errno::LOOP, "open a symbolic link")),
            _ => return Err(Error::new(Errno::NXIO, "open a special file")),
        }
        let opened = self.open_checked(node, flags);
        match opened {
            // Only owners may leave access times alone.
            Err(e) if e.is(Errno::PERM) && flags.contains(OFlags::NOATIME) => {
                self.open_checked(node, flags - OFlags::NOATIME)
            }
            done => done,
        }
    }

    fn open_checked(&self, node: &Arc<Node>, flags: OFlags) -> Result<OwnedFd> {
        // Where others change names, a name could stand for a device by now: O_PATH first, then the same inode.
        let by_name = self.coherence != Coherence::Shared || sys::proc_self_fd().is_err();
        if by_name && node.descriptor().is_none() {
            if let Some(file) = self.open_by_name(node, flags)? {
                return Ok(file);
            }
        }
        let fd = self.reach(node)?;
        match self.with_room(|| sys::reopen(&*fd, flags)) {
            Err(Errno::NOSYS) => self.open_by_name(node, flags)?.ok_or_else(|| stale(Errno::STALE)),
            done => done.attempt("open a file"),
        }
    }

    /// `None` when the name is gone or stands for something else.
    fn open_by_name(&self, node: &Arc<Node>, flags: OFlags) -> Result<Option<OwnedFd>> {
        let Some(seen) = node.sighting() else { return Ok(None) };
        let parent = self.reach(&seen.parent)?;
        let open = || sys::open_name(&*parent, &seen.name, flags | OFlags::NONBLOCK, Mode::empty());
        let file = match self.with_room(open) {
            Ok(file) => file,
            Err(errno) if stale_if_absent(errno).is(Errno::STALE) => return Ok(None),
            Err(errno) => return Err(Error::new(errno, "open a file")),
        };
        let stat = self.stat_fd(&file).attempt("look at an opened file")?;
        Ok((stat.key == node.key).then_some(file))
    }

    pub(super) fn read_file(&self, handle: HandleId, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let file = self.files.get(handle)?;
        check_range(offset, buffer.len() as u64)?;
        let host = self.host(&file)?;
        let mut done = 0;
        while done < buffer.len() {
            match rustix::io::pread(&**host, &mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(errno) => return Err(Error::new(errno, "read a file")),
            }
        }
        Ok(done)
    }

    pub(super) fn write_file(
        &self,
        caller: &Caller,
        handle: HandleId,
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        let file = self.files.get(handle)?;
        if !file.flags.contains(OpenFlags::APPEND) {
            check_range(offset, data.len() as u64)?;
        }
        let host = self.host(&file)?;
        let done = self.change_bytes(caller, &file.node, host.as_fd(), || write_all(host, offset, data))?;
        match file.flags.contains(OpenFlags::APPEND) {
            true => self.notices.inode(caller, file.node.id),
            false => self.notices.bytes(caller, file.node.id, offset, done as u64),
        }
        Ok(done)
    }

    /// Closing a copy of the descriptor makes network filesystems report what failed; local ones have nothing to say.
    pub(super) fn flush_file(&self, handle: HandleId) -> Result<()> {
        let file = self.files.get(handle)?;
        if !self.network_host || !file.flags.contains(OpenFlags::WRITE) {
            return Ok(());
        }
        let host = self.host(&file)?;
        let copy = self.with_room(|| rustix::io::fcntl_dupfd_cloexec(&**host, 0)).attempt("flush a file")?;
        // SAFETY: `into_raw_fd` gave up the descriptor, so it is closed once, here.
        let closed = unsafe { rustix::io::try_close(std::os::fd::IntoRawFd::into_raw_fd(copy)) };
        closed.attempt("flush a file")
    }

    pub(super) fn sync_file(&self, handle: HandleId, data_only: bool) -> Result<()> {
        let file = self.files.get(handle)?;
        let host = self.host(&file)?;
        let done = if data_only { fs::fdatasync(&**host) } else { fs::fsync(&**host) };
        done.attempt("make a file durable")
    }

    /// Waits until the bytes are on the device, not until the journal says so: on ext4 a later rename is committed after.
    pub(super) fn order_file(&self, handle: HandleId) -> Result<()> {
        if !self.ordered_host {
            return self.sync_file(handle, false);
        }
        let file = self.files.get(handle)?;
        sys::write_out(&**self.host(&file)?).attempt("write a file out")
    }

    pub(super) fn begin_order_of_file(&self, handle: HandleId) -> Result<()> {
        let file = self.files.get(handle)?;
        sys::begin_to_write_out(&**self.host(&file)?).attempt("begin to write a file out")
    }

    pub(super) fn allocate(
        &self,
        caller: &Caller,
        handle: HandleId,
        mode: FallocateMode,
        (offset, length): (u64, u64),
    ) -> Result<()> {
        let file = self.files.get(handle)?;
        let flags = FallocateFlags::from_bits_retain(mode.bits());
        let host = self.host(&file)?;
        self.change_bytes(caller, &file.node, host.as_fd(), || {
            fs::fallocate(&**host, flags, offset, length).attempt("allocate or free space")
        })?;
        self.notices.inode(caller, file.node.id);
        Ok(())
    }

    pub(super) fn seek_sparse(&self, handle: HandleId, offset: u64, to: SeekTo) -> Result<u64> {
        let file = self.files.get(handle)?;
        check_range(offset, 0)?;
        let to = match to {
            SeekTo::Data => SeekFrom::Data(offset),
            SeekTo::Hole => SeekFrom::Hole(offset),
        };
        // The position of the shared open file moves, but reads and writes never use it.
        fs::seek(&**self.host(&file)?, to).attempt("look for data or a hole")
    }

    /// EXDEV, EOPNOTSUPP and the like pass up: those who asked copy by reading and writing then.
    pub(super) fn copy_between(
        &self,
        caller: &Caller,
        from: (HandleId, u64),
        to: (HandleId, u64),
        length: u64,
    ) -> Result<u64> {
        let (source, target) = (self.files.get(from.0)?, self.files.get(to.0)?);
        let (mut read_at, mut write_at) = (from.1, to.1);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (source_host, target_host) = (self.host(&source)?, self.host(&target)?);
        let copied = self.change_bytes(caller, &target.node, target_host.as_fd(), || {
            let (from, to) = (Some(&mut read_at), Some(&mut write_at));
            fs::copy_file_range(&**source_host, from, &**target_host, to, length)
                .attempt("copy between files")
        })?;
        self.notices.inode(caller, target.node.id);
        Ok(copied as u64)
    }

    pub(super) fn space(&self) -> Result<StatFs> {
        let root = self.reach(&self.node(NodeId::ROOT)?)?;
        let host = fs::fstatvfs(&*root).attempt("ask for free space")?;
        Ok(StatFs {
            blocks: host.f_blocks,
            blocks_free: host.f_bfree,
            blocks_available: host.f_bavail,
            files: host.f_files,
            files_free: host.f_ffree,
            block_size_bytes: u32::try_from(host.f_frsize).unwrap_or(4096),
            name_len_max: u32::try_from(host.f_namemax).unwrap_or(255),
        })
    }
}
