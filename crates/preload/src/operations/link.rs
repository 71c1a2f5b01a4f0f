//! The process's way to its service: a channel made on first need, and another one when that has ended, because the service's worker died or
//! the mounts changed.
//!
//! Open files are numbers of the channel by which they were opened, and carry its label ([`label`]), so that none is ever taken for a file of
//! another channel. Channels that have ended stay where they are, since other threads may be in them: each tells what became of writes that had
//! returned.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64};

use polytropo_client::{Channel, File, Refused, Verdict};

use super::{names, process};
use crate::sys;

const NONE: u32 = 0;
const CONNECTING: u32 = 1;
const READY: u32 = 2;
/// There was no channel, and there is to be none.
const OFF: u32 = 3;
/// The channel has ended.
const GONE: u32 = 4;
/// The same, and a thread is making the next one.
const AGAIN: u32 = 5;
/// It has ended, and there is to be none after it.
const LAST: u32 = 6;
/// Above these bits of the state: the label of the last channel that there was.
const STATE_BITS: u32 = 8;
const STATE_MASK: u32 = (1 << STATE_BITS) - 1;
/// Descriptors of the channel below this number would be in the way of the program's own.
const LOWEST_DESCRIPTOR: i32 = 512;

/// Channels that a process may have had; afterwards all is the kernel's.
const CHANNELS_MAX: usize = 128;
/// Where a file's number has the label of its channel.
const LABEL_AT: u32 = 56;
const LABEL_MASK: u64 = (CHANNELS_MAX as u64 - 1) << LABEL_AT;

/// Pause from the end of a channel to the next one: doubles with each that did not last [`LASTING`] times as long, and with each attempt that fails.
const PAUSE_MIN_MS: u32 = 100;
const PAUSE_MAX_MS: u32 = 1_000;
const LASTING: u32 = 10;
/// After so many channels the pause is this one, so that the others last for an hour of deaths.
const OFTEN: u32 = 16;
const PAUSE_OFTEN_MS: u32 = 30_000;
/// Needs of a channel that has ended, or could not be made, between looks at the clock.
const NEEDS: u32 = 16;
/// Who insists on a channel waits so long for another thread that makes one.
const INSISTING_NAPS_MAX: u32 = 100;
const INSISTING_NAP_NS: u64 = 10_000_000;

pub struct Link {
    state: AtomicU32,
    needs: AtomicU32,
    pause_ms: AtomicU32,
    /// When the last channel was made, when it ended or could not be made again.
    made_ms: AtomicU64,
    ended_ms: AtomicU64,
    /// Requests and rings of channels that have ended.
    past: [AtomicU64; 2],
    /// What the channel's descriptors are, to know whether they still are.
    identities: [[AtomicU64; 2]; 3],
    channels: [UnsafeCell<MaybeUninit<Channel>>; CHANNELS_MAX],
}

// SAFETY: a channel is written by whoever moved the state from NONE to CONNECTING or from GONE to AGAIN, and read only after READY.
unsafe impl Sync for Link {}

/// The number of a file, with the channel's label.
pub fn label(channel: &Channel, file: File) -> u64 {
    file.to_number() | u64::from(channel.label()) << LABEL_AT
}

impl Link {
    pub const fn new() -> Self {
        Self {
            state: AtomicU32::new(NONE),
            needs: AtomicU32::new(0),
            pause_ms: AtomicU32::new(PAUSE_MIN_MS),
            made_ms: AtomicU64::new(0),
            ended_ms: AtomicU64::new(0),
            past: [const { AtomicU64::new(0) }; 2],
            identities: [const { [const { AtomicU64::new(0) }; 2] }; 3],
            channels: [const { UnsafeCell::new(MaybeUninit::uninit()) }; CHANNELS_MAX],
        }
    }

    /// # Safety
    /// There must have been a channel of that label.
    #[inline]
    unsafe fn channel(&self, label: u32) -> &Channel {
        let place = &self.channels[label as usize % CHANNELS_MAX];
        // SAFETY: the caller's word; a channel is never written again but in a forked child, by `forget`.
        unsafe { (*place.get()).assume_init_ref() }
    }

    /// The channel, if there is one now.
    #[inline]
    pub fn get(&self) -> Option<&Channel> {
        let word = self.state.load(Acquire);
        // SAFETY: READY says that it was written.
        (word & STATE_MASK == READY).then(|| unsafe { self.channel(word >> STATE_BITS) })
    }

    /// The channel by which a file was opened, which may have ended, and the file.
    #[inline]
    pub fn of(&self, number: u64) -> Option<(&Channel, File)> {
        let label = ((number & LABEL_MASK) >> LABEL_AT) as u32;
        let word = self.state.load(Acquire);
        let was = matches!(word & STATE_MASK, READY | GONE | AGAIN | LAST) && label <= word >> STATE_BITS;
        // SAFETY: just checked.
        was.then(|| (unsafe { self.channel(label) }, File::from_number(number & !LABEL_MASK)))
    }

