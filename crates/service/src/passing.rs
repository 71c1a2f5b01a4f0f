//! Files passed through: what door and keeper say to each other about them.
//!
//! One SOCK_SEQPACKET socket a door. A request is eight bytes, one to register carries the file's descriptor; its answer is four. The
//! keeper has the rights that registering takes, and believes the worker nothing: see `keeper/passing.rs`.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::doors::fuse::Registrar;

/// Smaller files are read through the mount's own cache: that is faster when they are read again, and all of an image
/// together are few bytes (15 of 218 MiB) but more files than can be registered at once.
pub const SIZE_MIN_BYTES: u64 = 4 << 10;

/// A keeper that does not answer for so long never will; no lock of the door's is held meanwhile.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

const REGISTER: u32 = 1;
const UNREGISTER: u32 = 2;
const REQUEST_BYTES: usize = 8;

#[derive(Debug)]
pub enum Request {
    Register(OwnedFd),
    Unregister(u32),
}

/// The two ends: the keeper's, and the door's, which gives up waiting after a while.
pub fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    let (keeper, door) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    for timeout in [rustix::net::sockopt::Timeout::Recv, rustix::net::sockopt::Timeout::Send] {
        rustix::net::sockopt::set_socket_timeout(&door, timeout, Some(ANSWER_TIMEOUT))?;
    }
    Ok((keeper, door))
}

/// The next request; `None` when the door is gone. EPROTO for what is none.
pub fn receive(socket: &OwnedFd) -> rustix::io::Result<Option<Request>> {
    let mut message = [0; REQUEST_BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(&mut message)];
        rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut files = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            files.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    if received.bytes != REQUEST_BYTES || received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(Errno::PROTO);
    }
    let word =
        |at: usize| u32::from_le_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]]);
    match (word(0), word(4), files.pop(), files.is_empty()) {
        (REGISTER, 0, Some(file), true) => Ok(Some(Request::Register(file))),
        (UNREGISTER, id, None, true) => Ok(Some(Request::Unregister(id))),
        _ => Err(Errno::PROTO),
    }
}

/// Answers a request to register.
pub fn answer(socket: &OwnedFd, result: Result<u32, Errno>) -> rustix::io::Result<()> {
    let number = match result {
        Ok(id) => id as i32,
        Err(errno) => -errno.raw_os_error(),
    };
    // A door that takes no answers loses them: the keeper waits for nobody.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    retry_on_intr(|| rustix::net::send(socket, &number.to_ne_bytes(), flags)).map(drop)
}

/// The door's end. Asks the keeper, one thread at a time; `None` once it did not answer.
pub struct KeepersRegistrar {
    socket: Mutex<Option<OwnedFd>>,
}

impl KeepersRegistrar {
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket: Mutex::new(Some(socket)) }
    }

    /// Runs `exchange`; after a failure the two ends would not agree on what is answered, so that is the last.
    fn with_socket<T>(&self, exchange: impl FnOnce(&OwnedFd) -> rustix::io::Result<T>) -> io::Result<T> {
        let mut socket = self.socket.lock();
        let open = socket.as_ref().ok_or_else(|| io::Error::from(Errno::PIPE))?;
        let done = exchange(open);
        if done.is_err() {
            *socket = None;
        }
        Ok(done?)
    }
}

impl Registrar for KeepersRegistrar {
    fn register(&self, file: BorrowedFd<'_>) -> io::Result<u32> {
        let number = self.with_socket(|socket| {
            send(socket, (REGISTER, 0), &[file])?;
            let mut bytes = [0; 4];
            match retry_on_intr(|| rustix::net::recv(socket, &mut bytes[..], RecvFlags::empty()))?.0 {
                4 => Ok(i32::from_ne_bytes(bytes)),
                _ => Err(Errno::PIPE),
            }
        })?;
        u32::try_from(number).map_err(|_| io::Error::from_raw_os_error(number.saturating_neg()))
    }

    fn unregister(&self, id: u32) {
        if let Err(error) = self.with_socket(|socket| send(socket, (UNREGISTER, id), &[])) {
            log::debug!("FUSE door: registered file {id} stays until the door ends: {error}");
        }
    }
}

fn send(socket: &OwnedFd, (what, id): (u32, u32), files: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let message = (u64::from(what) | u64::from(id) << 32).to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(Errno::MSGSIZE);
    }
    retry_on_intr(|| {
        rustix::net::sendmsg(socket, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn files_are_registered_and_given_up() {
        let (keeper, door) = pair().unwrap();
        let desk = std::thread::spawn(move || {
            let mut seen = Vec::new();
            while let Some(request) = receive(&keeper).unwrap() {
                match request {
                    Request::Register(_) if seen.is_empty() => answer(&keeper, Ok(7)).unwrap(),
                    Request::Register(_) => answer(&keeper, Err(Errno::NOSPC)).unwrap(),
                    Request::Unregister(id) => assert_eq!(id, 7),
                }
                seen.push(request);
            }
            seen.len()
        });
        let file = tempfile::tempfile().unwrap();
        let registrar = KeepersRegistrar::new(door);
        assert_eq!(registrar.register(file.as_fd()).unwrap(), 7);
        let full = registrar.register(file.as_fd()).unwrap_err();
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
        registrar.unregister(7);
        drop(registrar);
        assert_eq!(desk.join().unwrap(), 3);
    }

    #[test]
    fn a_keeper_that_is_gone_is_not_asked_again() {
        let (keeper, door) = pair().unwrap();
        drop(keeper);
        let registrar = KeepersRegistrar::new(door);
        let file = tempfile::tempfile().unwrap();
        for _ in 0..2 {
            assert!(registrar.register(file.as_fd()).is_err());
        }
        registrar.unregister(1);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let (keeper, door) = pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let (one, two) = ([file.as_fd()], [file.as_fd(), file.as_fd()]);
        let messages: [(&[u8], &[BorrowedFd<'_>]); 7] = [
            (&[1, 0, 0, 0, 0, 0, 0], &one),
            (&[1, 0, 0, 0, 0, 0, 0, 0, 0], &one),
            (&[1, 0, 0, 0, 0, 0, 0, 0], &[]),
            (&[1, 0, 0, 0, 0, 0, 0, 0], &two),
            (&[1, 0, 0, 0, 9, 0, 0, 0], &one),
            (&[2, 0, 0, 0, 9, 0, 0, 0], &one),
            (&[3, 0, 0, 0, 0, 0, 0, 0], &[]),
        ];
        for (message, files) in messages {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files)));
            let parts = [IoSlice::new(message)];
            rustix::net::sendmsg(&door, &parts, &mut control, SendFlags::NOSIGNAL).unwrap();
            assert_eq!(receive(&keeper).unwrap_err(), Errno::PROTO, "{message:?}");
        }
        drop(door);
        assert!(receive(&keeper).unwrap().is_none());
    }
}
