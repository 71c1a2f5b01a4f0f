//! Times of modification while the kernel holds back writes: the kernel's own count, not when bytes come down.
//!
//! With write-back the kernel sets mtime when a program writes, by a clock that moves every few milliseconds, and passes it on
//! only if it differs from the last one that it was told or told us. So a file that is written within the tick in which it was
//! made or cut, as most small files are, never gets another SETATTR, while the bytes that come later move the time in
//! the layers. Bytes that the kernel writes back therefore leave mtime as it is, if it is recent. An older one the kernel will
//! replace; should it die before, or the program be killed, then the time of the bytes' way down is the better one.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use polytropo_libservices::{NodeId, Result, Timestamp};
use rustc_hash::FxHashMap;

const SHARDS: usize = 16;
/// The kernel keeps bytes for half a minute, unless it is told otherwise, and looks every five seconds.
const HELD_BACK_MAX: Duration = Duration::from_secs(60);

/// What the kernel holds a node's mtime to be.
#[derive(Clone, Copy, Default)]
enum Time {
    #[default]
    Unknown,
    /// It will tell another one.
    Old,
    Settled(Timestamp),
}

type Settled = Arc<Mutex<Time>>;

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
            if let Time::Unknown = *settled {
                *settled = match look() {
                    Ok(mtime) if is_recent(mtime) => Time::Settled(mtime),
                    // Whoever cannot look has no time to put back.
                    _ => Time::Old,
                };
            }
        }
        let written = write();
        {
            let settled = settled.lock();
            if let Time::Settled(mtime) = *settled {
                if let Err(error) = put_back(mtime) {
                    log::debug!("mtime of node {} became that of its bytes' way down: {error}", node.0);
                }
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
                *settled = Time::Settled(mtime);
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

fn is_recent(mtime: Timestamp) -> bool {
    let Ok(seconds) = u64::try_from(mtime.seconds) else { return false };
    let mtime = Duration::new(seconds, mtime.nanoseconds);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.abs_diff(mtime) <= HELD_BACK_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(7);

    /// So many seconds before now.
    fn ago(seconds: u64) -> Timestamp {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Timestamp { seconds: (now.as_secs() - seconds) as i64, nanoseconds: 5 }
    }

    #[test]
    fn writing_leaves_the_time_that_was_set_last_and_nothing_behind() {
        let (made, written, told) = (ago(9), ago(5), ago(3));
        let times = Times::default();
        let host = Mutex::new(made);
        let put_back = |time| {
            *host.lock() = time;
            Ok(())
        };
        let look = || Ok(*host.lock());
        let write = || {
            *host.lock() = written;
            Ok(())
        };
        times.keep(NODE, look, write, put_back).unwrap();
        assert_eq!(*host.lock(), made);
        // Another thread's write and a new time arrive while one is under way.
        let write = || {
            *host.lock() = written;
            times.keep(NODE, || panic!("another has looked"), || Ok(()), put_back)?;
            assert_eq!(*host.lock(), made);
            times.set(NODE, || {
                *host.lock() = told;
                Ok((told, ()))
            })?;
            *host.lock() = written;
            Ok(())
        };
        times.keep(NODE, look, write, put_back).unwrap();
        assert_eq!(*host.lock(), told);
        assert!(times.shards.iter().all(|shard| shard.lock().is_empty()));
    }

    #[test]
    fn an_old_time_gives_way_to_that_of_the_bytes() {
        let times = Times::default();
        for old in [ago(3600), Timestamp { seconds: -7, nanoseconds: 0 }] {
            times.keep(NODE, || Ok(old), || Ok(()), |_| panic!("it was put back")).unwrap();
        }
    }
}