    /// Whether a channel has ended and there may be another one.
    pub fn may_return(&self) -> bool {
        matches!(self.state.load(Acquire) & STATE_MASK, GONE | AGAIN)
    }

    /// The channel, connected if need be. A thread that comes while another connects does without.
    pub fn get_or_connect(&self, connect: impl FnOnce() -> Result<Channel, Refused>) -> Option<&Channel> {
        let word = self.state.load(Acquire);
        let is_turn = || self.needs.fetch_add(1, Relaxed) % NEEDS == 0;
        match word & STATE_MASK {
            NONE if is_turn() => self.connect(word, false, connect),
            GONE if is_turn() => self.connect_again(word, false, connect),
            _ => self.get(),
        }
    }

    /// One more attempt for what must not go without: whatever was tried lately, and after whoever connects just now. For calls that are rare.
    #[cold]
    pub fn insist(&self, connect: impl FnOnce() -> Result<Channel, Refused>) -> Option<&Channel> {
        for _ in 0..INSISTING_NAPS_MAX {
            if !matches!(self.state.load(Acquire) & STATE_MASK, CONNECTING | AGAIN) {
                break;
            }
            sys::nap(INSISTING_NAP_NS);
        }
        let word = self.state.load(Acquire);
        match word & STATE_MASK {
            NONE => self.connect(word, true, connect),
            GONE => self.connect_again(word, true, connect),
            _ => self.get(),
        }
    }

    /// Whether there will never be a channel again.
    pub fn is_off(&self) -> bool {
        matches!(self.state.load(Acquire) & STATE_MASK, OFF | LAST)
    }

    #[cold]
    fn connect(
        &self,
        word: u32,
        at_once: bool,
        connect: impl FnOnce() -> Result<Channel, Refused>,
    ) -> Option<&Channel> {
        // The end of an attempt that failed, if there was one.
        let (ended_ms, pause_ms) = (self.ended_ms.load(Relaxed), self.pause_ms.load(Relaxed));
        let paused = || sys::coarse_clock_ms().wrapping_sub(ended_ms) >= u64::from(pause_ms);
        if !(at_once || ended_ms == 0 || paused())
            || self.state.compare_exchange(word, CONNECTING, AcqRel, Acquire).is_err()
        {
            return self.get();
        }
        match connect() {
            // A low limit keeps them low: then they are the program's numbers, and there is no channel.
            Ok(channel) if channel.descriptors().iter().any(|number| *number < LOWEST_DESCRIPTOR) => {
                self.state.store(OFF, Release);
            }
            // SAFETY: this thread alone is CONNECTING.
            Ok(channel) => unsafe { self.keep(channel, 0) },
            // There may be a service later, or room.
            Err(Refused::Errno(_) | Refused::Verdict(Verdict::Gone | Verdict::TooMany | Verdict::Failed)) => {
                self.ended_ms.store(sys::coarse_clock_ms(), Relaxed);
                if ended_ms != 0 {
                    self.pause_ms.store((2 * pause_ms).min(PAUSE_MAX_MS), Relaxed);
                }
                self.state.store(NONE, Release);
            }
            Err(_) => self.state.store(OFF, Release),
        }
        self.get()
    }

    #[cold]
    fn connect_again(
        &self,
        word: u32,
        at_once: bool,
        connect: impl FnOnce() -> Result<Channel, Refused>,
    ) -> Option<&Channel> {
        let (last, now) = (word >> STATE_BITS, sys::coarse_clock_ms());
        let often = if last < OFTEN { 0 } else { PAUSE_OFTEN_MS };
        let pause_ms = self.pause_ms.load(Relaxed).max(often);
        let paused = now.wrapping_sub(self.ended_ms.load(Relaxed)) >= u64::from(pause_ms);
        if !(paused || at_once)
            || last as usize + 1 >= CHANNELS_MAX
            // Who has changed its reach keeps to the kernel.
            || names::has_ended()
            || self.state.compare_exchange(word, word & !STATE_MASK | AGAIN, AcqRel, Acquire).is_err()
        {
            return None;
        }
        // SAFETY: this word says that there was one.
        let former = unsafe { self.channel(last) };
        if !self.owns(former) {
            // The program has taken the numbers for itself, in a way that we did not see.
            // What was open is still to be told from what never was.
            self.state.store(word & !STATE_MASK | LAST, Release);
            return None;
        }
        let Ok(mut channel) = connect() else {
            self.ended_ms.store(now, Relaxed);
            self.pause_ms.store((2 * pause_ms).min(PAUSE_MAX_MS), Relaxed);
            self.state.store(word, Release);
            return None;
        };
        for (past, counter) in self.past.iter().zip([&former.counters.requests, &former.counters.rings]) {
            past.fetch_add(counter.load(Relaxed), Relaxed);
        }
        channel.succeed(former, last + 1);
        process::begin_with_channel();
        // SAFETY: this thread alone has the state AGAIN.
        unsafe { self.keep(channel, last + 1) };
        self.get()
    }

