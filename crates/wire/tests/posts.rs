//! Posted writes, every interleaving of small cases, with the words and functions that both sides use. Each case is tried
//! with a fault planted as well, which must be found.
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::sync::atomic::Ordering::{AcqRel, Relaxed, Release, SeqCst};
use loom::sync::atomic::{AtomicU32, AtomicU64, fence};
use loom::sync::{Arc, Mutex};
use loom::thread;
use polytropo_wire::posts::{Post, STATE_DONE, STATE_FREE, STATE_PUBLISHED, limit, withdraw};

const FILE: u64 = 7;
const SLOTS: usize = 2;

struct Memory {
    issued: AtomicU64,
    permit: AtomicU64,
    posts: [Post; SLOTS],
    /// What was applied, in order, a digit each. The service's own.
    applied: AtomicU64,
}

fn word32(value: u32) -> AtomicU32 {
    AtomicU32::new(value)
}

impl Memory {
    fn new() -> Arc<Self> {
        let post = |_| Post {
            state: word32(STATE_FREE),
            waiters: word32(0),
            file: AtomicU64::new(FILE),
            offset: AtomicU64::new(0),
            sequence: AtomicU64::new(0),
            bytes: word32(0),
            outcome: word32(0),
            place: AtomicU64::new(0),
            place_of: AtomicU64::new(0),
            applied_of: AtomicU64::new(0),
        };
        Arc::new(Self {
            issued: AtomicU64::new(0),
            permit: AtomicU64::new(FILE),
            posts: std::array::from_fn(post),
            applied: AtomicU64::new(0),
        })
    }

    /// True if the write returned at once.
    fn write(&self, slot: usize, value: u32, faulty: bool) -> bool {
        let post = &self.posts[slot];
        post.bytes.store(value, Relaxed);
        if faulty {
            // As `publish` without its fence.
            post.sequence.store(self.issued.fetch_add(1, AcqRel), Relaxed);
            post.state.store(STATE_PUBLISHED, Release);
            return self.permit.load(Relaxed) == FILE;
        }
        post.publish(&self.issued, &self.permit, FILE)
    }

    /// As the service does, in sequence.
    fn drain(&self, limited: bool) {
        let limit = if limited { limit(&self.issued) } else { u64::MAX };
        let mut found: Vec<_> =
            self.posts.iter().filter_map(|post| Some((post.pending(limit)?, post))).collect();
        found.sort_by_key(|(sequence, _)| *sequence);
        for (_, post) in found {
            if post.take() {
                let value = u64::from(post.bytes.load(Relaxed));
                self.applied.store(self.applied.load(Relaxed) * 10 + value, Relaxed);
                post.finish(0);
            }
        }
    }
}

/// After a withdrawal nothing lies about that a program believes to be written.
fn withdrawal(faulty: bool) {
    loom::model(move || {
        let memory = Memory::new();
        let program = {
            let memory = memory.clone();
            thread::spawn(move || {
                // A second one only while the first needed no waiting, which would be the service's turn.
                let first = memory.write(0, 1, faulty);
                (first, first && memory.write(1, 2, faulty))
            })
        };
        if faulty {
            memory.permit.store(0, Relaxed);
        } else {
            withdraw(&memory.permit);
        }
        memory.drain(true);
        // From here on the service answers others.
        let seen = memory.applied.load(Relaxed);
        let (first, second) = program.join().unwrap();
        let expected = if second { 12 } else { u64::from(first) };
        assert!(seen == expected || seen / 10 == expected || seen == 1, "{seen} {first} {second}");
        assert!(!first || seen != 0, "a write that had returned was not seen");
        assert!(!second || seen == 12, "a write that had returned was not seen");
    });
}

/// A write that began after another had returned is never applied before it.
fn order(limited: bool) {
    loom::model(move || {
        let memory = Memory::new();
        let programs = {
            let memory = memory.clone();
            thread::spawn(move || {
                // The later one lies where the service looks last.
                memory.write(0, 1, false);
                memory.write(1, 2, false);
            })
        };
        memory.drain(limited);
        let seen = memory.applied.load(Relaxed);
        assert!([0, 1, 12].contains(&seen), "applied as {seen}");
        programs.join().unwrap();
    });
}

/// A post that its program took back is applied never, one that it could not take back once.
fn taking_back() {
    loom::model(|| {
        let memory = Memory::new();
        let program = {
            let memory = memory.clone();
            thread::spawn(move || !memory.write(0, 1, false) && memory.posts[0].take_back())
        };
        withdraw(&memory.permit);
        memory.drain(true);
        let back = program.join().unwrap();
        if back {
            assert_eq!(memory.applied.load(Relaxed), 0);
        } else {
            memory.drain(true);
            assert_eq!(memory.applied.load(Relaxed), 1);
        }
    });
}

