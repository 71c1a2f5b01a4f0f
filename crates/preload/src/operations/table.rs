//! What is known of the program's descriptors.
//!
//! Each is a real one of the kernel's, or a placeholder (`placeholders`); what we keep beside it only tells where its bytes may be read without a
//! call. So whatever we do not know is done by the kernel, rightly. The one thing that the kernel may not know is the offset of a file that this process has opened
//! and nobody shares (*held*): it is handed over before anything but read(2) and lseek(2) can see it, and never taken again.
//!
//! The table is wiped in a forked child, where it begins anew.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};

use crate::sys;

/// Descriptors with higher numbers are the kernel's alone.
pub const DESCRIPTORS_MAX: usize = 4096;

/// What a descriptor is, as far as we looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    Unknown = 0,
    /// A regular file of our mount.
    Ours = 1,
    /// Anything else, or one that cannot be read here.
    Foreign = 2,
    /// A regular file of our mount that the kernel has not opened: a placeholder.
    Placeholder = 3,
    /// A placeholder that a thread is just having the kernel open.
    Upgrading = 4,
    /// The library's own.
    Own = 5,
}

const KIND_BITS: u32 = 8;
const KIND_MASK: u32 = (1 << KIND_BITS) - 1;
const HELD: u64 = 1 << 63;
const OFFSET_BITS: u32 = 48;
const OFFSET_MASK: u64 = (1 << OFFSET_BITS) - 1;
/// For an offset: wherever the file ends, after something was appended.
pub const AT_END: u64 = OFFSET_MASK;

/// One descriptor's. Zeroed: unknown.
#[repr(C)]
pub struct Entry {
    /// Kind below, generation above: it changes with each end of the descriptor.
    kind: AtomicU32,
    reads: AtomicU32,
    /// [`HELD`], some of the generation, the offset.
    offset: AtomicU64,
    /// The client's number of the open file; 0 without one.
    file: AtomicU64,
    /// Of a placeholder: one more than the place of its file among those that are kept; [`NO_PLACE`] if the file is its own.
    place: AtomicU32,
    /// Of a placeholder: what it was opened for, the flags of open(2) that fcntl(2) tells.
    flags: AtomicU32,
    /// Of a stand-in: one more than the place of its path.
    stand_in: AtomicU32,
}

/// Of a placeholder whose file nobody else uses.
pub const NO_PLACE: u32 = u32::MAX - 1;

/// An offset that is held: as it was when it was looked at.
#[derive(Clone, Copy)]
pub struct Held(u64);

impl Held {
    pub fn offset(self) -> u64 {
        self.0 & OFFSET_MASK
    }
}

impl Entry {
    pub fn generation(&self) -> u32 {
        self.kind.load(Acquire) >> KIND_BITS
    }

    pub fn kind(&self) -> Kind {
        match self.kind.load(Acquire) & KIND_MASK {
            1 => Kind::Ours,
            2 => Kind::Foreign,
            3 => Kind::Placeholder,
            4 => Kind::Upgrading,
            5 => Kind::Own,
            _ => Kind::Unknown,
        }
    }

    /// Notes what the descriptor is, unless it has ended since.
    pub fn set_kind(&self, generation: u32, kind: Kind) {
        let _ = self.kind.fetch_update(AcqRel, Relaxed, |word| {
            (word >> KIND_BITS == generation).then_some(generation << KIND_BITS | kind as u32)
        });
    }

    /// The descriptor was made just now, to stand for a kept file.
    pub fn set_placeholder(&self, file: u64, place: u32, flags: u32, stand_in: Option<u32>) {
        self.stand_in.store(stand_in.map_or(0, |index| index + 1), Release);
        self.flags.store(flags, Release);
        self.place.store(place + 1, Release);
        self.file.store(file, Release);
        self.set_kind(self.generation(), Kind::Placeholder);
    }

    /// What a placeholder was opened for.
    pub fn flags(&self) -> u32 {
        self.flags.load(Acquire)
    }

    /// Where the path of a stand-in is.
    pub fn stand_in(&self) -> Option<u32> {
        self.stand_in.load(Acquire).checked_sub(1)
    }

    pub fn take_stand_in(&self) -> Option<u32> {
        self.stand_in.swap(0, AcqRel).checked_sub(1)
    }

    /// Takes a placeholder's place away.
    pub fn take_place(&self) -> Option<u32> {
        self.place.swap(0, AcqRel).checked_sub(1)
    }

    /// False if the kind is another, or the descriptor has ended since.
    pub fn exchange_kind(&self, generation: u32, from: Kind, to: Kind) -> bool {
        let word = |kind: Kind| generation << KIND_BITS | kind as u32;
        self.kind.compare_exchange(word(from), word(to), AcqRel, Relaxed).is_ok()
    }

