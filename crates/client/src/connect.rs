//! Connecting: one hello, one welcome.

use polytropo_wire::hello::{Hello, Verdict, WELCOME_BYTES, WELCOME_DESCRIPTORS, Welcome};
use polytropo_wire::{VERSION, answers, channel, epochs};

use crate::answers::Answers;
use crate::channel::Channel;
use crate::lookups::Lookups;
use crate::sys::{self, Descriptor, Mapping};

/// Why there is no channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The service says so.
    Verdict(Verdict),
    /// A system call failed: there is no service, or this process lacks what it takes.
    Errno(i32),
    /// What answered is no service of this version.
    Protocol,
}

impl From<i32> for Refused {
    fn from(errno: i32) -> Self {
        Self::Errno(errno)
    }
}

const ECONNRESET: i32 = 104;

/// Descriptors are kept above this number where the limit allows.
const LOWEST_DESCRIPTOR: i32 = 512;

impl Channel {
    /// Connects to the service at the socket `path`, for the mount whose root `mount_root` (an `O_PATH` descriptor) is. Makes system calls
    /// and may wait for the service; everything it keeps is its own.
    pub fn connect(path: &[u8], mount_root: i32) -> Result<Channel, Refused> {
        let socket = sys::connect(path)?;
        sys::send(&socket, &Hello::default().to_bytes(), mount_root)?;
        let mut answer = [0; WELCOME_BYTES];
        let (count, descriptors) = sys::receive::<WELCOME_DESCRIPTORS>(&socket, &mut answer)?;
        if count == 0 {
            // It ended before it answered.
            return Err(Refused::Errno(ECONNRESET));
        }
        let answer = answer.get(..count).ok_or(Refused::Protocol)?;
        let welcome = Welcome::from_bytes(answer).ok_or(Refused::Protocol)?;
        let verdict = Verdict::from_number(welcome.verdict).ok_or(Refused::Protocol)?;
        if verdict != Verdict::Welcome {
            return Err(Refused::Verdict(verdict));
        }
        let [Some(memory), Some(bell), Some(windows), Some(table), Some(shared)] = descriptors else {
            return Err(Refused::Protocol);
        };
        if welcome.version != VERSION || welcome.channel_bytes != channel::TOTAL_BYTES as u64 {
            return Err(Refused::Protocol);
        }
        let memory = Mapping::shared(&memory, channel::TOTAL_BYTES, true)?;
        // Without it nothing is kept, and everything asked.
        let lookups = if welcome.epochs_bytes == epochs::TOTAL_BYTES as u64 {
            Lookups::over(&table).ok()
        } else {
            None
        };
        let answers = if welcome.answers_bytes == answers::TOTAL_BYTES as u64 {
            Answers::over(&shared).ok()
        } else {
            None
        };
        let up = |descriptor: Descriptor| descriptor.moved_up(LOWEST_DESCRIPTOR);
        Channel::over(memory, up(socket), up(bell), up(windows), lookups, answers, &welcome)
    }
}
