//! A directory as it travels to programs and is kept there: its names with attributes, and for each what it depends on.
//!
//! Made of 64-bit words: a head, entries in the order of the directory, and an index by name. Every part can be asked of any words, true or
//! not: beyond their end there are zeros.

use crate::message::{ATTRIBUTE_WORDS, Attributes};
use crate::sync::{AtomicU64, Relaxed};

/// Words of the head: how many there are in all, the directory's inode, its counter and the entries' count, the counter's
/// sample, where the index is and its mask, one for the program's own use; then the directory's attributes.
pub const HEAD_WORDS: usize = 6 + ATTRIBUTE_WORDS;
/// Words of an entry before its name: the samples of the name's and the inode's counters, counters and length and flags, where reading goes on
/// after it, attributes.
pub const ENTRY_WORDS: usize = 4 + ATTRIBUTE_WORDS;
/// Words of one listing at the most.
pub const WORDS_MAX: usize = 128 << 10;
pub const NAME_BYTES_MAX: usize = 255;

/// The attributes are not told: the kernel has them, or they could not be looked up.
pub const UNTOLD: u64 = 1;
/// Something else is mounted there, for this program.
pub const COVERED: u64 = 2;

/// Words that may be any.
pub trait Words {
    fn word(&self, at: usize) -> u64;
    fn count(&self) -> usize;
}

impl Words for [u64] {
    #[inline]
    fn word(&self, at: usize) -> u64 {
        self.get(at).copied().unwrap_or(0)
    }

    fn count(&self) -> usize {
        self.len()
    }
}

impl Words for [AtomicU64] {
    #[inline]
    fn word(&self, at: usize) -> u64 {
        self.get(at).map_or(0, |word| word.load(Relaxed))
    }

    fn count(&self) -> usize {
        self.len()
    }
}

/// What an answer depends on: a counter and what it was.
pub type Sample = (u16, u64);

/// A name's hash.
#[inline]
pub fn hash(name: &[u8]) -> u64 {
    let mut hash = name.len() as u64 ^ 0x243f_6a88_85a3_08d3;
    name_words(name).for_each(|word| {
        let product = u128::from(hash ^ word) * 0x9e37_79b9_7f4a_7c15;
        hash = product as u64 ^ (product >> 64) as u64;
    });
    hash
}

/// A name as words, with zeros after its end.
#[inline]
pub fn name_words(name: &[u8]) -> impl Iterator<Item = u64> + '_ {
    name.chunks(8).map(|chunk| match <[u8; 8]>::try_from(chunk) {
        Ok(whole) => u64::from_le_bytes(whole),
        Err(_) => chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    })
}

/// A listing.
#[derive(Clone, Copy)]
pub struct View<'a, W: Words + ?Sized> {
    words: &'a W,
}

/// An entry of a listing.
#[derive(Clone, Copy)]
pub struct Entry<'a, W: Words + ?Sized> {
    words: &'a W,
    at: usize,
}

impl<'a, W: Words + ?Sized> View<'a, W> {
    pub fn new(words: &'a W) -> Self {
        Self { words }
    }

    pub fn total_words(&self) -> usize {
        self.words.word(0) as usize
    }

    pub fn ino(&self) -> u64 {
        self.words.word(1)
    }

    /// What the names depend on, as a whole.
    pub fn sample(&self) -> Sample {
        (self.words.word(2) as u16, self.words.word(3))
    }

    pub fn count(&self) -> usize {
        (self.words.word(2) >> 32) as usize
    }

    /// The directory's own, which depend on its counter.
    pub fn attributes(&self) -> Attributes {
        attributes(self.words, 6)
    }

    pub fn first(&self) -> usize {
        HEAD_WORDS
    }

    /// The entry that begins there, if one can; the listing ends where the index begins.
    pub fn entry(&self, at: usize) -> Option<Entry<'a, W>> {
        let end = (self.words.word(4) as u32 as usize).min(self.words.count());
        (at >= HEAD_WORDS && at + ENTRY_WORDS < end).then_some(Entry { words: self.words, at })
    }

    #[inline]
    pub fn find(&self, name: &[u8]) -> Option<Entry<'a, W>> {
        let index = self.words.word(4);
        let (index_at, mask) = (index as u32 as usize, (index >> 32) as usize);
        let mut place = hash(name) as usize;
        for _ in 0..=mask.min(2 * self.words.count()) {
            place &= mask;
            let slot = (self.words.word(index_at + place / 2) >> (place % 2 * 32)) as u32 as usize;
            if slot == 0 {
                return None;
            }
            if let Some(entry) = self.entry(slot).filter(|entry| entry.is_called(name)) {
                return Some(entry);
            }
            place += 1;
        }
        None
    }
}

impl<W: Words + ?Sized> Entry<'_, W> {
    fn facts(&self) -> u64 {
        self.words.word(self.at + 2)
    }

    pub fn name_bytes(&self) -> usize {
        (self.facts() >> 32 & 0xff) as usize
    }

    pub fn flags(&self) -> u64 {
        self.facts() >> 48
    }

    /// What it depends on that the name stands for this inode.
    pub fn name_sample(&self) -> Sample {
        (self.facts() as u16, self.words.word(self.at))
    }

    /// What the attributes depend on.
    pub fn inode_sample(&self) -> Sample {
        ((self.facts() >> 16) as u16, self.words.word(self.at + 1))
    }

    /// Where reading goes on after it, as the layers have it.
    pub fn next_offset(&self) -> u64 {
        self.words.word(self.at + 3)
    }

    /// Where the next entry begins.
    pub fn end(&self) -> usize {
        self.at + ENTRY_WORDS + self.name_bytes().div_ceil(8)
    }

    pub fn at(&self) -> usize {
        self.at
    }

    pub fn ino(&self) -> u64 {
        self.words.word(self.at + 4)
    }

    pub fn mode(&self) -> u32 {
        self.words.word(self.at + 5) as u32
    }

    pub fn attributes(&self) -> Attributes {
        attributes(self.words, self.at + 4)
    }

    pub fn is_called(&self, name: &[u8]) -> bool {
        self.name_bytes() == name.len()
            && name_words(name).enumerate().all(|(at, word)| self.name_word(at) == word)
    }

    /// Eight bytes of the name.
    pub fn name_word(&self, at: usize) -> u64 {
        self.words.word(self.at + ENTRY_WORDS + at)
    }
}

fn attributes<W: Words + ?Sized>(words: &W, from: usize) -> Attributes {
    Attributes::from_words(&core::array::from_fn(|at| words.word(from + at)))
}

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;
    use super::*;
    use std::vec;

    #[test]
    fn any_words_are_a_listing() {
        let mut random = 1u64;
        for round in 0..2000 {
            let mut words = vec![0u64; round % 200];
            for word in &mut words {
                random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(round as u64);
                *word = if random >> 60 == 0 { random } else { random >> 40 };
            }
            let view = View::new(&words[..]);
            let _ = (view.attributes(), view.find(b"some name"));
            let (mut at, mut steps) = (view.first(), 0);
            while let Some(entry) = view.entry(at) {
                let _ = (entry.attributes(), entry.name_word(31));
                at = entry.end();
                steps += 1;
            }
            assert!(steps <= words.len() / ENTRY_WORDS);
        }
    }
}
