//! One run: threads on a queue for a time, and what that took.

use crate::rivals::{Handle, Item, Queue};
use serde::Serialize;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Every thread puts and takes in turn.
    Pairs,
    /// Half of the threads put, the other half take.
    Split,
}

#[derive(Clone, Copy, Serialize, Default, Debug)]
pub struct Percentiles {
    pub median_ns: f64,
    pub p99_ns: f64,
    pub p999_ns: f64,
}

#[derive(Clone, Copy, Serialize, Debug)]
pub struct Outcome {
    pub items_per_s: f64,
    pub cpu_ns_per_item: f64,
    pub sleeps_per_item: f64,
    pub wakes_per_item: f64,
    pub vain_spins_per_item: f64,
    pub put: Percentiles,
    pub get: Percentiles,
    /// From the call that puts to the return of the call that takes.
    pub transfer: Percentiles,
}

#[derive(Clone, Copy)]
pub struct Machine {
    /// Of the time-stamp counter.
    pub ticks_per_ns: f64,
    /// Turns of the work loop between two operations, on average.
    turns: f64,
    pub cpus: usize,
}

/// Stamps have 40 bits, as many as the smallest item.
const STAMP_MASK: u64 = (1 << 40) - 1;
/// One operation in so many is timed.
const SAMPLE_EVERY: u64 = 8;
const SAMPLES_MAX: usize = 200_000;

fn now() -> u64 {
    // SAFETY: every x86-64 processor has the counter.
    unsafe { std::arch::x86_64::_rdtsc() & STAMP_MASK }
}

pub fn current_cpu() -> u32 {
    // SAFETY: reads a number.
    u32::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(0)
}