    /// # Safety
    /// For the thread that may write the channel.
    unsafe fn keep(&self, channel: Channel, label: u32) {
        let table = process::known_table();
        for (descriptor, identity) in channel.descriptors().into_iter().zip(&self.identities) {
            let status = sys::status(descriptor as usize);
            let words = status.map_or([0; 2], |status| [status.device, status.inode]);
            identity.iter().zip(words).for_each(|(place, word)| place.store(word, Relaxed));
            if let Some(table) = table {
                table.keep_own(descriptor as usize);
            }
        }
        self.made_ms.store(sys::coarse_clock_ms(), Relaxed);
        // SAFETY: the caller's word.
        unsafe { (*self.channels[label as usize % CHANNELS_MAX].get()).write(channel) };
        self.state.store(label << STATE_BITS | READY, Release);
    }

    /// Whether the numbers of a channel's descriptors still are that.
    fn owns(&self, channel: &Channel) -> bool {
        channel.descriptors().into_iter().zip(&self.identities).all(|(descriptor, identity)| {
            sys::status(descriptor as usize).is_some_and(|now| {
                [now.device, now.inode] == [identity[0].load(Relaxed), identity[1].load(Relaxed)]
            })
        })
    }

    /// Numbers of the descriptors that are the library's own.
    pub fn descriptors(&self) -> Option<[i32; 3]> {
        let word = self.state.load(Acquire);
        let was = matches!(word & STATE_MASK, READY | GONE | AGAIN);
        // SAFETY: just checked.
        was.then(|| unsafe { self.channel(word >> STATE_BITS) }.descriptors())
    }

    /// A count that changes with each request of the channel that there is, and nothing more: it is looked at twice in every call.
    #[inline]
    pub fn requests(&self) -> u64 {
        let word = self.state.load(Acquire);
        if !matches!(word & STATE_MASK, READY | GONE | LAST) {
            return 0;
        }
        // SAFETY: just checked.
        unsafe { self.channel(word >> STATE_BITS) }.counters.requests.load(Relaxed)
    }

    /// Requests that were made, and how often the service had to be woken.
    pub fn asked(&self) -> [u64; 2] {
        let word = self.state.load(Acquire);
        let last = matches!(word & STATE_MASK, READY | GONE | LAST).then_some(word >> STATE_BITS);
        let now = last.map_or([0; 2], |label| {
            // SAFETY: just checked.
            let counters = &unsafe { self.channel(label) }.counters;
            [counters.requests.load(Relaxed), counters.rings.load(Relaxed)]
        });
        [now[0] + self.past[0].load(Relaxed), now[1] + self.past[1].load(Relaxed)]
    }

    /// This channel has ended: everything goes to the kernel, for a while at least. The memory stays, since other threads may be in it.
    #[cold]
    pub fn give_up(&self, channel: &Channel) {
        let label = channel.label() << STATE_BITS;
        let now = sys::coarse_clock_ms();
        let lasted_ms = now.wrapping_sub(self.made_ms.load(Relaxed));
        let pause_ms = self.pause_ms.load(Relaxed);
        if self.state.compare_exchange(label | READY, label | GONE, AcqRel, Acquire).is_err() {
            return;
        }
        let lasted = lasted_ms >= u64::from(pause_ms * LASTING) || channel.label() == 0;
        let pause_ms = if lasted { PAUSE_MIN_MS } else { (2 * pause_ms).min(PAUSE_MAX_MS) };
        self.pause_ms.store(pause_ms, Relaxed);
        self.ended_ms.store(now, Relaxed);
        self.needs.store(0, Relaxed);
    }

    /// In a forked child, which has none of the memory: begins anew.
    pub fn forget(&self) {
        let word = self.state.swap(NONE, AcqRel);
        self.needs.store(0, Relaxed);
        self.ended_ms.store(0, Relaxed);
        self.past.iter().for_each(|past| past.store(0, Relaxed));
        self.pause_ms.store(PAUSE_MIN_MS, Relaxed);
        if matches!(word & STATE_MASK, READY | GONE | AGAIN) {
            let place = &self.channels[(word >> STATE_BITS) as usize % CHANNELS_MAX];
            // SAFETY: there was one, and the child's only thread takes it out.
            unsafe { (*place.get()).assume_init_read() }.forget_in_child();
        }
    }
}
