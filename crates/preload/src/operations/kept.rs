//! Files that are open at the service for the sake of opens to come, each with a descriptor that only names it (O_PATH).
//!
//! What opens a file that is here gets a copy of that descriptor, a *placeholder*: its number, its limits, fstat(2) and /proc/self/fd are right, and
//! the kernel refuses to read it (`EBADF`) should anything get by us. Several placeholders may share one file: each has an offset of its own.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicI32, AtomicU32, AtomicU64};

use super::process::{self, LINK};
use super::table::Kind;
use crate::sys::{self, nr};

/// Files that are kept or in use.
const PLACES: usize = 256;
/// Of those, files that nobody has open: each keeps its inode alive.
const IDLE_MAX: u32 = 64;
/// Larger files are given up with their last user, since a removed one keeps its space meanwhile.
const IDLE_BYTES_MAX: u64 = 1 << 20;
/// Kept descriptors are moved up here, out of the program's way.
const LOWEST_DESCRIPTOR: usize = 512;
const F_DUPFD: usize = 0;
const F_DUPFD_CLOEXEC: usize = 1030;

const USERS: u64 = 0xffff;
/// Stays when its last user goes.
const CACHED: u64 = 1 << 16;
/// Not free.
const TAKEN: u64 = 1 << 17;
/// Counts what the place was used for.
const TIMES_BITS: u32 = 32;

struct Place {
    state: AtomicU64,
    /// The client's number, with its channel's label.
    file: AtomicU64,
    /// -1: none, so that the kernel has to name the file for each placeholder.
    descriptor: AtomicI32,
}

static KEPT: [Place; PLACES] =
    [const { Place { state: AtomicU64::new(0), file: AtomicU64::new(0), descriptor: AtomicI32::new(-1) } };
        PLACES];
static IDLE: AtomicU32 = AtomicU32::new(0);
/// Where the search for a place, or for one to give up, goes on.
static HAND: AtomicU32 = AtomicU32::new(0);

/// A use of a kept file.
pub struct Use {
    pub index: u32,
    pub file: u64,
}

/// Never 0.
fn word(index: usize, state: u64) -> u64 {
    1 << 63 | (state >> TIMES_BITS) << 16 | index as u64
}

impl Place {
    fn descriptor(&self) -> Option<usize> {
        usize::try_from(self.descriptor.load(Acquire)).ok()
    }

    /// The place is this thread's to clear: nobody uses it, and nobody can any more.
    fn clear(&self) {
        let file = self.file.swap(0, AcqRel);
        self.close_descriptor();
        if let Some((channel, file)) = LINK.of(file).filter(|_| file != 0) {
            let _ = channel.close(file);
        }
        self.state.fetch_and(!(USERS | CACHED | TAKEN), Release);
    }

    fn close_descriptor(&self) {
        if let Ok(number) = usize::try_from(self.descriptor.swap(-1, AcqRel)) {
            close_own(number);
        }
    }

    /// Gives up what is kept for nobody.
    fn give_up_idle(&self) -> bool {
        let state = self.state.load(Acquire);
        let idle = state & TAKEN != 0 && state & CACHED != 0 && state & USERS == 0;
        // Counted up, so that who still has the word gets nothing.
        let gone = (state & !CACHED).wrapping_add(1 << TIMES_BITS);
        if !idle || self.state.compare_exchange(state, gone, AcqRel, Relaxed).is_err() {
            return false;
        }
        IDLE.fetch_sub(1, AcqRel);
        self.clear();
        true
    }
}

/// A use of the file that `word` stands for. None if it is not kept any more.
pub fn enter(word: u64) -> Option<Use> {
    let index = (word & 0xffff) as usize;
    let place = KEPT.get(index)?;
    let mut state = place.state.load(Acquire);
    loop {
        let same = state & TAKEN != 0 && (state >> TIMES_BITS) as u32 == (word >> 16) as u32;
        if !same || state & USERS == USERS {
            return None;
        }
        match place.state.compare_exchange_weak(state, state + 1, AcqRel, Acquire) {
            Ok(_) => break,
            Err(now) => state = now,
        }
    }
    if state & USERS == 0 && state & CACHED != 0 {
        IDLE.fetch_sub(1, AcqRel);
    }
    Some(Use { index: index as u32, file: place.file.load(Acquire) })
}

/// A placeholder that is a copy of the kept descriptor, or the errno with which the kernel refuses one. None if there is no such descriptor.
pub fn copy(used: &Use, close_on_exec: bool) -> Option<Result<usize, isize>> {
    let place = KEPT.get(used.index as usize)?;
    let kept = place.descriptor()?;
    let how = if close_on_exec { F_DUPFD_CLOEXEC } else { F_DUPFD };
    // SAFETY: concerns no memory.
    let copied = unsafe { sys::call(nr::FCNTL, [kept, how, 0, 0, 0, 0]) };
    if copied < 0 {
        return Some(Err(copied));
    }
    if place.descriptor() != Some(kept) {
        // The program took that number for something else meanwhile.
        sys::close(copied as i32);
        return None;
    }
    Some(Ok(copied as usize))
}

