//! Wakes the thread that looks after held writes.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

#[derive(Default)]
pub struct Bell {
    rung: Mutex<bool>,
    wake: Condvar,
    /// Somebody sleeps until it is rung, however long.
    sound_asleep: AtomicBool,
}

impl Bell {
    /// Not `urgent`: who looks every now and then anyhow is left alone.
    pub fn ring(&self, urgent: bool) {
        if urgent || self.sound_asleep.load(SeqCst) {
            *self.rung.lock() = true;
            self.wake.notify_one();
        }
    }

    /// None: until it is rung.
    pub fn wait(&self, time: Option<Duration>) {
        let mut rung = self.rung.lock();
        match time {
            _ if *rung => {}
            Some(time) => drop(self.wake.wait_for(&mut rung, time)),
            None => {
                self.sound_asleep.store(true, SeqCst);
                // Something may have come before that was seen.
                self.wake.wait_for(&mut rung, SLEEP_MAX);
                self.sound_asleep.store(false, SeqCst);
            }
        }
        *rung = false;
    }
}

/// Of a ring that was not, because the sleeper was not yet asleep, one hears so late.
const SLEEP_MAX: Duration = Duration::from_millis(500);
