//! What the keeper has of programs' channels, for the case that their worker dies: the memory of each, and the files that are written
//! there without waiting. So what was posted and not yet applied is applied by the keeper, and programs learn at once that the channel has
//! ended.
//!
//! A worker tells of them on a socket of its own ([`Custodian`]) that nobody listens at: the keeper reads it when it is told to, a few
//! times a second at most, or when the worker is dead ([`Kept`]). So a file that is written for a moment costs no waking of the keeper.

mod kept;
mod recovery;
#[cfg(test)]
mod tests;
mod worker;

pub use kept::Kept;
pub use recovery::Recovered;
pub use worker::{Channel, Custodian, Permit};

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::{Errno, Result, retry_on_intr};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// Files of one door that may be written without waiting: the keeper has a descriptor of each.
pub const PERMITS_MAX: usize = 1024;

/// One message: four words. Descriptors come with `CHANNEL`, and with `PERMIT` where there is a file of the host.
const MESSAGE_BYTES: usize = 32;
type Message = [u64; 4];

/// A channel begins: its number.
const CHANNEL: u64 = 1;
/// It has ended.
const CHANNEL_GONE: u64 = 2;
/// A file may be written: a key that is never used again, the channel, the file's number there, with `APPENDS` in the highest bit.
const PERMIT: u64 = 3;
/// No more, and all that was posted is applied: the key.
const PERMIT_GONE: u64 = 4;
/// Of a file's number: its bytes go to its end.
const APPENDS: u64 = 1 << 63;

/// The two ends: the keeper's, the worker's.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

fn send(socket: &OwnedFd, message: Message, file: Option<BorrowedFd<'_>>, flags: SendFlags) -> Result<()> {
    let mut bytes = [0; MESSAGE_BYTES];
    for (place, word) in bytes.chunks_exact_mut(8).zip(message) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = file.into_iter().collect();
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(Errno::MSGSIZE);
    }
    let parts = [IoSlice::new(&bytes)];
    let flags = flags | SendFlags::NOSIGNAL;
    retry_on_intr(|| rustix::net::sendmsg(socket, &parts, &mut control, flags)).map(drop)
}
