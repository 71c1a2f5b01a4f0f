//! When a rule strikes, and what with.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::{OPERATIONS, errnos};
use crate::error::{Errno, Error, Result};
use crate::stack::FaultRule;

/// Stands for every operation.
pub const ANY: &str = "*";

struct Rule {
    /// `None`: every operation.
    operation: Option<usize>,
    after: u64,
    times: u64,
    probability: f64,
    errno: Option<Errno>,
    delay: Duration,
    kill: bool,
    short_bytes: Option<u64>,
    /// Calls that it was about, and how many of them it hit.
    calls: AtomicU64,
    hits: AtomicU64,
    seed: u64,
}

pub struct Rules(Vec<Rule>);

impl Rules {
    /// EINVAL for names that `StackDocument::check` would have refused.
    pub fn new(rules: &[FaultRule], seed: u64) -> Result<Self> {
        let refused = || Error::new(Errno::INVAL, "read a rule of a fault layer");
        let rules = rules.iter().enumerate().map(|(i, rule)| {
            let known = OPERATIONS.iter().position(|name| *name == rule.operation);
            if known.is_none() && rule.operation != ANY {
                return Err(refused());
            }
            let errno = match &rule.errno {
                Some(name) => Some(errnos::by_name(name).ok_or_else(refused)?),
                None => None,
            };
            Ok(Rule {
                operation: known,
                after: rule.after,
                times: rule.times,
                probability: rule.probability,
                errno,
                delay: Duration::from_millis(rule.delay_ms),
                kill: rule.kill,
                short_bytes: rule.short_bytes,
                calls: AtomicU64::new(0),
                hits: AtomicU64::new(0),
                seed: mix(seed ^ mix(i as u64 + 1)),
            })
        });
        rules.collect::<Result<_>>().map(Self)
    }

    /// Called before an operation: waits and fails as the rules say, or tells how many bytes it may move.
    pub fn strike(&self, operation: usize) -> Result<u64> {
        let mut bytes_max = u64::MAX;
        for rule in &self.0 {
            if rule.operation.is_some_and(|only| only != operation) || !rule.hits_now() {
                continue;
            }
            if !rule.delay.is_zero() {
                std::thread::sleep(rule.delay);
            }
            if rule.kill {
                std::process::abort();
            }
            if let Some(errno) = rule.errno {
                return Err(Error::new(errno, "pass a fault layer"));
            }
            bytes_max = bytes_max.min(rule.short_bytes.unwrap_or(u64::MAX));
        }
        Ok(bytes_max)
    }
}

impl Rule {
    fn hits_now(&self) -> bool {
        let call = self.calls.fetch_add(1, Relaxed);
        if call < self.after || !self.dice(call) {
            return false;
        }
        let more = |hits: u64| (self.times == 0 || hits < self.times).then_some(hits.saturating_add(1));
        self.hits.fetch_update(Relaxed, Relaxed, more).is_ok()
    }

    /// The same for the same seed and number of the call, whatever the other threads do.
    fn dice(&self, call: u64) -> bool {
        let roll = (mix(self.seed ^ call) >> 11) as f64 / (1u64 << 53) as f64;
        roll < self.probability
    }
}

/// SplitMix64: spreads the bits of a counter.
fn mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
