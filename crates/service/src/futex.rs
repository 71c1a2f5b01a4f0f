//! Words in shared memory that programs sleep on.

use std::sync::atomic::AtomicU32;

use rustix::thread::futex;

/// Wakes all who sleep on the word; tells how many. Nobody may; the address is ours, so nothing else can fail.
pub fn wake_all(word: &AtomicU32) -> usize {
    // The kernel takes the number for a signed one: `u32::MAX` would be below 0, and wake one.
    futex::wake(word, futex::Flags::empty(), i32::MAX as u32).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    /// Whether the thread sleeps in futex(2).
    fn is_asleep(thread: rustix::thread::Pid) -> bool {
        let path = format!("/proc/self/task/{}/syscall", thread.as_raw_nonzero());
        let call = std::fs::read_to_string(path).unwrap_or_default();
        call.split(' ').next() == Some(&libc::SYS_futex.to_string())
    }

    #[test]
    fn all_sleepers_are_woken() {
        let word = Arc::new(AtomicU32::new(0));
        let (tell, told) = std::sync::mpsc::channel();
        let sleepers: Vec<_> = (0..3)
            .map(|_| {
                let (word, tell) = (word.clone(), tell.clone());
                std::thread::spawn(move || {
                    tell.send(rustix::thread::gettid()).unwrap();
                    let limit = rustix::time::Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
                    futex::wait(&word, futex::Flags::empty(), 0, Some(&limit))
                })
            })
            .collect();
        let begun = Instant::now();
        for thread in told.iter().take(sleepers.len()) {
            while !is_asleep(thread) {
                assert!(begun.elapsed() < LIMIT, "a thread does not fall asleep");
                std::thread::yield_now();
            }
        }
        assert_eq!(wake_all(&word), sleepers.len());
        assert!(sleepers.into_iter().all(|sleeper| sleeper.join().unwrap().is_ok()));
    }
}
