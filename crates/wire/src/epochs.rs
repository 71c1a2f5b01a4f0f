//! The epoch table: counters of changes, which programs see and only the service writes.
//!
//! A program may keep an answer together with a [`Tag`]: which counters the answer depends on (one for each name on the way, one for
//! the inode that it tells of, and the counter of everything, which also counts changes of who may search which directory) and what they were. The answer stands as long as the tag [holds](Tag::holds).
//!
//! - Who changes something [begins](Epoch::begin) before any of it can be seen, and [ends](Epoch::end) when all of it can. Both
//!   are counted, so no lock has to be held in between, and changes of one thing, or of two that share a counter, may overlap.
//! - Who answers takes a [sample](Epoch::sample) before looking at the thing. While a change is under way there is none: an answer
//!   from then may be of before the change or of after it.
//! - Who uses an answer looks at the counters after the last load of the answer, or of all answers that are used together: then there
//!   was a moment, after the use began, when all of them were true.
//!
//! A counter never returns to what it was, so of many counters the sum is enough.

use crate::sync::{AcqRel, Acquire, AtomicU64, Release, SeqCst, fence};

pub const MAGIC: u64 = u64::from_le_bytes(*b"POLYEPOC");
/// Counters of one table. Inodes that share one are taken for each other, which costs a request and no more.
pub const COUNTERS: usize = 16_384;
pub const COUNTERS_AT: usize = 4096;
pub const TOTAL_BYTES: usize = COUNTERS_AT + COUNTERS * size_of::<Epoch>();
/// Every answer depends on it: bumped by what cannot be told in inodes.
pub const EVERYTHING: u16 = 0;

/// Begins the table.
#[repr(C)]
pub struct Header {
    pub magic: AtomicU64,
    pub version: AtomicU64,
    pub counters: AtomicU64,
}

const _: () = assert!(COUNTERS.is_power_of_two() && COUNTERS <= 1 << 16);

/// One counter: changes that are under way in the low bits, all that ever began above.
#[repr(transparent)]
pub struct Epoch(AtomicU64);

/// Changes of one counter that can be under way at once: far more than a service has threads.
const UNDER_WAY: u64 = 0xffff;
const BEGUN: u64 = UNDER_WAY + 1;

impl Default for Epoch {
    fn default() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl Epoch {
    /// A change begins: no answer of before holds any more. Nothing of the change may be visible yet.
    pub fn begin(&self) {
        self.0.fetch_add(BEGUN + 1, AcqRel);
        // Whoever sees anything of the change sees the count, too.
        fence(SeqCst);
    }

    /// All of the change can be seen.
    pub fn end(&self) {
        self.0.fetch_sub(1, Release);
    }

    /// What an answer may be tagged with; None while a change is under way.
    pub fn sample(&self) -> Option<u64> {
        let seen = self.now();
        (seen & UNDER_WAY == 0).then_some(seen)
    }

    /// For comparing with samples.
    pub fn now(&self) -> u64 {
        self.0.load(Acquire)
    }
}

/// Counters that one answer may depend on; those with more are not kept.
pub const DEPENDENCIES_MAX: usize = 16;
/// Words of a tag in a reply.
pub const TAG_WORDS: usize = 2 + DEPENDENCIES_MAX / 4;

/// What an answer depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    sum: u64,
    counters: [u16; DEPENDENCIES_MAX],
    count: u16,
    /// A sample was missing, or there was no room for one.
    spoilt: bool,
}

impl Tag {
    /// Depends on one more counter, of which `sample` was taken before what it counts was looked at.
    pub fn add(&mut self, counter: u16, sample: Option<u64>) {
        match (sample, self.counters.get_mut(usize::from(self.count))) {
            (Some(sample), Some(place)) => {
                *place = counter;
                self.count += 1;
                self.sum = self.sum.wrapping_add(sample);
            }
            _ => self.spoilt = true,
        }
    }

    /// The answer cannot be kept.
    pub fn spoil(&mut self) {
        self.spoilt = true;
    }

