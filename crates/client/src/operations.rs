//! What programs ask for.

use core::sync::atomic::Ordering::Relaxed;

use polytropo_wire::epochs::TAG_WORDS;
use polytropo_wire::message::{
    ATTRIBUTE_WORDS, Attributes, CARRIED_BYTES_MAX, HANDED_NAME_BYTES, OPENED_TAG_AT, Operation,
    PATH_BYTES_MAX, handed_name, opened, opened_flags, window,
};

use crate::arena::Chunk;
use crate::channel::{Channel, Claim, Reply, result_of};
use crate::copies::Situation;
use crate::files::{Arrived, File, InUse};
use crate::lookups::Asked;
use crate::windows::{Found, Window};
use crate::{EINVAL, ENAMETOOLONG, EPROTO, Error, Result};

/// Where a path begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    Root,
    /// An open file of this channel; a directory unless the path is empty.
    File(File),
    /// The directory with this inode. The service knows no such beginning: for what is kept here alone.
    Inode(u64),
}

/// In the words of beginnings that are inodes, so that they are no file's number.
const INODE: u64 = 1 << 63;

impl At {
    pub(crate) fn word(self) -> u64 {
        match self {
            Self::Root => 0,
            Self::File(file) => file.0,
            Self::Inode(inode) => inode | INODE,
        }
    }
}

/// An open file and what it was like when it was opened.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    pub file: File,
    pub attributes: Attributes,
    /// By this open.
    pub made: bool,
}

/// How often a read looks for missing bytes in a window without getting any further before it asks for them by request.
const MISSES_MAX: u32 = 4;

impl Reply {
    fn attributes(&self, from: usize) -> Result<Attributes> {
        let words = self.words.get(from..from + ATTRIBUTE_WORDS).and_then(|words| words.try_into().ok());
        words.map(Attributes::from_words).ok_or(Error::Errno(EPROTO))
    }

    /// A count that is at most `limit`.
    pub(crate) fn count(&self, limit: usize) -> Result<usize> {
        usize::try_from(self.words[0]).ok().filter(|count| *count <= limit).ok_or(Error::Errno(EPROTO))
    }
}

pub(crate) fn put_path(claim: &Claim<'_>, at: usize, path: &[u8]) -> Result<u64> {
    if path.len() > PATH_BYTES_MAX {
        return Err(Error::Errno(ENAMETOOLONG));
    }
    claim.put(at, path)?;
    Ok(path.len() as u64)
}

impl Channel {
    /// A round trip and nothing else.
    pub fn ping(&self) -> Result<()> {
        self.claim()?.ask(Operation::Ping, &[0]).map(drop)
    }

    /// Says that this program watches files, as long as this channel is there: changes by all channels are left to the kernel.
    pub fn watch(&self) -> Result<()> {
        self.claim()?.ask(Operation::Watch, &[]).map(drop)
    }

    /// openat(2). `flags` and `mode` as there; `umask` is the process's.
    pub fn open(&self, at: At, path: &[u8], flags: u32, mode: u32, umask: u32) -> Result<Opened> {
        // What is not there is known by whoever asked for it.
        let asked = self.asked_by_open(at, path, flags);
        if let Some(known) = asked.as_ref().and_then(|asked| self.recall(asked, at, &mut [])) {
            result_of(known.outcome)?;
        }
        let words = [flags.into(), mode.into(), umask.into(), 0, 0];
        let (claim, reply) = self.ask_to_open(at, path, words, asked.as_ref())?;
        self.take_opened(&claim, &reply)
    }

    /// openat(2) of a name in a directory of which it is known which inode it is, and that it lay at the path's beginning: `Error::Kernel` if another
    /// one does.
    pub fn open_in(&self, parent: u64, path: &[u8], flags: u32, mode: u32, umask: u32) -> Result<Opened> {
        let words = [flags.into(), mode.into(), umask.into(), 0, parent];
        let (claim, reply) = self.ask_to_open(At::Root, path, words, None)?;
        self.take_opened(&claim, &reply)
    }

    /// openat(2) for reading. Of a small file its bytes come along, and the service has nothing open: what they are is known while
    /// nothing changes, and afterwards each use is answered `Error::Kernel`.
    pub fn open_to_read(&self, at: At, path: &[u8], flags: u32) -> Result<Opened> {
        let asked = self.asked_by_open(at, path, flags);
        if let Some(known) = asked.as_ref().and_then(|asked| self.recall(asked, at, &mut [])) {
            result_of(known.outcome)?;
        }
        let chunk = self.arena.take_chunk();
        let words = [flags.into(), 0, 0, u64::from(chunk.is_some()), 0];
        let (claim, reply) = match self.ask_to_open(at, path, words, asked.as_ref()) {
            Ok(asked) => asked,
            Err(error) => {
                chunk.inspect(|chunk| self.arena.give_chunk(*chunk));
                return Err(error);
            }
        };
        match chunk {
            Some(chunk) if reply.words[opened::FILE] == 0 => {
                self.take_carried(&claim, &reply, chunk).inspect_err(|_| self.arena.give_chunk(chunk))
            }
            Some(chunk) => {
                self.arena.give_chunk(chunk);
                self.take_opened(&claim, &reply)
            }
            None => self.take_opened(&claim, &reply),
        }
    }

