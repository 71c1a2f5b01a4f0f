//! What a channel remembers: a place for each open file, and room for the bytes of small ones. One anonymous mapping, allocated by the
//! kernel as it is touched.

use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Relaxed, Release};

use polytropo_wire::message::{CARRIED_BYTES_MAX, FILES_MAX};

use crate::files::FileState;
use crate::sys::{Errno, Mapping};

const MAP_WORDS: usize = 2;
/// Small files that may be carried at once.
const CHUNKS: usize = MAP_WORDS * 64;
/// Files that are open here alone: their bytes came along.
const LOCAL_MAX: usize = CHUNKS;
const CHUNKS_AT: usize = ((FILES_MAX + LOCAL_MAX) * size_of::<FileState>()).next_multiple_of(4096);
const _: () = assert!(FILES_MAX + LOCAL_MAX <= 1 << 16);

pub struct Arena {
    memory: Mapping,
    chunks: [AtomicU64; MAP_WORDS],
    /// Files that were ever open here alone.
    local: AtomicU64,
}

/// In the number of a file that is open here alone.
pub const LOCAL: u64 = 1 << 63;

/// Numbers leave the bits between free for those who keep files of several channels.
const LOCAL_TIMES_BITS: u32 = 40;

/// The number of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk(u32);

impl Chunk {
    /// 0 is none.
    pub fn to_word(chunk: Option<Chunk>) -> u32 {
        chunk.map_or(0, |chunk| chunk.0 + 1)
    }

    pub fn from_word(word: u32) -> Option<Chunk> {
        word.checked_sub(1).filter(|number| (*number as usize) < CHUNKS).map(Chunk)
    }
}

impl Arena {
    pub fn new() -> Result<Self, Errno> {
        let memory = Mapping::anonymous(CHUNKS_AT + CHUNKS * CARRIED_BYTES_MAX)?;
        Ok(Self { memory, chunks: [const { AtomicU64::new(0) }; MAP_WORDS], local: AtomicU64::new(0) })
    }

    /// The place of the file whose number in the channel's table is `index`.
    pub fn file(&self, index: usize) -> Option<&FileState> {
        if index >= FILES_MAX + LOCAL_MAX {
            return None;
        }
        // SAFETY: the table begins at the mapping's base, zeroed, and holds that many places; they are made of atomics.
        Some(unsafe { self.memory.base().cast::<FileState>().add(index).as_ref() })
    }

    /// A number for the file that is open here alone, and whose bytes lie in that chunk.
    pub fn local_number(&self, chunk: Chunk) -> u64 {
        let times = self.local.fetch_add(1, Relaxed) & ((1 << LOCAL_TIMES_BITS) - 1);
        LOCAL | times << 16 | (FILES_MAX + chunk.0 as usize) as u64
    }

    pub fn take_chunk(&self) -> Option<Chunk> {
        for (at, word) in self.chunks.iter().enumerate() {
            let mut taken = word.load(Relaxed);
            while taken != u64::MAX {
                let bit = 1 << taken.trailing_ones();
                taken = word.fetch_or(bit, AcqRel);
                if taken & bit == 0 {
                    return Some(Chunk(at as u32 * 64 + bit.trailing_zeros()));
                }
            }
        }
        None
    }

    pub fn give_chunk(&self, chunk: Chunk) {
        if let Some(word) = self.chunks.get(chunk.0 as usize / 64) {
            word.fetch_and(!(1 << (chunk.0 % 64)), Release);
        }
    }

    /// Where a chunk's `CARRIED_BYTES_MAX` bytes lie.
    pub fn chunk(&self, chunk: Chunk) -> NonNull<u8> {
        // SAFETY: chunks have numbers below CHUNKS, all of which lie in the mapping.
        unsafe { self.memory.base().add(CHUNKS_AT + chunk.0 as usize * CARRIED_BYTES_MAX) }
    }

    /// Nobody may use the files any more.
    pub fn unmap_windows(&self) {
        (0..FILES_MAX)
            .filter_map(|index| self.file(index))
            .take_while(|file| file.was_used())
            .for_each(FileState::unmap);
    }
}
