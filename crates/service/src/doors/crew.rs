//! How many threads of a door wait for messages.
//!
//! The kernel wakes the threads that wait in read(2) in turn, so a lone program would be served by another thread, on
//! another core or with colder caches, each time. One thread stays where the program runs, and often finds the next request
//! before it has fallen asleep. So as few threads read as can cope; the others stand by. One is called
//! - by a reader that sees several programs' requests interleaved, or never has to wait for messages;
//! - by a reader that begins something slow;
//! - by the watch, one of those standing by, which looks now and then whether all readers are stuck.
//!
//! A reader that sees one program at a time stands by again, unless it is the last.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

/// After so many looks at nothing the watch sleeps until there is a request.
const QUIET_LOOKS_MAX: u32 = 16;
/// Messages in a row without a wait that show a backlog.
const PRESSED_MAX: u32 = 16;
/// What shows that programs work at once: a message of one counts so much after another's, all others count against it.
const CROSSING: u32 = 4;
const CROSSED_MAX: u32 = 32;
/// Messages that show neither, less two for each that does.
const IDLE_MAX: u32 = 16;
/// Senders remembered.
const RECENT_COUNT: usize = 8;

/// What a thread does; the rest of its beat counts its requests.
const STANDING_BY: u64 = 0;
const READING: u64 = 1;
const WORKING: u64 = 2;
const STATES: u64 = 3;
const ONE_REQUEST: u64 = 4;

/// Written by its own thread alone.
#[repr(align(128))]
#[derive(Default)]
struct Beat(AtomicU64);

/// The threads of one door.
pub struct Crew {
    readers: AtomicUsize,
    beats: Box<[Beat]>,
    standing: Mutex<Standing>,
    call: Condvar,
    watch_sleeps: AtomicBool,
    /// How often the watch looks; readers that were at the same request all the while are stuck.
    watch_interval: Duration,
    /// More readers than that do not make work faster that needs the CPU.
    cpus: usize,
}

#[derive(Default)]
struct Standing {
    waiting: usize,
    /// Calls that nobody has taken yet.
    calls: usize,
    watched: bool,
    ended: bool,
}

