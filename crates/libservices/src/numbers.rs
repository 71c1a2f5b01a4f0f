//! Where the numbers of nodes and open files begin.
//!
//! Numbers are never used twice in a process. A process that takes over what another one served begins above all that the other may have
//! given out, so that an old number is known for one.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

static FIRST: AtomicU64 = AtomicU64::new(1);

/// Before anything is built.
pub fn begin_numbers_at(first: u64) {
    FIRST.store(first.max(1), Relaxed);
}

/// The smallest number, the root's aside, that this process gives out.
pub fn first_number() -> u64 {
    FIRST.load(Relaxed)
}
