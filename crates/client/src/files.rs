//! Open files as the program's side knows them.
//!
//! A file may be closed while another thread reads it. So whoever works with one is counted, and what belongs to it is taken down by the last.

use core::ptr::NonNull;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64};

use polytropo_wire::epochs::TAG_WORDS;
use polytropo_wire::message::{ATTRIBUTE_WORDS, Attributes, Operation, opened_flags};

use crate::arena::{Chunk, LOCAL};
use crate::channel::Channel;
use crate::windows::Window;
use crate::{EBADF, Error, Result};

/// An open file of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct File(pub(crate) u64);

impl File {
    /// For those who keep it as a number.
    pub fn to_number(self) -> u64 {
        self.0
    }

    /// A number that was no file's is answered EBADF when it is used.
    pub fn from_number(number: u64) -> Self {
        Self(number)
    }

    fn index(self) -> usize {
        (self.0 & 0xffff) as usize
    }

    /// The service has no such open file: its bytes came along, and do while nothing changes.
    pub(crate) fn is_local(self) -> bool {
        self.0 & LOCAL != 0
    }
}

/// Open, in the word of users.
const ALIVE: u32 = 1 << 31;
/// Closed, and the last user has yet to take it down.
const CLOSING: u32 = 1 << 30;

/// What is known of an open file; zeroed where there is none.
#[repr(C, align(64))]
pub struct FileState {
    users: AtomicU32,
    /// A chunk's word.
    chunk: AtomicU32,
    number: AtomicU64,
    pub(crate) flags: AtomicU64,
    carried_bytes: AtomicU64,
    /// Writes that returned and whose outcome is not known.
    pub(crate) posted: AtomicU32,
    /// Not 0: some write was posted since the file was opened.
    pub(crate) posted_any: AtomicU32,
    /// Error of such a write, to be told once.
    pub(crate) error: AtomicU32,
    window: AtomicPtr<u8>,
    window_bytes: AtomicU64,
    /// A window that was given up; others may read it yet. Unmapped with the file.
    former: AtomicPtr<u8>,
    former_bytes: AtomicU64,
    attributes: [AtomicU64; ATTRIBUTE_WORDS],
    /// As long as it holds, the attributes are those above, and the bytes those that came along. Zeros hold never.
    tag: [AtomicU64; TAG_WORDS],
}

/// What came with an open file.
pub(crate) struct Arrived {
    pub flags: u64,
    pub carried: Option<(Chunk, u64)>,
    pub attributes: [u64; ATTRIBUTE_WORDS],
    pub tag: [u64; TAG_WORDS],
}

/// A file in use by this thread.
pub(crate) struct InUse<'a> {
    channel: &'a Channel,
    pub state: &'a FileState,
    pub file: File,
}

impl FileState {
    pub fn was_used(&self) -> bool {
        self.number.load(Relaxed) != 0
    }

    pub fn unmap(&self) {
        for (base, bytes) in [(&self.window, &self.window_bytes), (&self.former, &self.former_bytes)] {
            let base = base.swap(core::ptr::null_mut(), AcqRel);
            let bytes = bytes.swap(0, AcqRel);
            if let Some(base) = NonNull::new(base) {
                Window::unmap(base, bytes);
            }
        }
    }
}

impl Channel {
    /// Remembers a file that the service just opened.
    pub(crate) fn remember(&self, file: File, arrived: Arrived) -> Result<()> {
        let Arrived { flags, carried, attributes, tag } = arrived;
        let state = self.arena.file(file.index()).ok_or(Error::Errno(crate::EPROTO))?;
        // A number that is still in use here is a service's mistake.
        if state.users.load(Acquire) & (ALIVE | CLOSING) != 0 {
            return Err(Error::Errno(crate::EPROTO));
        }
        state.number.store(file.0, Relaxed);
        state.flags.store(flags, Relaxed);
        state.posted.store(0, Relaxed);
        state.posted_any.store(0, Relaxed);
        state.error.store(0, Relaxed);
        state.chunk.store(Chunk::to_word(carried.map(|(chunk, _)| chunk)), Relaxed);
        state.carried_bytes.store(carried.map_or(0, |(_, bytes)| bytes), Relaxed);
        let words = state.attributes.iter().zip(attributes).chain(state.tag.iter().zip(tag));
        words.for_each(|(place, word)| place.store(word, Relaxed));
        state.users.fetch_or(ALIVE, Release);
        Ok(())
    }

