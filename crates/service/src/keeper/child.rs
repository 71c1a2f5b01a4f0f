//! The worker as its parent sees it: started, asked, watched.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use log::{error, info, warn};
use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::keeping::Keeping;
use super::passing::Mounts;
use super::said;
use super::windows::{WindowPlace, WindowStore};
use crate::control::{Refusal, describe};
use crate::custody;
use crate::doors::fuse::Transport;
use crate::isolation::ids::Ids;
use crate::link::{Link, Newcomer, PACKET_DESCRIPTORS_MAX, Report, Task};
use crate::state::{BLAME_OF_FAULT, BLAME_OF_KILL};

const START_TIMEOUT: Duration = Duration::from_secs(15);
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(10);
/// What a process takes between closing its descriptors and its end.
const LAST_STEPS: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// Longer than a worker waits until it asks again.
const LOOK_AFTER: Duration = Duration::from_millis(250);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Hears of doors and of the worker's end. Called on threads of the child's own.
pub trait Watcher: Send + Sync {
    /// False if there is no such door of that worker, or it has ended before.
    fn door_ended(&self, worker: &Child, door: u64) -> bool;
    fn worker_ended(&self, worker: &Arc<Child>);
}

/// What a worker is to serve, and where it writes down what it does.
pub struct Served<'a> {
    pub door: u64,
    pub state: &'a OwnedFd,
    /// Memory of held writes.
    pub held: &'a OwnedFd,
    /// How many workers served it before.
    pub incarnation: u64,
    /// How much of the last one's death falls on the requests that it was doing.
    pub blame: u64,
}

enum Outcome {
    Done(Option<String>),
    Statistics(serde_json::Value),
}

/// A running worker, or one that has ended.
pub struct Child {
    pid: u32,
    pidfd: OwnedFd,
    ids: Ids,
    /// Where its windows lie.
    windows: OnceLock<WindowStore>,
    /// Its user namespace, by which directories are idmapped for it.
    namespace: OnceLock<OwnedFd>,
    link: Link,
    /// Where files lie that may be passed through.
    mounts: Mutex<Mounts>,
    /// What it holds of files, for the case that it dies.
    keeping: Keeping,
    /// Keeps the packets of one task together.
    sending: Mutex<()>,
    waiting: Mutex<HashMap<u64, SyncSender<Outcome>>>,
    last_request: AtomicU64,
    alive: AtomicBool,
    /// How much of its death falls on the requests that it was doing.
    blame: AtomicU64,
    /// Whether a thread still hears what it says, or said before it ended.
    hears: (Mutex<bool>, Condvar),
}

impl Child {
    /// Starts a worker and waits until it is confined. `copies`: the plan that it copies by. `first_number`: where its numbers begin.
    pub fn start(
        ids: Ids,
        (copies, first_number): (Option<String>, u64),
        transport: Transport,
        watcher: Arc<dyn Watcher>,
    ) -> Result<Arc<Self>, Refusal> {
        let (ours, theirs) =
            Link::pair().map_err(|errno| Refusal::of(errno, "the link to a worker cannot be made"))?;
        let (tell, told) = sync_channel(1);
        let spawned = std::thread::Builder::new().name("worker-wait".into()).spawn(move || {
            // The thread that starts the worker lives as long as it: the worker dies with it.
            match spawn(theirs.into_socket(), transport) {
                Ok((mut child, pidfd)) => {
                    let (owner, ended) = sync_channel::<Arc<Child>>(1);
                    let _ = tell.send(Ok((child.id(), pidfd, child.stderr.take(), owner)));
                    if let Ok(worker) = ended.recv() {
                        let status = worker.wait_over(&mut child);
                        worker.ended(&status, &*watcher);
                    }
                    // There is nothing more to be learnt of it.
                    let _ = child.wait();
                }
                Err(error) => {
                    let _ = tell.send(Err(error));
                }
            }
        });
        let cannot =
            |why: &dyn std::fmt::Display| Refusal::new(format!("the worker cannot be started: {why}"));
        spawned.map_err(|e| cannot(&e))?;
        let (pid, pidfd, log, owner) = told.recv().map_err(|e| cannot(&e))?.map_err(|e| cannot(&e))?;
        // Not on the waiting thread, which can start no other.
        if let Some(log) = log {
            said::relay_log(log);
        }
        let child = Arc::new(Self {
            pid,
            pidfd,
            ids,
            windows: OnceLock::new(),
            namespace: OnceLock::new(),
            link: ours,
            mounts: Mutex::default(),
            keeping: Keeping::default(),
            sending: Mutex::new(()),
            waiting: Mutex::default(),
            last_request: AtomicU64::new(0),
            alive: AtomicBool::new(true),
            blame: AtomicU64::new(0),
            hears: Default::default(),
        });
        let _ = owner.send(child.clone());
        child.wait_until_ready(Task::Mapped { copies, first_number })?;
        info!("worker {pid} is ready");
        Ok(child)
    }

