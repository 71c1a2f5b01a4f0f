//! Times of copies in each situation. Contenders are measured in turn within a round, so that what disturbs one disturbs all, in an
//! order that is drawn for each round, so that what one leaves in the caches meets all others alike.

use crate::code::CopyFunction;
use crate::plan::Situation;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// What is timed.
#[derive(Clone, Copy)]
pub enum Contender {
    Emitted(CopyFunction),
    /// memcpy(3) of the C library.
    Libc,
}

/// Memory that no cache holds, twice: for sources and for destinations.
const COLD_BYTES: usize = 256 << 20;
/// What is handed from core to core at once: within the second-level cache.
const POOL_BYTES: usize = 256 << 10;
const SLOTS_MAX: usize = 1024;
/// On how many memories the rounds are taken, if so many bytes are enough for that.
const PLACEMENTS: usize = 5;
const PLACED_BYTES_MAX: usize = 64 << 20;
/// malloc(3) of large blocks returns addresses 16 bytes after a line; windows and channels begin at pages.
const DESTINATION_OFFSET: usize = 16;
const PAGE_BYTES: usize = 4096;

fn copy(contender: Contender, destination: *mut u8, source: *const u8, size_bytes: usize) {
    // SAFETY: called with ranges of `Area`s only, which do not overlap.
    unsafe {
        match contender {
            Contender::Emitted(function) => function(destination, source, size_bytes),
            Contender::Libc => {
                libc::memcpy(destination.cast(), source.cast(), size_bytes);
            }
        }
    }
}

/// Anonymous memory, all of it touched.
struct Area {
    at: *mut u8,
    size_bytes: usize,
}

// SAFETY: raw memory; the two threads agree about who uses it by the words of `Turn`.
unsafe impl Sync for Area {}
// SAFETY: as above.
unsafe impl Send for Area {}

impl Area {
    fn new(size_bytes: usize) -> io::Result<Self> {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
        );
        // SAFETY: new memory.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), size_bytes, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: all of the new mapping, so that no page is the shared one of zeros.
        unsafe { std::ptr::write_bytes(at.cast::<u8>(), 0x5a, size_bytes) };
        Ok(Self { at: at.cast(), size_bytes })
    }

    fn slot(&self, index: usize, stride: usize, offset: usize) -> *mut u8 {
        let begin = (index * stride + offset).min(self.size_bytes);
        // SAFETY: within the area, or its end.
        unsafe { self.at.add(begin) }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.at.cast(), self.size_bytes) };
    }
}

/// Keeps this thread on one CPU; gives it back where it may run.
struct Pinned(libc::cpu_set_t);

impl Pinned {
    fn to(cpu: usize) -> io::Result<Self> {
        // SAFETY: sets of this size, as the calls want them; the thread is our own.
        unsafe {
            let mut before: libc::cpu_set_t = std::mem::zeroed();
            let mut one: libc::cpu_set_t = std::mem::zeroed();
            let size = size_of::<libc::cpu_set_t>();
            if cpu >= libc::CPU_SETSIZE as usize || libc::sched_getaffinity(0, size, &mut before) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::CPU_SET(cpu, &mut one);
            if libc::sched_setaffinity(0, size, &one) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(before))
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the set that the kernel gave us. Failing, the thread stays where it is.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &self.0) };
    }
}

const IDLE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;
const END: u32 = 3;

/// What the other core is asked to do, and how long it took.
#[derive(Default)]
struct Turn {
    order: AtomicU32,
    slots: AtomicUsize,
    elapsed_ns: AtomicUsize,
    failed: AtomicBool,
}

impl Turn {
    /// Asks and waits. Both spin: they run on CPUs of their own.
    fn ask(&self, order: u32, slots: usize) -> f64 {
        self.slots.store(slots, Ordering::Relaxed);
        self.order.store(order, Ordering::Release);
        while self.order.load(Ordering::Acquire) != IDLE && !self.failed.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
        self.elapsed_ns.load(Ordering::Relaxed) as f64
    }
}

struct Pools {
    sources: Area,
    destinations: Area,
    slots: usize,
    stride: usize,
    size_bytes: usize,
}

impl Pools {
    fn new(size_bytes: usize) -> io::Result<Self> {
        let stride = if size_bytes < PAGE_BYTES {
            size_bytes.next_multiple_of(64)
        } else {
            size_bytes.next_multiple_of(PAGE_BYTES)
        };
        let slots = (POOL_BYTES / stride).clamp(1, SLOTS_MAX);
        let room = slots * stride + PAGE_BYTES;
        Ok(Self { sources: Area::new(room)?, destinations: Area::new(room)?, slots, stride, size_bytes })
    }

    fn source(&self, slot: usize) -> *mut u8 {
        self.sources.slot(slot, self.stride, 0)
    }

    fn destination(&self, slot: usize) -> *mut u8 {
        self.destinations.slot(slot, self.stride, DESTINATION_OFFSET)
    }

