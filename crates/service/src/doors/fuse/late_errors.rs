//! Failures that no program may ever be told of: of bytes that the kernel had taken before it asked for them to be written.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use polytropo_libservices::{DoorId, Error, NodeId};

/// A full disk fails every write of a long list.
const BETWEEN: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct LateErrors {
    last: Mutex<Option<Instant>>,
}

impl LateErrors {
    /// Logs the failure, unless one was logged a moment ago.
    pub fn tell(&self, door: DoorId, node: NodeId, error: &Error) {
        let now = Instant::now();
        let mut last = self.last.lock();
        if last.is_some_and(|last| now.duration_since(last) < BETWEEN) {
            return;
        }
        *last = Some(now);
        log::warn!(
            "FUSE door {}: bytes of node {} that a program wrote earlier could not be kept ({error}); close, fsync or \
             syncfs of that file tells it, if the program asks",
            door.0,
            node.0
        );
    }
}