fn work(turns: u64) {
    let mut value = turns;
    for _ in 0..turns {
        value = std::hint::black_box(value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
    std::hint::black_box(value);
}

impl Machine {
    pub fn measure(work_ns: u32) -> Self {
        let (start, first) = (Instant::now(), now());
        std::thread::sleep(Duration::from_millis(50));
        let ticks_per_ns = (now() - first) as f64 / start.elapsed().as_nanos() as f64;
        let fastest = (0..20)
            .map(|_| {
                let start = Instant::now();
                work(20_000);
                start.elapsed().as_nanos() as f64
            })
            .fold(f64::MAX, f64::min);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self { ticks_per_ns, turns: 20_000.0 * f64::from(work_ns) / fastest, cpus }
    }
}

struct Random(u64);

impl Random {
    /// Turns of work: half to one and a half of the average.
    fn turns(&mut self, machine: &Machine) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let share = 0.5 + (self.0 >> 40) as f64 / (1u64 << 24) as f64;
        (machine.turns * share) as u64
    }
}

#[derive(Default)]
struct Samples {
    put: Vec<u32>,
    get: Vec<u32>,
    transfer: Vec<u32>,
    items: u64,
}

fn note(samples: &mut Vec<u32>, ticks: u64) {
    if samples.len() < SAMPLES_MAX {
        samples.push(u32::try_from(ticks & STAMP_MASK).unwrap_or(u32::MAX));
    }
}

fn percentiles(mut samples: Vec<u32>, machine: &Machine) -> Percentiles {
    samples.sort_unstable();
    let at = |share: f64| match samples.len() {
        0 => 0.0,
        count => f64::from(samples[((count - 1) as f64 * share) as usize]) / machine.ticks_per_ns,
    };
    Percentiles { median_ns: at(0.5), p99_ns: at(0.99), p999_ns: at(0.999) }
}

fn cpu_time_ns() -> u64 {
    // SAFETY: the kernel fills in what is zeroed here.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let of = |time: libc::timeval| time.tv_sec as u64 * 1_000_000_000 + time.tv_usec as u64 * 1_000;
    of(usage.ru_utime) + of(usage.ru_stime)
}

fn pin(cpu: usize) {
    // SAFETY: a zeroed set is an empty one, the number is below its size.
    let pinned = unsafe {
        let mut set = std::mem::zeroed::<libc::cpu_set_t>();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    assert_eq!(pinned, 0, "cannot run on CPU {cpu}");
}

struct Shared<'a, Q> {
    queue: &'a Q,
    machine: &'a Machine,
    start: &'a Barrier,
    stop: &'a AtomicBool,
}

impl<Q> Shared<'_, Q> {
    fn begin<T: Item>(&self, thread: usize, cpu: usize) -> (Q::Handle<'_>, Random)
    where
        Q: Queue<T>,
    {
        pin(cpu % self.machine.cpus);
        let handle = self.queue.handle(thread);
        // Once to say that all is set up, once to begin: what happens between is not measured.
        self.start.wait();
        self.start.wait();
        (handle, Random(0x1234_5678_9ABC_DEF1 ^ (thread as u64) << 32))
    }

    fn put<T: Item>(handle: &mut impl Handle<T>, turn: u64, samples: &mut Samples) {
        let begin = now();
        handle.put(T::stamped(begin.max(1)));
        if turn % SAMPLE_EVERY == 0 {
            note(&mut samples.put, now().wrapping_sub(begin));
        }
    }

    /// False if the item says that the run is over.
    fn get<T: Item>(handle: &mut impl Handle<T>, turn: u64, samples: &mut Samples) -> bool {
        let sampled = turn % SAMPLE_EVERY == 0;
        let begin = if sampled { now() } else { 0 };
        let item = handle.get();
        if item.time() == 0 {
            return false;
        }
        if sampled {
            let end = now();
            note(&mut samples.get, end.wrapping_sub(begin));
            note(&mut samples.transfer, end.wrapping_sub(item.time()));
        }
        samples.items += 1;
        true
    }

    fn pairs<T: Item>(&self, thread: usize) -> Samples
    where
        Q: Queue<T>,
    {
        let (mut handle, mut random) = self.begin(thread, thread);
        let mut samples = Samples::default();
        for turn in 0.. {
            if turn % 16 == 0 && self.stop.load(Relaxed) {
                break;
            }
            Self::put(&mut handle, turn, &mut samples);
            work(random.turns(self.machine));
            Self::get(&mut handle, turn, &mut samples);
            work(random.turns(self.machine));
        }
        samples
    }

    fn produce<T: Item>(&self, thread: usize, number: usize) -> Samples
    where
        Q: Queue<T>,
    {
        let (mut handle, mut random) = self.begin(thread, number);
        let mut samples = Samples::default();
        for turn in 0.. {
            if turn % 16 == 0 && self.stop.load(Relaxed) {
                break;
            }
            Self::put(&mut handle, turn, &mut samples);
            work(random.turns(self.machine));
        }
        samples
    }

    fn consume<T: Item>(&self, thread: usize, number: usize) -> Samples
    where
        Q: Queue<T>,
    {
        // The first consumer is on another CPU than the first producer, and so on.
        let (mut handle, mut random) = self.begin(thread, number + 1);
        let mut samples = Samples::default();
        for turn in 0.. {
            if !Self::get(&mut handle, turn, &mut samples) {
                break;
            }
            work(random.turns(self.machine));
        }
        samples
    }
}

pub fn run<T: Item, Q: Queue<T>>(
    method: Method,
    threads: usize,
    time: Duration,
    machine: &Machine,
) -> Outcome {
    let queue = Q::new(threads);
    let (start, stop) = (Barrier::new(threads + 1), AtomicBool::new(false));
    let shared = Shared { queue: &queue, machine, start: &start, stop: &stop };
    let shared = &shared;
    std::thread::scope(|scope| {
        let producers = if method == Method::Split { threads / 2 } else { threads };
        let makers: Vec<_> = (0..producers)
            .map(|n| match method {
                Method::Pairs => scope.spawn(move || shared.pairs(n)),
                Method::Split => scope.spawn(move || shared.produce(n, n)),
            })
            .collect();
        let takers: Vec<_> =
            (producers..threads).map(|n| scope.spawn(move || shared.consume(n, n - producers))).collect();
        start.wait();
        let (began, cpu_before) = (Instant::now(), cpu_time_ns());
        start.wait();
        std::thread::sleep(time);
        stop.store(true, Relaxed);
        let mut all: Vec<Samples> =
            makers.into_iter().map(|maker| maker.join().expect("a thread failed")).collect();
        let mut handle = queue.handle(threads);
        takers.iter().for_each(|_| handle.put(T::stamped(0)));
        all.extend(takers.into_iter().map(|taker| taker.join().expect("a thread failed")));
        let (seconds, cpu_ns) = (began.elapsed().as_secs_f64(), cpu_time_ns() - cpu_before);
        let items: u64 = all.iter().map(|samples| samples.items).sum();
        let gather = |of: fn(&mut Samples) -> &mut Vec<u32>, all: &mut Vec<Samples>| {
            percentiles(all.iter_mut().flat_map(|samples| std::mem::take(of(samples))).collect(), machine)
        };
        let [sleeps, wakes, spins] = queue.waits().map(|count| count as f64 / items.max(1) as f64);
        Outcome {
            items_per_s: items as f64 / seconds,
            cpu_ns_per_item: cpu_ns as f64 / items.max(1) as f64,
            sleeps_per_item: sleeps,
            wakes_per_item: wakes,
            vain_spins_per_item: spins,
            put: gather(|samples| &mut samples.put, &mut all),
            get: gather(|samples| &mut samples.get, &mut all),
            transfer: gather(|samples| &mut samples.transfer, &mut all),
        }
    })
}