    /// The other core's part.
    fn serve(&self, turn: &Turn, cpu: usize) {
        let Ok(_pinned) = Pinned::to(cpu) else {
            turn.failed.store(true, Ordering::Relaxed);
            return;
        };
        let mut byte = 0u8;
        loop {
            let order = turn.order.load(Ordering::Acquire);
            let slots = turn.slots.load(Ordering::Relaxed).min(self.slots);
            let begin = Instant::now();
            match order {
                IDLE => {
                    std::hint::spin_loop();
                    continue;
                }
                WRITE => {
                    byte = byte.wrapping_add(1);
                    for slot in 0..slots {
                        // SAFETY: a slot of the sources; the measuring thread waits.
                        unsafe { std::ptr::write_bytes(self.source(slot), byte, self.size_bytes) };
                    }
                }
                READ => (0..slots).for_each(|slot| self.read(slot)),
                _ => return,
            }
            turn.elapsed_ns.store(begin.elapsed().as_nanos() as usize, Ordering::Relaxed);
            turn.order.store(IDLE, Ordering::Release);
        }
    }

    /// Reads every word of a destination, as the program that the bytes are for will.
    fn read(&self, slot: usize) {
        let mut sum = 0u64;
        let words = self.destination(slot).cast::<u64>();
        for index in 0..self.size_bytes / 8 {
            // SAFETY: within the slot; the measuring thread waits.
            sum = sum.wrapping_add(unsafe { words.add(index).read_unaligned() });
        }
        std::hint::black_box(sum);
    }
}

/// Where samples are taken: the CPU of this thread, and another one.
pub struct Bench {
    cpu: usize,
    other_cpu: Option<usize>,
    cold: Option<(Area, Area)>,
    step: usize,
}

impl Bench {
    /// Without another CPU only [`Situation::Hot`] and [`Situation::Cold`] can be measured.
    pub fn new(cpu: usize, other_cpu: Option<usize>) -> Self {
        Self { cpu, other_cpu: other_cpu.filter(|other| *other != cpu), cold: None, step: 0 }
    }

    /// Nanoseconds a copy, for each contender a sample in every round. A sample takes `sample_ns` or a little more.
    pub fn sample(
        &mut self,
        contenders: &[Contender],
        situation: Situation,
        size_bytes: usize,
        rounds: usize,
        sample_ns: u64,
    ) -> io::Result<Vec<Vec<f64>>> {
        let _pinned = Pinned::to(self.cpu)?;
        match situation {
            Situation::Cold => self.cold(contenders, size_bytes, rounds, sample_ns),
            Situation::Hot => placements(size_bytes, rounds, |pools, rounds| {
                Ok(samples(contenders, rounds, sample_ns, |contender, times| {
                    let begin = Instant::now();
                    for _ in 0..times {
                        copy(contender, pools.destination(0), pools.source(0), size_bytes);
                    }
                    begin.elapsed().as_nanos() as f64
                }))
            }),
            _ => placements(size_bytes, rounds, |pools, rounds| {
                self.across(contenders, situation, pools, rounds, sample_ns)
            }),
        }
    }

    fn across(
        &self,
        contenders: &[Contender],
        situation: Situation,
        pools: &Pools,
        rounds: usize,
        sample_ns: u64,
    ) -> io::Result<Vec<Vec<f64>>> {
        let no_cpu = || io::Error::new(io::ErrorKind::InvalidInput, "this situation needs a second CPU");
        let other = self.other_cpu.ok_or_else(no_cpu)?;
        let fresh = matches!(situation, Situation::Fresh | Situation::Relayed);
        let handed = matches!(situation, Situation::Handed | Situation::Relayed);
        let turn = Turn::default();
        let found = std::thread::scope(|scope| {
            scope.spawn(|| pools.serve(&turn, other));
            let found = samples(contenders, rounds, sample_ns, |contender, times| {
                let mut elapsed = 0.0;
                let mut left = times;
                while left > 0 {
                    let slots = left.min(pools.slots);
                    left -= slots;
                    if fresh {
                        turn.ask(WRITE, slots);
                    }
                    let begin = Instant::now();
                    for slot in 0..slots {
                        let source = pools.source(if fresh { slot } else { 0 });
                        copy(
                            contender,
                            pools.destination(if handed { slot } else { 0 }),
                            source,
                            pools.size_bytes,
                        );
                    }
                    elapsed += begin.elapsed().as_nanos() as f64;
                    if handed {
                        elapsed += turn.ask(READ, slots);
                    }
                }
                elapsed
            });
            turn.order.store(END, Ordering::Release);
            found
        });
        let failed = turn.failed.load(Ordering::Relaxed);
        if failed { Err(io::Error::other(format!("cannot run on CPU {other}"))) } else { Ok(found) }
    }