    fn wait_until_ready(&self, mapped: Task) -> Result<(), Refusal> {
        self.shake_hands(&mapped).map_err(|problem| {
            self.kill();
            Refusal::new(format!("the worker cannot be started: {problem}"))
        })
    }

    fn shake_hands(&self, mapped: &Task) -> Result<(), String> {
        match self.next_report()? {
            Report::Separated {} => {}
            report => return Err(what_went_wrong(report)),
        }
        let namespace = std::fs::File::open(format!("/proc/{}/ns/user", self.pid))
            .map_err(|error| format!("its user namespace cannot be opened: {error}"))?;
        let _ = self.namespace.set(namespace.into());
        self.ids.write(self.pid).map_err(|error| format!("its ids cannot be mapped: {error}"))?;
        self.link.send(mapped, &[]).map_err(describe)?;
        match self.next_report()? {
            Report::Ready {} => Ok(()),
            report => Err(what_went_wrong(report)),
        }
    }

    fn next_report(&self) -> Result<Report, String> {
        let timeout = Timespec { tv_sec: START_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
        let mut polled = [PollFd::new(&self.link, PollFlags::IN)];
        let ready = rustix::io::retry_on_intr(|| poll(&mut polled, Some(&timeout)));
        if ready.map_err(describe)? == 0 {
            return Err(describe(Errno::TIMEDOUT));
        }
        match self.link.receive::<Report>().map_err(describe)? {
            Some((report, _)) => Ok(report),
            None => Err("it ended at its start".into()),
        }
    }

    /// Hears the worker's reports until it ends. Runs on a thread of its own.
    pub fn listen(self: &Arc<Self>, watcher: Arc<dyn Watcher>) -> Result<(), Refusal> {
        let child = self.clone();
        *self.hears.0.lock() = true;
        let spawned = std::thread::Builder::new().name("worker-link".into()).spawn(move || {
            let mut reset = false;
            let mut look_at = None;
            loop {
                if !child.look_when_due(&mut look_at) {
                    error!("worker {} broke the protocol and is ended", child.pid);
                    break;
                }
                let sound = match child.link.receive::<Report>() {
                    Ok(None) => break,
                    // It died before it read all; what it said before is still to be heard.
                    Err(Errno::CONNRESET) if !std::mem::replace(&mut reset, true) => continue,
                    Ok(Some((Report::Holds { door, key }, descriptors))) => {
                        child.keeping.keep(door, key, descriptors)
                    }
                    Ok(Some((Report::Look { now }, descriptors))) if descriptors.is_empty() => {
                        let at = Instant::now() + if now { Duration::ZERO } else { LOOK_AFTER };
                        look_at = Some(look_at.map_or(at, |due: Instant| due.min(at)));
                        true
                    }
                    Ok(Some((report, descriptors))) if descriptors.is_empty() => {
                        child.heard(report, &*watcher)
                    }
                    _ => false,
                };
                if !sound {
                    error!("worker {} broke the protocol and is ended", child.pid);
                    break;
                }
            }
            child.kill();
            *child.hears.0.lock() = false;
            child.hears.1.notify_all();
        });
        if spawned.is_err() {
            *self.hears.0.lock() = false;
        }
        spawned.map(drop).map_err(|error| Refusal::new(format!("the worker cannot be heard: {error}")))
    }

    /// Returns when the worker says something, and looks in between at what it told of channels if that is due. False if that makes no sense.
    fn look_when_due(&self, due: &mut Option<Instant>) -> bool {
        while let Some(at) = *due {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                *due = None;
                return self.keeping.look();
            }
            let timeout = rustix::time::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut polled = [rustix::event::PollFd::new(&self.link, rustix::event::PollFlags::IN)];
            if matches!(rustix::event::poll(&mut polled, Some(&timeout)), Ok(1..)) {
                return true;
            }
        }
        true
    }

