//! Answers that programs of the same rights share: memory that the service writes and programs read.
//!
//! A log of records that goes round, and an index by inode. What is about to be overwritten is told first ([`Header::reserved`]); who reads a
//! record looks afterwards whether it was still there. Both halves are here. Every part can be asked of any words, true or not.

use crate::sync::{Acquire, AtomicU64, Fault, Relaxed, Release, fence, has};

pub const MAGIC: u64 = u64::from_le_bytes(*b"POLYANSW");
/// Where one inode's record may be told of.
pub const WAYS: usize = 4;
pub const PLACES: usize = 16_384;
pub const LOG_WORDS: usize = 2 << 20;
pub const PLACES_AT: usize = 4096;
pub const LOG_AT: usize = PLACES_AT + PLACES * size_of::<Place>();
pub const TOTAL_BYTES: usize = LOG_AT + LOG_WORDS * 8;
/// Words of a record before its path: where it begins, its words in all and the path's bytes and the kind, the inode, the sample of
/// everything's counter.
pub const HEAD_WORDS: usize = 4;
/// Longest path of a record.
pub const PATH_BYTES_MAX: usize = 4096;

const _: () = assert!(PLACES % WAYS == 0 && LOG_AT % 4096 == 0);

/// What a record tells of its inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A [`crate::listing`].
    Listing = 1,
    /// A small file's attributes and bytes: [`bytes`].
    Bytes = 2,
}

/// A small file: counter and size, the counter's sample, attributes, bytes.
pub mod bytes {
    use super::{AtomicU64, Relaxed};
    use crate::listing::Sample;
    use crate::message::{ATTRIBUTE_WORDS, Attributes};

    /// Larger files come with windows, or by request.
    pub const BYTES_MAX: usize = 16 << 10;
    pub const HEAD_WORDS: usize = 2 + ATTRIBUTE_WORDS;

    /// What stands before the bytes.
    pub fn head((counter, sample): Sample, size_bytes: usize, attributes: &Attributes) -> [u64; HEAD_WORDS] {
        let mut words = [0; HEAD_WORDS];
        words[0] = u64::from(counter) | (size_bytes as u64) << 32;
        words[1] = sample;
        words[2..].copy_from_slice(&attributes.to_words());
        words
    }

    /// A small file as it lies in a record.
    pub struct View<'a> {
        words: &'a [AtomicU64],
    }

    impl<'a> View<'a> {
        /// None for what is no file.
        pub fn of(payload: &'a [AtomicU64]) -> Option<Self> {
            let size = (payload.first()?.load(Relaxed) >> 32) as usize;
            let fits = size <= BYTES_MAX && payload.len() >= HEAD_WORDS + size.div_ceil(8);
            fits.then_some(Self { words: payload })
        }

        fn word(&self, at: usize) -> u64 {
            self.words.get(at).map_or(0, |word| word.load(Relaxed))
        }

        pub fn size_bytes(&self) -> usize {
            (self.word(0) >> 32) as usize
        }

        pub fn attributes(&self) -> Attributes {
            Attributes::from_words(&core::array::from_fn(|at| self.word(2 + at)))
        }

        /// What all of it depends on, beside everything's counter.
        pub fn sample(&self) -> Sample {
            (self.word(0) as u16, self.word(1))
        }

        /// The bytes, as words.
        pub fn bytes(&self) -> &'a [AtomicU64] {
            self.words.get(HEAD_WORDS..).unwrap_or(&[])
        }
    }
}

/// Begins the memory.
#[repr(C)]
pub struct Header {
    pub magic: AtomicU64,
    pub version: AtomicU64,
    pub log_words: AtomicU64,
    /// The end of what was or is being written, counted on and on: what lies a log's length before it is gone.
    pub reserved: AtomicU64,
}

/// Where an inode's record begins. Zeroed: none.
#[repr(C)]
pub struct Place {
    ino: AtomicU64,
    position: AtomicU64,
}

impl Default for Place {
    fn default() -> Self {
        Self { ino: AtomicU64::new(0), position: AtomicU64::new(0) }
    }
}

/// The memory's parts. The log's length never changes.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub header: &'a Header,
    pub places: &'a [Place],
    pub log: &'a [AtomicU64],
}

/// A record that was found. What is read of it counts if it [is there](View::is_there) afterwards.
#[derive(Clone, Copy)]
pub struct Record<'a> {
    pub position: u64,
    words: &'a [AtomicU64],
}

/// What the service is about to put there.
#[derive(Clone, Copy)]
pub struct New<'a> {
    pub kind: Kind,
    pub ino: u64,
    pub everything: u64,
    /// By which it was found, from the root.
    pub path: &'a [u8],
    pub payload: &'a [u64],
}

