//! Real processes, killed and stopped at random instants while they work on a shared queue.
#![cfg(all(not(modeled), not(miri)))]

use polytropo_queue::shm::{self, Mapping};
use polytropo_queue::{Config, Deadline, Error, Memory, Rcqb, Rcqd, Rcqs, Stats, identity};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WORKER: &str = "POLYTROPO_QUEUE_TEST_WORKER";
const PUT: u8 = 1;
const TAKEN: u8 = 2;
const LEDGER_ITEMS: usize = 1 << 26;

fn config() -> Config {
    Config { item_size: 64, lanes: 2, skew: 8, participants: 16, ..Config::strict(32) }
}

/// Which items were put and taken, in memory that survives the workers: a counter, then a byte an item.
struct Ledger(Mapping);

impl Ledger {
    fn next(&self) -> &AtomicU64 {
        // SAFETY: the mapping is aligned and long enough, and used through atomics alone.
        unsafe { self.0.base().cast::<AtomicU64>().as_ref() }
    }

    fn items(&self) -> &[AtomicU8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.0.base().as_ptr().add(64).cast(), LEDGER_ITEMS) }
    }

    fn mark(&self, item: u64, what: u8) {
        let before = self.items()[item as usize].fetch_or(what, Ordering::SeqCst);
        assert_eq!(before & what, 0, "item {item} was marked twice with {what}");
    }
}

enum Queue {
    Bytes(Rcqb<Mapping>),
    Single(Rcqs<Mapping>),
    Double(Rcqd<Mapping>),
}

/// RCQD has room for more than the number of an item, so that a half-written one would show.
fn widened(item: u64) -> u64 {
    item | !item << 32
}

impl Queue {
    fn size_bytes(kind: &str) -> usize {
        match kind {
            "bytes" => Rcqb::<Mapping>::size_bytes(&config()),
            "single" => Rcqs::<Mapping>::size_bytes(&config()),
            _ => Rcqd::<Mapping>::size_bytes(&config()),
        }
        .unwrap()
    }

    fn create(kind: &str, memory: Mapping) -> Self {
        match kind {
            "bytes" => {
                Self::Bytes(Rcqb::create(memory, &config(), identity::of_this_process().unwrap()).unwrap())
            }
            "single" => Self::Single(Rcqs::create(memory, &config()).unwrap()),
            _ => Self::Double(Rcqd::create(memory, &config()).unwrap()),
        }
    }

    fn open(kind: &str, name: &str) -> Self {
        let memory = shm::open_named(name).unwrap();
        match kind {
            "bytes" => Self::Bytes(Rcqb::attach(memory, identity::of_this_process().unwrap()).unwrap()),
            "single" => Self::Single(Rcqs::attach(memory).unwrap()),
            _ => Self::Double(Rcqd::attach(memory).unwrap()),
        }
    }

    fn put(&self, item: u64, deadline: Deadline) -> Result<(), Error> {
        match self {
            Self::Bytes(queue) => queue.handle().put(&[item.to_le_bytes(); 8].concat(), deadline),
            Self::Single(queue) => queue.handle().enqueue(item, deadline),
            Self::Double(queue) => queue.handle().enqueue(widened(item), deadline),
        }
    }

    fn get(&self, deadline: Deadline) -> Result<u64, Error> {
        match self {
            Self::Bytes(queue) => {
                let mut out = [0; 64];
                let length = queue.handle().get(&mut out, deadline)?;
                let item = &out[..8];
                assert!(length == 64 && out.chunks(8).all(|chunk| chunk == item), "a torn item: {out:?}");
                Ok(u64::from_le_bytes(item.try_into().unwrap()))
            }
            Self::Single(queue) => queue.handle().dequeue(deadline),
            Self::Double(queue) => {
                let item = queue.handle().dequeue(deadline)?;
                let narrow = item & 0xffff_ffff;
                assert_eq!(item, widened(narrow), "a torn item");
                Ok(narrow)
            }
        }
    }