    /// False for a report that makes no sense. Each one is an answer to a request or the end of a door, and there are so many
    /// of those: a worker cannot keep the keeper busy, nor fill its log.
    fn heard(&self, report: Report, watcher: &dyn Watcher) -> bool {
        match report {
            Report::Done { request, problem } => self.answer(request, Outcome::Done(problem)),
            Report::Statistics { request, statistics } => {
                self.answer(request, Outcome::Statistics(statistics))
            }
            Report::Ended { door, problem } => {
                let known = watcher.door_ended(self, door);
                self.keeping.end(door);
                match problem {
                    Some(problem) if known => warn!("door {door} ended: {}", said::presentable(&problem)),
                    _ if known => info!("door {door} ended"),
                    _ => {}
                }
                known
            }
            Report::LetsGo { door, key } => self.keeping.let_go(door, key),
            Report::Separated {} | Report::Ready {} | Report::Holds { .. } | Report::Look { .. } => false,
        }
    }

    fn answer(&self, request: u64, result: Outcome) -> bool {
        if let Some(asker) = self.waiting.lock().remove(&request) {
            // An asker that gave up has no more use for it.
            let _ = asker.try_send(result);
            return true;
        }
        // The asker may have given up just now; it never asked for what is yet to be numbered.
        request <= self.last_request.load(SeqCst)
    }

    /// Waits until the worker does nothing any more. Threads whose notices wait in the kernel, for what the next worker answers, may be left of it; they
    /// have no more open than a device (`doors/fuse/parted`), so the link ends without them.
    fn wait_over(&self, process: &mut std::process::Child) -> std::io::Result<Option<ExitStatus>> {
        let mut polled =
            [PollFd::new(&self.pidfd, PollFlags::IN), PollFd::new(&self.link, PollFlags::empty())];
        rustix::io::retry_on_intr(|| poll(&mut polled, None))?;
        if polled[0].revents().is_empty() {
            // One that only closed the link ends now, too.
            self.kill();
            rustix::io::retry_on_intr(|| poll(&mut polled[..1], Some(&LAST_STEPS)))?;
        }
        process.try_wait()
    }

    fn ended(self: &Arc<Self>, status: &std::io::Result<Option<ExitStatus>>, watcher: &dyn Watcher) {
        match status {
            Ok(None) => warn!("worker {} ended, but for a notice that waits in the kernel", self.pid),
            Ok(Some(status)) => warn!("worker {} ended: {status}", self.pid),
            Err(error) => error!("worker {} cannot be waited for: {error}", self.pid),
        }
        self.blame.store(blame_of(status), SeqCst);
        // What it sent before it died is heard first.
        self.hears.1.wait_while_for(&mut self.hears.0.lock(), |hears| *hears, LAST_WORDS_TIMEOUT);
        // Before another may serve the same files.
        self.keeping.recover(self.pid);
        self.alive.store(false, SeqCst);
        self.waiting.lock().clear();
        watcher.worker_ended(self);
    }

    /// Looks at the mounts on which files lie that may be passed through.
    pub fn may_pass<T>(&self, ask: impl FnOnce(&mut Mounts) -> T) -> T {
        ask(&mut self.mounts.lock())
    }

