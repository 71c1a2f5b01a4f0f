//! Threads that tell the kernel things, with descriptors of their own.
//!
//! A notice may wait in the kernel for pages or a directory that only an answer of ours sets free. Who is killed meanwhile cannot end before it is
//! answered, and nobody answers before the killed worker has ended. So such a thread has nothing open but the device: what the others
//! had open is closed when they end, the link to the keeper among it, by which the keeper knows that nothing but notices is left of a worker.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use polytropo_libservices::Errno;
use zerocopy::IntoBytes;

use super::abi::{InvalInodeOut, notify};
use super::device::Device;

/// For the log.
const STANDARD_ERROR: RawFd = 2;

/// Starts a thread that has `device` and the log, and no other descriptor. What it returns or captures must not close any when the thread drops it.
pub fn spawn<T: Send + 'static>(
    name: String,
    device: &Device,
    run: impl FnOnce(&Device) -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let own = device.as_fd().try_clone_to_owned()?;
    let number = own.as_raw_fd();
    let (tell, told) = sync_channel(1);
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        let parted = part(number);
        if let Err(errno) = &parted {
            log::debug!("FUSE door: a thread shares the descriptors of others: {errno}");
        }
        if parted.is_ok()
            && let Err(errno) = close_others(number)
        {
            log::debug!("FUSE door: a thread keeps descriptors of others: {errno}");
        }
        // The other end waits for it.
        let _ = tell.send(parted.is_ok());
        run(&Device::new(own))
    })?;
    if told.recv().unwrap_or(false) {
        // SAFETY: since the thread parted there are two descriptors of this number, and `own` is the one in its table. This one, in ours, is
        // nobody else's.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok(thread)
}

/// Gives the calling thread a table of its own, up to `kept`. Only if that fails the table is the others' still.
fn part(kept: RawFd) -> io::Result<()> {
    close_range(kept + 1, RawFd::MAX, libc::CLOSE_RANGE_UNSHARE)
}

/// Leaves `kept` and the log in the table that `part` has made.
fn close_others(kept: RawFd) -> io::Result<()> {
    close_range(0, STANDARD_ERROR - 1, 0)?;
    if kept > STANDARD_ERROR + 1 { close_range(STANDARD_ERROR + 1, kept - 1, 0) } else { Ok(()) }
}

/// From `first` to `last`, both included.
fn close_range(first: RawFd, last: RawFd, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: the first call gives the thread a table of its own, and what is closed in that one nobody uses: see `spawn`.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has the kernel write files back, for a thread that has to be able to end meanwhile.
pub struct Flusher {
    asks: Option<Sender<u64>>,
    answers: Receiver<Result<(), Errno>>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    pub fn start(name: String, device: &Device) -> io::Result<Self> {
        let (asks, asked) = channel();
        let (answer, answers) = sync_channel(1);
        let thread = spawn(name, device, move |device| flush_all(device, &asked, &answer))?;
        Ok(Self { asks: Some(asks), answers, thread: Some(thread) })
    }

    /// Returns when the kernel holds back nothing of the inode.
    pub fn flush(&self, number: u64) -> Result<(), Errno> {
        let asked = self.asks.as_ref().is_some_and(|asks| asks.send(number).is_ok());
        // The thread ends before us only if it panicked.
        if asked { self.answers.recv().unwrap_or(Err(Errno::IO)) } else { Err(Errno::IO) }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.asks = None;
        if let Some(thread) = self.thread.take() {
            // A panic was logged by the panic hook already.
            let _ = thread.join();
        }
    }
}

fn flush_all(device: &Device, asked: &Receiver<u64>, answer: &SyncSender<Result<(), Errno>>) {
    while let Ok(ino) = asked.recv() {
        let everything = InvalInodeOut { ino, off: 0, len: 0 };
        let flushed = match device.notify(notify::INVAL_INODE, &[everything.as_bytes()]) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        };
        if answer.send(flushed).is_err() {
            return;
        }
    }
}
