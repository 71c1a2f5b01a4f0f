//! Questions about paths: answered from what is kept where it is still true, else asked, and kept.

use core::sync::atomic::Ordering::Relaxed;

use polytropo_wire::epochs::TAG_WORDS;
use polytropo_wire::message::{Attributes, Operation, TAG_AT, outcome};

use crate::channel::{Channel, Reply, result_of};
use crate::entry::{ANSWER_WORDS, Answer, TEXT_WORDS};
use crate::files::File;
use crate::lookups::Asked;
use crate::operations::{At, put_path};
use crate::{EPROTO, Error, Result};

/// Flags of open(2) with which a missing name is more, or something else, than a missing name: O_CREAT, O_NOFOLLOW, and O_TMPFILE without
/// its O_DIRECTORY.
const NOT_ONLY_OPENED: u32 = 0o100 | 0o400_000 | 0o20_000_000;

/// Tells what is kept of opens that succeeded from what is kept of failures.
const KEPT_OPEN: u32 = 1;

impl Channel {
    pub(crate) fn asked(
        &self,
        operation: Operation,
        at: At,
        path: &[u8],
        mode: u32,
        flags: u32,
    ) -> Option<Asked> {
        self.lookups.as_ref()?;
        Asked::new(operation as u64 | u64::from(mode) << 8 | u64::from(flags) << 32, at.word(), path)
    }

    /// Whether answers are ever kept. If not, the kernel is nearer than the service.
    pub fn keeps_answers(&self) -> bool {
        self.lookups.is_some()
    }

    /// What an open asks first.
    pub(crate) fn asked_by_open(&self, at: At, path: &[u8], flags: u32) -> Option<Asked> {
        if flags & NOT_ONLY_OPENED != 0 {
            return None;
        }
        // With O_DIRECTORY, for writing and so on there are other failures. The access mode and the flags tell them apart.
        self.asked(Operation::Open, at, path, 0, flags)
    }

    /// An answer that is kept and still true.
    #[inline]
    pub(crate) fn recall(&self, asked: &Asked, at: At, target: &mut [u64]) -> Option<Answer> {
        let lookups = self.lookups.as_ref().filter(|_| !self.has_ended())?;
        // A file that was closed answers nothing.
        let _used = match at {
            At::File(file) => Some(self.enter(file).ok()?),
            At::Root | At::Inode(_) => None,
        };
        let answer = lookups.recall(asked, target)?;
        self.counters.local_answers.fetch_add(1, Relaxed);
        Some(answer)
    }

    #[inline]
    pub(crate) fn tag_holds(&self, tag: &[u64; TAG_WORDS]) -> bool {
        !self.has_ended() && self.lookups.as_ref().is_some_and(|lookups| lookups.tag_holds(tag))
    }

    /// What was kept for this open by `keep_open`, while the name leads to the same file that may be opened the same way, and nothing of it
    /// has changed; `Error::Kernel` if the kernel has to open it.
    #[inline]
    pub fn open_known(&self, at: At, path: &[u8], flags: u32) -> Option<Result<u64>> {
        let known = self.known(Operation::Open, at, path, KEPT_OPEN, flags)?;
        Some(result_of(known.outcome).map(|()| known.words[0]))
    }

    /// Keeps a word for the open that gave `file`, or that the kernel has to open what it gave. False if that cannot be kept.
    pub fn keep_open(&self, at: At, path: &[u8], flags: u32, file: File, word: Option<u64>) -> bool {
        let Some(asked) = self.asked(Operation::Open, at, path, KEPT_OPEN, flags) else { return false };
        let (Some(lookups), Ok(used)) = (&self.lookups, self.enter(file)) else { return false };
        if !used.is_as_opened() {
            return false;
        }
        let outcome = if word.is_some() { 0 } else { outcome::KERNEL };
        let mut words = [0; ANSWER_WORDS];
        words[0] = word.unwrap_or(0);
        lookups.keep(&asked, &Answer { outcome, words }, &used.tag(), &[]);
        true
    }

    /// Keeps an answer if the service says that it may be.
    pub(crate) fn keep(&self, asked: Option<&Asked>, reply: &Reply, target: &[u64]) {
        let (Some(lookups), Some(asked)) = (&self.lookups, asked) else { return };
        let tag = reply.words.get(TAG_AT..).and_then(|words| words.try_into().ok());
        let words = reply.words.get(..ANSWER_WORDS).and_then(|words| words.try_into().ok());
        if let (Some(tag), Some(words)) = (tag, words) {
            let tag: [u64; TAG_WORDS] = tag;
            lookups.keep(asked, &Answer { outcome: reply.outcome, words }, &tag, target);
        }
    }