    /// The descriptor is about to end, or just has: nothing that is known counts. False while a thread is upgrading it.
    pub fn try_clear(&self) -> bool {
        let ended = |word: u32| {
            let at_it = word & KIND_MASK == Kind::Upgrading as u32;
            (!at_it).then(|| (word >> KIND_BITS).wrapping_add(1) << KIND_BITS)
        };
        let cleared = self.kind.fetch_update(AcqRel, Relaxed, ended).is_ok();
        if cleared {
            self.offset.store(0, Release);
            self.reads.store(0, Relaxed);
        }
        cleared
    }

    /// The same, whoever is at it.
    pub fn clear(&self) {
        let next = |word: u32| Some((word >> KIND_BITS).wrapping_add(1) << KIND_BITS);
        let _ = self.kind.fetch_update(AcqRel, Relaxed, next);
        self.offset.store(0, Release);
        self.reads.store(0, Relaxed);
    }

    /// The descriptor was opened just now, by this process alone, at its beginning.
    pub fn hold(&self) {
        let generation = u64::from(self.generation()) << OFFSET_BITS;
        self.offset.store(HELD | (generation & !HELD & !OFFSET_MASK), Release);
    }

    pub fn held(&self) -> Option<Held> {
        let word = self.offset.load(Acquire);
        (word & HELD != 0).then_some(Held(word))
    }

    /// Moves a held offset; None if somebody else did, or it is held no longer.
    pub fn advance(&self, from: Held, to: u64) -> Option<Held> {
        let word = from.0 & !OFFSET_MASK | to;
        let moved = to <= AT_END && self.offset.compare_exchange(from.0, word, AcqRel, Relaxed).is_ok();
        moved.then_some(Held(word))
    }

    /// Gives a held offset to the kernel, for good; that of a placeholder, of which the kernel has none, stays.
    pub fn release(&self, descriptor: usize) {
        if !matches!(self.kind(), Kind::Placeholder | Kind::Upgrading) {
            self.release_opened(descriptor);
        }
    }

    /// The same of a descriptor that the kernel has surely opened.
    pub fn release_opened(&self, descriptor: usize) {
        while let Some(held) = self.held() {
            // Nobody uses the kernel's offset while this one is held.
            const SEEK_END: usize = 2;
            let to = if held.offset() == AT_END { [0, SEEK_END] } else { [held.offset() as usize, 0] };
            // SAFETY: concerns no memory.
            unsafe { sys::call(sys::nr::LSEEK, [descriptor, to[0], to[1], 0, 0, 0]) };
            if self.offset.compare_exchange(held.0, 0, AcqRel, Relaxed).is_ok() {
                return;
            }
        }
    }

    /// Counts a read: how many there were before. Threads may lose a count to each other, which skips none.
    pub fn count_read(&self) -> u32 {
        let before = self.reads.load(Relaxed);
        self.reads.store(before.wrapping_add(1), Relaxed);
        before
    }

    /// Counts from the beginning.
    pub fn begin_reads(&self) {
        self.reads.store(0, Relaxed);
    }

    /// Whether anything was counted.
    pub fn was_read(&self) -> bool {
        self.reads.load(Relaxed) != 0
    }

    pub fn file(&self) -> Option<u64> {
        Some(self.file.load(Acquire)).filter(|file| *file != 0)
    }

    /// Takes the file away; 0 without one.
    pub fn take_file(&self) -> u64 {
        self.file.swap(0, AcqRel)
    }

    /// Keeps a file for the descriptor; false if it has ended since, or another thread was faster.
    pub fn keep_file(&self, generation: u32, file: u64) -> bool {
        if self.file.compare_exchange(0, file, AcqRel, Relaxed).is_err() {
            return false;
        }
        if self.generation() == generation {
            return true;
        }
        // Ended meanwhile: whoever swaps it out closes it.
        self.file.compare_exchange(file, 0, AcqRel, Relaxed).is_err()
    }
}

/// In memory that is wiped in a forked child.
#[repr(C)]
pub struct Table {
    /// 0 in a child that has not looked at it yet.
    pub alive: AtomicU32,
    /// One more than the highest descriptor that was ever held.
    highest: AtomicUsize,
    entries: [Entry; DESCRIPTORS_MAX],
}

impl Table {
    pub fn entry(&self, descriptor: usize) -> Option<&Entry> {
        // Of a descriptor only the low 32 bits count.
        self.entries.get(descriptor as u32 as usize)
    }

    pub fn hold(&self, descriptor: usize) {
        if let Some(entry) = self.entry(descriptor) {
            entry.hold();
            self.highest.fetch_max(descriptor + 1, AcqRel);
        }
    }

    /// The library has made this descriptor for itself.
    pub fn keep_own(&self, descriptor: usize) {
        if let Some(entry) = self.entry(descriptor) {
            entry.clear();
            entry.set_kind(entry.generation(), Kind::Own);
        }
    }

    /// All that may be held.
    pub fn known(&self) -> impl Iterator<Item = (usize, &Entry)> {
        let highest = self.highest.load(Acquire).min(DESCRIPTORS_MAX);
        self.entries[..highest].iter().enumerate()
    }

    /// Gives all held offsets to the kernel: others are about to share open files.
    pub fn release_all(&self) {
        self.known().for_each(|(descriptor, entry)| entry.release(descriptor));
    }
}
