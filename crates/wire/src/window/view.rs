//! A window's header and words, as readers look at them and as the service changes them. Both halves stand here because they are
//! one protocol: `tests/loom.rs` tries every interleaving of them.

use super::{BLOCK_BYTES, Header, KEPT, ONE_GENERATION, RESIDENT, SIZE_UNKNOWN};
use crate::sync::{Acquire, AtomicU64, Fault, Relaxed, Release, SeqCst, fence, has};

/// What a read of a window found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// So many bytes, up to the end of the file if fewer than asked for.
    Bytes(usize),
    /// The bytes at this offset are not there: ask for them.
    Missing(u64),
    /// The size is not known: ask the service.
    Stale,
    /// Given up: ask for another window.
    Retired,
}

/// The words of one window.
#[derive(Clone, Copy)]
pub struct View<'a> {
    header: &'a Header,
    words: &'a [AtomicU64],
}

/// How often a file has changed, as far as the service was told. It lies under a lock that the service holds while it
/// changes the window: having it at hand proves that.
#[derive(Debug, Default)]
pub struct Changes(u64);

impl Changes {
    pub fn count(&self) -> u64 {
        self.0
    }
}

impl<'a> View<'a> {
    /// One word for each block.
    pub fn new(header: &'a Header, words: &'a [AtomicU64]) -> Self {
        Self { header, words }
    }

    pub fn blocks(&self) -> u64 {
        self.words.len() as u64
    }

