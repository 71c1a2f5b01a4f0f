//! Directories that were listed: their names and attributes lie here as the service sent them, and answer questions as long as the
//! counters that each depends on stand still.
//!
//! One listing brings the attributes of all that lies in a directory, so programs that walk a tree ask once for each directory. That a
//! directory is here says that this process may list and search it; paths are walked from one to the next.
//!
//! Most lie in memory that programs of the same rights share, where the service writes them ([`Answers`]). What it could not put there is kept in
//! memory of this process, used in two halves, in turn: what is kept is overwritten only after as much again was kept since. Who reads
//! looks at the turn afterwards.

use core::ptr::NonNull;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicU32, AtomicU64, fence};

use polytropo_wire::answers::{self, Kind};
use polytropo_wire::listing::View;

use crate::answers::Answers;
use crate::lookups::PATH_BYTES_MAX;
use crate::sys::{Errno, Mapping};

const PLACES: usize = 4096;
const WAYS: usize = 4;
const HALF_WORDS: usize = 512 << 10;
/// Before a listing: words of the record, bytes of the path, the path.
const HEAD_WORDS: usize = 2;
/// Where a listing has the sample of everything's counter.
const EVERYTHING_AT: usize = 5;

/// Where a directory's listing lies.
#[repr(C)]
struct Place {
    ino: AtomicU64,
    /// The turn above, plus one; the word in its half below.
    word: AtomicU64,
}

const HALVES_AT: usize = PLACES * size_of::<Place>();
const TOTAL_BYTES: usize = HALVES_AT + 2 * HALF_WORDS * 8;

/// What is kept of directories.
pub struct Listings {
    shared: Option<Answers>,
    memory: Mapping,
    /// The turn above, words used of its half below.
    used: AtomicU64,
    /// Who writes into each half.
    writers: [AtomicU32; 2],
}

/// A directory's listing that was kept: the turn and the word in its half, or [`SHARED`] and its position in the shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record(u64);

const SHARED: u64 = 1 << 63;

impl Record {
    pub fn to_number(self) -> u64 {
        self.0
    }

    pub fn from_number(number: u64) -> Option<Self> {
        (number >> 32 != 0).then_some(Self(number))
    }

    /// Which of three places it lies in, each of which is overwritten by itself.
    pub fn part(self) -> usize {
        if self.position().is_some() { 2 } else { self.turn() as usize & 1 }
    }

    /// Whether the other one, of the same part, is overwritten first.
    pub fn outlives(self, other: Self) -> bool {
        self.0 > other.0
    }

    /// In the shared memory.
    #[inline]
    fn position(self) -> Option<u64> {
        (self.0 & SHARED != 0).then_some(self.0 & !SHARED)
    }

    fn turn(self) -> u32 {
        ((self.0 >> 32) as u32).wrapping_sub(1)
    }
}

/// Room for a listing that is being taken.
pub struct Room<'a> {
    listings: &'a Listings,
    record: Record,
    half: usize,
    path_words: usize,
}

impl Listings {
    pub fn new(shared: Option<Answers>) -> Result<Self, Errno> {
        let memory = Mapping::anonymous(TOTAL_BYTES)?;
        Ok(Self { shared, memory, used: AtomicU64::new(0), writers: [AtomicU32::new(0), AtomicU32::new(0)] })
    }

    /// What programs of the same rights share.
    pub fn answers(&self) -> Option<&Answers> {
        self.shared.as_ref()
    }

    /// Of a channel that has ended: nothing that is kept counts any more.
    pub(crate) fn drop_memory(&self) {
        // First, so that who reads zeros finds that his listing is not there any more.
        self.used.fetch_add(2 << 32, SeqCst);
        self.memory.clear();
    }

    /// In a forked child, where the shared memory is not mapped.
    pub fn forget_in_child(self) {
        let Self { shared, memory, .. } = self;
        core::mem::forget(shared);
        drop(memory);
    }