    /// Whether an answer may be kept at all.
    pub fn is_good(&self) -> bool {
        !self.spoilt && self.count > 0
    }

    /// Whether an answer with this tag is still true. `epochs` are the table's; all of the answer was loaded before.
    #[inline]
    pub fn holds(&self, epochs: &[Epoch]) -> bool {
        Self::words_hold(&self.to_words(), epochs)
    }

    /// The same of a tag as it lies in a reply.
    #[inline]
    pub fn words_hold(words: &[u64; TAG_WORDS], epochs: &[Epoch]) -> bool {
        fence(Acquire);
        let count = words[1] as usize;
        if count == 0 || count > DEPENDENCIES_MAX {
            return false;
        }
        let mut sum = 0u64;
        for at in 0..count {
            let counter = (words[2 + at / 4] >> (at % 4 * 16)) as u16;
            let Some(epoch) = epochs.get(usize::from(counter)) else { return false };
            sum = sum.wrapping_add(epoch.now());
        }
        sum == words[0]
    }

    pub fn to_words(&self) -> [u64; TAG_WORDS] {
        let mut words = [0; TAG_WORDS];
        words[0] = self.sum;
        words[1] = if self.spoilt { 0 } else { self.count.into() };
        for (word, counters) in words[2..].iter_mut().zip(self.counters.chunks_exact(4)) {
            *word = counters.iter().rev().fold(0, |word, counter| word << 16 | u64::from(*counter));
        }
        words
    }

    /// Words that make no sense are a tag that is not good.
    pub fn from_words(words: &[u64; TAG_WORDS]) -> Self {
        let mut counters = [0; DEPENDENCIES_MAX];
        for (place, counters) in words[2..].iter().zip(counters.chunks_exact_mut(4)) {
            for (at, counter) in counters.iter_mut().enumerate() {
                *counter = (place >> (16 * at)) as u16;
            }
        }
        let count = u16::try_from(words[1]).ok().filter(|count| usize::from(*count) <= DEPENDENCIES_MAX);
        Self { sum: words[0], counters, count: count.unwrap_or(0), spoilt: count.is_none() }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn holds_until_something_begins() {
        let epochs: [Epoch; 4] = core::array::from_fn(|_| Epoch::default());
        let mut tag = Tag::default();
        assert!(!tag.is_good() && !tag.holds(&epochs));
        [1, 3].into_iter().for_each(|at| tag.add(at, epochs[usize::from(at)].sample()));
        assert!(tag.is_good() && tag.holds(&epochs));
        epochs[2].begin();
        assert!(tag.holds(&epochs));
        epochs[3].begin();
        assert!(!tag.holds(&epochs) && epochs[3].sample().is_none());
        epochs[3].end();
        assert!(!tag.holds(&epochs) && epochs[3].sample().is_some());
        assert!(!tag.holds(&epochs[..2]));
    }

    #[test]
    fn what_was_not_sampled_is_not_kept() {
        let epochs = [Epoch::default()];
        let mut tag = Tag::default();
        epochs[0].begin();
        tag.add(0, epochs[0].sample());
        epochs[0].end();
        assert!(!tag.is_good() && !tag.holds(&epochs));
        let mut tag = Tag::default();
        (0..=DEPENDENCIES_MAX).for_each(|_| tag.add(0, epochs[0].sample()));
        assert!(!tag.is_good());
        assert!(!Tag::from_words(&tag.to_words()).is_good());
    }

    #[test]
    fn tags_survive_the_way() {
        let mut tag = Tag::default();
        (0..7).for_each(|at| tag.add(at * 9000, Some(u64::from(at) << 40)));
        assert_eq!(Tag::from_words(&tag.to_words()), tag);
        assert!(!Tag::from_words(&[1, 17, 0, 0, 0, 0]).is_good());
        assert!(!Tag::from_words(&[u64::MAX; TAG_WORDS]).is_good());
    }
}
