//! Every interleaving of who changes, who answers and who uses an answer. Run with `RUSTFLAGS="--cfg modeled --cfg loom"`, as `make
//! loom` does; otherwise this file is empty. Each rule of the protocol is broken once, and the model must notice.
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, fence};
use loom::thread;
use polytropo_wire::epochs::{Epoch, Tag};
use polytropo_wire::sync::{Acquire, Relaxed, Release};

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 20_000;
    builder.check(model);
}

/// A rule that somebody does not keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The change is applied first and counted afterwards.
    CountedAfterwards,
    /// Counted before the change, but nobody can see that it is under way.
    NotUnderWay,
    /// The answer is looked up first and the sample taken afterwards.
    SampledAfterwards,
    /// The counters are looked at before the answer.
    CheckedFirst,
    /// A change of two inodes counts one, then does its part, then the other.
    OneAfterTheOther,
    /// An answer depends on the last component only.
    LastComponentOnly,
}

fn finds(fault: Fault, model: impl Fn(Fault) + Sync + Send + Copy + 'static) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = catch_unwind(AssertUnwindSafe(|| explore(move || model(fault)))).is_err();
    std::panic::set_hook(hook);
    assert!(found, "the model does not notice {fault:?}");
}

/// What one inode says, and what the service answered of it.
struct Inode {
    epoch: [Epoch; 1],
    state: AtomicU64,
}

impl Inode {
    fn new() -> Arc<Self> {
        Arc::new(Self { epoch: [Epoch::default()], state: AtomicU64::new(0) })
    }

    fn change(&self, to: u64, fault: Fault) {
        if fault == Fault::CountedAfterwards {
            self.state.store(to, Relaxed);
        }
        self.epoch[0].begin();
        if fault == Fault::NotUnderWay {
            self.epoch[0].end();
        }
        if fault != Fault::CountedAfterwards {
            self.state.store(to, Relaxed);
        }
        if fault != Fault::NotUnderWay {
            self.epoch[0].end();
        }
    }

    fn answer(&self, fault: Fault) -> (u64, Tag) {
        let mut tag = Tag::default();
        if fault == Fault::SampledAfterwards {
            let state = self.state.load(Acquire);
            tag.add(0, self.epoch[0].sample());
            return (state, tag);
        }
        tag.add(0, self.epoch[0].sample());
        (self.state.load(Acquire), tag)
    }
}

/// What somebody has seen, by whatever way, no answer that is used afterwards may be older than.
fn never_older_than_what_was_seen(fault: Fault) {
    let inode = Inode::new();
    let writer = {
        let inode = inode.clone();
        thread::spawn(move || inode.change(1, fault))
    };
    let (kept, tag) = inode.answer(fault);
    let early = fault == Fault::CheckedFirst && tag.holds(&inode.epoch);
    let seen = inode.state.load(Acquire);
    if early || (fault != Fault::CheckedFirst && tag.holds(&inode.epoch)) {
        assert!(kept >= seen, "kept {kept}, though {seen} was seen before");
    }
    writer.join().unwrap();
    if tag.holds(&inode.epoch) {
        assert_eq!(kept, 1, "an answer of before the change holds after it");
    }
}

#[test]
fn an_answer_is_never_older_than_what_was_seen() {
    explore(|| never_older_than_what_was_seen(Fault::None));
    for fault in [Fault::CountedAfterwards, Fault::NotUnderWay, Fault::SampledAfterwards, Fault::CheckedFirst]
    {
        finds(fault, never_older_than_what_was_seen);
    }
}

/// Two changes under one counter may overlap.
#[test]
fn overlapping_changes_are_told_apart() {
    explore(|| {
        let inode = Inode::new();
        let other = Arc::new(AtomicU64::new(0));
        let writers = [0, 1].map(|which| {
            let (inode, other) = (inode.clone(), other.clone());
            thread::spawn(move || {
                inode.epoch[0].begin();
                if which == 0 {
                    inode.state.store(1, Relaxed)
                } else {
                    other.store(1, Relaxed)
                }
                inode.epoch[0].end();
            })
        });
        let mut tag = Tag::default();
        tag.add(0, inode.epoch[0].sample());
        let kept = [inode.state.load(Acquire), other.load(Acquire)];
        let seen = [inode.state.load(Acquire), other.load(Acquire)];
        if tag.holds(&inode.epoch) {
            assert_eq!(kept, seen);
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        if tag.holds(&inode.epoch) {
            assert_eq!(kept, [1, 1]);
        }
    });
}

/// A file moves from one directory to another: whoever puts two answers together finds it in one of them.
fn found_in_one_place(fault: Fault) {
    let epochs: Arc<[Epoch; 2]> = Arc::new([Epoch::default(), Epoch::default()]);
    // Behind a lock, as names are: bit 0 is the name in the first directory, bit 1 in the second.
    let names = Arc::new(AtomicU64::new(0b01));
    let mover = {
        let (epochs, names) = (epochs.clone(), names.clone());
        thread::spawn(move || {
            epochs[0].begin();
            if fault == Fault::OneAfterTheOther {
                names.store(0b10, Release);
                epochs[0].end();
                epochs[1].begin();
            } else {
                epochs[1].begin();
                names.store(0b10, Release);
                epochs[0].end();
            }
            epochs[1].end();
        })
    };
    let ask = |which: usize| {
        let mut tag = Tag::default();
        tag.add(which as u16, epochs[which].sample());
        (names.load(Acquire) >> which & 1, tag)
    };
    // Where it will be is looked at first.
    let (second, second_tag) = ask(1);
    let (first, first_tag) = ask(0);
    // Used together: all loaded, then all checked.
    if first_tag.holds(&*epochs) && second_tag.holds(&*epochs) {
        assert_eq!(first + second, 1, "the file is in both places or in none");
    }
    mover.join().unwrap();
}

#[test]
fn a_rename_is_seen_whole() {
    explore(|| found_in_one_place(Fault::None));
    finds(Fault::OneAfterTheOther, found_in_one_place);
}

/// The directory on the way is closed to the caller, then the file in it changes: who knows of the second change has lost the first answer.
fn permission_on_the_way(fault: Fault) {
    let epochs: Arc<[Epoch; 2]> = Arc::new([Epoch::default(), Epoch::default()]);
    let open = Arc::new(AtomicU64::new(1));
    let mut tag = Tag::default();
    if fault != Fault::LastComponentOnly {
        tag.add(0, epochs[0].sample());
    }
    tag.add(1, epochs[1].sample());
    let allowed = open.load(Acquire);
    let owner = {
        let (epochs, open) = (epochs.clone(), open.clone());
        thread::spawn(move || {
            epochs[0].begin();
            open.store(0, Relaxed);
            epochs[0].end();
        })
    };
    let seen = open.load(Relaxed);
    fence(Acquire);
    if allowed == 1 && tag.holds(&*epochs) {
        assert_eq!(seen, 1, "allowed by an answer, though the directory was seen closed");
    }
    owner.join().unwrap();
}

#[test]
fn every_component_counts() {
    explore(|| permission_on_the_way(Fault::None));
    finds(Fault::LastComponentOnly, permission_on_the_way);
}
