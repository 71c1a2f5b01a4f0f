//! One kept answer: words that are read and written by many threads, and by signal handlers that come in between, without a lock.
//!
//! A writer makes the sequence number odd, so others pass by; a reader looks at it before and after. A writer that never goes on
//! (its thread was killed, or a handler jumped out of it) leaves a place that is used no more.

use polytropo_wire::epochs::{Epoch, TAG_WORDS, Tag};
use polytropo_wire::sync::{AcqRel, Acquire, AtomicU64, Relaxed, Release, fence};

/// Words of an answer: attributes, or how long a link's target is.
pub const ANSWER_WORDS: usize = 13;
/// Words of what was asked, and of a link's target.
pub const TEXT_WORDS: usize = 40;

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question<'a> {
    /// Which operation with which flags.
    pub kind: u64,
    /// Where the path begins.
    pub at: u64,
    /// The path's bytes, with zeros after them.
    pub path: &'a [u64],
    pub path_bytes: usize,
    pub hash: u64,
}

/// What was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// As in the slot of a request.
    pub outcome: u32,
    pub words: [u64; ANSWER_WORDS],
}

/// A place for one answer.
#[repr(C, align(64))]
pub struct Entry {
    sequence: AtomicU64,
    hash: AtomicU64,
    kind: AtomicU64,
    at: AtomicU64,
    /// Outcome above, bytes of the path below.
    outcome: AtomicU64,
    tag: [AtomicU64; TAG_WORDS],
    answer: [AtomicU64; ANSWER_WORDS],
    text: [AtomicU64; TEXT_WORDS],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Entry>() == 512);

impl Entry {
    /// The answer to `question`, if it is here and still true. `target` gets the bytes of a link's target, as far as it has room.
    #[inline]
    pub fn recall(&self, question: &Question<'_>, epochs: &[Epoch], target: &mut [u64]) -> Option<Answer> {
        let sequence = self.sequence.load(Acquire);
        if sequence & 1 != 0
            || self.hash.load(Relaxed) != question.hash
            || self.kind.load(Relaxed) != question.kind
            || self.at.load(Relaxed) != question.at
        {
            return None;
        }
        let outcome = self.outcome.load(Relaxed);
        if outcome as u32 as usize != question.path_bytes {
            return None;
        }
        let path = self.text.get(..question.path.len())?;
        if !path.iter().zip(question.path).all(|(kept, asked)| kept.load(Relaxed) == *asked) {
            return None;
        }
        let mut tag = [0; TAG_WORDS];
        copy(&self.tag, &mut tag);
        let mut words = [0; ANSWER_WORDS];
        copy(&self.answer, &mut words);
        copy(self.text.get(question.path.len()..)?, target);
        fence(Acquire);
        if self.sequence.load(Relaxed) != sequence || !Tag::words_hold(&tag, epochs) {
            return None;
        }
        Some(Answer { outcome: (outcome >> 32) as u32, words })
    }

    /// Whether something else may be put here without loss.
    pub fn is_stale(&self, epochs: &[Epoch]) -> bool {
        let mut tag = [0; TAG_WORDS];
        copy(&self.tag, &mut tag);
        !Tag::words_hold(&tag, epochs)
    }

    /// Whether the same was asked here.
    pub fn is_of(&self, question: &Question<'_>) -> bool {
        self.hash.load(Relaxed) == question.hash && self.at.load(Relaxed) == question.at
    }

    /// Keeps an answer. Does nothing if somebody else is at it.
    pub fn keep(&self, question: &Question<'_>, answer: &Answer, tag: &[u64; TAG_WORDS], target: &[u64]) {
        let sequence = self.sequence.load(Relaxed);
        let free = sequence & 1 == 0;
        if !free || self.sequence.compare_exchange(sequence, sequence + 1, AcqRel, Relaxed).is_err() {
            return;
        }
        // Whoever sees any of the words below sees that the number is odd.
        fence(Release);
        self.hash.store(question.hash, Relaxed);
        self.kind.store(question.kind, Relaxed);
        self.at.store(question.at, Relaxed);
        self.outcome.store(u64::from(answer.outcome) << 32 | question.path_bytes as u64, Relaxed);
        put(tag, &self.tag);
        put(&answer.words, &self.answer);
        put(question.path, &self.text);
        put(target, self.text.get(question.path.len()..).unwrap_or(&[]));
        self.sequence.store(sequence.wrapping_add(2), Release);
    }
}

fn copy(from: &[AtomicU64], to: &mut [u64]) {
    for (place, word) in to.iter_mut().zip(from) {
        *place = word.load(Relaxed);
    }
}

fn put(from: &[u64], to: &[AtomicU64]) {
    for (place, word) in to.iter().zip(from) {
        place.store(*word, Relaxed);
    }
}
