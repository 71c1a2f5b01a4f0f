//! Operations on open directories.

use polytropo_libservices::{DirEntry, Entry, Errno, Error, HandleId, Result};
use zerocopy::IntoBytes;

use super::abi::{self, FileOpenFlags};
use super::names::{dirent_ino, dirent_type};
use super::reply::{Held, Reply};
use super::request::Arguments;
use super::session::Operation;

/// Positions after `.` and after `..`, which the layers do not know. No filesystem gives such positions out: they
/// count from 0 or end at `i64::MAX`.
const AFTER_DOT: u64 = i64::MAX as u64 - 16;
const AFTER_DOT_DOT: u64 = i64::MAX as u64 - 15;
/// The number of `..`, which nobody knows here; as libfuse has it.
const INO_UNKNOWN: u64 = 0xffff_ffff;

/// An answer to READDIR or READDIRPLUS, filled entry by entry.
struct Listing<'a, 'b> {
    reply: &'a mut Reply<'b>,
    limit: usize,
    /// The kernel asked for the entries' attributes too.
    plus: bool,
}

struct Line<'a> {
    ino: u64,
    next_offset: u64,
    kind: u32,
    name: &'a [u8],
}

impl Listing<'_, '_> {
    /// False when it does not fit.
    fn add(&mut self, line: &Line<'_>, entry: abi::EntryOut) -> bool {
        let dirent = abi::Dirent {
            ino: line.ino,
            off: line.next_offset,
            namelen: line.name.len() as u32,
            kind: line.kind,
        };
        let head = if self.plus { size_of::<abi::EntryOut>() } else { 0 } + size_of::<abi::Dirent>();
        let len = (head + line.name.len()).next_multiple_of(abi::DIRENT_ALIGN);
        let left = self.limit.saturating_sub(self.reply.len());
        let room = self.reply.room(left);
        if room.len() < len {
            return false;
        }
        let (record, _) = room.split_at_mut(len);
        let (head_bytes, rest) = record.split_at_mut(head);
        let (entry_bytes, dirent_bytes) = head_bytes.split_at_mut(head - size_of::<abi::Dirent>());
        if self.plus {
            entry_bytes.copy_from_slice(entry.as_bytes());
        }
        dirent_bytes.copy_from_slice(dirent.as_bytes());
        let (name, padding) = rest.split_at_mut(line.name.len());
        name.copy_from_slice(line.name);
        padding.fill(0);
        self.reply.filled(len);
        true
    }

    /// Adds what comes before the layers' own entries. `None` when there is no room for more, else where the layers
    /// go on.
    fn add_dots(&mut self, offset: u64, own_ino: impl FnOnce() -> Result<u64>) -> Result<Option<u64>> {
        let kind = dirent_type(libc::S_IFDIR);
        let nothing = abi::EntryOut::default();
        if offset == 0 {
            let dot = Line { ino: own_ino()?, next_offset: AFTER_DOT, kind, name: b"." };
            if !self.add(&dot, nothing) {
                return Ok(None);
            }
        }
        if offset == 0 || offset == AFTER_DOT {
            let dots = Line { ino: INO_UNKNOWN, next_offset: AFTER_DOT_DOT, kind, name: b".." };
            if !self.add(&dots, nothing) {
                return Ok(None);
            }
        }
        Ok(Some(if matches!(offset, AFTER_DOT | AFTER_DOT_DOT) { 0 } else { offset }))
    }
}

