//! Times of copies in each situation. Contenders are measured in turn within a round, so that what disturbs one disturbs all, in an
//! order that is drawn for each round. Each makes its own copies first, untimed, so that it finds the caches as it leaves them itself:
//! after a copy that stores past the caches, lines lie elsewhere than after one that does not.

mod memory;
mod peer;

use crate::code::CopyFunction;
use crate::plan::Situation;
use memory::{Pinned, Pools};
use peer::{Awake, Peer};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
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
/// On how many memories the rounds are taken in turn, if so many bytes are enough for that: where pages lie in the caches differs from one
/// memory to the next, and what is fastest on one need not be so on another.
const PLACEMENTS: usize = 5;
const PLACED_BYTES_MAX: usize = 64 << 20;
const TIMES_MAX: usize = 1 << 20;
/// Untimed copies before a sample, where one slot is copied again and again.
const WARM_TIMES: usize = 2;
/// What a program reads it looks at, which takes longer where the copy went past the caches. That counts from this size on; below, the
/// next copy to the same place is as slow.
const READ_BACK_BYTES: usize = 1 << 20;
/// Of copies so large, none leaves anything in the caches that the next one finds.
const BEYOND_CACHES_BYTES: usize = 16 << 20;

fn copy(contender: Contender, destination: *mut u8, source: *const u8, size_bytes: usize) {
    // SAFETY: called with slots of `Pools` only, which do not overlap.
    unsafe {
        match contender {
            Contender::Emitted(function) => function(destination, source, size_bytes),
            Contender::Libc => {
                libc::memcpy(destination.cast(), source.cast(), size_bytes);
            }
        }
    }
}

/// What a round was taken under: not of our making, or one of several that make up a situation.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Condition {
    /// Nothing to tell.
    Usual,
    /// So long took a word to the other core and back.
    RoundTrip { ns: f64 },
    /// Where the source of [`Situation::Read`] lay.
    Source(&'static str),
}

const SOURCES: [&str; 3] = ["in this core's caches", "in order", "at random"];

/// For each contender a sample in every round, in nanoseconds a copy; and what each round was taken under.
#[derive(Debug, Default)]
pub struct Samples {
    pub ns: Vec<Vec<f64>>,
    pub conditions: Vec<Condition>,
}

/// Where samples are taken: the CPU of this thread, and another one.
pub struct Bench {
    cpu: usize,
    peer: Option<Peer>,
    cold: Option<Pools>,
    near: Vec<Pools>,
    step: usize,
}

impl Bench {
    /// Without another CPU no situation can be measured that is [`Situation::is_across_cores`].
    pub fn new(cpu: usize, other_cpu: Option<usize>) -> Self {
        let peer = other_cpu.filter(|other| *other != cpu).map(Peer::on);
        Self { cpu, peer, cold: None, near: Vec::new(), step: 0 }
    }

    /// Takes the samples, `sample_ns` each or a little more for memcpy(3); all contenders make as many copies as that does.
    pub fn sample(
        &mut self,
        contenders: &[Contender],
        situation: Situation,
        size_bytes: usize,
        rounds: usize,
        sample_ns: u64,
    ) -> io::Result<Samples> {
        let _pinned = Pinned::to(self.cpu)?;
        self.prepare(situation, size_bytes, rounds)?;
        let no_cpu = || io::Error::new(io::ErrorKind::InvalidInput, "this situation needs a second CPU");
        let peer = if situation.is_across_cores() {
            Some(self.peer.as_ref().ok_or_else(no_cpu)?.wake())
        } else {
            None
        };
        let mut course =
            Course { situation, near: &self.near, cold: self.cold.as_ref(), peer, step: self.step };
        let times = course.calibrate(sample_ns)?;
        let mut samples =
            Samples { ns: vec![Vec::with_capacity(rounds); contenders.len()], ..Samples::default() };
        let mut order: Vec<usize> = (0..contenders.len()).collect();
        for round in 0..rounds {
            samples.conditions.push(course.condition(round)?);
            shuffle(&mut order);
            for &index in &order {
                let elapsed_ns = course.run(round, contenders[index], times)?;
                samples.ns[index].push(elapsed_ns / times as f64);
            }
        }
        self.step = course.step;
        Ok(samples)
    }

    /// Memory is kept for the next samples of the same size.
    fn prepare(&mut self, situation: Situation, size_bytes: usize, rounds: usize) -> io::Result<()> {
        if matches!(situation, Situation::Cold | Situation::Read) {
            self.cold = Some(match self.cold.take() {
                Some(pools) if size_bytes <= COLD_BYTES => pools.resized(size_bytes, COLD_BYTES),
                _ => Pools::beyond_caches(size_bytes, COLD_BYTES)?,
            });
        }
        if situation == Situation::Cold {
            return Ok(());
        }
        if self.near.first().is_some_and(|pools| pools.size_bytes() != size_bytes) {
            self.near.clear();
        }
        let wanted = (PLACED_BYTES_MAX / size_bytes).clamp(1, PLACEMENTS).min(rounds.max(1));
        while self.near.len() < wanted {
            self.near.push(Pools::shared(size_bytes)?);
        }
        Ok(())
    }
}

/// How one contender's copies follow each other.
struct Course<'a> {
    situation: Situation,
    near: &'a [Pools],
    cold: Option<&'a Pools>,
    peer: Option<Awake<'a>>,
    step: usize,
}