    fn stats(&self) -> Stats {
        match self {
            Self::Bytes(queue) => queue.stats(),
            Self::Single(queue) => queue.stats(),
            Self::Double(queue) => queue.stats(),
        }
    }
}

/// Not a test by itself: what the processes run that are to be killed. Alone it does nothing.
#[test]
fn worker() {
    let Ok(arguments) = std::env::var(WORKER) else { return };
    let [kind, name, role] = *arguments.split(' ').collect::<Vec<_>>() else { panic!("{arguments}") };
    let queue = Queue::open(kind, name);
    let ledger = Ledger(shm::open_named(&format!("{name}.ledger")).unwrap());
    for turn in 0u64.. {
        if role == "both" {
            let item = ledger.next().fetch_add(1, Ordering::SeqCst);
            if item >= LEDGER_ITEMS as u64 {
                std::thread::sleep(Duration::from_secs(60));
            }
            match queue.put(item, Deadline::Never) {
                Ok(()) => ledger.mark(item, PUT),
                Err(error) => panic!("put: {error}"),
            }
        }
        // Putters alone fill the queue, getters alone empty it: both sides sleep now and then. Who does both must not
        // wait for ever for an item that a getter took.
        let patience = if role == "getter" {
            Deadline::Never
        } else {
            Deadline::after(Duration::from_micros(turn % 300))
        };
        match queue.get(patience) {
            Ok(item) => ledger.mark(item, TAKEN),
            Err(Error::TimedOut) => {}
            Err(error) => panic!("get: {error}"),
        }
    }
}

struct Names(String);

impl Drop for Names {
    fn drop(&mut self) {
        let _ = shm::unlink_named(&self.0);
        let _ = shm::unlink_named(&format!("{}.ledger", self.0));
    }
}

struct Workers(Vec<Child>);

impl Drop for Workers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

