//! The worker's end.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::AcqRel;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::SendFlags;

use super::{APPENDS, CHANNEL, CHANNEL_GONE, Message, PERMIT, PERMIT_GONE, PERMITS_MAX, send};

/// The keeper is told to look so often at most, and looks later than that.
pub const LOOK_EVERY: Duration = Duration::from_millis(200);
/// So many messages may wait before the keeper is to look at once. Far below what a socket holds.
const WAITING_MAX: u32 = 64;

/// Has the keeper look at the socket: at once, or soon.
pub type Tell = Box<dyn Fn(bool) + Send + Sync>;

/// One door's way to the keeper.
pub struct Custodian {
    socket: OwnedFd,
    tell: Tell,
    waiting: Mutex<Waiting>,
    /// Numbers given out. Taken before `waiting`.
    last: Mutex<u64>,
    permits: AtomicUsize,
}

#[derive(Default)]
struct Waiting {
    count: u32,
    told: Option<Instant>,
}

/// A channel that the keeper knows.
pub struct Channel {
    custodian: Arc<Custodian>,
    number: u64,
}

/// A file that the keeper knows, until all that was posted is applied.
pub struct Permit {
    custodian: Arc<Custodian>,
    key: u64,
}

impl Custodian {
    pub fn new(socket: OwnedFd, tell: Tell) -> Arc<Self> {
        Arc::new(Self {
            socket,
            tell,
            waiting: Mutex::default(),
            last: Mutex::default(),
            permits: AtomicUsize::new(0),
        })
    }

    /// Before the program hears of the channel.
    pub fn channel(self: &Arc<Self>, memory: BorrowedFd<'_>) -> rustix::io::Result<Channel> {
        let number = self.introduce(|number| [CHANNEL, number, 0, 0], Some(memory))?;
        Ok(Channel { custodian: self.clone(), number })
    }

    /// Tells of something new by a number of its own. Numbers reach the keeper in their order, whichever threads they come from: it takes
    /// none that is lower than one before.
    fn introduce(
        &self,
        message: impl FnOnce(u64) -> Message,
        file: Option<BorrowedFd<'_>>,
    ) -> rustix::io::Result<u64> {
        let mut last = self.last.lock();
        *last += 1;
        self.say(message(*last), file)?;
        Ok(*last)
    }

    fn say(&self, message: Message, file: Option<BorrowedFd<'_>>) -> rustix::io::Result<()> {
        match send(&self.socket, message, file, SendFlags::DONTWAIT) {
            Err(Errno::AGAIN) => {
                (self.tell)(true);
                send(&self.socket, message, file, SendFlags::empty())
            }
            done => done,
        }?;
        let mut waiting = self.waiting.lock();
        waiting.count += 1;
        let many = waiting.count >= WAITING_MAX;
        if many || waiting.told.is_none_or(|told| told.elapsed() >= LOOK_EVERY) {
            *waiting = Waiting { count: 0, told: Some(Instant::now()) };
            drop(waiting);
            (self.tell)(many);
        }
        Ok(())
    }
}

impl Channel {
    /// Before the program may write the file without waiting. None if the keeper cannot have it. `file`: of the host, where its bytes are
    /// those of one.
    pub fn permit(&self, number: u64, appends: bool, file: Option<BorrowedFd<'_>>) -> Option<Permit> {
        let custodian = &self.custodian;
        if custodian.permits.fetch_add(1, AcqRel) >= PERMITS_MAX || number & APPENDS != 0 {
            custodian.permits.fetch_sub(1, AcqRel);
            return None;
        }
        let about = number | if appends { APPENDS } else { 0 };
        match custodian.introduce(|key| [PERMIT, key, self.number, about], file) {
            Ok(key) => Some(Permit { custodian: custodian.clone(), key }),
            Err(errno) => {
                log::warn!("writes to a file wait, for the keeper cannot have it: {errno}");
                custodian.permits.fetch_sub(1, AcqRel);
                None
            }
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // A keeper that is gone keeps nothing.
        let _ = self.custodian.say([CHANNEL_GONE, self.number, 0, 0], None);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.custodian.permits.fetch_sub(1, AcqRel);
        let _ = self.custodian.say([PERMIT_GONE, self.key, 0, 0], None);
    }
}