impl New<'_> {
    pub fn words(&self) -> usize {
        HEAD_WORDS + self.path.len().div_ceil(8) + self.payload.len()
    }

    fn facts(&self) -> u64 {
        self.words() as u64 | (self.path.len() as u64) << 32 | (self.kind as u64) << 56
    }
}

impl<'a> View<'a> {
    fn ways(&self, ino: u64) -> &'a [Place] {
        let sets = self.places.len() / WAYS;
        let first = (ino.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % sets.max(1) * WAYS;
        self.places.get(first..first + WAYS).unwrap_or(&[])
    }

    /// What is told of an inode. It may be outdated.
    #[inline]
    pub fn find(&self, kind: Kind, ino: u64) -> Option<Record<'a>> {
        let place = self.ways(ino).iter().find(|place| place.ino.load(Acquire) == ino)?;
        let record = self.record(place.position.load(Acquire))?;
        // The two words of a place change one after the other.
        let same = has(Fault::AnswerOfAnother) || record.word(2) == ino;
        (same && record.kind() == kind as u8).then_some(record)
    }

    /// The record that begins there, if it is there.
    #[inline]
    pub fn record(&self, position: u64) -> Option<Record<'a>> {
        // The log counts from its own length on.
        let at = (position as usize).checked_rem(self.log.len()).filter(|_| position != 0)?;
        let rest = self.log.get(at..)?;
        let record = Record { position, words: rest };
        if record.word(0) != position {
            return None;
        }
        let words = rest.get(..record.word(1) as u32 as usize)?;
        let record = Record { position, words };
        self.is_there(position).then_some(record)
    }

    /// To be asked after a record was read: whether what was read is what was put there.
    #[inline]
    pub fn is_there(&self, position: u64) -> bool {
        if has(Fault::AnswerLookedAtOnce) {
            return true;
        }
        if !has(Fault::AnswerReaderWithoutFence) {
            fence(Acquire);
        }
        self.header.reserved.load(Relaxed).wrapping_sub(position) <= self.log.len() as u64
    }
}

/// The service's half. One at a time writes.
impl View<'_> {
    /// Where a record of so many words will begin after `head`, the log's end, if it goes no further than `usable` words; None: it is too long.
    pub fn room_for(&self, head: u64, words: usize, usable: usize) -> Option<u64> {
        let round = self.log.len() as u64;
        let usable = usable.min(self.log.len());
        if words > usable || round == 0 {
            return None;
        }
        let at = head % round;
        Some(if at + words as u64 <= usable as u64 { head } else { head - at + round })
    }

    /// Puts a record at a position from `room_for`, and tells the log's end behind it. Whatever was known of the inode before is replaced.
    pub fn put(&self, position: u64, new: &New<'_>) -> u64 {
        let end = position + new.words() as u64;
        let tell = || {
            self.header.reserved.store(end, Relaxed);
            if !has(Fault::AnswerWriterWithoutFence) {
                // Whoever sees anything of the record sees that what lay there is gone.
                fence(Release);
            }
        };
        if !has(Fault::AnswerToldAfterwards) {
            tell();
        }
        let at = (position % self.log.len() as u64) as usize;
        let words = &self.log[at..at + new.words()];
        let head = [position, new.facts(), new.ino, new.everything];
        let path = crate::listing::name_words(new.path);
        let all = head.into_iter().chain(path).chain(new.payload.iter().copied());
        words.iter().zip(all).for_each(|(place, word)| place.store(word, Relaxed));
        if has(Fault::AnswerToldAfterwards) {
            tell();
        }
        let ways = self.ways(new.ino);
        let known = ways.iter().find(|place| place.ino.load(Relaxed) == new.ino);
        let gone = |place: &&Place| !self.is_there(place.position.load(Relaxed));
        let place = known.or_else(|| ways.iter().find(gone));
        let place = place.or_else(|| ways.iter().min_by_key(|place| place.position.load(Relaxed)));
        if let Some(place) = place {
            place.position.store(position, Release);
            place.ino.store(new.ino, Release);
        }
        end
    }

    /// Nothing is told of an inode any more.
    pub fn drop_of(&self, ino: u64) {
        if let Some(place) = self.ways(ino).iter().find(|place| place.ino.load(Relaxed) == ino) {
            place.position.store(0, Relaxed);
        }
    }
}

impl<'a> Record<'a> {
    fn word(&self, at: usize) -> u64 {
        self.words.get(at).map_or(0, |word| word.load(Relaxed))
    }

    fn kind(&self) -> u8 {
        (self.word(1) >> 56) as u8
    }

    pub fn ino(&self) -> u64 {
        self.word(2)
    }