    fn word(&self, block: u64) -> Option<&'a AtomicU64> {
        self.words.get(usize::try_from(block).ok()?)
    }

    /// None while it is not known.
    pub fn size_bytes(&self) -> Option<u64> {
        Some(self.header.size_bytes.load(Acquire)).filter(|size| *size != SIZE_UNKNOWN)
    }

    pub fn is_resident(&self, block: u64) -> bool {
        self.word(block).is_some_and(|word| word.load(Acquire) & RESIDENT != 0)
    }

    /// Its bytes are in place, but readers have to ask.
    pub fn is_hidden(&self, block: u64) -> bool {
        self.word(block).is_some_and(|word| word.load(Acquire) & (RESIDENT | KEPT) == KEPT)
    }

    pub fn is_retired(&self) -> bool {
        self.header.retired.load(Acquire) != 0
    }

    /// Reads `count` bytes at `offset`: `copy` is told how many were copied before, from where in the file the next ones come, and how
    /// many. What it copied means nothing unless this returns `Bytes`.
    #[inline]
    pub fn read(&self, count: usize, offset: u64, mut copy: impl FnMut(usize, u64, usize)) -> Found {
        if self.is_retired() {
            return Found::Retired;
        }
        let size = self.header.size_bytes.load(Acquire);
        if size == SIZE_UNKNOWN || size > self.blocks() * BLOCK_BYTES {
            return Found::Stale;
        }
        let count = size.saturating_sub(offset).min(count as u64) as usize;
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let Some(word) = self.word(at / BLOCK_BYTES) else { return Found::Stale };
            let part = ((BLOCK_BYTES - at % BLOCK_BYTES) as usize).min(count - done);
            if !self.read_block(word, size, || copy(done, at, part)) {
                let same = self.header.size_bytes.load(Acquire) == size;
                return if same { Found::Missing(at) } else { Found::Stale };
            }
            done += part;
        }
        Found::Bytes(count)
    }

    /// What `copy` copied counts if the block was there, and has not changed meanwhile, nor has the size.
    #[inline]
    fn read_block(&self, word: &AtomicU64, size: u64, copy: impl FnOnce()) -> bool {
        let before = word.load(Acquire);
        if before & RESIDENT == 0 {
            return false;
        }
        copy();
        if has(Fault::ReaderLooksOnce) {
            return true;
        }
        // The copy's loads come before the second looks.
        if !has(Fault::ReaderWithoutFence) {
            fence(Acquire);
        }
        word.load(Relaxed) == before
            && (has(Fault::ReaderForgetsSize) || self.header.size_bytes.load(Relaxed) == size)
    }

    /// Puts a block's bytes in place by `put`; false, and nothing is done, if the file has changed since there were `seen` changes.
    pub fn fill<E>(
        &self,
        changes: &Changes,
        seen: u64,
        block: u64,
        put: impl FnOnce() -> Result<(), E>,
    ) -> Result<bool, E> {
        let Some(word) = self.word(block) else { return Ok(false) };
        if changes.0 != seen && !has(Fault::FillAfterChange) {
            return Ok(false);
        }
        if word.load(Relaxed) & RESIDENT == 0 {
            if has(Fault::WordBeforeBytes) {
                show(word);
            }
            put()?;
            show(word);
        }
        Ok(true)
    }

    /// Readers have to ask for the block, whose bytes stay in place. False if it is not there.
    pub fn hide(&self, _changes: &Changes, block: u64) -> bool {
        let Some(word) = self.word(block) else { return false };
        let seen = word.load(Relaxed);
        if seen & RESIDENT != 0 {
            word.store(next(seen) & !RESIDENT, Release);
        }
        seen & RESIDENT != 0
    }

    /// Shows a block again that was hidden; false if its bytes are not in place.
    pub fn show_again(&self, _changes: &Changes, block: u64) -> bool {
        let Some(word) = self.word(block) else { return false };
        match word.load(Relaxed) & (RESIDENT | KEPT) {
            KEPT => show(word),
            bits => return bits & RESIDENT != 0,
        }
        true
    }

    /// From here on no reader believes what it copies of the block, so its bytes may be changed. Tells whether they were in place.
    pub fn take_back(&self, _changes: &Changes, block: u64) -> bool {
        let Some(word) = self.word(block) else { return false };
        let seen = word.load(Relaxed);
        if seen & (RESIDENT | KEPT) == 0 {
            return false;
        }
        let kept = if has(Fault::HiddenKept) { KEPT } else { 0 };
        word.store(next(seen) & !(RESIDENT | KEPT) | kept, Release);
        // A reader that sees bytes of after this must see the word of before them.
        if !has(Fault::WordWithoutFence) {
            fence(SeqCst);
        }
        true
    }

    /// The file was changed from `offset` on as `put` does it: of each block that is in place, it is told where the bytes are that it is to
    /// change, and how many. What is being filled meanwhile does not count.
    pub fn change(
        &self,
        changes: &mut Changes,
        (offset, count): (u64, u64),
        size_bytes: u64,
        mut put: impl FnMut(u64, u64),
    ) {
        if !has(Fault::ChangeUncounted) {
            changes.0 += 1;
        }
        let (mut at, end) = (offset, offset.saturating_add(count));
        while at < end {
            let block = at / BLOCK_BYTES;
            let part = (BLOCK_BYTES - at % BLOCK_BYTES).min(end - at);
            let Some(word) = self.word(block) else { break };
            let bits = word.load(Relaxed) & (RESIDENT | KEPT);
            if self.take_back(changes, block) {
                put(at, part);
                // As it was before: hidden ones stay hidden.
                word.store(next(word.load(Relaxed)) | bits, Release);
            }
            at += part;
        }
        let known = self.header.size_bytes.load(Relaxed);
        if known != SIZE_UNKNOWN && known < size_bytes {
            self.header.size_bytes.store(size_bytes, Release);
        }
    }

    /// False, and nothing is done, if the file has changed since there were `seen` changes.
    pub fn set_size(&self, changes: &Changes, seen: u64, size_bytes: u64) -> bool {
        let current = changes.0 == seen || has(Fault::SizeAfterChange);
        if current {
            self.header.size_bytes.store(size_bytes, Release);
        }
        current
    }

    /// The file has changed, nobody knows where: nothing here counts any more.
    pub fn forget(&self, changes: &mut Changes) {
        changes.0 += 1;
        if !has(Fault::SizeKept) {
            self.header.size_bytes.store(SIZE_UNKNOWN, Release);
        }
        if !has(Fault::BlocksKept) {
            for block in 0..self.blocks() {
                self.take_back(changes, block);
            }
        }
    }

    /// For good: who has this window has to ask for another.
    pub fn retire(&self, changes: &mut Changes) {
        self.header.retired.store(1, Release);
        self.forget(changes);
    }
}

fn show(word: &AtomicU64) {
    word.store(next(word.load(Relaxed)) | RESIDENT | KEPT, Release);
}

fn next(word: u64) -> u64 {
    if has(Fault::SameGeneration) { word } else { word.wrapping_add(ONE_GENERATION) }
}
