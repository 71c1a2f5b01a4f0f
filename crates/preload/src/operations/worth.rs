//! When a channel is worth its making: what it costs, and what it would have saved so far.
//!
//! Until there is one everything is FUSE's, whose kernel caches answer what was asked before as well as a filesystem of the kernel does. So a
//! channel pays only for a program that goes on asking, and nobody knows which one does. The usual answer to that: change over once as
//! much was lost as changing costs, which never costs more than twice what knowing would have.
//!
//! | event | by FUSE | by the channel | saves |
//! |---|---|---|---|
//! | a question about a path that was asked before (stat) | 910 ns | 91 ns | 800 ns |
//! | opening a file that was opened before | 2.8 us | 0.6 us | 2,200 ns |
//! | reading 4 KiB, in order or at random | 480, 630 ns | 120, 320 ns | 300 ns |
//! | making, removing, renaming a file | 80 to 110 us | 45 us | 30,000 ns |
//! | writing 4 KiB, where programs write by channels | 10 us | 0.2 us | 9,800 ns |
//! | listing a directory | 75 us for 1,000 names | 138 us | nothing |
//!
//! (`make bench-path`, hot.) Making a channel takes 350 us, and what is asked over it for the first time is a request of 10 us: some 150
//! names are 1.5 ms more.
//!
//! Whoever asks for preloading (`--preload`) says that it pays: then little is enough, and what a channel learns (a listing answers for all
//! names in a directory) counts as well.

use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::Relaxed;

use super::process;

/// What a program has done without a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A path was asked for once more.
    Question,
    /// A directory was opened.
    Directory,
    /// A file was opened; whether it had been before.
    Open { again: bool },
    /// A file of ours was read.
    Read,
    /// A name was made, went or moved.
    Change,
    /// A file was opened to be filled: it is made, or cut, and mostly written.
    Filled,
    /// A file of ours that the kernel has open was written so often that posting would have paid for a channel.
    Written,
}

/// What an event counts for, and what a channel has to have saved, in nanoseconds.
struct Costs {
    question: u32,
    directory: u32,
    open: u32,
    open_again: u32,
    /// None: reads alone are worth it.
    read: Option<u32>,
    change: u32,
    filled: u32,
    written: u32,
    channel: u32,
}

/// Writes to one file after which it counts as `Written`: they took what making a channel takes.
pub const WRITES: u32 = 32;

/// For programs that were to be preloaded: 64 questions or changes of names, 8 directories, 16 files, 8 that are filled, or any file that is read
/// more than a few times or written often. The file that is written stays the kernel's; those that are opened next are not.
const ASKED_FOR: Costs = Costs {
    question: 800,
    directory: 6_400,
    open: 3_200,
    open_again: 3_200,
    read: None,
    change: 800,
    filled: 3_200,
    written: 51_200,
    channel: 51_200,
};
/// For all others (`POLYTROPO_PRELOAD=auto`): 2,300 questions, 840 files, 6,200 reads, 62 changes.
const PATIENT: Costs = Costs {
    question: 800,
    directory: 0,
    open: 0,
    open_again: 2_200,
    read: Some(300),
    change: 30_000,
    // Where nobody asked for channels, FUSE's writes are held back by the kernel.
    filled: 0,
    written: 0,
    channel: CHANNEL_NS,
};
/// With 150 first questions.
const CHANNEL_NS: u32 = 1_850_000;

impl Costs {
    fn of(&self, event: Event) -> Option<u32> {
        let counts_for = match event {
            Event::Question => self.question,
            Event::Directory => self.directory,
            Event::Open { again: false } => self.open,
            Event::Open { again: true } => self.open_again,
            Event::Read => return self.read,
            Event::Change => self.change,
            Event::Filled => self.filled,
            Event::Written => self.written,
        };
        Some(counts_for)
    }
}

static SAVED_NS: AtomicU32 = AtomicU32::new(0);

/// Counts an event. True from the one on with which a channel is worth its making.
pub fn count(event: Event) -> bool {
    let costs = if process::setting().is_patient() { &PATIENT } else { &ASKED_FOR };
    let Some(counts_for) = costs.of(event) else { return true };
    // Threads may lose a count to each other.
    let saved_ns = SAVED_NS.load(Relaxed).saturating_add(counts_for);
    SAVED_NS.store(saved_ns, Relaxed);
    saved_ns >= costs.channel
}

/// In a forked child, which has lost its channel.
pub fn forget_in_child() {
    SAVED_NS.store(0, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events_until(costs: &Costs, event: Event) -> u32 {
        costs.of(event).map_or(1, |counts_for| costs.channel.div_ceil(counts_for))
    }

    #[test]
    fn thresholds_are_as_documented() {
        let open = Event::Open { again: true };
        let events =
            |costs: &Costs| [Event::Question, open, Event::Read].map(|event| events_until(costs, event));
        assert_eq!(events(&ASKED_FOR), [64, 16, 1]);
        assert_eq!(events_until(&ASKED_FOR, Event::Directory), 8);
        assert_eq!(events_until(&ASKED_FOR, Event::Written), 1);
        // Each is opened as well.
        assert_eq!(ASKED_FOR.channel / (ASKED_FOR.open + ASKED_FOR.filled), 8);
        assert_eq!(events(&PATIENT), [2313, 841, 6167]);
    }
}