    /// What everything's counter was.
    pub fn everything(&self) -> u64 {
        self.word(3)
    }

    pub fn path_bytes(&self) -> usize {
        (self.word(1) >> 32 & 0xff_ffff) as usize
    }

    /// The path's words, with what follows.
    pub fn path_words(&self) -> &'a [AtomicU64] {
        self.words.get(HEAD_WORDS..).unwrap_or(&[])
    }

    pub fn payload(&self) -> &'a [AtomicU64] {
        self.words.get(HEAD_WORDS + self.path_bytes().div_ceil(8)..).unwrap_or(&[])
    }

    /// Whether it says the same.
    pub fn is(&self, new: &New<'_>) -> bool {
        let payload = self.payload();
        self.word(1) == new.facts()
            && self.everything() == new.everything
            && payload.len() == new.payload.len()
            && payload.iter().zip(new.payload).all(|(kept, word)| kept.load(Relaxed) == *word)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    struct Memory {
        header: Header,
        places: Vec<Place>,
        log: Vec<AtomicU64>,
    }

    impl Memory {
        fn new(places: usize, log: usize) -> Self {
            let zero = || AtomicU64::new(0);
            let header = Header { magic: zero(), version: zero(), log_words: zero(), reserved: zero() };
            let places = (0..places).map(|_| Place::default()).collect();
            Self { header, places, log: (0..log).map(|_| zero()).collect() }
        }

        fn view(&self) -> View<'_> {
            View { header: &self.header, places: &self.places, log: &self.log }
        }
    }

    #[test]
    fn what_was_put_is_found_until_the_log_comes_round() {
        let memory = Memory::new(8, 100);
        let view = memory.view();
        let (mut head, mut kept) = (100, Vec::new());
        for ino in 1..500u64 {
            let payload: Vec<u64> = (0..ino % 7).map(|at| ino * 100 + at).collect();
            let new = New { kind: Kind::Listing, ino, everything: 9, path: b"a/path", payload: &payload };
            assert!(view.find(Kind::Listing, ino).is_none());
            let position = view.room_for(head, new.words(), 90).unwrap();
            head = view.put(position, &new);
            kept.push((position, new.words() as u64, ino));
            let found = view.find(Kind::Listing, ino).unwrap();
            assert!(found.position == position && found.is(&new) && found.ino() == ino);
            // What nobody wrote over is still there, and nothing else.
            for (old, words, ino) in &kept {
                let round = position - position % 100 - 100;
                let there = *old + words > position || (*old >= round && *old >= head - 100);
                let record = view.record(*old);
                assert_eq!(record.is_some(), there, "{ino}: {old} of {position} to {head}");
                assert!(record.is_none_or(|record| record.ino() == *ino && record.path_bytes() == 6));
            }
        }
        let last = view.find(Kind::Listing, 499).unwrap();
        assert_eq!(last.path_words()[0].load(Relaxed).to_le_bytes(), *b"a/path\0\0");
        view.drop_of(499);
        assert!(view.find(Kind::Listing, 499).is_none());
        assert!(view.room_for(head, 91, 90).is_none());
    }

    #[test]
    fn any_words_are_read() {
        let memory = Memory::new(8, 64);
        let mut random = 1u64;
        for _ in 0..20_000 {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let (at, value) = ((random >> 58) as usize, random.rotate_left(29));
            let value = match random >> 20 & 3 {
                0 => value,
                1 => 2 << 56 | value & 0x3f,
                _ => value & 0xff,
            };
            match random >> 30 & 3 {
                0 => memory.places[at % 8].ino.store(value % 32, Relaxed),
                1 => memory.places[at % 8].position.store(value, Relaxed),
                2 => memory.header.reserved.store(value % 128, Relaxed),
                _ => memory.log[at].store(value, Relaxed),
            }
            for ino in 0..32 {
                if let Some(found) = memory.view().find(Kind::Listing, ino) {
                    assert!(found.payload().len() <= 64 && found.path_words().len() <= 64);
                    let _ = crate::listing::View::new(found.payload()).find(b"name");
                }
                if let Some(found) = memory.view().find(Kind::Bytes, ino)
                    && let Some(file) = bytes::View::of(found.payload())
                {
                    let _ = (file.attributes(), file.sample());
                    assert!(file.size_bytes() <= file.bytes().len() * 8);
                }
            }
        }
    }

    #[test]
    fn no_memory_has_no_answers() {
        let memory = Memory::new(0, 0);
        assert!(memory.view().find(Kind::Listing, 1).is_none() && memory.view().record(7).is_none());
        assert!(memory.view().room_for(0, 4, 10).is_none());
    }
}