    fn ways(&self, ino: u64) -> &[Place] {
        let first = (ino.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % (PLACES / WAYS) * WAYS;
        // SAFETY: that many places lie at the mapping's beginning, aligned, zeroed at first; they are made of atomics.
        unsafe { NonNull::slice_from_raw_parts(self.memory.base().cast::<Place>().add(first), WAYS).as_ref() }
    }

    /// The words of a half from one on.
    fn words(&self, turn: u32, from: usize) -> &[AtomicU64] {
        let from = from.min(HALF_WORDS);
        let at = HALVES_AT + (turn as usize & 1) * HALF_WORDS * 8 + from * 8;
        // SAFETY: both halves lie in the mapping, aligned; their words are read as atomics. They are written as bytes, too, but only where
        // nobody uses what he reads: see `is_there`.
        unsafe {
            NonNull::slice_from_raw_parts(self.memory.base().add(at).cast(), HALF_WORDS - from).as_ref()
        }
    }

    /// The listing of a directory, if one was kept. It may be outdated.
    #[inline]
    pub fn find(&self, ino: u64) -> Option<Record> {
        if let Some(shared) = &self.shared
            && let Some(found) = shared.find(Kind::Listing, ino)
        {
            return Some(Record(found.position | SHARED));
        }
        self.find_own(ino)
    }

    fn find_own(&self, ino: u64) -> Option<Record> {
        let place = self.ways(ino).iter().find(|place| place.ino.load(Acquire) == ino)?;
        let record = Record::from_number(place.word.load(Acquire))?;
        (self.is_there(record) && self.view(record).ino() == ino).then_some(record)
    }

    /// To be asked after a record was read: whether what was read is what was kept.
    #[inline]
    pub fn is_there(&self, record: Record) -> bool {
        if let Some(position) = record.position() {
            return self.shared.as_ref().is_some_and(|shared| shared.is_there(position));
        }
        fence(Acquire);
        let turn = (self.used.load(Relaxed) >> 32) as u32;
        turn.wrapping_sub(record.turn()) <= 1
    }

    #[inline]
    fn shared(&self, record: Record) -> Option<answers::Record<'_>> {
        self.shared.as_ref()?.record(record.position()?)
    }

    /// A record's words, without its path.
    #[inline]
    fn listing(&self, record: Record) -> &[AtomicU64] {
        if record.position().is_some() {
            return self.shared(record).map_or(&[], |shared| shared.payload());
        }
        let words = self.words(record.turn(), record.0 as u32 as usize);
        let path_words = words.get(1).map_or(0, |word| (word.load(Relaxed) as usize).div_ceil(8));
        words.get(HEAD_WORDS.saturating_add(path_words)..).unwrap_or(&[])
    }

    #[inline]
    pub fn view(&self, record: Record) -> View<'_, [AtomicU64]> {
        View::new(self.listing(record))
    }

    /// What everything's counter was.
    #[inline]
    pub fn everything(&self, record: Record) -> u64 {
        if let Some(shared) = self.shared(record) {
            return shared.everything();
        }
        self.listing(record).get(EVERYTHING_AT).map_or(0, |word| word.load(Relaxed))
    }

    /// The path by which it was listed. How many bytes.
    pub fn path(&self, record: Record, to: &mut [u8; PATH_BYTES_MAX]) -> Option<usize> {
        let (bytes, words) = match record.position() {
            Some(_) => {
                let shared = self.shared(record)?;
                (shared.path_bytes(), shared.path_words())
            }
            None => {
                let words = self.words(record.turn(), record.0 as u32 as usize);
                (words.get(1)?.load(Relaxed) as usize, words.get(HEAD_WORDS..)?)
            }
        };
        for (chunk, word) in to.get_mut(..bytes)?.chunks_mut(8).zip(words) {
            chunk.copy_from_slice(&word.load(Relaxed).to_le_bytes()[..chunk.len()]);
        }
        self.is_there(record).then_some(bytes)
    }

    /// What the service has put into the shared memory, of whichever directory that is; None if it is gone already.
    pub fn shared_at(&self, position: u64) -> Option<(u64, Record)> {
        let found = self.shared.as_ref()?.record(position)?;
        let (ino, record) = (found.ino(), Record(position | SHARED));
        self.is_there(record).then_some((ino, record))
    }

    /// Room for a listing of so many words. None when there is none now.
    pub fn make_room(&self, path: &[u8], listing_words: usize) -> Option<Room<'_>> {
        let path_words = path.len().div_ceil(8);
        let words = HEAD_WORDS + path_words + listing_words;
        if words > HALF_WORDS || path.len() > PATH_BYTES_MAX {
            return None;
        }
        loop {
            let used = self.used.load(Acquire);
            let (turn, begin) = ((used >> 32) as u32, used as u32 as usize);
            let fits = begin + words <= HALF_WORDS;
            let (turn, begin) = if fits { (turn, begin) } else { (turn.wrapping_add(1), 0) };
            let half = turn as usize & 1;
            // Whoever still writes there, of two turns ago, is not to be disturbed.
            if self.writers[half].fetch_add(1, AcqRel) != 0 && !fits {
                self.writers[half].fetch_sub(1, AcqRel);
                return None;
            }
            let next = u64::from(turn) << 32 | (begin + words) as u64;
            if self.used.compare_exchange(used, next, AcqRel, Acquire).is_err() {
                self.writers[half].fetch_sub(1, AcqRel);
                continue;
            }
            let record = Record(u64::from(turn.wrapping_add(1)) << 32 | begin as u64);
            let room = Room { listings: self, record, half, path_words };
            let place = self.words(turn, begin);
            place[0].store(words as u64, Relaxed);
            place[1].store(path.len() as u64, Relaxed);
            for (place, word) in place[HEAD_WORDS..].iter().zip(polytropo_wire::listing::name_words(path)) {
                place.store(word, Relaxed);
            }
            return Some(room);
        }
    }
}