    /// Has the worker serve a stack at `devices`; with `passing`, its way to have files passed through.
    pub fn serve(
        &self,
        what: &Served<'_>,
        (document, document_bytes): (&OwnedFd, usize),
        windows: &WindowPlace,
        passing: Option<&OwnedFd>,
        devices: &[OwnedFd],
        roots: &[OwnedFd],
    ) -> Result<(), Refusal> {
        let cannot = |errno| Refusal::of(errno, "the memory of held writes cannot be shared");
        let held =
            what.held.try_clone().map_err(|e| cannot(Errno::from_io_error(&e).unwrap_or(Errno::MFILE)))?;
        let (ours, theirs) = custody::pair()
            .map_err(|errno| Refusal::of(errno, "a way to know of programs' channels cannot be made"))?;
        self.keeping.begin(what.door, held, ours);
        let (request, answer) = self.expect();
        let (cache_bytes, passthrough) = (windows.cache_bytes, passing.is_some());
        let roots_count = roots.len();
        let task = Task::Serve {
            request,
            door: what.door,
            document_bytes,
            roots: roots_count,
            cache_bytes,
            passthrough,
            channel_writes: windows.channel_writes,
            incarnation: what.incarnation,
            blame: what.blame,
        };
        let sent = {
            let _together = self.sending.lock();
            let mut first = vec![document.as_fd(), windows.own.as_fd(), windows.shown.as_fd()];
            first.extend([what.state.as_fd(), what.held.as_fd(), theirs.as_fd()]);
            first.extend(passing.map(AsFd::as_fd));
            first.extend(devices.iter().map(AsFd::as_fd));
            self.send(&task, &first).and_then(|()| {
                roots.chunks(PACKET_DESCRIPTORS_MAX).try_for_each(|chunk| {
                    let chunk: Vec<_> = chunk.iter().map(AsFd::as_fd).collect();
                    self.send(&Task::Roots {}, &chunk)
                })
            })
        };
        match self.await_answer(request, sent, &answer)? {
            Outcome::Done(None) => Ok(()),
            Outcome::Done(Some(problem)) => {
                self.keeping.end(what.door);
                Err(Refusal::new(said::presentable(&problem)))
            }
            Outcome::Statistics(_) => Err(Refusal::new("the worker answered something else")),
        }
    }

