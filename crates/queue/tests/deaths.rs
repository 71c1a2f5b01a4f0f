//! Real processes, killed at random instants while they work on a shared queue.
#![cfg(all(not(loom), not(miri)))]

use polytropo_queue::shm::{self, Mapping};
use polytropo_queue::{Config, Deadline, Error, Memory, Rcqb, Rcqs, identity};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WORKER: &str = "POLYTROPO_QUEUE_TEST_WORKER";
const PUT: u8 = 1;
const TAKEN: u8 = 2;
const LEDGER_ITEMS: usize = 1 << 24;

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
    Words(Rcqs<Mapping>),
}

impl Queue {
    fn open(kind: &str, name: &str) -> Self {
        let memory = shm::open_named(name).unwrap();
        if kind == "bytes" {
            Self::Bytes(Rcqb::attach(memory, identity::of_this_process().unwrap()).unwrap())
        } else {
            Self::Words(Rcqs::attach(memory).unwrap())
        }
    }

    fn put(&self, item: u64, deadline: Deadline) -> Result<(), Error> {
        match self {
            Self::Bytes(queue) => queue.handle().put(&[item.to_le_bytes(); 8].concat(), deadline),
            Self::Words(queue) => queue.handle().enqueue(item, deadline),
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
            Self::Words(queue) => queue.handle().dequeue(deadline),
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

fn kill_many(kind: &str, kills: usize, limit: Duration) {
    let name = format!("deaths-{kind}-{}", std::process::id());
    let names = Names(name.clone());
    let ledger =
        shm::create_named(&format!("{name}.ledger"), 64 + LEDGER_ITEMS, |mapping| Ok(Ledger(mapping)))
            .unwrap();
    let size = Rcqb::<Mapping>::size_bytes(&config()).unwrap();
    shm::create_named(&name, size, |memory| {
        if kind == "bytes" {
            drop(Rcqb::create(memory, &config(), identity::of_this_process()?).unwrap());
        } else {
            drop(Rcqs::create(memory, &config()).unwrap());
        }
        Ok(())
    })
    .unwrap();
    let queue = Queue::open(kind, &name);
    let spawn = |number: usize| {
        let role = ["both", "both", "getter", "both"][number % 4];
        Command::new(std::env::current_exe().unwrap())
            .args(["worker", "--exact", "--nocapture", "--test-threads=1"])
            .env(WORKER, format!("{kind} {name} {role}"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let started = Instant::now();
    let mut workers = Workers((0..4).map(spawn).collect());
    let mut random = 0x9E37_79B9_7F4A_7C15u64 ^ u64::from(std::process::id());
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut killed = 0;
    while killed < kills
        && started.elapsed() < limit
        && ledger.next().load(Ordering::Relaxed) < LEDGER_ITEMS as u64 / 2
    {
        std::thread::sleep(Duration::from_micros(500 + next() % 6000));
        let victim = next() as usize % workers.0.len();
        let ended = workers.0[victim].try_wait().unwrap();
        assert!(ended.is_none(), "worker {victim} ended by itself: {ended:?}");
        workers.0[victim].kill().unwrap();
        workers.0[victim].wait().unwrap();
        workers.0[victim] = spawn(victim);
        killed += 1;
        // Whatever the dead one was doing, others get on.
        if killed % 16 == 0 {
            let before = ledger.next().load(Ordering::Relaxed);
            let patience = Instant::now() + Duration::from_secs(20);
            while ledger.next().load(Ordering::Relaxed) < before + 10 {
                assert!(Instant::now() < patience, "after {killed} kills nobody gets on");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    let in_flight = workers.0.len();
    drop(workers);
    assert!(killed >= kills.min(50), "only {killed} kills in {limit:?}");

    if let Queue::Bytes(queue) = &queue {
        queue.reap();
    }
    let soon = || Deadline::after(Duration::from_secs(5));
    let mut left = 0;
    while !matches!(queue.get(Deadline::At(0)).map(|item| ledger.mark(item, TAKEN)), Err(Error::TimedOut)) {
        left += 1;
        assert!(left <= 64);
    }
    // All of the capacity is there again.
    for _ in 0..3 {
        (0..32).for_each(|item| queue.put(item, soon()).unwrap());
        assert_eq!(queue.put(32, Deadline::At(0)), Err(Error::TimedOut));
        (0..32).for_each(|_| assert!(queue.get(soon()).is_ok()));
        assert_eq!(queue.get(Deadline::At(0)), Err(Error::TimedOut));
    }
    let items = &ledger.items()[..ledger.next().load(Ordering::Relaxed) as usize];
    let count = |state: u8| items.iter().filter(|item| item.load(Ordering::Relaxed) == state).count();
    let (undelivered, unfinished) = (count(PUT), count(0));
    let stats = match &queue {
        Queue::Bytes(queue) => queue.stats(),
        Queue::Words(queue) => queue.stats(),
    };
    println!(
        "{kind}: {killed} kills, {} items, {undelivered} lost with their getter, {unfinished} never put, {stats:?}",
        items.len()
    );
    assert!(undelivered <= killed + in_flight, "{undelivered} items lost by {killed} kills");
    assert!(unfinished <= killed + in_flight, "{unfinished} items vanished by {killed} kills");
    assert!(stats.lost_dequeues <= undelivered as u64, "more reported lost than were");
    drop(names);
}

#[test]
fn killed_processes_wedge_nobody_bytes() {
    kill_many("bytes", 300, Duration::from_secs(20));
}

#[test]
fn killed_processes_wedge_nobody_words() {
    kill_many("words", 300, Duration::from_secs(20));
}

#[test]
#[ignore = "minutes; run by make soak"]
fn thousands_of_killed_processes_wedge_nobody_bytes() {
    kill_many("bytes", 20_000, Duration::from_secs(240));
}

#[test]
#[ignore = "minutes; run by make soak"]
fn thousands_of_killed_processes_wedge_nobody_words() {
    kill_many("words", 20_000, Duration::from_secs(240));
}
