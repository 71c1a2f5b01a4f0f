//! Every interleaving of the kernel that asks, a program that changes something behind it, and the thread that sends notices. Run with
//! `RUSTFLAGS="--cfg modeled --cfg loom"`, as `make loom` does; otherwise this file is empty. Each rule of the protocol is broken once,
//! and the model must notice.
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::sync::atomic::AtomicU64;
use loom::sync::{Arc, Mutex};
use loom::thread;
use marks::Slots;
use polytropo_wire::sync::{Acquire, Relaxed, Release};

#[path = "../../service/src/doors/fuse/marks.rs"]
mod marks;

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 20_000;
    builder.check(model);
}

fn finds(fault: Fault, model: impl Fn(Fault) + Sync + Send + Copy + 'static) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = catch_unwind(AssertUnwindSafe(|| explore(move || model(fault)))).is_err();
    std::panic::set_hook(hook);
    assert!(found, "the model does not notice {fault:?}");
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// A name is looked up, then marked.
    MarkedAfterwards,
    /// The mark is looked at, then the change is made.
    LookedAtBefore,
    /// The notice is sent, then the mark taken away.
    ClearedAfterwards,
    /// An entry whose inode was marked after it was looked at is kept whatever happened meanwhile.
    KeptAnyway,
    /// Changes are counted after the mark was looked at.
    CountedAfterwards,
}

const NAME: u64 = 5;

fn slots() -> Slots {
    Slots::new((0..2).map(|_| AtomicU64::new(0)).collect())
}

/// The truth, what the kernel keeps of it (one less, or 0 for nothing) under its lock of the directory, and notices that wait.
struct World {
    slots: Slots,
    truth: AtomicU64,
    kernel: Mutex<u64>,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self { slots: slots(), truth: AtomicU64::new(1), kernel: Mutex::new(0) })
    }

    /// The kernel asks, holding its lock.
    fn ask(&self, fault: Fault) {
        let mut kernel = self.kernel.lock().unwrap();
        if fault != Fault::MarkedAfterwards {
            self.slots.mark(NAME);
        }
        let found = self.truth.load(Acquire);
        if fault == Fault::MarkedAfterwards {
            self.slots.mark(NAME);
        }
        *kernel = found;
    }

    /// A change behind the kernel's back, and its notice if there has to be one. It is acknowledged at the end.
    fn change(&self, to: u64, fault: Fault) {
        let early = fault == Fault::LookedAtBefore && self.slots.is_marked(NAME);
        self.truth.store(to, Release);
        self.slots.look();
        if early || (fault != Fault::LookedAtBefore && self.slots.is_marked(NAME)) {
            if fault != Fault::ClearedAfterwards {
                self.slots.clear(NAME);
            }
            *self.kernel.lock().unwrap() = 0;
            if fault == Fault::ClearedAfterwards {
                self.slots.clear(NAME);
            }
        }
    }
}

/// After a change was acknowledged the kernel keeps nothing older.
fn names_are_never_kept_too_long(fault: Fault) {
    let world = World::new();
    let asker = {
        let world = world.clone();
        thread::spawn(move || {
            world.ask(fault);
            world.ask(fault);
        })
    };
    world.change(2, fault);
    let kept = *world.kernel.lock().unwrap();
    assert!(kept == 0 || kept == 2, "the kernel keeps {kept} after the change");
    world.change(3, fault);
    let kept = *world.kernel.lock().unwrap();
    assert!(kept == 0 || kept == 3, "the kernel keeps {kept} after the second change");
    asker.join().unwrap();
    let kept = *world.kernel.lock().unwrap();
    assert!(kept == 0 || kept == 3, "the kernel keeps {kept} in the end");
}

#[test]
fn names_that_others_change_are_dropped_by_the_kernel() {
    explore(|| names_are_never_kept_too_long(Fault::None));
    for fault in [Fault::MarkedAfterwards, Fault::LookedAtBefore, Fault::ClearedAfterwards] {
        finds(fault, names_are_never_kept_too_long);
    }
}

/// Attributes come with a name, and which inode they are of is known only then.
fn attributes_are_kept_only_if_nothing_changed(fault: Fault) {
    let (slots, truth) = (Arc::new(slots()), Arc::new(AtomicU64::new(1)));
    let asker = {
        let (slots, truth) = (slots.clone(), truth.clone());
        thread::spawn(move || {
            let looked = slots.looked();
            let found = truth.load(Acquire);
            slots.mark(NAME);
            (fault == Fault::KeptAnyway || slots.looked() == looked).then_some(found)
        })
    };
    truth.store(2, Relaxed);
    if fault != Fault::CountedAfterwards {
        slots.look();
    }
    let told = slots.is_marked(NAME);
    if fault == Fault::CountedAfterwards {
        slots.look();
    }
    let kept = asker.join().unwrap();
    assert!(told || kept != Some(1), "the kernel keeps what was, and is not told");
}

#[test]
fn attributes_that_others_change_meanwhile_are_not_kept() {
    explore(|| attributes_are_kept_only_if_nothing_changed(Fault::None));
    for fault in [Fault::KeptAnyway, Fault::CountedAfterwards] {
        finds(fault, attributes_are_kept_only_if_nothing_changed);
    }
}
