//! What programs change, and listings.

use polytropo_wire::message::{Operation, PATH_BYTES_MAX};

use crate::channel::Channel;
use crate::files::File;
use crate::operations::{At, put_path};
use crate::{EINVAL, ENAMETOOLONG, Error, Result};

/// A time for [`Channel::change_times`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time {
    pub seconds: i64,
    /// Or UTIME_NOW, UTIME_OMIT.
    pub nanoseconds: i64,
}

impl Channel {
    /// pwrite(2), or an append if the file was opened so.
    pub fn pwrite(&self, file: File, bytes: &[u8], offset: u64) -> Result<usize> {
        // SAFETY: a slice is readable.
        unsafe { self.pwrite_raw(file, bytes.as_ptr(), bytes.len(), offset) }
    }

    /// pwrite(2).
    ///
    /// # Safety
    /// `from` must be readable for `count` bytes, as far as the caller wants to answer for faults.
    pub unsafe fn pwrite_raw(&self, file: File, from: *const u8, count: usize, offset: u64) -> Result<usize> {
        let used = self.enter(file)?;
        // SAFETY: the caller's word.
        if let Some(done) = unsafe { self.post_write(&used, from, count, offset) }? {
            return Ok(done);
        }
        self.settle(&used)?;
        let claim = self.claim()?;
        let mut done = 0;
        loop {
            let part = (count - done).min(claim.capacity());
            let at = offset.checked_add(done as u64).ok_or(Error::Errno(EINVAL))?;
            // SAFETY: within the caller's bytes.
            unsafe { claim.put_raw(0, from.add(done), part) }?;
            let reply = claim.ask(Operation::Write, &[file.0, at, part as u64]);
            match reply.and_then(|reply| reply.count(part)) {
                Ok(written) => done += written,
                // What was written before it counts.
                Err(_) if done > 0 => return Ok(done),
                Err(error) => return Err(error),
            }
            if done >= count || done % claim.capacity() != 0 {
                return Ok(done);
            }
        }
    }

    /// ftruncate(2).
    pub fn ftruncate(&self, file: File, size_bytes: u64) -> Result<()> {
        let used = self.enter(file)?;
        self.settle(&used)?;
        self.claim()?.ask(Operation::Truncate, &[file.0, size_bytes]).map(drop)
    }

    /// fallocate(2).
    pub fn allocate(&self, file: File, mode: u32, offset: u64, bytes: u64) -> Result<()> {
        let used = self.enter(file)?;
        self.settle(&used)?;
        self.claim()?.ask(Operation::Allocate, &[file.0, mode.into(), offset, bytes]).map(drop)
    }

    /// fsync(2), or fdatasync(2).
    pub fn fsync(&self, file: File, data_only: bool) -> Result<()> {
        let used = self.enter(file)?;
        let synced = self.claim()?.ask(Operation::Sync, &[file.0, data_only.into()]);
        // What was posted was applied before.
        self.reclaim_posts();
        self.told(&used)?;
        synced.map(drop)
    }

    /// getdents64(2): entries from `position` (0: from the beginning, read anew) on. Tells how many bytes, and where it goes on.
    /// EINVAL for a buffer of fewer bytes than one entry may take.
    pub fn read_directory(&self, directory: File, buffer: &mut [u8], position: u64) -> Result<(usize, u64)> {
        let _used = self.enter(directory)?;
        let claim = self.claim()?;
        let room = buffer.len().min(claim.capacity());
        let reply = claim.ask(Operation::ReadDirectory, &[directory.0, position, room as u64])?;
        let count = reply.count(room)?;
        // SAFETY: the slice holds that many bytes.
        unsafe { claim.take_raw(buffer.as_mut_ptr(), count) }?;
        Ok((count, reply.words[1]))
    }

    pub fn mkdir(&self, at: At, path: &[u8], mode: u32, umask: u32) -> Result<()> {
        self.names([0; 2]).mkdir(at, path, mode, umask)
    }

    /// unlinkat(2).
    pub fn unlink(&self, at: At, path: &[u8], flags: u32) -> Result<()> {
        self.names([0; 2]).unlink(at, path, flags)
    }

    /// fchmodat2(2).
    pub fn chmod(&self, at: At, path: &[u8], mode: u32, flags: u32) -> Result<()> {
        self.on_path(Operation::ChangeMode, at, path, &[mode.into(), flags.into()])
    }

    /// fchownat(2).
    pub fn chown(&self, at: At, path: &[u8], uid: u32, gid: u32, flags: u32) -> Result<()> {
        self.on_path(Operation::ChangeOwner, at, path, &[uid.into(), gid.into(), flags.into()])
    }