/// A service that sleeps until its bell is rung, as `doors/channel/hall` has it, and a program that waits for room. Neither has a clock. Nobody
/// blocks, since loom does not get over a deadlock: who rings for the service does its work until it sleeps again.
struct Sleeping {
    memory: Arc<Memory>,
    /// Not 0: somebody looks for posts.
    cpu: AtomicU32,
    service: Mutex<Service>,
    /// The program sleeps on the post.
    asleep: Mutex<bool>,
}

#[derive(Default)]
struct Service {
    rung: bool,
    sleeps: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Who waits for a write waits for the next one, too.
    AnyTurn,
    /// The service is told before it is clear what is waited for.
    NotifiedTooEarly,
}

impl Sleeping {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            memory: Memory::new(),
            cpu: word32(1),
            service: Mutex::default(),
            asleep: Mutex::new(false),
        })
    }

    fn post(&self) -> &Post {
        &self.memory.posts[0]
    }

    fn notify(&self) {
        fence(SeqCst);
        if self.cpu.load(Relaxed) == 0 {
            let sleeps = {
                let mut service = self.service.lock().unwrap();
                service.rung = true;
                std::mem::take(&mut service.sleeps)
            };
            if sleeps {
                self.serve();
            }
        }
    }

    /// The service, until it falls asleep.
    fn serve(&self) {
        loop {
            self.cpu.store(1, Relaxed);
            let post = self.post();
            if post.pending(limit(&self.memory.issued)).is_some() && post.take() && post.finish(0) {
                *self.asleep.lock().unwrap() = false;
            }
            self.cpu.store(0, Relaxed);
            fence(SeqCst);
            if post.pending(u64::MAX).is_some() {
                continue;
            }
            let mut service = self.service.lock().unwrap();
            if !std::mem::take(&mut service.rung) {
                service.sleeps = true;
                return;
            }
        }
    }

    fn wait_for_room(&self, fault: Fault) {
        let post = self.post();
        if fault == Fault::NotifiedTooEarly {
            self.notify();
        }
        let Some(mut turn) = post.pending_turn() else { return };
        if fault != Fault::NotifiedTooEarly {
            self.notify();
        }
        if fault == Fault::AnyTurn
            && let Some(other) = post.pending_turn()
        {
            turn = other;
        }
        post.wait_and_stay(turn, |word| {
            let mut asleep = self.asleep.lock().unwrap();
            *asleep = post.state.load(Relaxed) == word;
            !*asleep
        });
    }

    /// Writes once more with the post if it is done, and does not wait. As after the first posts of a sleeping service, nobody is told.
    fn write_again(&self) {
        if self.post().kind() == STATE_DONE {
            self.post().free();
            self.post().publish(&self.memory.issued, &self.memory.permit, FILE);
        }
    }
}

/// Who waits for room while another thread of its program takes it, and the service falls asleep, is woken all the same.
fn waiting_for_room(fault: Fault) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let all = Sleeping::new();
        all.memory.write(0, 1, false);
        let service = {
            let all = all.clone();
            thread::spawn(move || all.serve())
        };
        let other = {
            let all = all.clone();
            thread::spawn(move || all.write_again())
        };
        all.wait_for_room(fault);
        other.join().unwrap();
        service.join().unwrap();
        assert!(!*all.asleep.lock().unwrap(), "asleep for good");
    });
}

/// Who sleeps until a post is done is woken: it says so and looks, the service finishes and looks.
fn waking(faulty: bool) {
    loom::model(move || {
        let memory = Memory::new();
        memory.write(0, 1, false);
        let service = {
            let memory = memory.clone();
            thread::spawn(move || {
                assert!(memory.posts[0].take());
                memory.posts[0].finish(0)
            })
        };
        let post = &memory.posts[0];
        let mut sleeps = false;
        if faulty {
            post.waiters.store(1, Relaxed);
            sleeps = post.kind() != STATE_DONE;
        } else if let Some(turn) = post.pending_turn() {
            post.wait_and_stay(turn, |_| {
                sleeps = true;
                false
            });
        }
        let wakes = service.join().unwrap();
        assert!(!sleeps || wakes, "asleep for good");
    });
}

