//! Rings made ahead, since a confined worker may make none.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use parking_lot::Mutex;

use super::ring::Ring;
use crate::doors::fuse::device::PAYLOAD_BYTES_MAX;

/// Threads that take requests of one CPU's queue: while one is at something slow, the other goes on.
const THREADS_PER_CPU: usize = 2;
/// What all payloads of one door may take, and the least that one has to take.
const PAYLOADS_BYTES_MAX: usize = 64 << 20;
const PAYLOAD_BYTES_MIN: usize = 128 << 10;
/// Rings of one process; each takes some 20 KiB of the kernel's memory, three mappings and a descriptor.
const RINGS_MAX: usize = 256;
pub const DOORS_MAX: usize = 32;

/// Queues are by CPU: the kernel wants one for each that it might ever have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpus {
    possible: usize,
    online: Vec<usize>,
}

impl Cpus {
    fn of_this_machine() -> io::Result<Self> {
        let read = |what| {
            let text = std::fs::read_to_string(format!("/sys/devices/system/cpu/{what}"))?;
            parse_list(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        };
        let possible = read("possible")?.len();
        let online = read("online")?.into_iter().filter(|&cpu| cpu < possible).collect();
        Ok(Self { possible, online })
    }

    /// For each thread of a door the queues that it serves, and the CPU to do so on. Queues of CPUs that are not there
    /// have their requests sent by nobody, until one is plugged in: one set of threads does for all.
    pub fn plan(&self) -> Vec<Share> {
        let mut shares: Vec<Share> =
            self.online.iter().map(|&cpu| Share { queues: vec![cpu as u16], cpu: Some(cpu) }).collect();
        let absent = (0..self.possible).filter(|cpu| !self.online.contains(cpu));
        let queues: Vec<u16> = absent.map(|cpu| cpu as u16).collect();
        if !queues.is_empty() {
            shares.push(Share { queues, cpu: None });
        }
        shares.into_iter().flat_map(|share| std::iter::repeat_n(share, THREADS_PER_CPU)).collect()
    }

    /// The largest payload of a request. `None` where the CPUs are too many for the memory.
    pub fn payload_bytes(&self) -> Option<usize> {
        let each = PAYLOADS_BYTES_MAX / (self.possible * THREADS_PER_CPU).max(1);
        let bytes = PAYLOAD_BYTES_MAX.min(each.checked_ilog2().map_or(0, |log| 1 << log));
        (bytes >= PAYLOAD_BYTES_MIN).then_some(bytes)
    }
}

/// What one thread serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    pub queues: Vec<u16>,
    pub cpu: Option<usize>,
}

/// `0-3,8` and the like.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut all = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range: RangeInclusive<usize> = first.parse().ok()?..=last.parse().ok()?;
        // No machine has more.
        if *range.end() > usize::from(u16::MAX) {
            return None;
        }
        all.extend(range);
    }
    Some(all)
}

/// Whether the kernel speaks FUSE over io_uring, as far as can be told before a mount.
fn is_offered() -> bool {
    std::fs::read_to_string("/sys/module/fuse/parameters/enable_uring").is_ok_and(|set| set.trim() == "Y")
}

/// The rings of a process's doors.
pub struct RingPool {
    rings: Mutex<Vec<Ring>>,
    cpus: Cpus,
}

impl RingPool {
    /// Rings for as many doors as the bounds allow, but no more than `doors`; `None` where the kernel has no FUSE over
    /// io_uring, or it is switched off, or there are too many CPUs.
    pub fn new(doors: usize) -> Option<Arc<Self>> {
        if !is_offered() {
            return None;
        }
        let cpus = Cpus::of_this_machine()
            .inspect_err(|error| log::info!("FUSE over io_uring is not used: no list of CPUs: {error}"))
            .ok()?;
        let threads = cpus.plan().len();
        if cpus.payload_bytes().is_none() || threads > RINGS_MAX {
            log::info!("FUSE over io_uring is not used: {} CPUs would take too much memory", cpus.possible);
            return None;
        }
        let count = threads * doors.min(DOORS_MAX).min(RINGS_MAX / threads.max(1));
        let rings = (0..count).map(|_| Ring::new()).collect::<io::Result<Vec<_>>>();
        let rings = rings
            .inspect_err(|error| log::info!("FUSE over io_uring is not used: no ring can be made: {error}"))
            .ok()?;
        Some(Arc::new(Self { rings: Mutex::new(rings), cpus }))
    }

    pub fn cpus(&self) -> &Cpus {
        &self.cpus
    }

    /// One ring for each thread of a door; `None` when too few are left.
    pub fn take(&self) -> Option<Vec<Ring>> {
        let count = self.cpus.plan().len();
        let mut rings = self.rings.lock();
        let rest = rings.len().checked_sub(count)?;
        Some(rings.split_off(rest))
    }

    /// Takes back a ring whose thread has ended. One whose commands are still with the kernel, because its door was closed and
    /// its connection was not, has to be closed: only that ends them.
    pub fn give_back(&self, ring: Ring) {
        if ring.is_idle() {
            self.rings.lock().push(ring);
        }
    }
}

impl fmt::Debug for RingPool {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "RingPool({} left)", self.rings.lock().len())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::doors::fuse::uring::ring::Command;

    #[test]
    fn every_possible_cpu_has_a_queue_and_threads_to_serve_it() {
        let cpus = Cpus { possible: 4, online: vec![0, 2] };
        let plan = cpus.plan();
        assert_eq!(plan.len(), 3 * THREADS_PER_CPU);
        for queue in 0..4 {
            assert_eq!(plan.iter().filter(|share| share.queues.contains(&queue)).count(), THREADS_PER_CPU);
        }
        assert_eq!(plan.last().unwrap(), &Share { queues: vec![1, 3], cpu: None });
    }

    #[test]
    fn rings_with_commands_under_way_are_not_used_again() {
        let Ok(mut ring) = Ring::new() else {
            eprintln!("skipped: no io_uring here");
            return;
        };
        let cpus = Cpus { possible: 1, online: vec![0] };
        let pool = RingPool { rings: Mutex::default(), cpus };
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        // SAFETY: `event` outlives the ring's use.
        unsafe { ring.push(&Command::wait_readable(event.as_fd(), 7)) }.unwrap();
        ring.submit().unwrap();
        pool.give_back(ring);
        assert!(pool.take().is_none());
        (0..THREADS_PER_CPU).for_each(|_| pool.give_back(Ring::new().unwrap()));
        assert_eq!(pool.take().unwrap().len(), THREADS_PER_CPU);
    }

    #[test]
    fn payloads_are_bounded_together() {
        let bytes = |possible| Cpus { possible, online: vec![0] }.payload_bytes();
        assert_eq!(bytes(2), Some(1 << 20));
        assert_eq!(bytes(64), Some(512 << 10));
        assert_eq!(bytes(256), Some(128 << 10));
        assert_eq!(bytes(512), None);
    }

    #[test]
    fn lists_of_cpus() {
        assert_eq!(parse_list("0-2,5\n"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parse_list("7"), Some(vec![7]));
        assert_eq!(parse_list(""), None);
        assert_eq!(parse_list("0-99999999"), None);
    }
}
