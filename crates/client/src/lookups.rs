//! The look-up cache: what the service answered about paths, kept as long as the epochs that it depends on stand still.
//!
//! The key is the question as it was asked (operation, flags, where the path begins, the whole path), so a known path costs one probe,
//! however long it is. The service walks, weighs permissions for this process, and says with each answer what it depends on; that
//! nothing changed is seen in the table of epochs, which only the service writes.

use core::mem::MaybeUninit;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use polytropo_wire::VERSION;
use polytropo_wire::epochs::{COUNTERS, COUNTERS_AT, Epoch, Header, MAGIC, TAG_WORDS, TOTAL_BYTES, Tag};

use crate::entry::{Answer, Entry, Question, TEXT_WORDS};
use crate::sys::{Descriptor, Errno, Mapping};

/// Answers that are kept, 512 bytes each; memory is taken as it is used.
const ENTRIES: usize = 8192;
/// Places where one answer may be.
const WAYS: usize = 4;
/// Longest path whose answers are kept.
pub const PATH_BYTES_MAX: usize = TEXT_WORDS * 8;

/// See the module.
pub struct Lookups {
    entries: Mapping,
    epochs: Mapping,
    /// Which of several true answers has to go, in turn.
    turn: AtomicU64,
}

/// A path as words, for hashing and comparing.
pub struct Asked {
    /// The first `count` are there; the others are not even zeros, which would take as long as the rest.
    words: [MaybeUninit<u64>; TEXT_WORDS],
    count: usize,
    bytes: usize,
    kind: u64,
    at: u64,
    hash: u64,
}

impl Asked {
    /// None for what is not kept.
    #[inline(always)]
    pub fn new(kind: u64, at: u64, path: &[u8]) -> Option<Self> {
        if path.len() > PATH_BYTES_MAX {
            return None;
        }
        let mut words = [const { MaybeUninit::uninit() }; TEXT_WORDS];
        // Turned, since `mix` does not look at the lowest bit of what it multiplies by.
        let mut hash = mix(kind ^ 0x243f_6a88_85a3_08d3, at.rotate_left(1) ^ 0x1319_8a2e_0370_7344);
        let mut count = 0;
        for (place, chunk) in words.iter_mut().zip(path.chunks(8)) {
            let word = match <[u8; 8]>::try_from(chunk) {
                Ok(whole) => u64::from_le_bytes(whole),
                Err(_) => chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
            };
            place.write(word);
            hash = mix(hash ^ word, 0xa409_3822_299f_31d1);
            count += 1;
        }
        let hash = mix(hash ^ path.len() as u64, 0x082e_fa98_ec4e_6c89);
        Some(Self { words, count, bytes: path.len(), kind, at, hash })
    }

    fn question(&self) -> Question<'_> {
        // SAFETY: `new` wrote that many, all of which lie in the array.
        let path = unsafe { core::slice::from_raw_parts(self.words.as_ptr().cast::<u64>(), self.count) };
        Question { kind: self.kind, at: self.at, path, path_bytes: self.bytes, hash: self.hash }
    }

    /// Room for a link's target beside the path.
    pub fn room_bytes(&self) -> usize {
        (TEXT_WORDS - self.count) * 8
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b | 1);
    product as u64 ^ (product >> 64) as u64
}

impl Lookups {
    /// Maps the table of epochs.
    pub fn over(table: &Descriptor) -> Result<Self, Errno> {
        let epochs = Mapping::shared(table, TOTAL_BYTES, false)?;
        let entries = Mapping::anonymous(ENTRIES * size_of::<Entry>())?;
        let made = Self { entries, epochs, turn: AtomicU64::new(0) };
        let header = made.header();
        let known = header.magic.load(Relaxed) == MAGIC
            && header.version.load(Relaxed) == u64::from(VERSION)
            && header.counters.load(Relaxed) == COUNTERS as u64;
        if known { Ok(made) } else { Err(crate::EPROTO) }
    }

    fn header(&self) -> &Header {
        // SAFETY: it lies at the mapping's base, page-aligned, and is made of atomics.
        unsafe { self.epochs.base().cast().as_ref() }
    }

    #[inline]
    pub fn epochs(&self) -> &[Epoch] {
        // SAFETY: that many counters lie in the mapping, whose memory is sealed in its size, aligned; they are atomics, read only.
        unsafe {
            NonNull::slice_from_raw_parts(self.epochs.base().add(COUNTERS_AT).cast::<Epoch>(), COUNTERS)
                .as_ref()
        }
    }

    #[inline]
    fn ways(&self, hash: u64) -> &[Entry] {
        let first = hash as usize % (ENTRIES / WAYS) * WAYS;
        // SAFETY: that many entries lie in the mapping from there on, aligned, zeroed at first; they are made of atomics.
        unsafe {
            NonNull::slice_from_raw_parts(self.entries.base().cast::<Entry>().add(first), WAYS).as_ref()
        }
    }

    /// What the service answered, if that is still true. `target` gets the words of a link's target.
    #[inline]
    pub fn recall(&self, asked: &Asked, target: &mut [u64]) -> Option<Answer> {
        let question = asked.question();
        self.ways(asked.hash).iter().find_map(|entry| entry.recall(&question, self.epochs(), target))
    }

    /// Keeps an answer, if it can be.
    pub fn keep(&self, asked: &Asked, answer: &Answer, tag: &[u64; TAG_WORDS], target: &[u64]) {
        let (question, epochs) = (asked.question(), self.epochs());
        if !Tag::words_hold(tag, epochs) {
            return;
        }
        let ways = self.ways(asked.hash);
        let place = ways.iter().find(|entry| entry.is_of(&question));
        let place = place.or_else(|| ways.iter().find(|entry| entry.is_stale(epochs)));
        let place = place.or_else(|| ways.get(self.turn.fetch_add(1, Relaxed) as usize % WAYS));
        if let Some(place) = place {
            place.keep(&question, answer, tag, target);
        }
    }

    /// Whether what depends on these counters is still true.
    #[inline]
    pub fn tag_holds(&self, tag: &[u64; TAG_WORDS]) -> bool {
        Tag::words_hold(tag, self.epochs())
    }

    /// Of a channel that has ended: nothing that is kept counts any more.
    pub(crate) fn drop_memory(&self) {
        self.entries.clear();
    }

    /// In a forked child, where the table is not mapped.
    pub fn forget_in_child(self) {
        let this = core::mem::ManuallyDrop::new(self);
        // SAFETY: read once, and never used or dropped again. The other mapping is not there in a child.
        unsafe { drop(core::ptr::read(&this.entries)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_told_apart() {
        let hash = |kind, at, path: &[u8]| Asked::new(kind, at, path).map(|asked| asked.hash);
        let one = hash(1, 0, b"/a/b");
        assert_eq!(one, hash(1, 0, b"/a/b"));
        for other in [hash(2, 0, b"/a/b"), hash(1, 1, b"/a/b"), hash(1, 0, b"/a/c"), hash(1, 0, b"/a/b\0")] {
            assert_ne!(one, other);
        }
        assert!(Asked::new(1, 0, &[b'x'; PATH_BYTES_MAX]).is_some());
        assert!(Asked::new(1, 0, &[b'x'; PATH_BYTES_MAX + 1]).is_none());
        let asked = Asked::new(1, 0, b"123456789").unwrap();
        assert_eq!((asked.count, asked.room_bytes()), (2, (TEXT_WORDS - 2) * 8));
    }
}