impl Crew {
    /// Of `count` threads, the first of which reads at once.
    pub fn new(count: usize, watch_interval: Duration) -> Self {
        Self {
            readers: AtomicUsize::new(1),
            beats: (0..count.max(1)).map(|_| Beat::default()).collect(),
            standing: Mutex::default(),
            call: Condvar::new(),
            watch_sleeps: AtomicBool::new(false),
            watch_interval,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// Before thread `number` waits for a message.
    pub fn reads(&self, number: usize) {
        self.set_state(number, READING, Ordering::Release);
    }

    /// Before thread `number` works on a message.
    pub fn works(&self, number: usize) {
        let beat = &self.beats[number].0;
        let next = (beat.load(Ordering::Relaxed) & !STATES).wrapping_add(ONE_REQUEST) | WORKING;
        // With the load below, so that either we see the watch asleep or it sees us at work.
        beat.store(next, Ordering::SeqCst);
        if self.watch_sleeps.load(Ordering::SeqCst) && self.watch_sleeps.swap(false, Ordering::SeqCst) {
            let _standing = self.standing.lock();
            self.call.notify_all();
        }
    }

    fn set_state(&self, number: usize, state: u64, order: Ordering) {
        let beat = &self.beats[number].0;
        beat.store(beat.load(Ordering::Relaxed) & !STATES | state, order);
    }

    /// One more thread is to read. False if none is left.
    pub fn call(&self) -> bool {
        let mut standing = self.standing.lock();
        let any = standing.waiting > standing.calls;
        if any {
            standing.calls += 1;
            self.readers.fetch_add(1, Ordering::Relaxed);
            self.call.notify_one();
        }
        any
    }

    /// Whether a call would be heard.
    pub fn has_standby(&self) -> bool {
        let standing = self.standing.lock();
        standing.waiting > standing.calls
    }

    /// A thread that is made now reads at once.
    pub fn joins(&self) {
        self.readers.fetch_add(1, Ordering::Relaxed);
    }

    /// It could not be made.
    pub fn leaves(&self) {
        self.readers.fetch_sub(1, Ordering::Relaxed);
    }

    /// One more thread is to read, if fewer than `limit` do, and fewer than there are CPUs.
    pub fn call_up_to(&self, limit: usize) {
        if self.readers.load(Ordering::Relaxed) < limit.min(self.cpus) {
            self.call();
        }
    }

    /// Whether the calling thread is the only one that reads.
    pub fn is_alone(&self) -> bool {
        self.readers.load(Ordering::Relaxed) == 1
    }

    pub fn cpus(&self) -> usize {
        self.cpus
    }

    /// The calling thread will not read for a while. False if nobody else does.
    pub fn begin_slow(&self) -> bool {
        self.readers.fetch_sub(1, Ordering::Relaxed) > 1 || self.call()
    }

    pub fn end_slow(&self) {
        self.readers.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the calling thread may stop reading. If so it has to stand by.
    pub fn may_leave(&self) -> bool {
        let less = |readers| if readers > 1 { Some(readers - 1) } else { None };
        self.readers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// Waits until thread `number` is to read. False when the door ends.
    pub fn stand_by(&self, number: usize) -> bool {
        self.set_state(number, STANDING_BY, Ordering::Release);
        let mut standing = self.standing.lock();
        standing.waiting += 1;
        loop {
            if standing.ended || standing.calls > 0 {
                break;
            }
            if standing.watched {
                self.call.wait(&mut standing);
            } else if self.watch(&mut standing) {
                standing.calls += 1;
                self.readers.fetch_add(1, Ordering::Relaxed);
            }
        }
        standing.waiting -= 1;
        standing.calls = standing.calls.saturating_sub(1);
        // Somebody else may have to be the watch now.
        self.call.notify_one();
        !standing.ended
    }

    /// Lets all who stand by go.
    pub fn end(&self) {
        self.standing.lock().ended = true;
        self.call.notify_all();
    }

    /// Watches until there is a call or the end, or all readers are stuck: true.
    fn watch(&self, standing: &mut MutexGuard<'_, Standing>) -> bool {
        standing.watched = true;
        let mut before = self.beats();
        let mut quiet_looks = 0;
        let mut stuck = false;
        while !stuck && standing.calls == 0 && !standing.ended {
            if quiet_looks < QUIET_LOOKS_MAX {
                self.call.wait_for(standing, self.watch_interval);
            } else {
                self.watch_sleeps.store(true, Ordering::SeqCst);
                if self.beats().iter().any(|beat| beat & STATES == WORKING) {
                    self.watch_sleeps.store(false, Ordering::SeqCst);
                } else {
                    self.call.wait(standing);
                }
                quiet_looks = 0;
            }
            let now = self.beats();
            stuck = are_stuck(&before, &now);
            quiet_looks = if before == now && !stuck { quiet_looks + 1 } else { 0 };
            before = now;
        }
        self.watch_sleeps.store(false, Ordering::SeqCst);
        standing.watched = false;
        stuck
    }

    pub fn beats(&self) -> Vec<u64> {
        self.beats.iter().map(|beat| beat.0.load(Ordering::SeqCst)).collect()
    }

    /// Whether a thread other than `number` reads, or has gone on to another request since its beat was as `before`.
    pub fn other_lives(&self, number: usize, before: &[u64]) -> bool {
        let lives =
            |now: u64, before: u64| now & STATES == READING || (now & STATES == WORKING && now != before);
        let beats = self.beats();
        beats.iter().zip(before).enumerate().any(|(at, (now, before))| at != number && lives(*now, *before))
    }
}

/// Nobody waits for messages, and nobody has finished anything since the look before.
fn are_stuck(before: &[u64], now: &[u64]) -> bool {
    let working = now.iter().any(|beat| beat & STATES == WORKING);
    let reading = now.iter().any(|beat| beat & STATES == READING);
    working && !reading && before == now
}

/// What one reader sees of the load.
#[derive(Default)]
pub struct Load {
    pressed: u32,
    crossed: u32,
    idle: u32,
    /// Threads that sent the last messages, changes only; the newest is at `newest`.
    recent: [u32; RECENT_COUNT],
    newest: usize,
}

/// What a reader should do about the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    Nothing,
    /// Call another, if fewer read than this.
    Call(usize),
    Leave,
}

impl Load {
    /// A message of `bytes` came from thread `sender`, `waited` after the answer to the one before was begun.
    pub fn message(&mut self, waited: Duration, bytes: usize, sender: u32) -> Advice {
        let pressed = waited < without_sleep(bytes);
        let crossed = self.crosses(sender);
        self.pressed = if pressed { self.pressed + 1 } else { 0 };
        self.crossed = if crossed { self.crossed + CROSSING } else { self.crossed.saturating_sub(1) };
        self.idle = if pressed || crossed { self.idle.saturating_sub(2) } else { self.idle + 1 };
        if self.pressed >= PRESSED_MAX {
            self.pressed = 0;
            Advice::Call(usize::MAX)
        } else if self.crossed >= CROSSED_MAX {
            self.crossed = 0;
            Advice::Call(self.senders())
        } else if self.idle >= IDLE_MAX {
            self.idle = 0;
            Advice::Leave
        } else {
            Advice::Nothing
        }
    }

    /// Whether others sent between this message and an earlier one of the same sender. What the kernel sends for itself
    /// (FORGET, RELEASE, write-back) has no sender, and follows upon what programs do.
    fn crosses(&mut self, sender: u32) -> bool {
        if sender == 0 || sender == self.recent[self.newest] {
            return false;
        }
        let crossed = self.recent.contains(&sender);
        self.newest = (self.newest + 1) % RECENT_COUNT;
        self.recent[self.newest] = sender;
        crossed
    }

    fn senders(&self) -> usize {
        let first = |(at, sender): (usize, &u32)| *sender != 0 && !self.recent[..at].contains(sender);
        self.recent.iter().enumerate().filter(|&each| first(each)).count()
    }
}

/// The longest that an answer and the next read(2) take for `bytes` that are there already. A lone program needs longer
/// to ask again, even on another core; any machine copies 2 GB/s.
fn without_sleep(bytes: usize) -> Duration {
    Duration::from_nanos(5_000 + bytes as u64 / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const INTERVAL: Duration = Duration::from_millis(1);

    /// The advice after each of `times` messages.
    fn advice(load: &mut Load, waited_us: u64, senders: &[u32], times: u32) -> Vec<Advice> {
        let senders = senders.iter().cycle();
        senders
            .take(times as usize)
            .map(|&sender| load.message(Duration::from_micros(waited_us), 100, sender))
            .collect()
    }

    #[test]
    fn a_backlog_calls_another() {
        let mut load = Load::default();
        let called = advice(&mut load, 1, &[7], PRESSED_MAX);
        assert_eq!(called.iter().filter(|&&a| a == Advice::Nothing).count() as u32, PRESSED_MAX - 1);
        assert_eq!(called.last(), Some(&Advice::Call(usize::MAX)));
        // One wait begins the count anew.
        advice(&mut load, 1, &[7], PRESSED_MAX - 1);
        advice(&mut load, 50, &[7], 1);
        assert!(advice(&mut load, 1, &[7], PRESSED_MAX - 1).iter().all(|&a| a == Advice::Nothing));
    }

    #[test]
    fn programs_at_work_at_once_call_as_many_as_they_are() {
        let called = advice(&mut Load::default(), 50, &[7, 8, 9], 50);
        assert!(called.contains(&Advice::Call(3)) && !called.contains(&Advice::Leave));
        // What the kernel sends for itself shows no other program.
        let called = advice(&mut Load::default(), 50, &[7, 0], 500);
        assert!(called.iter().all(|a| matches!(a, Advice::Nothing | Advice::Leave)));
        // One after the other is not at once.
        let senders: Vec<u32> = (1..100).flat_map(|sender| [sender; 5]).collect();
        let called = advice(&mut Load::default(), 50, &senders, 500);
        assert!(called.iter().all(|a| matches!(a, Advice::Nothing | Advice::Leave)));
        assert!(called.contains(&Advice::Leave));
    }

    #[test]
    fn the_last_reader_stays() {
        let crew = Crew::new(1, INTERVAL);
        assert!(!crew.may_leave());
        crew.call();
        assert!(!crew.may_leave(), "nobody stood by to be called");
    }

    #[test]
    fn a_thread_that_does_not_go_on_does_not_live() {
        let crew = Crew::new(2, INTERVAL);
        let before = crew.beats();
        assert!(!crew.other_lives(0, &before), "one that stands by");
        crew.works(1);
        assert!(crew.other_lives(0, &before) && !crew.other_lives(1, &before));
        let before = crew.beats();
        assert!(!crew.other_lives(0, &before), "one that is stuck");
        crew.reads(1);
        assert!(crew.other_lives(0, &before));
    }

    #[test]
    fn who_stands_by_reads_when_called_and_goes_at_the_end() {
        let crew = Arc::new(Crew::new(3, INTERVAL));
        crew.reads(0);
        let threads: Vec<_> = [1, 2]
            .map(|number| {
                let crew = crew.clone();
                std::thread::spawn(move || crew.stand_by(number))
            })
            .into();
        while crew.standing.lock().waiting < 2 {
            std::thread::yield_now();
        }
        crew.call();
        while crew.standing.lock().waiting == 2 {
            std::thread::yield_now();
        }
        assert!(crew.may_leave() && !crew.may_leave());
        crew.end();
        let mut read: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        read.sort();
        assert_eq!(read, [false, true]);
    }

    #[test]
    fn the_watch_reads_when_all_readers_are_stuck() {
        let crew = Arc::new(Crew::new(2, INTERVAL));
        crew.works(0);
        assert!(crew.stand_by(1), "returns only because thread 0 never finishes");
    }

    #[test]
    fn a_watch_that_fell_asleep_is_woken_by_a_request() {
        let crew = Arc::new(Crew::new(2, INTERVAL));
        crew.reads(0);
        let watch = {
            let crew = crew.clone();
            std::thread::spawn(move || crew.stand_by(1))
        };
        while !crew.watch_sleeps.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        crew.works(0);
        assert!(watch.join().unwrap());
    }
}