    fn cold(
        &mut self,
        contenders: &[Contender],
        size_bytes: usize,
        rounds: usize,
        sample_ns: u64,
    ) -> io::Result<Vec<Vec<f64>>> {
        if self.cold.is_none() {
            self.cold = Some((Area::new(COLD_BYTES + PAGE_BYTES)?, Area::new(COLD_BYTES + PAGE_BYTES)?));
        }
        let Some((sources, destinations)) = &self.cold else { return Err(io::ErrorKind::OutOfMemory.into()) };
        let stride = size_bytes.next_power_of_two().max(64);
        let slots = (COLD_BYTES / stride).max(1);
        let mut slot = self.step & (slots - 1);
        let found = samples(contenders, rounds, sample_ns, |contender, times| {
            let begin = Instant::now();
            for _ in 0..times {
                // A walk through all slots in no order that a prefetcher knows (full period: 5 mod 8, odd).
                slot = (slot.wrapping_mul(1_664_525) + 1_013_904_223) & (slots - 1);
                let destination = destinations.slot(slot, stride, DESTINATION_OFFSET);
                copy(contender, destination, sources.slot(slot, stride, 0), size_bytes);
            }
            begin.elapsed().as_nanos() as f64
        });
        self.step = slot;
        Ok(found)
    }
}

/// Takes the rounds on several pools in turn: where pages lie in the caches differs from one memory to the next, and what is
/// fastest on one need not be so on another. All stay until the end, so that none gets the pages of the one before.
fn placements(
    size_bytes: usize,
    rounds: usize,
    mut take: impl FnMut(&Pools, usize) -> io::Result<Vec<Vec<f64>>>,
) -> io::Result<Vec<Vec<f64>>> {
    let count = (PLACED_BYTES_MAX / size_bytes).clamp(1, PLACEMENTS).min(rounds.max(1));
    let mut kept = Vec::with_capacity(count);
    let mut found: Vec<Vec<f64>> = Vec::new();
    for index in 0..count {
        let pools = Pools::new(size_bytes)?;
        let share = rounds / count + usize::from(index < rounds % count);
        let taken = take(&pools, share)?;
        found.resize(taken.len(), Vec::new());
        found.iter_mut().zip(taken).for_each(|(all, some)| all.extend(some));
        kept.push(pools);
    }
    Ok(found)
}

/// Runs `run(contender, times)`, which tells the nanoseconds, with as many times as fill a sample.
fn samples(
    contenders: &[Contender],
    rounds: usize,
    sample_ns: u64,
    mut run: impl FnMut(Contender, usize) -> f64,
) -> Vec<Vec<f64>> {
    let warm = |run: &mut dyn FnMut(Contender, usize) -> f64, contender| {
        run(contender, 1);
        let mut times = 1;
        loop {
            let elapsed = run(contender, times);
            if elapsed >= sample_ns as f64 / 4.0 || times >= 1 << 20 {
                let wanted = times as f64 * sample_ns as f64 / elapsed.max(1.0);
                return (wanted as usize).clamp(1, 1 << 20);
            }
            times *= 4;
        }
    };
    let times: Vec<usize> = contenders.iter().map(|contender| warm(&mut run, *contender)).collect();
    let mut found = vec![Vec::with_capacity(rounds); contenders.len()];
    let mut order: Vec<usize> = (0..contenders.len()).collect();
    for _ in 0..rounds {
        shuffle(&mut order);
        for &index in &order {
            found[index].push(run(contenders[index], times[index]) / times[index] as f64);
        }
    }
    found
}

/// Fisher and Yates. Orders go on from call to call, since some calls take one round only.
fn shuffle(order: &mut [usize]) {
    static STATE: AtomicU64 = AtomicU64::new(0x9E37_79B9_7F4A_7C15);
    let mut state = STATE.load(Ordering::Relaxed);
    for last in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, (state >> 32) as usize % (last + 1));
    }
    STATE.store(state, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each place of each contender comes up about as often as any other.
    #[test]
    fn orders_are_drawn_evenly() {
        let mut seen = [[0u32; 4]; 4];
        let mut order = [0, 1, 2, 3];
        for _ in 0..4000 {
            shuffle(&mut order);
            order.iter().enumerate().for_each(|(place, contender)| seen[*contender][place] += 1);
        }
        assert!(seen.iter().flatten().all(|count| (850..1150).contains(count)), "{seen:?}");
    }

    #[test]
    fn samples_belong_to_their_contenders() {
        extern "sysv64" fn nothing(_: *mut u8, _: *const u8, _: usize) {}
        let contenders = [Contender::Libc, Contender::Emitted(nothing)];
        let found = samples(&contenders, 50, 1000, |contender, times| match contender {
            Contender::Libc => 1000.0 * times as f64,
            Contender::Emitted(_) => 2000.0 * times as f64,
        });
        assert!(found[0].iter().all(|ns| *ns == 1000.0) && found[1].iter().all(|ns| *ns == 2000.0));
    }
}
