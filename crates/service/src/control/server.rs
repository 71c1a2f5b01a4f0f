//! Serves the control socket: who may connect, how long a line may be, how long a client may dawdle.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use log::{debug, warn};
use rustix::io::Errno;

use super::{Answer, Order, Refusal, Reply};

/// An order holds at most a stack document: 500 layers with long paths fit.
const LINE_MAX_BYTES: usize = 4 << 20;
const CLIENTS_MAX: usize = 64;
/// A client that says nothing, or not a whole line, for so long is let go.
const PATIENCE: Duration = Duration::from_secs(30);

/// Carries out orders, from several clients at once.
pub trait Orders: Send + Sync + 'static {
    fn carry_out(&self, order: Order) -> Answer;

    /// From then on orders are not refused but left unanswered: the client sees the service gone and may start another.
    fn is_ending(&self) -> bool;
}

/// The control socket. Each client has a thread, so a slow one is waited for by nobody else.
pub struct Server {
    listener: UnixListener,
    clients: Arc<AtomicUsize>,
}

impl Server {
    /// Listens on `control.sock` in `run_dir`; the socket of a dead keeper is replaced. EADDRINUSE if one answers.
    pub fn listen(run_dir: &Path) -> Result<Self, Refusal> {
        let listener = bind(run_dir).map_err(|errno| {
            Refusal::of(errno, format!("{}/control.sock cannot be made", run_dir.display()))
        })?;
        Ok(Self { listener, clients: Arc::default() })
    }

    pub fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Takes one waiting client. Call it when the socket is readable.
    pub fn accept(&self, orders: &Arc<dyn Orders>) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!("a client went before it was heard: {error}");
                return;
            }
        };
        if let Err(why) = allowed(&stream) {
            warn!("a client was turned away: {why}");
            return say_goodbye(stream, &why);
        }
        if self.clients.fetch_add(1, Relaxed) >= CLIENTS_MAX {
            self.clients.fetch_sub(1, Relaxed);
            let why = format!("the service has {CLIENTS_MAX} clients already; try again");
            return say_goodbye(stream, &Refusal::with_errno(Errno::AGAIN, why));
        }
        let (orders, clients) = (orders.clone(), self.clients.clone());
        let counted = clients.clone();
        let spawned = std::thread::Builder::new().name("client".into()).spawn(move || {
            let end = Client { stream, pending: Vec::new() }.serve(&*orders);
            if let Err(error) = end {
                debug!("a client was let go: {error}");
            }
            clients.fetch_sub(1, Relaxed);
        });
        if let Err(error) = spawned {
            counted.fetch_sub(1, Relaxed);
            warn!("a client could not be served: {error}");
        }
    }
}

fn bind(run_dir: &Path) -> rustix::io::Result<UnixListener> {
    use rustix::fs::{Mode, OFlags};
    // Through a descriptor, since a socket's address holds 107 bytes and state directories may lie deep.
    let directory =
        rustix::fs::open(run_dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let place = format!("/proc/self/fd/{}/control.sock", std::os::fd::AsRawFd::as_raw_fd(&directory));
    if UnixStream::connect(&place).is_ok() {
        return Err(Errno::ADDRINUSE);
    }
    match rustix::fs::unlinkat(&directory, "control.sock", rustix::fs::AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno),
    }
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(&place);
    rustix::process::umask(before);
    let listener = bound.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    listener.set_nonblocking(true).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    Ok(listener)
}

/// Only the service's owner and root give orders.
fn allowed(stream: &UnixStream) -> Result<(), Refusal> {
    let peer = peer_of(stream).map_err(|errno| Refusal::of(errno, "the client's identity cannot be read"))?;
    let who = peer.uid;
    if who == 0 || who == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    Err(Refusal::with_errno(
        Errno::PERM,
        format!("user {who} may not give orders; only the owner and root may"),
    ))
}

/// Who is at the other end. (Its process id is 0 if it lives in another PID namespace, which rustix does not foresee.)
pub fn peer_of(stream: &UnixStream) -> rustix::io::Result<libc::ucred> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `peer`, which is that long and plain numbers.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &mut length,
        )
    };
    if done == 0 {
        return Ok(peer);
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

fn say_goodbye(mut stream: UnixStream, why: &Refusal) {
    // A new connection has room for one sentence; a client that is gone misses nothing.
    let _ = stream.set_nonblocking(true);
    let _ = stream.write_all(&line_of(&Err(why.clone())));
}

fn line_of(answer: &Answer) -> Vec<u8> {
    let reply = match answer {
        Ok(value) => Reply::Ok(value),
        Err(refusal) => Reply::Error(refusal),
    };
    let mut line = serde_json::to_vec(&reply).expect("an answer has only string keys");
    line.push(b'\n');
    line
}

struct Client {
    stream: UnixStream,
    pending: Vec<u8>,
}

impl Client {
    fn serve(mut self, orders: &dyn Orders) -> std::io::Result<()> {
        self.stream.set_nonblocking(false)?;
        self.stream.set_write_timeout(Some(PATIENCE))?;
        loop {
            let line = match self.read_line()? {
                Line::Whole(line) => line,
                Line::End => return Ok(()),
                Line::TooLong => {
                    let why = format!("the order is longer than {LINE_MAX_BYTES} bytes");
                    return self.stream.write_all(&line_of(&Err(Refusal::new(why))));
                }
            };
            let answer = match serde_json::from_slice::<Order>(&line) {
                Ok(order) => orders.carry_out(order),
                Err(error) => {
                    Err(Refusal::with_errno(Errno::INVAL, format!("the order cannot be understood: {error}")))
                }
            };
            if answer.is_err() && orders.is_ending() {
                return Ok(());
            }
            self.stream.write_all(&line_of(&answer))?;
        }
    }

    /// The next line without its end. A whole line must come within `PATIENCE`.
    fn read_line(&mut self) -> std::io::Result<Line> {
        let deadline = Instant::now() + PATIENCE;
        let mut searched = 0;
        loop {
            if let Some(end) = self.pending[searched..].iter().position(|&byte| byte == b'\n') {
                let rest = self.pending.split_off(searched + end + 1);
                let mut line = std::mem::replace(&mut self.pending, rest);
                line.pop();
                return Ok(Line::Whole(line));
            }
            searched = self.pending.len();
            if searched > LINE_MAX_BYTES {
                return Ok(Line::TooLong);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 16 << 10];
            match self.stream.read(&mut buffer)? {
                0 => return Ok(Line::End),
                count => self.pending.extend_from_slice(&buffer[..count]),
            }
        }
    }
}

enum Line {
    Whole(Vec<u8>),
    TooLong,
    End,
}
