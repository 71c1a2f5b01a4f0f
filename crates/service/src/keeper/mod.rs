//! The keeper: takes orders, opens what a stack names, mounts, and watches the worker. It never touches data.

pub mod channels;
mod child;
mod keeping;
mod mounting;
mod mounts;
mod orders;
mod passing;
mod recovery;
pub mod rootless;
mod roots;
mod said;
mod table;
mod windows;

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{error, info, warn};
use rustix::event::{PollFd, PollFlags};

use crate::control::{Orders, Refusal, Server};
use orders::Keeper;

/// How a keeper is started.
pub struct Config {
    pub run_dir: PathBuf,
    pub uid_base: u32,
    pub uid_count: u32,
    pub idle_timeout: Duration,
    /// Told one line when the keeper is ready.
    pub ready: Option<OwnedFd>,
    pub tenant: Option<String>,
    /// Runs as an ordinary user, in namespaces of its own.
    pub rootless: bool,
    /// How much memory windows may take.
    pub cache_bytes: u64,
    /// Programs may write through channels; the kernel then holds back no writes and asks for each open.
    pub channel_writes: bool,
    pub fuse_transport: crate::doors::fuse::Transport,
    pub copy_engine: crate::copies::Choice,
    /// Where plans for copies lie.
    pub tuning_dir: Option<PathBuf>,
    /// How many workers a minute take over at once from one that died; later ones wait. With 0 its mounts are dead.
    pub restarts: usize,
    /// Opened `/dev/fuse`s for the first mounts.
    pub devices: Vec<OwnedFd>,
}

/// Bound on how often the kernel's mount table is read.
const TABLE_PAUSE: Duration = Duration::from_millis(100);
/// The idle clock is looked at this often at least.
const TICK: Duration = Duration::from_secs(5);

/// Runs until it is stopped or idle for long enough.
pub fn run(mut config: Config) -> Result<(), Refusal> {
    let failed = |what: &str, error: std::io::Error| Refusal::new(format!("{what}: {error}"));
    if config.rootless {
        rootless::enter()?;
    }
    // A stack of many layers is many descriptors for a moment.
    if let Err(errno) = crate::isolation::limits::raise_descriptors() {
        warn!("the limit of descriptors stays: {errno}");
    }
    let signals = block_signals().map_err(|e| failed("signals cannot be received", e))?;
    let server = Server::listen(&config.run_dir)?;
    let gate = channels::Gate::listen(&config.run_dir)?;
    let pid_file = config.run_dir.join("keeper.pid");
    std::fs::write(&pid_file, format!("{}\n", std::process::id()))
        .map_err(|e| failed("keeper.pid cannot be written", e))?;
    let table = mounting::watch_table().map_err(|e| failed("the mount table cannot be watched", e))?;
    let idle_timeout = config.idle_timeout;
    let ready = config.ready.take();
    let keeper = Keeper::start(config)?;
    info!("ready, version {}", env!("CARGO_PKG_VERSION"));
    if let Some(ready) = ready
        && let Err(errno) = rustix::io::write(ready, b"ready\n")
    {
        warn!("whoever started this keeper does not listen: {errno}");
    }
    let ended = serve(&keeper, (&server, &gate), signals, &table, idle_timeout);
    // From here on nobody reaches this keeper, and another one may start: the names go before the socket is closed, so
    // they are still ours.
    for name in [pid_file, keeper.run_dir().join("control.sock")] {
        if let Err(error) = std::fs::remove_file(&name) {
            warn!("{} cannot be removed: {error}", name.display());
        }
    }
    drop(server);
    keeper.end();
    ended
}

fn serve(
    keeper: &Arc<Keeper>,
    (server, gate): (&Server, &channels::Gate),
    signals: OwnedFd,
    table: &std::fs::File,
    idle_timeout: Duration,
) -> Result<(), Refusal> {
    let orders: Arc<dyn Orders> = keeper.clone();
    let mut table_read = Instant::now();
    let mut table_changed = false;
    loop {
        if keeper.is_stopped() {
            info!("stopped by an order");
            return Ok(());
        }
        if keeper.stop_if_idle(idle_timeout) {
            info!("idle for {} s", idle_timeout.as_secs());
            return Ok(());
        }
        let left = keeper.idle_time().map(|idle| idle_timeout.saturating_sub(idle));
        let mut wait = left.map_or(TICK, |left| left.clamp(Duration::from_millis(20), TICK));
        if table_changed {
            // Clients must not wait for that.
            wait = wait.min(TABLE_PAUSE.saturating_sub(table_read.elapsed()));
        }
        let timeout =
            rustix::time::Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        let mut polled = [
            PollFd::from_borrowed_fd(server.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(keeper.wake_fd(), PollFlags::IN),
            PollFd::new(&signals, PollFlags::IN),
            PollFd::from_borrowed_fd(table.as_fd(), PollFlags::PRI),
            PollFd::from_borrowed_fd(gate.as_fd(), PollFlags::IN),
        ];
        if let Err(errno) = rustix::event::poll(&mut polled, Some(&timeout))
            && errno != rustix::io::Errno::INTR
        {
            return Err(Refusal::of(errno, "the keeper cannot wait for events"));
        }
        let [clients, woken, signalled, changed, programs] = polled.map(|p| !p.revents().is_empty());
        if signalled {
            info!("ended by a signal");
            return Ok(());
        }
        if woken {
            keeper.clear_wake();
        }
        if clients {
            server.accept(&orders);
        }
        if programs {
            gate.accept(keeper);
        }
        table_changed |= changed;
        if table_changed && table_read.elapsed() >= TABLE_PAUSE {
            table_changed = false;
            table_read = Instant::now();
            keeper.look_at_mounts();
        }
    }
}

/// Has SIGTERM and SIGINT come through a descriptor, in every thread.
fn block_signals() -> std::io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: the set is initialised by sigemptyset before it is used, and lives as long as the calls.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        let failure = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        if failure != 0 {
            return Err(std::io::Error::from_raw_os_error(failure));
        }
        let descriptor = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if descriptor < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(descriptor))
    }
}

/// Logs why a keeper could not run; the last line of the log is what persons are shown.
pub fn report_failure(refusal: &Refusal) {
    error!("{refusal}");
}