/// Who uses a post again and sleeps on it is woken, though who finished it before is about to wake those that sleep.
fn waking_again(faulty: bool) {
    loom::model(move || {
        let memory = Memory::new();
        let asleep = Arc::new(Mutex::new(false));
        memory.write(0, 1, false);
        let finish = {
            let (memory, asleep) = (memory.clone(), asleep.clone());
            move || {
                let post = &memory.posts[0];
                if post.pending(limit(&memory.issued)).is_none() || !post.take() {
                    return;
                }
                post.mark_done(0);
                fence(SeqCst);
                // The fault: says that nobody sleeps now, for which it may be too late.
                let awaited = if faulty { post.waiters.swap(0, Relaxed) != 0 } else { post.is_awaited() };
                if awaited {
                    *asleep.lock().unwrap() = false;
                }
            }
        };
        let service = {
            let finish = finish.clone();
            thread::spawn(move || {
                finish();
                finish();
            })
        };
        let post = &memory.posts[0];
        while post.kind() != STATE_DONE {
            thread::yield_now();
        }
        post.free();
        memory.write(0, 2, false);
        if let Some(turn) = post.pending_turn() {
            post.wait_and_stay(turn, |word| {
                let mut asleep = asleep.lock().unwrap();
                *asleep = post.state.load(Relaxed) == word;
                !*asleep
            });
        }
        service.join().unwrap();
        finish();
        assert!(!*asleep.lock().unwrap(), "asleep for good");
    });
}

/// A service that holds what is posted under a permit, as `doors/channel/posted` and `held` do: whoever applies posts has the turn, and looks at
/// the permit only then.
struct Holding {
    memory: Arc<Memory>,
    turn: Mutex<()>,
    held: Mutex<u64>,
    /// What the layers have, in order, a digit each.
    layers: AtomicU64,
}

impl Holding {
    fn apply(&self, seen_before: Option<bool>) {
        let _turn = self.turn.lock().unwrap();
        let limit = limit(&self.memory.issued);
        let posts = &self.memory.posts;
        let mut found: Vec<_> = posts.iter().filter_map(|post| Some((post.pending(limit)?, post))).collect();
        found.sort_by_key(|(sequence, _)| *sequence);
        for (_, post) in found {
            if !post.take() {
                continue;
            }
            let value = u64::from(post.bytes.load(Relaxed));
            if seen_before.unwrap_or_else(|| self.is_permitted()) {
                let mut held = self.held.lock().unwrap();
                *held = *held * 10 + value;
            } else {
                // What was held goes first.
                self.flush();
                self.layers.store(self.layers.load(Relaxed) * 10 + value, Relaxed);
            }
            post.finish(0);
        }
    }

    fn is_permitted(&self) -> bool {
        self.memory.permit.load(Relaxed) == FILE
    }

    fn flush(&self) {
        let mut held = self.held.lock().unwrap();
        if *held != 0 {
            let digits = if *held < 10 { 10 } else { 100 };
            self.layers.store(self.layers.load(Relaxed) * digits + *held, Relaxed);
            *held = 0;
        }
    }
}

/// Whoever withdraws a permit, applies what was posted and then writes what is held has all that had returned with the layers, in order, though another
/// thread was about to hold it.
fn holding(faulty: bool) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let memory = Memory::new();
        let (turn, held, layers) = (Mutex::new(()), Mutex::new(0), AtomicU64::new(0));
        let service = Arc::new(Holding { memory: memory.clone(), turn, held, layers });
        let first = memory.write(0, 1, false);
        let program = thread::spawn(move || memory.write(1, 2, false));
        let driver = {
            let service = service.clone();
            thread::spawn(move || service.apply(faulty.then(|| service.is_permitted())))
        };
        withdraw(&service.memory.permit);
        service.apply(None);
        service.flush();
        // From here on the service answers others.
        let seen = service.layers.load(Relaxed);
        let second = program.join().unwrap();
        driver.join().unwrap();
        assert!(first && (seen == 12 || (seen == 1 && !second)), "{seen} {second}");
        assert_eq!(*service.held.lock().unwrap(), 0, "held of a file that others know");
    });
}

fn found(model: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(model)).is_err()
}

#[test]
fn what_returned_is_seen_by_whoever_comes_next() {
    withdrawal(false);
    assert!(found(|| withdrawal(true)), "the missing fences were not noticed");
}

#[test]
fn writes_are_applied_in_order() {
    order(true);
    assert!(found(|| order(false)), "the missing limit was not noticed");
}

#[test]
fn a_post_is_applied_once_or_taken_back() {
    taking_back();
}

#[test]
fn what_is_held_is_written_before_others_look() {
    holding(false);
    assert!(found(|| holding(true)), "a look at the permit out of turn was not noticed");
}

#[test]
fn sleepers_are_woken() {
    waking(false);
    assert!(found(|| waking(true)), "the missing fence was not noticed");
    waking_again(false);
    assert!(found(|| waking_again(true)), "a count cleared late was not noticed");
}

#[test]
fn who_waits_for_room_is_woken_without_a_clock() {
    waiting_for_room(Fault::None);
    for fault in [Fault::AnyTurn, Fault::NotifiedTooEarly] {
        assert!(found(move || waiting_for_room(fault)), "{fault:?} was not noticed");
    }
}