impl Workers {
    fn spawn(kind: &str, name: &str, number: usize) -> Child {
        let role = ["both", "both", "getter", "both"][number % 4];
        Command::new(std::env::current_exe().unwrap())
            .args(["worker", "--exact", "--nocapture", "--test-threads=1"])
            .env(WORKER, format!("{kind} {name} {role}"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn kill(&mut self, victim: usize) {
        let ended = self.0[victim].try_wait().unwrap();
        assert!(ended.is_none(), "worker {victim} ended by itself: {ended:?}");
        self.0[victim].kill().unwrap();
        self.0[victim].wait().unwrap();
    }

    fn signal(&self, number: usize, signal: i32) {
        // SAFETY: the child was not waited for, so that its number is still its own.
        assert_eq!(unsafe { libc::kill(self.0[number].id() as i32, signal) }, 0);
    }
}

/// Items are put and taken from now on, or the test ends.
fn others_get_on(ledger: &Ledger, after: &str) {
    let before = ledger.next().load(Ordering::Relaxed);
    let patience = Instant::now() + Duration::from_secs(20);
    while ledger.next().load(Ordering::Relaxed) < before + 10 {
        assert!(Instant::now() < patience, "{after} nobody gets on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Kills `kills` workers, as far as `limit` allows, and tells how many.
fn kill_many(kind: &str, kills: usize, limit: Duration, round: usize) -> usize {
    let name = format!("deaths-{kind}-{}-{round}", std::process::id());
    let names = Names(name.clone());
    let ledger =
        shm::create_named(&format!("{name}.ledger"), 64 + LEDGER_ITEMS, |mapping| Ok(Ledger(mapping)))
            .unwrap();
    shm::create_named(&name, Queue::size_bytes(kind), |memory| {
        drop(Queue::create(kind, memory));
        Ok(())
    })
    .unwrap();
    let queue = Queue::open(kind, &name);
    let started = Instant::now();
    let mut workers = Workers((0..4).map(|number| Workers::spawn(kind, &name, number)).collect());
    let mut random = Random(0x9E37_79B9_7F4A_7C15u64 ^ u64::from(std::process::id()) ^ (round as u64) << 40);
    let mut killed = 0;
    while killed < kills
        && started.elapsed() < limit
        && ledger.next().load(Ordering::Relaxed) < LEDGER_ITEMS as u64 / 2
    {
        std::thread::sleep(Duration::from_micros(500 + random.next() % 6000));
        let victim = random.next() as usize % workers.0.len();
        workers.kill(victim);
        workers.0[victim] = Workers::spawn(kind, &name, victim);
        killed += 1;
        // Whatever the dead one was doing, others get on; and so they do while one is stopped in the middle of something.
        if killed % 16 == 0 {
            others_get_on(&ledger, &format!("after {killed} kills"));
            let stopped = random.next() as usize % workers.0.len();
            workers.signal(stopped, libc::SIGSTOP);
            others_get_on(&ledger, "while a worker is stopped");
            workers.signal(stopped, libc::SIGCONT);
        }
    }
    let in_flight = workers.0.len();
    drop(workers);
    count_up(kind, &queue, &ledger, killed, in_flight);
    drop(names);
    killed
}

/// Nothing was lost but with those who died, nothing came twice, and the queue is as good as new.
fn count_up(kind: &str, queue: &Queue, ledger: &Ledger, killed: usize, in_flight: usize) {
    if let Queue::Bytes(queue) = queue {
        queue.reap();
    }
    let soon = || Deadline::after(Duration::from_secs(5));
    let mut left = 0;
    while !matches!(queue.get(Deadline::At(0)).map(|item| ledger.mark(item, TAKEN)), Err(Error::TimedOut)) {
        left += 1;
        assert!(left <= 64);
    }
    for _ in 0..3 {
        (0..32).for_each(|item| queue.put(item, soon()).unwrap());
        assert_eq!(queue.put(32, Deadline::At(0)), Err(Error::TimedOut));
        (0..32).for_each(|_| assert!(queue.get(soon()).is_ok()));
        assert_eq!(queue.get(Deadline::At(0)), Err(Error::TimedOut));
    }
    let items = &ledger.items()[..ledger.next().load(Ordering::Relaxed) as usize];
    let count = |state: u8| items.iter().filter(|item| item.load(Ordering::Relaxed) == state).count();
    let (undelivered, unfinished) = (count(PUT), count(0));
    let stats = queue.stats();
    println!(
        "{kind}: {killed} kills, {} items, {undelivered} lost with their getter, {unfinished} never put, {stats:?}",
        items.len()
    );
    assert!(undelivered <= killed + in_flight, "{undelivered} items lost by {killed} kills");
    assert!(unfinished <= killed + in_flight, "{unfinished} items vanished by {killed} kills");
    assert!(stats.lost_dequeues <= undelivered as u64, "more reported lost than were");
}

fn gate(kind: &str) {
    let killed = kill_many(kind, 300, Duration::from_secs(20), 0);
    assert!(killed >= 50, "only {killed} kills in 20 s");
}

/// In rounds, each with a new queue: what one round leaves does not hide in the next.
fn soak(kind: &str) {
    let (mut killed, started) = (0, Instant::now());
    for round in 0.. {
        killed += kill_many(kind, 500, Duration::from_secs(60), round);
        if killed >= 20_000 {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(3600), "only {killed} kills in an hour");
    }
    println!("{kind}: {killed} kills in {:?}", started.elapsed());
}

#[test]
fn killed_processes_wedge_nobody_bytes() {
    gate("bytes");
}

#[test]
fn killed_processes_wedge_nobody_single() {
    gate("single");
}

#[test]
fn killed_processes_wedge_nobody_double() {
    gate("double");
}

#[test]
#[ignore = "minutes; run by make soak"]
fn thousands_of_killed_processes_wedge_nobody_bytes() {
    soak("bytes");
}

#[test]
#[ignore = "minutes; run by make soak"]
fn thousands_of_killed_processes_wedge_nobody_single() {
    soak("single");
}

#[test]
#[ignore = "minutes; run by make soak"]
fn thousands_of_killed_processes_wedge_nobody_double() {
    soak("double");
}