/// Keeps a copy of a descriptor that names the file: it was opened more than once.
#[cold]
pub fn keep_descriptor(used: &Use, named: usize) {
    let Some(place) = KEPT.get(used.index as usize) else { return };
    if place.descriptor().is_some() || place.state.load(Acquire) & CACHED == 0 {
        return;
    }
    let Some(moved) = move_up(named) else { return };
    if place.descriptor.compare_exchange(-1, moved as i32, AcqRel, Relaxed).is_err() {
        close_own(moved);
    }
}

/// A user goes.
pub fn release(index: u32) {
    let Some(place) = KEPT.get(index as usize) else { return };
    let left = place.state.fetch_sub(1, AcqRel).wrapping_sub(1);
    if left & USERS != 0 || left & TAKEN == 0 {
        return;
    }
    if left & CACHED == 0 {
        let gone = left.wrapping_add(1 << TIMES_BITS);
        if place.state.compare_exchange(left, gone, AcqRel, Relaxed).is_ok() {
            place.clear();
        }
    } else if IDLE.fetch_add(1, AcqRel) >= IDLE_MAX {
        give_up_one();
    }
}

fn give_up_one() {
    for _ in 0..PLACES {
        let index = HAND.fetch_add(1, Relaxed) as usize % PLACES;
        if KEPT[index].give_up_idle() {
            return;
        }
    }
}

/// Keeps an open file. Its word, or None if there is no room for it. One use of it is the caller's.
pub fn keep(file: u64, size_bytes: u64) -> Option<u64> {
    for _ in 0..2 {
        for _ in 0..PLACES {
            let index = HAND.fetch_add(1, Relaxed) as usize % PLACES;
            let place = &KEPT[index];
            let state = place.state.load(Relaxed);
            // A user of its own, who releases it when it may be found.
            let taken = state & !(USERS | CACHED) | TAKEN | 1;
            if state & TAKEN != 0 || place.state.compare_exchange(state, taken, AcqRel, Relaxed).is_err() {
                continue;
            }
            place.file.store(file, Release);
            place.descriptor.store(-1, Release);
            if size_bytes <= IDLE_BYTES_MAX {
                place.state.fetch_or(CACHED, AcqRel);
            }
            return Some(word(index, taken));
        }
        give_up_one();
    }
    None
}

/// A file is about to be changed: it is not kept open if nobody has it open.
pub fn give_up(word: u64) {
    if let Some(place) = KEPT.get(index_of(word) as usize) {
        place.give_up_idle();
    }
}

/// What `keep` kept is not to be found after all.
pub fn discard(word: u64) {
    if let Some(place) = KEPT.get(index_of(word) as usize) {
        place.state.fetch_and(!CACHED, AcqRel);
        release(index_of(word));
    }
}

/// The index that a word stands for.
pub fn index_of(word: u64) -> u32 {
    word as u32 & 0xffff
}

/// The number may be the program's afterwards. Who puts something else in its place just now has closed it.
fn close_own(number: usize) {
    let Some(entry) = process::known_table().and_then(|table| table.entry(number)) else {
        sys::close(number as i32);
        return;
    };
    if entry.exchange_kind(entry.generation(), Kind::Own, Kind::Upgrading) {
        sys::close(number as i32);
        entry.clear();
    }
}

fn move_up(descriptor: usize) -> Option<usize> {
    // SAFETY: concerns no memory.
    let moved = unsafe { sys::call(nr::FCNTL, [descriptor, F_DUPFD_CLOEXEC, LOWEST_DESCRIPTOR, 0, 0, 0]) };
    let moved = usize::try_from(moved).ok()?;
    if let Some(entry) = process::known_table().and_then(|table| table.entry(moved)) {
        entry.clear();
        entry.set_kind(entry.generation(), Kind::Own);
    }
    Some(moved)
}

/// The program takes a kept descriptor's number for something else: it is not closed here, since the kernel does that.
pub fn forget_descriptor(number: usize) {
    for place in &KEPT {
        let _ = place.descriptor.compare_exchange(number as i32, -1, AcqRel, Relaxed);
    }
}

/// Gives up all that nobody has open, and all descriptors that are kept.
pub fn give_up_all() {
    for place in &KEPT {
        if place.state.load(Acquire) & TAKEN != 0 && !place.give_up_idle() {
            place.close_descriptor();
        }
    }
}

/// In a forked child, which has no use for them: its channel will be another.
pub fn forget_in_child() {
    for place in &KEPT {
        let descriptor = place.descriptor.swap(-1, AcqRel);
        if descriptor >= 0 {
            sys::close(descriptor);
        }
        place.file.store(0, Relaxed);
        let state = place.state.load(Relaxed);
        place.state.store((state & !(USERS | CACHED | TAKEN)).wrapping_add(1 << TIMES_BITS), Relaxed);
    }
    IDLE.store(0, Relaxed);
}
