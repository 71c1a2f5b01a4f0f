//! Whether to look out for the next message a little before sleeping until it comes.
//!
//! A program that waits for an answer asks again soon. Where it runs on another CPU, sleeping means that this CPU goes idle and has
//! to be woken, which takes tens of microseconds in virtual machines: more than the request itself. Where it runs on
//! this CPU, looking out only keeps it from asking. Nobody tells which of the two holds, so the looks themselves do: those
//! that find nothing make the next ones rare.

use std::time::{Duration, Instant};

/// Looks in vain, one after the other, that are put down to chance.
const VAIN_MAX: u32 = 3;
/// After more of them so many messages pass without a look, doubled each time.
const PAUSE_MESSAGES: u32 = 16;
const PAUSE_DOUBLINGS_MAX: u32 = 6;

/// One thread's experience with looking out.
pub struct Spin {
    /// With one CPU there is nobody to look out for.
    useful: bool,
    /// A look costs no more than this.
    look_max: Duration,
    vain: u32,
    pause: u32,
}

impl Spin {
    pub fn new(cpus: usize, look_max: Duration) -> Self {
        Self { useful: cpus > 1, look_max, vain: 0, pause: 0 }
    }

    /// After an answer: looks with `is_there` for a while, or not at all.
    pub fn look_out(&mut self, mut is_there: impl FnMut() -> bool) {
        if !self.useful {
            return;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return;
        }
        let began = Instant::now();
        loop {
            if is_there() {
                self.vain = 0;
                return;
            }
            if began.elapsed() >= self.look_max {
                break;
            }
        }
        self.vain = self.vain.saturating_add(1);
        if self.vain > VAIN_MAX {
            self.pause = PAUSE_MESSAGES << (self.vain - VAIN_MAX - 1).min(PAUSE_DOUBLINGS_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK_MAX: Duration = Duration::from_micros(1);

    /// How many of `messages` were looked out for when `found` is what looks find.
    fn looks(spin: &mut Spin, messages: u32, found: bool) -> u32 {
        let mut looks = 0;
        for _ in 0..messages {
            let mut looked = false;
            spin.look_out(|| {
                looked = true;
                found
            });
            looks += u32::from(looked);
        }
        looks
    }

    #[test]
    fn looks_that_find_go_on() {
        assert_eq!(looks(&mut Spin::new(2, LOOK_MAX), 1000, true), 1000);
    }

    #[test]
    fn looks_in_vain_become_rare_and_one_that_finds_brings_them_back() {
        let mut spin = Spin::new(2, LOOK_MAX);
        let in_vain = looks(&mut spin, 5000, false);
        assert!((VAIN_MAX + 1..20).contains(&in_vain), "{in_vain}");
        while looks(&mut spin, 1, true) == 0 {}
        assert_eq!(looks(&mut spin, 1000, true), 1000);
    }

    #[test]
    fn one_cpu_is_never_kept_from_the_program() {
        assert_eq!(looks(&mut Spin::new(1, LOOK_MAX), 100, false), 0);
    }
}