    /// EBADF for a file that is not open.
    pub(crate) fn enter(&self, file: File) -> Result<InUse<'_>> {
        let state = self.arena.file(file.index()).ok_or(Error::Errno(EBADF))?;
        let before = state.users.fetch_add(1, Acquire);
        let entered = InUse { channel: self, state, file };
        if before & ALIVE != 0 && state.number.load(Relaxed) == file.0 {
            Ok(entered)
        } else {
            Err(Error::Errno(EBADF))
        }
    }

    /// The inode of an open file.
    pub fn inode_of(&self, file: File) -> Option<u64> {
        Some(self.enter(file).ok()?.attributes().ino)
    }

    /// Closes a file. Threads that read it right now finish first.
    pub fn close(&self, file: File) -> Result<()> {
        let entered = self.enter(file)?;
        // What failed is told now or never; the file is closed all the same.
        let settled = match self.settle_all(&entered) {
            Err(Error::Gone | Error::GoneAmid(_)) => self.settle_dead(&entered),
            told => told,
        };
        let close = |users: u32| (users & ALIVE != 0).then_some(users & !ALIVE | CLOSING);
        let closed = entered.state.users.fetch_update(AcqRel, Acquire, close);
        closed.map_err(|_| Error::Errno(EBADF))?;
        settled
    }
}

impl InUse<'_> {
    pub fn flags(&self) -> u64 {
        self.state.flags.load(Relaxed)
    }

    /// All bytes of the file, if they came with it.
    pub fn carried(&self) -> Option<(NonNull<u8>, u64)> {
        let chunk = Chunk::from_word(self.state.chunk.load(Relaxed))?;
        Some((self.channel.arena.chunk(chunk), self.state.carried_bytes.load(Relaxed)))
    }

    /// The tag of the open; zeros without one.
    pub fn tag(&self) -> [u64; TAG_WORDS] {
        core::array::from_fn(|at| self.state.tag[at].load(Relaxed))
    }

    /// Whether nothing of the file, of its name, and of who may open it by that, has changed since it was opened. All that was loaded before was true
    /// then.
    #[inline]
    pub fn is_as_opened(&self) -> bool {
        self.flags() & opened_flags::TAGGED != 0 && self.channel.tag_holds(&self.tag())
    }

    /// The attributes at the time of the open.
    pub fn attributes(&self) -> Attributes {
        let mut words = [0; ATTRIBUTE_WORDS];
        for (word, place) in words.iter_mut().zip(&self.state.attributes) {
            *word = place.load(Relaxed);
        }
        Attributes::from_words(&words)
    }

    pub fn window(&self) -> Option<Window> {
        let base = NonNull::new(self.state.window.load(Acquire))?;
        let bytes = self.state.window_bytes.load(Acquire);
        // Who exchanges the window writes the base before the size.
        let same = self.state.window.load(Acquire) == base.as_ptr();
        (same && bytes != 0).then(|| Window::at(base, bytes))
    }

    /// Keeps a window for this file, in place of `retired`, if there was one: that is unmapped with the file, because others may
    /// read it. If another thread was faster, its one is kept. False if a second one was given up: there is no place for more.
    pub fn keep_window(&self, (base, bytes): (NonNull<u8>, u64), retired: Option<Window>) -> bool {
        let (state, null) = (self.state, core::ptr::null_mut());
        let taken = match retired.map(|window| window.base().as_ptr()) {
            None => state.window.compare_exchange(null, base.as_ptr(), AcqRel, Acquire).is_ok(),
            // Who takes the place of the former one is the only one to exchange windows.
            Some(old) if state.former.compare_exchange(null, old, AcqRel, Acquire).is_ok() => {
                state.former_bytes.store(state.window_bytes.swap(0, AcqRel), Release);
                state.window.store(base.as_ptr(), Release);
                true
            }
            Some(_) => false,
        };
        if taken {
            // Readers look at the base first, and at nothing while this is 0.
            state.window_bytes.store(bytes, Release);
            return true;
        }
        Window::unmap(base, bytes);
        self.window().is_some_and(|window| !window.is_retired())
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        let state = self.state;
        let left = state.users.fetch_sub(1, AcqRel).wrapping_sub(1);
        // Of those who see the last one go, one takes it down.
        if left != CLOSING || state.users.compare_exchange(CLOSING, 0, AcqRel, Relaxed).is_err() {
            return;
        }
        state.unmap();
        let number = state.number.load(Relaxed);
        // The last thing for a file that is open here alone: whoever takes the chunk takes the place.
        if let Some(chunk) = Chunk::from_word(state.chunk.swap(0, AcqRel)) {
            self.channel.arena.give_chunk(chunk);
        }
        if File(number).is_local() {
            return;
        }
        // A service that is gone has closed it.
        let _ = self.channel.claim().and_then(|claim| claim.post(Operation::Close, &[number]));
    }
}