    /// utimensat(2).
    pub fn change_times(&self, at: At, path: &[u8], atime: Time, mtime: Time, flags: u32) -> Result<()> {
        let times = [atime, mtime].map(|time| [time.seconds as u64, time.nanoseconds as u64]);
        let words = [times[0][0], times[0][1], times[1][0], times[1][1], flags.into()];
        self.on_path(Operation::ChangeTimes, at, path, &words)
    }

    pub fn truncate(&self, at: At, path: &[u8], size_bytes: u64) -> Result<()> {
        self.on_path(Operation::TruncatePath, at, path, &[size_bytes])
    }

    /// renameat2(2).
    pub fn rename(&self, at: At, path: &[u8], new_at: At, new_path: &[u8], flags: u32) -> Result<()> {
        Names { channel: self, parents: [0; 2], files_only: false }.rename(
            (at, path),
            (new_at, new_path),
            flags,
        )
    }

    /// linkat(2).
    pub fn link(&self, at: At, path: &[u8], new_at: At, new_path: &[u8], flags: u32) -> Result<()> {
        self.names([0; 2]).link((at, path), (new_at, new_path), flags)
    }

    /// symlinkat(2): `path` gets to lead to `target`.
    pub fn symlink(&self, target: &[u8], at: At, path: &[u8]) -> Result<()> {
        self.names([0; 2]).symlink(target, at, path)
    }

    /// Changes of names in directories of which it is known which inodes they are, or 0: if a path comes to lead to another one, nothing
    /// is done and the answer is `Error::Kernel`. That is also the answer for directories that are to be renamed, since the kernel has to
    /// know where those are that are somebody's working directory.
    pub fn names(&self, parents: [u64; 2]) -> Names<'_> {
        Names { channel: self, parents, files_only: true }
    }

    fn on_path(&self, operation: Operation, at: At, path: &[u8], more: &[u64]) -> Result<()> {
        let claim = self.claim()?;
        let mut words = [0; 8];
        words[0] = at.word();
        words[1] = put_path(&claim, 0, path)?;
        for (place, word) in words.iter_mut().skip(2).zip(more) {
            *place = *word;
        }
        claim.ask(operation, &words).map(drop)
    }
}

/// See [`Channel::names`].
pub struct Names<'a> {
    channel: &'a Channel,
    parents: [u64; 2],
    files_only: bool,
}

impl Names<'_> {
    pub fn mkdir(&self, at: At, path: &[u8], mode: u32, umask: u32) -> Result<()> {
        let words = [mode.into(), umask.into(), self.parents[0]];
        self.channel.on_path(Operation::MakeDirectory, at, path, &words)
    }

    /// unlinkat(2).
    pub fn unlink(&self, at: At, path: &[u8], flags: u32) -> Result<()> {
        self.channel.on_path(Operation::Unlink, at, path, &[flags.into(), self.parents[0]])
    }

    /// renameat2(2).
    pub fn rename(&self, from: (At, &[u8]), to: (At, &[u8]), flags: u32) -> Result<()> {
        self.on_paths(Operation::Rename, from, to, flags)
    }

    /// linkat(2).
    pub fn link(&self, from: (At, &[u8]), to: (At, &[u8]), flags: u32) -> Result<()> {
        self.on_paths(Operation::Link, from, to, flags)
    }

    /// symlinkat(2).
    pub fn symlink(&self, target: &[u8], at: At, path: &[u8]) -> Result<()> {
        if target.len() > PATH_BYTES_MAX {
            return Err(Error::Errno(ENAMETOOLONG));
        }
        let claim = self.channel.claim()?;
        claim.put(0, target)?;
        let path_bytes = put_path(&claim, target.len(), path)?;
        let words = [at.word(), path_bytes, target.len() as u64, self.parents[0]];
        claim.ask(Operation::SymbolicLink, &words).map(drop)
    }

    fn on_paths(&self, operation: Operation, one: (At, &[u8]), two: (At, &[u8]), flags: u32) -> Result<()> {
        let claim = self.channel.claim()?;
        let first_bytes = put_path(&claim, 0, one.1)?;
        let second_bytes = put_path(&claim, one.1.len(), two.1)?;
        let [parent, new_parent] = self.parents;
        let [at, new_at] = [one.0.word(), two.0.word()];
        let only = self.files_only.into();
        let words = [at, first_bytes, new_at, second_bytes, flags.into(), parent, new_parent, only];
        claim.ask(operation, &words).map(drop)
    }
}
