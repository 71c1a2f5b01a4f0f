//! Which CPU the thread that looks for requests runs on: another one than its programs, where there is another.
//!
//! On the same CPU neither side can look out for the other, and each request takes two wake-ups of 5 us. The scheduler puts who is
//! woken where the waker runs, so it brings them together and does not part them.

use std::time::{Duration, Instant};

/// Requests in a row of programs on the thread's own CPU before it moves.
const MET_MAX: u32 = 8;
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// Where programs run on all CPUs, or the scheduler knows better, moves are in vain.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Requests from other CPUs that make up for a move, which takes some 20 us.
const WORTH: u32 = 256;

/// One thread's experience with moving.
pub struct Placement {
    met: u32,
    apart: u32,
    pause: Duration,
    next: Instant,
}

impl Placement {
    pub fn new() -> Self {
        Self { met: 0, apart: 0, pause: PAUSE_MIN, next: Instant::now() }
    }

    /// A request came from CPU `theirs` (plus one; 0 is not known) to CPU `own`. Says whether the thread should move.
    pub fn should_move(&mut self, own: u32, theirs: u32) -> bool {
        if theirs == 0 {
            return false;
        }
        if own != theirs {
            self.met = 0;
            self.apart = self.apart.saturating_add(1);
            return false;
        }
        self.met += 1;
        if self.met < MET_MAX {
            return false;
        }
        self.met = 0;
        let now = Instant::now();
        if now < self.next {
            return false;
        }
        self.pause = if self.apart >= WORTH { PAUSE_MIN } else { (self.pause * 2).min(PAUSE_MAX) };
        self.apart = 0;
        self.next = now + self.pause;
        true
    }
}

/// The CPU, plus one, that runs this thread now.
pub fn current_cpu() -> u32 {
    // SAFETY: no memory is involved. The C library reads it from memory that the kernel keeps up to date (rseq), so it costs no call.
    let cpu = unsafe { libc::sched_getcpu() };
    u32::try_from(cpu + 1).unwrap_or(0)
}

/// Has this thread run on another CPU than `cpu` (plus one), now; later it may run anywhere again. False if it has no other.
pub fn leave(cpu: u32) -> bool {
    let Some(cpu) = cpu.checked_sub(1).map(|cpu| cpu as usize) else { return false };
    let mut all = rustix::thread::CpuSet::new();
    (0..rustix::thread::CpuSet::MAX_CPU).for_each(|each| all.set(each));
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return false;
    }
    let mut others = all;
    others.unset(cpu);
    // Of those that are not in the cpuset the kernel makes nothing; with none left it refuses.
    let moved = rustix::thread::sched_setaffinity(None, &others).is_ok();
    if moved {
        if let Err(errno) = rustix::thread::sched_setaffinity(None, &all) {
            log::debug!("a thread stays off CPU {cpu}: {errno}");
        }
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_away_from_a_program_and_not_from_others() {
        let mut placement = Placement::new();
        assert!((0..1000).all(|_| !placement.should_move(1, 2) && !placement.should_move(1, 0)));
        let first = (1..).find(|_| placement.should_move(1, 1)).unwrap();
        assert_eq!(first, MET_MAX);
        assert!((0..1000).all(|_| !placement.should_move(1, 1)) || placement.pause > PAUSE_MIN);
    }

    #[test]
    fn moves_in_vain_become_rare_and_one_that_helps_brings_them_back() {
        let mut placement = Placement::new();
        for _ in 0..20 {
            placement.next = Instant::now();
            while !placement.should_move(1, 1) {}
        }
        assert_eq!(placement.pause, PAUSE_MAX);
        (0..WORTH).for_each(|_| assert!(!placement.should_move(2, 1)));
        placement.next = Instant::now();
        while !placement.should_move(1, 1) {}
        assert_eq!(placement.pause, PAUSE_MIN);
    }

    #[test]
    fn leaves_a_cpu_if_there_is_another() {
        let before = current_cpu();
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        assert!(before > 0 && allowed.is_set(before as usize - 1));
        assert_eq!(leave(before), allowed.count() > 1);
        assert_eq!(rustix::thread::sched_getaffinity(None).unwrap().count(), allowed.count());
    }
}
