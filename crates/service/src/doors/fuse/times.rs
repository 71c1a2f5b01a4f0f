//! Times of modification while the kernel holds back writes: the kernel's own count, not when bytes come down.
//!
//! With write-back the kernel sets mtime when a program writes, by a clock that moves every few milliseconds, and passes it on
//! only if it differs from the last one that it was told or told us. So a file that is written within the tick in which it was
//! made or cut, as most small files are, never gets another SETATTR, while the bytes that come later move the time in
//! the layers. Bytes that the kernel writes back therefore leave mtime as it is.

use std::sync::Arc;

use parking_lot::Mutex;
use polytropo_libservices::{NodeId, Result, Timestamp};
use rustc_hash::FxHashMap;

const SHARDS: usize = 16;

/// What the kernel holds a node's mtime to be; `None` until somebody has looked.
type Settled = Arc<Mutex<Option<Timestamp>>>;

/// The nodes that are being written, as several threads may write one and set its time meanwhile.
#[derive(Default)]
pub struct Times {
    shards: [Mutex<FxHashMap<NodeId, Settled>>; SHARDS],
}

impl Times {
    /// Runs `write`, then `put_back` with the time from before, or the one that was set meanwhile.
    pub fn keep<T>(
        &self,
        node: NodeId,
        look: impl FnOnce() -> Result<Timestamp>,
        write: impl FnOnce() -> Result<T>,
        put_back: impl FnOnce(Timestamp) -> Result<()>,
    ) -> Result<T> {
        let settled = self.enter(node);
        {
            let mut settled = settled.lock();
            if settled.is_none() {
                // Whoever cannot look has no time to put back.
                *settled = look().ok();
            }
        }
        let written = write();
        {
            let settled = settled.lock();
            if let Some(Err(error)) = settled.map(put_back) {
                log::debug!("mtime of node {} became that of its bytes' way down: {error}", node.0);
            }
        }
        self.leave(node, settled);
        written
    }

    /// Runs `set`, which says what the time is then.
    pub fn set<T>(&self, node: NodeId, set: impl FnOnce() -> Result<(Timestamp, T)>) -> Result<T> {
        let settled = self.enter(node);
        let done = {
            let mut settled = settled.lock();
            set().map(|(mtime, done)| {
                *settled = Some(mtime);
                done
            })
        };
        self.leave(node, settled);
        done
    }

    fn enter(&self, node: NodeId) -> Settled {
        self.shard(node).lock().entry(node).or_default().clone()
    }

    fn leave(&self, node: NodeId, settled: Settled) {
        let mut shard = self.shard(node).lock();
        drop(settled);
        // New users come by the shard, which is locked: only the table's own reference is left.
        if shard.get(&node).is_some_and(|kept| Arc::strong_count(kept) == 1) {
            shard.remove(&node);
        }
    }

    fn shard(&self, node: NodeId) -> &Mutex<FxHashMap<NodeId, Settled>> {
        &self.shards[node.0 as usize % SHARDS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(7);

    fn at(seconds: i64) -> Timestamp {
        Timestamp { seconds, nanoseconds: 0 }
    }

    #[test]
    fn writing_leaves_the_time_that_was_set_last_and_nothing_behind() {
        let times = Times::default();
        let host = Mutex::new(at(1));
        let put_back = |time| {
            *host.lock() = time;
            Ok(())
        };
        let look = || Ok(*host.lock());
        times
            .keep(
                NODE,
                look,
                || {
                    *host.lock() = at(50);
                    Ok(())
                },
                put_back,
            )
            .unwrap();
        assert_eq!(*host.lock(), at(1));
        // Another thread's write and a new time arrive while one is under way.
        let write = || {
            *host.lock() = at(60);
            times.keep(NODE, || panic!("another has looked"), || Ok(()), put_back)?;
            assert_eq!(*host.lock(), at(1));
            times.set(NODE, || {
                *host.lock() = at(2);
                Ok((at(2), ()))
            })?;
            *host.lock() = at(61);
            Ok(())
        };
        times.keep(NODE, look, write, put_back).unwrap();
        assert_eq!(*host.lock(), at(2));
        assert!(times.shards.iter().all(|shard| shard.lock().is_empty()));
    }
}