impl Course<'_> {
    fn condition(&self, round: usize) -> io::Result<Condition> {
        Ok(match (&self.peer, self.situation) {
            (Some(peer), _) => Condition::RoundTrip { ns: peer.round_trip_ns()? },
            (None, Situation::Read) => Condition::Source(SOURCES[round % SOURCES.len()]),
            (None, _) => Condition::Usual,
        })
    }

    /// How many copies fill a sample.
    fn calibrate(&mut self, sample_ns: u64) -> io::Result<usize> {
        let mut times = 1;
        loop {
            let elapsed_ns = self.run(0, Contender::Libc, times)?;
            if elapsed_ns >= sample_ns as f64 / 4.0 || times >= TIMES_MAX {
                let wanted = times as f64 * sample_ns as f64 / elapsed_ns.max(1.0);
                return Ok((wanted as usize).clamp(1, TIMES_MAX));
            }
            times *= 4;
        }
    }

    /// Nanoseconds of so many copies.
    fn run(&mut self, round: usize, contender: Contender, times: usize) -> io::Result<f64> {
        let near = (!self.near.is_empty()).then(|| &self.near[round % self.near.len()]);
        match (self.situation, near, self.cold) {
            (Situation::Cold, _, Some(cold)) => Ok(self.cold(contender, cold, times)),
            (Situation::Hot, Some(near), _) => Ok(repeat(contender, near, times, false, |_| near.source(0))),
            (Situation::Read, Some(near), Some(cold)) => Ok(self.read(round, contender, near, cold, times)),
            (_, Some(near), _) => self.across(contender, near, times),
            _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        }
    }

    /// A walk through all slots in no order that a prefetcher knows.
    fn wander(&mut self, slots: usize) -> usize {
        self.step = self.step.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Full period (5 mod 8, odd) in the lowest bits, of which there are as many as slots.
        self.step & (slots - 1)
    }

    fn cold(&mut self, contender: Contender, cold: &Pools, times: usize) -> f64 {
        let begin = Instant::now();
        for _ in 0..times {
            let slot = self.wander(cold.slots());
            copy(contender, cold.destination(slot), cold.source(slot), cold.size_bytes());
        }
        begin.elapsed().as_nanos() as f64
    }

    fn read(&mut self, round: usize, contender: Contender, near: &Pools, cold: &Pools, times: usize) -> f64 {
        let from = self.wander(cold.slots());
        let then_read = near.size_bytes() >= READ_BACK_BYTES;
        match round % SOURCES.len() {
            0 => repeat(contender, near, times, then_read, |_| near.source(0)),
            1 => {
                self.step = self.step.wrapping_add(times);
                repeat(contender, near, times, then_read, |time| cold.source(from + time))
            }
            _ => repeat(contender, near, times, then_read, |_| cold.source(self.wander(cold.slots()))),
        }
    }

    fn across(&self, contender: Contender, pools: &Pools, times: usize) -> io::Result<f64> {
        if pools.size_bytes() < BEYOND_CACHES_BYTES {
            self.lap(contender, pools, times.min(pools.slots()))?;
        }
        let (mut elapsed_ns, mut left) = (0.0, times);
        while left > 0 {
            let slots = left.min(pools.slots());
            left -= slots;
            elapsed_ns += self.lap(contender, pools, slots)?;
        }
        Ok(elapsed_ns)
    }

    /// Some slots, once each.
    fn lap(&self, contender: Contender, pools: &Pools, slots: usize) -> io::Result<f64> {
        let Some(peer) = &self.peer else { return Err(io::Error::from(io::ErrorKind::InvalidInput)) };
        let fresh = matches!(self.situation, Situation::Fresh | Situation::Relayed);
        let handed = matches!(self.situation, Situation::Handed | Situation::Relayed);
        if fresh {
            peer.write(pools, slots)?;
        }
        let begin = Instant::now();
        for slot in 0..slots {
            let source = pools.source(if fresh { slot } else { 0 });
            let destination = pools.destination(if handed { slot } else { 0 });
            copy(contender, destination, source, pools.size_bytes());
        }
        let elapsed_ns = begin.elapsed().as_nanos() as f64;
        Ok(if handed { elapsed_ns + peer.read(pools, slots)? } else { elapsed_ns })
    }
}

/// Copies to one place again and again, where a program may read each.
fn repeat(
    contender: Contender,
    near: &Pools,
    times: usize,
    then_read: bool,
    mut source: impl FnMut(usize) -> *mut u8,
) -> f64 {
    let warm_times = if near.size_bytes() < BEYOND_CACHES_BYTES { WARM_TIMES } else { 0 };
    for _ in 0..warm_times {
        copy(contender, near.destination(0), near.source(0), near.size_bytes());
    }
    let begin = Instant::now();
    for time in 0..times {
        copy(contender, near.destination(0), source(time), near.size_bytes());
        if then_read {
            near.read_destinations(1);
        }
    }
    begin.elapsed().as_nanos() as f64
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
    fn samples_belong_to_their_contenders_and_rounds_to_their_conditions() {
        unsafe extern "sysv64" fn slow(to: *mut u8, from: *const u8, size_bytes: usize) {
            for _ in 0..50 {
                // SAFETY: the caller's word.
                unsafe { crate::code::library(to, from, size_bytes) };
            }
        }
        let mut bench = Bench::new(0, None);
        let contenders = [Contender::Libc, Contender::Emitted(slow)];
        let found = bench.sample(&contenders, Situation::Read, 4096, 6, 1000).expect("samples");
        assert!(found.ns.iter().all(|samples| samples.len() == 6));
        let sums: Vec<f64> = found.ns.iter().map(|samples| samples.iter().sum()).collect();
        assert!(sums[1] > sums[0], "{sums:?}");
        let twice: Vec<Condition> = SOURCES.iter().chain(&SOURCES).map(|s| Condition::Source(s)).collect();
        assert_eq!(found.conditions, twice);
        assert!(bench.sample(&contenders, Situation::Fresh, 64, 1, 1000).is_err());
    }
}
