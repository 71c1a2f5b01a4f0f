//! The link between keeper and worker: bounded packets, some with descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, Result, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Bound on one packet.
pub const PACKET_MAX_BYTES: usize = 64 << 10;
/// Bound on the descriptors of one packet (the kernel's is 253).
pub const PACKET_DESCRIPTORS_MAX: usize = 200;

/// What the keeper asks of the worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Task {
    /// The id maps are written. The plan by which bytes are copied; none is memcpy(3).
    Mapped {
        copies: Option<String>,
        /// Where its numbers of nodes and open files begin: beyond those of workers before.
        first_number: u64,
    },
    /// Serve a stack at a FUSE device. Descriptors: the document, the directory of windows, the same as programs see it, the state
    /// area, the memory of held writes, the door's end of the socket for channels, with `passthrough` the door's end of the socket for it, the devices; the directories come in `Roots` packets after it.
    Serve {
        request: u64,
        door: u64,
        document_bytes: usize,
        roots: usize,
        cache_bytes: u64,
        passthrough: bool,
        channel_writes: bool,
        /// How many workers served the door before; they died. The devices are the connection's, all of them, and the state area is the last one's.
        incarnation: u64,
        /// How much of the last one's death falls on the requests that it was doing.
        blame: u64,
    },
    /// Open a channel for a program. Descriptors: its socket, the process, its mount table, what is mounted inside.
    Connect { request: u64, door: u64, newcomer: Newcomer },
    /// The next directories of the stack, in the document's order.
    Roots {},
    /// Tell what a door has done; without one, what all did that have ended.
    Statistics { request: u64, door: Option<u64> },
}

/// A program that asks for a channel, as the keeper found it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Newcomer {
    pub pid: u32,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub capabilities: u64,
    /// It sees the mount read-only.
    pub read_only: bool,
    /// The mount is its root directory.
    pub is_root: bool,
    pub device: u64,
    pub mount_id: u64,
    /// Bytes of the list of what is mounted inside.
    pub covered_bytes: usize,
}

/// What the worker tells the keeper.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Report {
    /// It is in a new user namespace and waits for its id maps.
    Separated {},
    /// It is confined and takes tasks.
    Ready {},
    /// A task is done; or what stood in the way.
    Done { request: u64, problem: Option<String> },
    /// A door's counters.
    Statistics { request: u64, statistics: serde_json::Value },
    /// From now on bytes of a file may be held that programs have written. Descriptor: the file, which the keeper keeps.
    Holds { door: u64, key: u64 },
    /// Nothing of it is held any more, nor will be.
    LetsGo { door: u64, key: u64 },
    /// Channels and files that are written without waiting were told of on the sockets for that: to be read at once, or soon.
    Look { now: bool },
    /// A door has ended: its last mount is gone, or it was aborted.
    Ended { door: u64, problem: Option<String> },
}

/// One end of a link. Packets arrive whole and in order.
pub struct Link {
    socket: OwnedFd,
}

impl Link {
    pub fn pair() -> Result<(Link, Link)> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Link { socket: ours }, Link { socket: theirs }))
    }

    pub fn from_socket(socket: OwnedFd) -> Self {
        Self { socket }
    }

    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// EMSGSIZE when the packet is over the bounds.
    pub fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let packet = serde_json::to_vec(message).map_err(|_| Errno::INVAL)?;
        if packet.len() > PACKET_MAX_BYTES || descriptors.len() > PACKET_DESCRIPTORS_MAX {
            return Err(Errno::MSGSIZE);
        }
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(Errno::MSGSIZE);
        }
        let parts = [IoSlice::new(&packet)];
        retry_on_intr(|| rustix::net::sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    /// The next packet; None when the other end is gone. EPROTO for one that makes no sense.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>> {
        let mut packet = vec![0; PACKET_MAX_BYTES];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = retry_on_intr(|| {
            let mut parts = [IoSliceMut::new(&mut packet)];
            rustix::net::recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(Errno::PROTO);
        }
        let message = serde_json::from_slice(&packet[..received.bytes]).map_err(|_| Errno::PROTO)?;
        Ok(Some((message, descriptors)))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_packets_and_descriptors() {
        let (a, b) = Link::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        a.send(&Task::Roots {}, &[file.as_fd(), file.as_fd()]).unwrap();
        let (task, descriptors) = b.receive::<Task>().unwrap().unwrap();
        assert!(matches!(task, Task::Roots {}));
        assert_eq!(descriptors.len(), 2);
        drop(a);
        assert!(b.receive::<Task>().unwrap().is_none());
    }

    #[test]
    fn refuses_nonsense_and_excess() {
        let (a, b) = Link::pair().unwrap();
        a.send(&"nonsense", &[]).unwrap();
        assert_eq!(b.receive::<Task>().unwrap_err(), Errno::PROTO);
        assert_eq!(a.send(&"x".repeat(PACKET_MAX_BYTES), &[]), Err(Errno::MSGSIZE));
        let many = vec![a.as_fd(); PACKET_DESCRIPTORS_MAX + 1];
        assert_eq!(a.send(&Task::Roots {}, &many), Err(Errno::MSGSIZE));
        let raw = vec![b' '; PACKET_MAX_BYTES + 1];
        rustix::net::send(&a, &raw, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(b.receive::<Task>().unwrap_err(), Errno::PROTO);
    }
}
