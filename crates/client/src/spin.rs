//! Whether to look out for an answer a little before sleeping until it comes.
//!
//! That the service runs on another CPU does not tell that it runs: it may wait for that CPU, or work on something long. Looks in vain
//! keep others from a CPU, so they make the next ones rare.

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Looks in vain, one after the other, that are put down to chance.
const VAIN_MAX: u32 = 3;
/// After more of them so many requests pass without a look, doubled each time.
const PAUSE_REQUESTS: u32 = 8;
const PAUSE_DOUBLINGS_MAX: u32 = 5;

/// The experience of all threads of a channel. They do not wait for each other to write it down: what gets lost is told anew.
#[derive(Default)]
pub struct Spin {
    vain: AtomicU32,
    pause: AtomicU32,
}

impl Spin {
    pub fn should_look(&self) -> bool {
        let pause = self.pause.load(Relaxed);
        if pause > 0 {
            self.pause.store(pause - 1, Relaxed);
        }
        pause == 0
    }

    pub fn looked(&self, found: bool) {
        let vain = self.vain.load(Relaxed);
        if found {
            if vain != 0 {
                self.vain.store(0, Relaxed);
            }
            return;
        }
        self.vain.store(vain.saturating_add(1), Relaxed);
        if vain >= VAIN_MAX {
            self.pause.store(PAUSE_REQUESTS << (vain - VAIN_MAX).min(PAUSE_DOUBLINGS_MAX), Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `requests` are looked out for when `found` is what looks find.
    fn looks(spin: &Spin, requests: u32, found: bool) -> u32 {
        let mut looks = 0;
        for _ in 0..requests {
            if spin.should_look() {
                spin.looked(found);
                looks += 1;
            }
        }
        looks
    }

    #[test]
    fn looks_in_vain_become_rare_and_one_that_finds_brings_them_back() {
        let spin = Spin::default();
        assert_eq!(looks(&spin, 1000, true), 1000);
        let in_vain = looks(&spin, 5000, false);
        assert!((VAIN_MAX + 1..40).contains(&in_vain), "{in_vain}");
        while looks(&spin, 1, true) == 0 {}
        assert_eq!(looks(&spin, 1000, true), 1000);
    }
}