    /// `words` behind the path: flags, mode, umask, whether the bytes will do, the directory if it is known.
    fn ask_to_open(
        &self,
        at: At,
        path: &[u8],
        words: [u64; 5],
        asked: Option<&Asked>,
    ) -> Result<(Claim<'_>, Reply)> {
        let claim = self.claim()?;
        let path_bytes = put_path(&claim, 0, path)?;
        let [flags, mode, umask, carry, parent] = words;
        let words = [at.word(), path_bytes, flags, mode, umask, carry, parent];
        let reply = claim.ask_whole(Operation::Open, &words)?;
        if reply.outcome != 0 {
            self.keep(asked, &reply, &[]);
        }
        result_of(reply.outcome)?;
        Ok((claim, reply))
    }

    /// A file that is open here alone.
    fn take_carried(&self, claim: &Claim<'_>, reply: &Reply, chunk: Chunk) -> Result<Opened> {
        let (flags, bytes) = (reply.words[opened::FLAGS], reply.words[opened::CARRIED_BYTES]);
        if flags & opened_flags::CARRIED == 0 || bytes > CARRIED_BYTES_MAX as u64 {
            return Err(Error::Errno(EPROTO));
        }
        if flags & (opened_flags::TAGGED | opened_flags::IMMUTABLE) == 0 {
            // It changed meanwhile.
            return Err(Error::Kernel);
        }
        let mut tag = [0; TAG_WORDS];
        if flags & opened_flags::TAGGED != 0 {
            claim.take_words(OPENED_TAG_AT, &mut tag);
        }
        // SAFETY: a chunk holds that many bytes and is ours alone now.
        unsafe { claim.take_raw(self.arena.chunk(chunk).as_ptr(), bytes as usize) }?;
        let file = File(self.arena.local_number(chunk));
        let attributes = reply.attributes(opened::ATTRIBUTES)?;
        let flags = flags & !(opened_flags::WINDOW | opened_flags::POSTS);
        let carried = Some((chunk, bytes));
        self.remember(file, Arrived { flags, carried, attributes: attributes.to_words(), tag })?;
        Ok(Opened { file, attributes, made: flags & opened_flags::MADE != 0 })
    }

    fn take_opened(&self, claim: &Claim<'_>, reply: &Reply) -> Result<Opened> {
        let file = File(reply.words[opened::FILE]);
        let mut flags = reply.words[opened::FLAGS];
        let bytes = reply.words[opened::CARRIED_BYTES];
        let mut tag = [0; TAG_WORDS];
        if flags & opened_flags::TAGGED != 0 {
            claim.take_words(OPENED_TAG_AT, &mut tag);
        }
        let lasting = flags & (opened_flags::IMMUTABLE | opened_flags::TAGGED) != 0;
        let mut carried = None;
        if flags & opened_flags::CARRIED != 0 && lasting && bytes <= CARRIED_BYTES_MAX as u64 {
            if let Some(chunk) = self.arena.take_chunk() {
                // SAFETY: a chunk holds that many bytes and is ours alone now.
                unsafe { claim.take_raw(self.arena.chunk(chunk).as_ptr(), bytes as usize) }?;
                carried = Some((chunk, bytes));
            }
        }
        if carried.is_none() {
            flags &= !opened_flags::CARRIED;
        }
        let attributes = reply.attributes(opened::ATTRIBUTES)?;
        self.remember(file, Arrived { flags, carried, attributes: attributes.to_words(), tag })?;
        Ok(Opened { file, attributes, made: flags & opened_flags::MADE != 0 })
    }

    /// A name by which the kernel finds an open file in the root of the mount, once, wherever its own names are.
    pub fn hand(&self, file: File) -> Result<[u8; HANDED_NAME_BYTES]> {
        let reply = self.claim()?.ask(Operation::Hand, &[file.0])?;
        Ok(handed_name([reply.words[0], reply.words[1]]))
    }

    /// fstat(2) of a file that is surely as it was when it was opened.
    #[inline]
    pub fn fstat_known(&self, file: File) -> Option<Attributes> {
        let used = self.enter(file).ok()?;
        let attributes = used.attributes();
        (used.flags() & opened_flags::IMMUTABLE != 0 || used.is_as_opened()).then_some(attributes)
    }

    /// fstat(2).
    pub fn fstat(&self, file: File) -> Result<Attributes> {
        let used = self.enter(file)?;
        let attributes = used.attributes();
        if used.flags() & opened_flags::IMMUTABLE != 0 || used.is_as_opened() {
            return Ok(attributes);
        }
        if file.is_local() {
            return Err(Error::Kernel);
        }
        self.claim()?.ask(Operation::FileStatus, &[file.0])?.attributes(0)
    }

