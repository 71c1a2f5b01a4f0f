//! What the door did, counted by each thread for itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;

use super::abi::opcode;

/// Sums since the door was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DoorStatistics {
    /// By the operation's name; only those that happened.
    pub operations: BTreeMap<&'static str, OperationStatistics>,
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// How many of all operations came over io_uring; the others came from the device.
    pub over_rings: u64,
    /// Requests that were answered EIO since several workers died of them.
    pub given_up: u64,
}

impl DoorStatistics {
    /// Adds what another door did.
    pub fn add(&mut self, other: &DoorStatistics) {
        for (name, theirs) in &other.operations {
            let ours = self.operations.entry(name).or_default();
            ours.count += theirs.count;
            ours.errors += theirs.errors;
            ours.total_ns += theirs.total_ns;
        }
        self.read_bytes += other.read_bytes;
        self.written_bytes += other.written_bytes;
        self.over_rings += other.over_rings;
        self.given_up += other.given_up;
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OperationStatistics {
    pub count: u64,
    /// Answers with an error; a name that is not there is one too.
    pub errors: u64,
    /// From the message read to the answer found.
    pub total_ns: u64,
}

/// One thread's counters. Only that thread writes them, so no addition needs to be atomic.
#[repr(align(128))]
pub struct Counters {
    operations: [Counter; opcode::COUNT],
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    given_up: AtomicU64,
    over_ring: bool,
}

#[derive(Default)]
struct Counter {
    count: AtomicU64,
    errors: AtomicU64,
    total_ns: AtomicU64,
}

fn add(to: &AtomicU64, amount: u64) {
    to.store(to.load(Relaxed).wrapping_add(amount), Relaxed);
}

impl Counters {
    fn new(over_ring: bool) -> Self {
        Self {
            operations: std::array::from_fn(|_| Counter::default()),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            given_up: AtomicU64::new(0),
            over_ring,
        }
    }

    /// Called by the owning thread alone.
    pub fn record(&self, opcode: u32, failed: bool, took: Duration) {
        let Some(counter) = self.operations.get(opcode as usize) else { return };
        add(&counter.count, 1);
        add(&counter.errors, u64::from(failed));
        add(&counter.total_ns, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Called by the owning thread alone.
    pub fn record_given_up(&self) {
        add(&self.given_up, 1);
    }

    /// Called by the owning thread alone.
    pub fn record_bytes(&self, opcode: u32, bytes: u64) {
        match opcode {
            opcode::READ => add(&self.read_bytes, bytes),
            opcode::WRITE => add(&self.written_bytes, bytes),
            _ => {}
        }
    }
}

/// The counters of all threads of a door.
#[derive(Default)]
pub struct AllCounters(Mutex<Vec<Arc<Counters>>>);

impl AllCounters {
    pub fn of_new_thread(&self) -> Arc<Counters> {
        self.add(Counters::new(false))
    }

    /// For a thread whose requests come over io_uring.
    pub fn of_ring_thread(&self) -> Arc<Counters> {
        self.add(Counters::new(true))
    }

    fn add(&self, counters: Counters) -> Arc<Counters> {
        let counters = Arc::new(counters);
        self.0.lock().push(counters.clone());
        counters
    }

    pub fn sum(&self) -> DoorStatistics {
        let mut sum = DoorStatistics::default();
        for counters in self.0.lock().iter() {
            sum.read_bytes += counters.read_bytes.load(Relaxed);
            sum.written_bytes += counters.written_bytes.load(Relaxed);
            sum.given_up += counters.given_up.load(Relaxed);
            for (opcode, counter) in counters.operations.iter().enumerate() {
                let count = counter.count.load(Relaxed);
                if count > 0 {
                    sum.over_rings += if counters.over_ring { count } else { 0 };
                    let operation = sum.operations.entry(opcode::name(opcode as u32)).or_default();
                    operation.count += count;
                    operation.errors += counter.errors.load(Relaxed);
                    operation.total_ns += counter.total_ns.load(Relaxed);
                }
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_threads_and_names_what_happened() {
        let all = AllCounters::default();
        let (one, two) = (all.of_new_thread(), all.of_ring_thread());
        one.record(opcode::READ, false, Duration::from_nanos(5));
        one.record_bytes(opcode::READ, 4096);
        two.record(opcode::READ, true, Duration::from_nanos(7));
        two.record(9_999, true, Duration::from_nanos(7));
        let sum = all.sum();
        assert_eq!(sum.operations.len(), 1);
        assert_eq!(sum.operations["read"], OperationStatistics { count: 2, errors: 1, total_ns: 12 });
        assert_eq!((sum.read_bytes, sum.written_bytes, sum.over_rings), (4096, 0, 1));
    }
}
