//! Which places of a section are free.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use parking_lot::Mutex;

pub struct Vacancies {
    capacity: usize,
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    /// Places that were in use and are not.
    vacant: Vec<u32>,
    /// Those from here on never were.
    fresh: u32,
}

impl Vacancies {
    pub fn new(capacity: usize) -> Self {
        Self { capacity, free: Mutex::default() }
    }

    /// A place; `used` is told how many were ever in use.
    pub fn take(&self, used: &AtomicU64) -> Option<u32> {
        let mut free = self.free.lock();
        if let Some(index) = free.vacant.pop() {
            return Some(index);
        }
        if free.fresh as usize == self.capacity {
            return None;
        }
        free.fresh += 1;
        used.store(free.fresh.into(), Relaxed);
        Some(free.fresh - 1)
    }

    pub fn give_back(&self, index: u32) {
        self.free.lock().vacant.push(index);
    }

    /// Those that are taken in what somebody else has left; beyond them none was ever.
    pub fn adopt(&self, taken: &[bool]) {
        let mut free = self.free.lock();
        free.fresh = taken.len() as u32;
        free.vacant = (0..free.fresh).filter(|index| !taken[*index as usize]).collect();
    }
}