    /// pread(2) into a slice.
    pub fn pread(&self, file: File, buffer: &mut [u8], offset: u64) -> Result<usize> {
        // SAFETY: a slice is writable.
        unsafe { self.pread_raw(file, buffer.as_mut_ptr(), buffer.len(), offset) }
    }

    /// pread(2).
    ///
    /// # Safety
    /// `to` must be writable for `count` bytes, as far as the caller wants to answer for faults.
    #[inline]
    pub unsafe fn pread_raw(&self, file: File, to: *mut u8, count: usize, offset: u64) -> Result<usize> {
        if i64::try_from(offset).is_err() {
            return Err(Error::Errno(EINVAL));
        }
        let used = self.enter(file)?;
        if let Some((bytes, length)) = used.carried() {
            let part = length.saturating_sub(offset).min(count as u64) as usize;
            let immutable = used.flags() & opened_flags::IMMUTABLE != 0;
            if part > 0 && (immutable || used.is_as_opened()) {
                // SAFETY: the range lies among the carried bytes, of which `length` are there.
                unsafe { self.copy(to, bytes.as_ptr().add(offset as usize), part, Situation::Hot) };
            }
            // A read tells what was there at some moment of it.
            if immutable || used.is_as_opened() {
                self.counters.local_reads.fetch_add(1, Relaxed);
                return Ok(part);
            }
        }
        if file.is_local() {
            return Err(Error::Kernel);
        }
        // A program sees what it wrote.
        self.settle(&used)?;
        if used.flags() & opened_flags::WINDOW != 0 {
            // SAFETY: the caller's word.
            if let Some(done) = unsafe { self.read_window(&used, to, count, offset) }? {
                return Ok(done);
            }
        }
        // SAFETY: the caller's word.
        unsafe { self.read_by_request(file, to, count, offset) }
    }

    /// None when the window is no help.
    ///
    /// # Safety
    /// As `pread_raw`.
    unsafe fn read_window(
        &self,
        used: &InUse<'_>,
        to: *mut u8,
        count: usize,
        offset: u64,
    ) -> Result<Option<usize>> {
        let (mut misses, mut furthest) = (0, None);
        loop {
            let missing = match used.window() {
                // SAFETY: the caller's word.
                Some(window) => match unsafe { window.read(self, to, count, offset) } {
                    // Before anybody else serves the file the channel has ended.
                    Found::Bytes(_) if self.has_ended() => return Err(Error::Gone),
                    Found::Bytes(done) => {
                        self.counters.local_reads.fetch_add(1, Relaxed);
                        return Ok(Some(done));
                    }
                    Found::Missing(at) => at,
                    Found::Stale | Found::Retired => offset,
                },
                None => offset,
            };
            self.counters.window_misses.fetch_add(1, Relaxed);
            misses = if furthest.is_some_and(|furthest| missing > furthest) { 1 } else { misses + 1 };
            furthest = furthest.max(Some(missing));
            let wanted = (count as u64).saturating_sub(missing.saturating_sub(offset));
            if misses > MISSES_MAX || !self.fetch(used, missing, wanted)? {
                return Ok(None);
            }
        }
    }

    /// Has the service make bytes at `offset` resident. False if there is no window for them.
    fn fetch(&self, used: &InUse<'_>, offset: u64, wanted: u64) -> Result<bool> {
        let reply = match self.claim()?.ask(Operation::Window, &[used.file.0, offset, wanted]) {
            Ok(reply) => reply,
            Err(Error::Errno(_)) => return Ok(false),
            Err(error) => return Err(error),
        };
        let present = used.window();
        if present.is_none_or(|window| window.is_retired()) {
            let name = [reply.words[window::NAME], reply.words[window::NAME_MORE]];
            match Window::map(self, name) {
                Ok(made) if used.keep_window(made, present) => {}
                Ok(_) => return Ok(false),
                // Too many descriptors or mappings: by request, then.
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    /// # Safety
    /// As `pread_raw`.
    unsafe fn read_by_request(&self, file: File, to: *mut u8, count: usize, offset: u64) -> Result<usize> {
        let claim = self.claim()?;
        let mut done = 0;
        while done < count {
            let part = (count - done).min(claim.capacity());
            let reply = claim.ask(Operation::Read, &[file.0, offset + done as u64, part as u64]);
            let got = match reply.and_then(|reply| reply.count(part)) {
                Ok(got) => got,
                // What was read before it counts.
                Err(Error::Errno(_)) if done > 0 => break,
                Err(error) => return Err(error),
            };
            // SAFETY: within the caller's bytes.
            unsafe { claim.take_raw(to.add(done), got) }?;
            done += got;
            if got < part {
                break;
            }
        }
        Ok(done)
    }
}