impl Operation<'_> {
    pub(super) fn opendir(self, reply: &mut Reply<'_>) -> Result<()> {
        if self.agreed.stateless_opendir() {
            return Err(Error::new(Errno::NOSYS, "open a directory where that is not needed"));
        }
        let handle = self.stack().opendir(&self.caller, self.node)?;
        reply.held.push(Held::Directory(self.node, handle));
        self.session.opens.list_directory(handle, self.node, &self.opener());
        let mut flags = FileOpenFlags::empty();
        if self.agreed.exclusive() {
            flags |= FileOpenFlags::CACHE_DIR | FileOpenFlags::KEEP_CACHE;
        }
        reply.put(&abi::OpenOut { fh: handle.0, open_flags: flags.bits(), backing_id: 0 })
    }

    pub(super) fn readdir(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::ReadIn = a.take()?;
        let mut listing = Listing { reply, limit: asked.size as usize, plus: false };
        let own_ino = || self.stack().getattr(&self.caller, self.node, None).map(|attr| attr.ino);
        let Some(offset) = listing.add_dots(asked.offset, own_ino)? else { return Ok(()) };
        let mut sink = |e: DirEntry<'_>| listing.add(&line(&e, None), abi::EntryOut::default());
        let done = self.on_directory(asked.fh, asked.offset == 0, |handle| {
            self.stack().readdir(&self.caller, self.node, handle, offset, &mut sink)
        });
        self.listed(asked.offset, listing.reply.len());
        listing.finish(done)
    }

    pub(super) fn readdirplus(self, a: &mut Arguments<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: abi::ReadIn = a.take()?;
        let mut listing = Listing { reply, limit: asked.size as usize, plus: true };
        let own_ino = || self.stack().getattr(&self.caller, self.node, None).map(|attr| attr.ino);
        let Some(offset) = listing.add_dots(asked.offset, own_ino)? else { return Ok(()) };
        let mut sink = |e: DirEntry<'_>, found: Option<&Entry>| {
            let told = &self.session.told;
            if let Some(found) = found {
                told.name(self.node, e.name.as_bytes());
                told.hold(found.node);
            }
            let entry = found.map(|found| self.entry_out(found)).unwrap_or_default();
            let taken = listing.add(&line(&e, found), entry);
            match found {
                Some(found) if taken => self.hold(&entry, e.name.as_bytes(), found, listing.reply.held),
                Some(found) => told.forget(found.node, 1),
                None => {}
            }
            taken
        };
        let done = self.on_directory(asked.fh, asked.offset == 0, |handle| {
            self.stack().readdir_plus(&self.caller, self.node, handle, offset, &mut sink)
        });
        self.listed(asked.offset, listing.reply.len());
        listing.finish(done)
    }

    /// Runs `operation` on the open directory that the kernel names, or on the door's own where it names none.
    fn on_directory<T>(
        &self,
        fh: u64,
        begins: bool,
        operation: impl FnOnce(HandleId) -> Result<T>,
    ) -> Result<T> {
        if !self.agreed.stateless_opendir() {
            return operation(self.session.numbers.handle(fh));
        }
        let directory = self.session.open_directories.get(&self.caller, self.node, begins)?;
        operation(directory.handle)
    }

    /// A listing that had nothing more to tell is at its end.
    fn listed(&self, offset: u64, answered_bytes: usize) {
        if answered_bytes == 0 && offset != 0 && self.agreed.stateless_opendir() {
            self.session.open_directories.forget(self.node);
        }
    }

    pub(super) fn fsyncdir(self, a: &mut Arguments<'_>) -> Result<()> {
        let asked: abi::FsyncIn = a.take()?;
        let data_only = asked.fsync_flags & abi::FSYNC_FDATASYNC != 0;
        self.on_directory(asked.fh, false, |handle| {
            self.stack().fsyncdir(&self.caller, self.node, handle, data_only)
        })
    }

    pub(super) fn releasedir(self, a: &mut Arguments<'_>) -> Result<()> {
        let asked: abi::ReleaseIn = a.take()?;
        if self.agreed.stateless_opendir() {
            return Ok(());
        }
        self.session.release_directory(self.node, self.session.numbers.handle(asked.fh));
        Ok(())
    }
}

impl Listing<'_, '_> {
    /// An error after some entries waits for the next call, so that those entries are not lost.
    fn finish(self, done: Result<()>) -> Result<()> {
        match done {
            Err(_) if self.reply.len() > 0 => Ok(()),
            Ok(()) if self.limit < size_of::<abi::Dirent>() => {
                Err(Error::new(Errno::INVAL, "list a directory into too small a buffer"))
            }
            done => done,
        }
    }
}

fn line<'a>(entry: &DirEntry<'a>, found: Option<&Entry>) -> Line<'a> {
    let attr = found.map(|found| &found.attr);
    Line {
        ino: dirent_ino(entry.ino, attr),
        next_offset: entry.next_offset,
        kind: dirent_type(attr.map_or(entry.file_type, |attr| attr.mode)),
        name: entry.name.as_bytes(),
    }
}