impl Room<'_> {
    /// Where the listing's words go.
    pub fn bytes(&self) -> *mut u8 {
        let words = self.listings.words(self.record.turn(), self.record.0 as u32 as usize);
        words[HEAD_WORDS + self.path_words..].as_ptr().cast_mut().cast()
    }

    /// The directory that the words in it are of.
    pub fn ino(&self) -> u64 {
        self.listings.view(self.record).ino()
    }

    /// All of it is there: it can be found from now on.
    pub fn publish(self, ino: u64, everything: u64) -> Record {
        let words = self.listings.words(self.record.turn(), self.record.0 as u32 as usize);
        words[HEAD_WORDS + self.path_words + EVERYTHING_AT].store(everything, Relaxed);
        let ways = self.listings.ways(ino);
        let known = ways.iter().find(|place| place.ino.load(Relaxed) == ino);
        let gone = |place: &&Place| {
            Record::from_number(place.word.load(Relaxed)).is_none_or(|old| !self.listings.is_there(old))
        };
        let place = known.or_else(|| ways.iter().find(gone)).unwrap_or(&ways[self.record.0 as usize % WAYS]);
        // Whoever sees the one without the other finds a listing of another directory, and looks at that.
        place.word.store(self.record.0, Release);
        place.ino.store(ino, Release);
        self.record
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.listings.writers[self.half].fetch_sub(1, AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(listings: &Listings, ino: u64, words: usize) -> Record {
        let room = listings.make_room(b"some/path", words).unwrap();
        // SAFETY: the room holds that many words.
        unsafe { room.bytes().cast::<u64>().add(1).write(ino) };
        room.publish(ino, 7)
    }

    #[test]
    fn what_was_kept_is_found_until_the_turn_after_next() {
        let listings = Listings::new(None).unwrap();
        let first = keep(&listings, 5, 1000);
        assert_eq!(listings.find(5), Some(first));
        assert_eq!(listings.everything(first), 7);
        let mut path = [0; PATH_BYTES_MAX];
        assert_eq!(listings.path(first, &mut path).map(|bytes| &path[..bytes]), Some(&b"some/path"[..]));
        let mut turns = 0;
        for ino in 6.. {
            let record = keep(&listings, ino, 1000);
            assert_eq!(listings.find(ino), Some(record));
            turns = record.turn();
            if turns == 2 {
                break;
            }
            assert!(listings.is_there(first));
        }
        assert_eq!(turns, 2);
        assert!(!listings.is_there(first) && listings.find(5).is_none());
    }

    #[test]
    fn nobody_writes_where_another_still_does() {
        let listings = Listings::new(None).unwrap();
        let slow = listings.make_room(b"", 1000).unwrap();
        let mut made = 0;
        while let Some(room) = listings.make_room(b"", 100_000) {
            room.publish(9, 0);
            made += 1;
            assert!(made < 100);
        }
        assert!(listings.is_there(slow.record));
        drop(slow);
        assert!(listings.make_room(b"", 100_000).is_some());
    }
}