    /// Has the worker open a channel for a program. `descriptors`: its socket, the process, its mount table.
    pub fn connect(
        &self,
        door: u64,
        newcomer: Newcomer,
        descriptors: [BorrowedFd<'_>; 3],
        covered: &[u8],
    ) -> Result<(), Refusal> {
        let cannot = |errno| Refusal::of(errno, "what a program sees mounted cannot be told");
        let covered = super::mounts::sealed_copy(covered).map_err(cannot)?;
        let (request, answer) = self.expect();
        let [socket, process, table] = descriptors;
        let sent = {
            let _together = self.sending.lock();
            let task = Task::Connect { request, door, newcomer };
            self.send(&task, &[socket, process, table, covered.as_fd()])
        };
        match self.await_answer(request, sent, &answer)? {
            Outcome::Done(None) => Ok(()),
            Outcome::Done(Some(problem)) => Err(Refusal::new(said::presentable(&problem))),
            Outcome::Statistics(_) => Err(Refusal::new("the worker answered something else")),
        }
    }

    pub fn statistics(&self, door: Option<u64>) -> Result<serde_json::Value, Refusal> {
        let (request, answer) = self.expect();
        let sent = {
            let _together = self.sending.lock();
            self.send(&Task::Statistics { request, door }, &[])
        };
        match self.await_answer(request, sent, &answer)? {
            Outcome::Statistics(statistics) => Ok(statistics),
            Outcome::Done(problem) => Err(Refusal::new(said::presentable(&problem.unwrap_or_default()))),
        }
    }

    fn expect(&self) -> (u64, Receiver<Outcome>) {
        let request = self.last_request.fetch_add(1, SeqCst) + 1;
        let (sender, receiver) = sync_channel(1);
        self.waiting.lock().insert(request, sender);
        (request, receiver)
    }

    fn send(&self, task: &Task, descriptors: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
        if !self.is_alive() {
            return Err(Errno::PIPE);
        }
        self.link.send(task, descriptors)
    }

    fn await_answer(
        &self,
        request: u64,
        sent: rustix::io::Result<()>,
        answer: &Receiver<Outcome>,
    ) -> Result<Outcome, Refusal> {
        let got = sent.and_then(|()| match answer.recv_timeout(ANSWER_TIMEOUT) {
            Ok(result) => Ok(result),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => Err(Errno::TIMEDOUT),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => Err(Errno::PIPE),
        });
        self.waiting.lock().remove(&request);
        got.map_err(|errno| match errno {
            Errno::PIPE | Errno::CONNRESET => {
                Refusal::with_errno(errno, "the worker ended; the next mount starts a new one")
            }
            errno => Refusal::of(errno, "the worker does not answer"),
        })
    }

    pub fn ids(&self) -> Ids {
        self.ids
    }

    /// A place for the windows of one door.
    pub fn window_place(
        &self,
        door: u64,
        cache_bytes: u64,
        channel_writes: bool,
    ) -> Result<WindowPlace, Refusal> {
        let cannot = |errno| Refusal::of(errno, "memory for cached bytes cannot be mounted");
        if self.windows.get().is_none() {
            let _ = self.windows.set(WindowStore::make(self.ids).map_err(cannot)?);
        }
        let store = self.windows.get().ok_or(Errno::AGAIN).map_err(cannot)?;
        let place = store.place(door, cache_bytes).map_err(cannot)?;
        Ok(WindowPlace { channel_writes, ..place })
    }

    pub fn namespace(&self) -> Option<&OwnedFd> {
        self.namespace.get()
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn blame(&self) -> u64 {
        self.blame.load(SeqCst)
    }

    pub fn is_alive(&self) -> bool {
        self.alive.load(SeqCst)
    }

    /// Ends the worker. Its FUSE connections are aborted by the kernel when its descriptors close.
    pub fn kill(&self) {
        // One that has ended already needs no killing.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
    }
}

/// One that ended in order, by a signal which others send, or of whose end nothing is known, hardly died of a request.
fn blame_of(status: &std::io::Result<Option<ExitStatus>>) -> u64 {
    const FAULTS: [i32; 7] =
        [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGABRT, libc::SIGFPE, libc::SIGSYS, libc::SIGTRAP];
    let Ok(Some(status)) = status else { return BLAME_OF_KILL };
    match (status.signal(), status.code()) {
        (Some(signal), _) if FAULTS.contains(&signal) => BLAME_OF_FAULT,
        (None, Some(code)) if code != 0 => BLAME_OF_FAULT,
        _ => BLAME_OF_KILL,
    }
}

fn what_went_wrong(report: Report) -> String {
    match report {
        Report::Done { problem: Some(problem), .. } => problem,
        _ => "it said something unexpected".into(),
    }
}

/// Starts the program anew as a worker, the first process of a new PID namespace. The calling thread can start
/// no other processes in its own afterwards.
fn spawn(socket: OwnedFd, transport: Transport) -> std::io::Result<(std::process::Child, OwnedFd)> {
    // SAFETY: only what this thread starts is concerned; no descriptors are parted.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWPID)? };
    let child = Command::new("/proc/self/exe")
        .arg0("polytropo-service")
        .args(["worker", "--fuse-transport", transport.name()])
        .env_clear()
        .envs(std::env::vars().filter(|(name, _)| name == "POLYTROPO_LOG" || name.starts_with("RUST_")))
        .current_dir("/")
        .stdin(Stdio::from(socket))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = rustix::process::Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    Ok((child, pidfd))
}

#[cfg(test)]
mod tests;