    /// Whatever has no more to say than its words.
    fn ask_about(
        &self,
        operation: Operation,
        at: At,
        path: &[u8],
        mode: u32,
        flags: u32,
        words: &[u64],
    ) -> Result<[u64; ANSWER_WORDS]> {
        let asked = self.asked(operation, at, path, mode, flags);
        if let Some(known) = asked.as_ref().and_then(|asked| self.recall(asked, at, &mut [])) {
            return result_of(known.outcome).map(|()| known.words);
        }
        let claim = self.claim()?;
        let path_bytes = put_path(&claim, 0, path)?;
        let mut request = [0; 4];
        (request[0], request[1]) = (at.word(), path_bytes);
        for (place, word) in request.iter_mut().skip(2).zip(words) {
            *place = *word;
        }
        let reply = claim.ask_whole(operation, &request)?;
        self.keep(asked.as_ref(), &reply, &[]);
        result_of(reply.outcome)?;
        reply.words.get(..ANSWER_WORDS).and_then(|words| words.try_into().ok()).ok_or(Error::Errno(EPROTO))
    }

    /// What is kept, without asking.
    #[inline]
    fn known(&self, operation: Operation, at: At, path: &[u8], mode: u32, flags: u32) -> Option<Answer> {
        self.recall(&self.asked(operation, at, path, mode, flags)?, at, &mut [])
    }

    /// `stat`, if it is known without a request.
    #[inline]
    pub fn stat_known(&self, at: At, path: &[u8], flags: u32) -> Option<Result<Attributes>> {
        let known = self.known(Operation::Status, at, path, 0, flags)?;
        Some(result_of(known.outcome).map(|()| Attributes::from_words(&known.words)))
    }

    /// `access`, if it is known without a request.
    #[inline]
    pub fn access_known(&self, at: At, path: &[u8], mode: u32, flags: u32) -> Option<Result<()>> {
        Some(result_of(self.known(Operation::Access, at, path, mode.min(255), flags)?.outcome))
    }

    /// `read_link`, if it is known without a request.
    pub fn read_link_known(&self, at: At, path: &[u8], buffer: &mut [u8]) -> Option<Result<usize>> {
        let mut target = [0; TEXT_WORDS];
        let asked = self.asked(Operation::ReadLink, at, path, 0, 0)?;
        let known = self.recall(&asked, at, &mut target)?;
        Some(result_of(known.outcome).map(|()| take_words(&target, known.words[0], buffer)))
    }

    /// fstatat(2) with its flags.
    #[inline]
    pub fn stat(&self, at: At, path: &[u8], flags: u32) -> Result<Attributes> {
        let words = self.ask_about(Operation::Status, at, path, 0, flags, &[flags.into()])?;
        Ok(Attributes::from_words(&words))
    }

    /// faccessat2(2) with effective ids.
    pub fn access(&self, at: At, path: &[u8], mode: u32, flags: u32) -> Result<()> {
        self.ask_about(Operation::Access, at, path, mode.min(255), flags, &[mode.into(), flags.into()])
            .map(drop)
    }

    /// readlinkat(2).
    pub fn read_link(&self, at: At, path: &[u8], buffer: &mut [u8]) -> Result<usize> {
        if let Some(known) = self.read_link_known(at, path, buffer) {
            return known;
        }
        let mut target = [0; TEXT_WORDS];
        let asked = self.asked(Operation::ReadLink, at, path, 0, 0);
        let claim = self.claim()?;
        let path_bytes = put_path(&claim, 0, path)?;
        let reply = claim.ask_whole(Operation::ReadLink, &[at.word(), path_bytes])?;
        if reply.outcome != 0 {
            self.keep(asked.as_ref(), &reply, &[]);
            result_of(reply.outcome)?;
        }
        let whole = reply.count(claim.capacity())?;
        let count = whole.min(buffer.len());
        // SAFETY: the slice holds that many bytes.
        unsafe { claim.take_raw(buffer.as_mut_ptr(), count) }?;
        if asked.as_ref().is_some_and(|asked| whole <= asked.room_bytes()) && count == whole {
            put_words(&buffer[..count], &mut target);
            self.keep(asked.as_ref(), &reply, &target);
        }
        Ok(count)
    }
}

fn put_words(bytes: &[u8], words: &mut [u64]) {
    for (word, chunk) in words.iter_mut().zip(bytes.chunks(8)) {
        *word = chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
}

fn take_words(words: &[u64], count: u64, buffer: &mut [u8]) -> usize {
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(buffer.len()).min(words.len() * 8);
    for (chunk, word) in buffer[..count].chunks_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
    count
}
