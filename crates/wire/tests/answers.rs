//! Every interleaving of a log that comes round and who reads in it. Run with `RUSTFLAGS="--cfg modeled --cfg loom"`, as `make loom` does;
//! otherwise this file is empty. Each rule of the protocol is broken once, and the model must notice.
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::sync::Arc;
use loom::thread;
use polytropo_wire::answers::{Header, Kind, New, Place, View};
use polytropo_wire::sync::{AtomicU64, Fault, Relaxed, plant};

/// Room for two records of two words.
const LOG_WORDS: usize = 12;

struct Memory {
    header: Header,
    places: Vec<Place>,
    log: Vec<AtomicU64>,
}

impl Memory {
    fn new() -> Arc<Self> {
        let zero = || AtomicU64::new(0);
        Arc::new(Self {
            header: Header {
                magic: zero(),
                version: zero(),
                log_words: zero(),
                reserved: AtomicU64::new(LOG_WORDS as u64),
            },
            places: (0..4).map(|_| Place::default()).collect(),
            log: (0..LOG_WORDS).map(|_| zero()).collect(),
        })
    }

    fn view(&self) -> View<'_> {
        View { header: &self.header, places: &self.places, log: &self.log }
    }

    /// What is told of an inode has its number in each word.
    fn put(&self, head: u64, ino: u64, tells: u64) -> u64 {
        let payload = [ino * 100 + tells; 2];
        let new = New { kind: Kind::Listing, ino, everything: ino, path: b"", payload: &payload };
        let view = self.view();
        view.put(view.room_for(head, new.words(), LOG_WORDS).unwrap(), &new)
    }

    fn read(&self, ino: u64) -> Option<u64> {
        let record = self.view().find(Kind::Listing, ino)?;
        let payload = record.payload();
        let words: Vec<_> = payload.iter().map(|word| word.load(Relaxed)).collect();
        if !self.view().is_there(record.position) {
            return None;
        }
        assert!(words.len() == 2 && words[0] == words[1], "torn: {words:?}");
        assert_eq!(words[0] / 100, ino, "of another inode");
        Some(words[0] % 100)
    }
}

fn explore(fault: Option<Fault>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 20_000;
    builder.check(move || {
        plant(fault);
        model();
    });
}

fn finds(fault: Fault, model: impl Fn() + Sync + Send + Copy + 'static) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = catch_unwind(AssertUnwindSafe(|| explore(Some(fault), model))).is_err();
    std::panic::set_hook(hook);
    plant(None);
    assert!(found, "the model does not notice {fault:?}");
}

/// A record is overwritten by those of others, and put anew.
fn comes_round() {
    let memory = Memory::new();
    let head = memory.put(LOG_WORDS as u64, 1, 1);
    let writer = {
        let memory = memory.clone();
        thread::spawn(move || {
            let head = memory.put(head, 2, 1);
            memory.put(head, 1, 2)
        })
    };
    let first = memory.read(1);
    let second = memory.read(1);
    assert!(first.is_none_or(|first| second.is_none_or(|second| second >= first)), "{first:?}, {second:?}");
    writer.join().unwrap();
    assert_eq!(memory.read(1), Some(2));
}

/// All ways of a place are taken, so that another inode's place is used again.
fn places_change_hands() {
    let memory = Memory::new();
    let mut head = LOG_WORDS as u64;
    for ino in [11, 12, 13, 1] {
        head = memory.put(head, ino, 1);
    }
    let writer = {
        let memory = memory.clone();
        thread::spawn(move || memory.put(head, 2, 1))
    };
    for ino in [1, 2, 13] {
        let _ = memory.read(ino);
    }
    writer.join().unwrap();
    assert_eq!(memory.read(2), Some(1));
}

#[test]
fn whoever_reads_sees_what_was_put_or_nothing() {
    explore(None, comes_round);
    for fault in [
        Fault::AnswerToldAfterwards,
        Fault::AnswerWriterWithoutFence,
        Fault::AnswerReaderWithoutFence,
        Fault::AnswerLookedAtOnce,
    ] {
        finds(fault, comes_round);
    }
}

#[test]
fn a_place_of_two_inodes_misleads_nobody() {
    explore(None, places_change_hands);
    finds(Fault::AnswerOfAnother, places_change_hands);
}
