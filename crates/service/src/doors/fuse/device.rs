//! The device: messages in, answers out, and memory that suits both.

use std::io::IoSlice;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use polytropo_libservices::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, InHeader, OutHeader, WriteIn};

/// Largest payload of one message either way.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
const PAGE_BYTES: usize = 4096;
/// A message begins so far before a page that what WRITE carries is aligned, which makes the kernel's copy cheaper.
const MESSAGE_START: usize = PAGE_BYTES - size_of::<InHeader>() - size_of::<WriteIn>();
/// Room behind the payload for extensions.
const MESSAGE_TAIL: usize = PAGE_BYTES;

/// One way to a FUSE connection. Answers go back through the device that the request came from.
#[derive(Clone)]
pub struct Device(Arc<OwnedFd>);

/// What became of waiting for a message.
pub enum Received {
    /// A message of so many bytes.
    Message(usize),
    /// Nothing yet; a signal, or a request that was taken back.
    Nothing,
    /// Unmounted or aborted.
    Ended,
}

impl Device {
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    /// One that is the connection's already.
    pub fn of(device: Arc<OwnedFd>) -> Self {
        Self(device)
    }

    /// A device of its own on the same connection, made of `spare` or where `/dev/fuse` can be opened; else the same one.
    pub fn clone_or_share(&self, spare: Option<Arc<OwnedFd>>) -> Self {
        self.try_clone(spare).unwrap_or_else(|errno| {
            log::debug!("FUSE door: threads share one device, since /dev/fuse cannot be opened: {errno}");
            self.clone()
        })
    }

    fn try_clone(&self, spare: Option<Arc<OwnedFd>>) -> rustix::io::Result<Self> {
        let open =
            || rustix::fs::open(c"/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map(Arc::new);
        let fresh = spare.map_or_else(open, Ok)?;
        let source = self.0.as_raw_fd() as u32;
        // SAFETY: the kernel reads one u32 from the pointer and keeps nothing of it.
        let done = unsafe { libc::ioctl(fresh.as_raw_fd(), abi::DEV_IOC_CLONE.into(), &raw const source) };
        if done == 0 { Ok(Self(fresh)) } else { Err(last_errno()) }
    }

    pub fn receive(&self, message: &mut MessageBuffer) -> std::result::Result<Received, Errno> {
        match rustix::io::read(&*self.0, message.room()) {
            Ok(count) => Ok(Received::Message(count)),
            // NOENT: the request was interrupted before we took it.
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => Ok(Received::Nothing),
            Err(Errno::NODEV | Errno::CONNABORTED) => Ok(Received::Ended),
            Err(errno) => Err(errno),
        }
    }

    /// Whether a message waits, or the connection has ended.
    pub fn has_message(&self) -> bool {
        let mut asked = [PollFd::new(&*self.0, PollFlags::IN)];
        // What is wrong with the device is told by reading from it.
        !matches!(poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }

    /// ENOENT when the request is gone meanwhile.
    pub fn reply(&self, header: &OutHeader, payload: &[u8]) -> rustix::io::Result<()> {
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(payload)];
        let parts = if payload.is_empty() { &parts[..1] } else { &parts[..] };
        rustix::io::writev(&*self.0, parts).map(drop)
    }

    /// Tells the kernel something that it did not ask.
    pub fn notify(&self, code: i32, parts: &[&[u8]]) -> rustix::io::Result<()> {
        let len = size_of::<OutHeader>() + parts.iter().map(|part| part.len()).sum::<usize>();
        let header = OutHeader { len: len as u32, error: code, unique: 0 };
        let mut slices = vec![IoSlice::new(header.as_bytes())];
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        rustix::io::writev(&*self.0, &slices).map(drop)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Where messages are read to; reused for every message of a thread.
pub struct MessageBuffer(Pages);

impl MessageBuffer {
    pub fn new() -> std::io::Result<Self> {
        Pages::new(PAGE_BYTES + PAYLOAD_BYTES_MAX + MESSAGE_TAIL).map(Self)
    }

    fn room(&mut self) -> &mut [u8] {
        &mut self.0[MESSAGE_START..]
    }

    /// Takes over a message that was received elsewhere.
    pub fn put(&mut self, message: &[u8]) {
        self.room()[..message.len()].copy_from_slice(message);
    }

    /// Has its memory there before it is read to. A page that is missing when the process is being killed cannot be had any more, and
    /// the kernel would answer the request EIO instead of keeping it for the next worker.
    pub fn touch(&mut self) {
        self.0.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = 0);
    }

    /// The thread that sent the message of `count` bytes; 0 when it does not say.
    pub fn sender(&self, count: usize) -> u32 {
        InHeader::read_from_prefix(self.message(count)).map_or(0, |(header, _)| header.pid)
    }

    pub fn message(&self, count: usize) -> &[u8] {
        &self.0[MESSAGE_START..][..count]
    }
}

/// Page-aligned memory, zeroed, that costs nothing before it is touched.
pub struct Pages {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that nobody else refers to.
unsafe impl Send for Pages {}

impl Pages {
    pub fn new(len: usize) -> std::io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new anonymous mapping touches no memory that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }
}

impl Deref for Pages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start` is a live mapping of `len` bytes, zeroed by the kernel, that only we refer to.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes this reference the only one.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference to it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

const _: () = assert!(PAYLOAD_BYTES_MAX + MESSAGE_TAIL > abi::READ_BUFFER_MIN);
