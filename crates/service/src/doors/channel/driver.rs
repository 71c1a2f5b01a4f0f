//! The thread that looks for requests in all channels of a door, and ends those whose programs are gone.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use polytropo_wire::VERSION;
use polytropo_wire::channel::TOTAL_BYTES;
use polytropo_wire::epochs;
use polytropo_wire::hello::{Verdict, Welcome};
use polytropo_wire::message::{REPLY_WORDS, outcome};
use rustc_hash::{FxHashMap, FxHashSet};
use rustix::event::{EventfdFlags, epoll};
use rustix::io::Errno;
use serde::Serialize;

use super::Shared;
use super::client::{Client, Peer};
use super::memory::{ChannelMemory, Request};
use super::operations::{Desk, Work};
use super::placement::{Placement, current_cpu, leave};
use super::walk::{Failure, Last, walk};
use crate::doors::spin::Spin;
use crate::epochs::Table;

/// Channels of one door.
const CLIENTS_MAX: usize = 4096;
/// Requests taken from one channel before the others have their turn.
const BURST_MAX: usize = 16;
/// How long the thread looks out for a request before it sleeps, if a program runs on another CPU.
const LOOK_MAX: Duration = Duration::from_micros(20);
/// Rounds between looks at who hung up, under load.
const ROUNDS_PER_LOOK: u32 = 4096;

/// What the descriptors of a client are, in the low bits of an event's number.
const BELL: u64 = 0;
const SOCKET: u64 = 1;
const PROCESS: u64 = 2;
const MOUNTS: u64 = 3;
/// The door's own bell has no client.
const WAKE: u64 = 0;

/// What a door's channels did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ChannelStatistics {
    pub channels: u64,
    pub channels_opened: u64,
    pub requests: u64,
    /// Answered "ask the kernel".
    pub to_kernel: u64,
    pub errors: u64,
    pub sleeps: u64,
    /// To another CPU than the programs'.
    pub moves: u64,
}

#[derive(Default)]
struct Counters {
    channels: AtomicU64,
    channels_opened: AtomicU64,
    requests: AtomicU64,
    to_kernel: AtomicU64,
    errors: AtomicU64,
    sleeps: AtomicU64,
    moves: AtomicU64,
}

/// Where programs wait to be served, and the way to wake the thread.
struct Waiting {
    arrivals: Mutex<Vec<Peer>>,
    wake: OwnedFd,
    stop: AtomicBool,
    counters: Counters,
}

pub struct Driver {
    waiting: Arc<Waiting>,
    thread: Option<JoinHandle<()>>,
}

impl Driver {
    pub fn start(shared: Arc<Shared>) -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let waiting = Arc::new(Waiting {
            arrivals: Mutex::default(),
            wake,
            stop: AtomicBool::new(false),
            counters: Counters::default(),
        });
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(WAKE);
        epoll::add(&epoll, &waiting.wake, data, epoll::EventFlags::IN)?;
        let name = format!("channels{}", shared.id.0);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let thread = Thread {
            spin: Spin::new(cpus, LOOK_MAX),
            placement: Placement::new(),
            cpu: 0,
            shared,
            waiting: waiting.clone(),
            epoll,
            clients: FxHashMap::default(),
            active: Vec::new(),
            last_key: 0,
            desk: Desk::default(),
            panicked: false,
        };
        let thread = std::thread::Builder::new().name(name).spawn(move || thread.run())?;
        Ok(Self { waiting, thread: Some(thread) })
    }

    pub fn connect(&self, peer: Peer) {
        self.waiting.arrivals.lock().push(peer);
        ring(self.waiting.wake.as_fd());
    }

    pub fn statistics(&self) -> ChannelStatistics {
        let counters = &self.waiting.counters;
        ChannelStatistics {
            channels: counters.channels.load(Relaxed),
            channels_opened: counters.channels_opened.load(Relaxed),
            requests: counters.requests.load(Relaxed),
            to_kernel: counters.to_kernel.load(Relaxed),
            errors: counters.errors.load(Relaxed),
            sleeps: counters.sleeps.load(Relaxed),
            moves: counters.moves.load(Relaxed),
        }
    }

    pub fn stop(&mut self) {
        self.waiting.stop.store(true, SeqCst);
        ring(self.waiting.wake.as_fd());
        if let Some(thread) = self.thread.take() {
            // A panic was logged by the panic hook already.
            let _ = thread.join();
        }
    }
}

/// Tells why there is no channel.
pub fn refuse(socket: BorrowedFd<'_>, verdict: Verdict) {
    let bytes = Welcome::refusal(verdict).to_bytes();
    let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
    // Who is gone, or does not listen, misses nothing.
    let _ = rustix::net::send(socket, &bytes, flags);
}

struct Thread {
    shared: Arc<Shared>,
    waiting: Arc<Waiting>,
    epoll: OwnedFd,
    clients: FxHashMap<u64, Arc<Client>>,
    /// Those who are looked at without being rung for.
    active: Vec<(u64, Arc<Client>)>,
    last_key: u64,
    desk: Desk,
    spin: Spin,
    placement: Placement,
    /// The CPU, plus one, that programs were told last.
    cpu: u32,
    panicked: bool,
}

impl Thread {
    fn run(mut self) {
        let mut rounds: u32 = 0;
        while !self.waiting.stop.load(Relaxed) {
            rounds = rounds.wrapping_add(1);
            if rounds % ROUNDS_PER_LOOK == 0 {
                self.wait(false);
            }
            if self.serve_active() {
                continue;
            }
            if self.may_spin() && self.look_out() {
                continue;
            }
            if self.fall_asleep() {
                self.waiting.counters.sleeps.fetch_add(1, Relaxed);
                self.wait(true);
            }
        }
    }

    /// Whether something is asked within a short time.
    fn look_out(&mut self) -> bool {
        let mut found = false;
        let (active, stop) = (&self.active, &self.waiting.stop);
        self.spin.look_out(|| {
            std::hint::spin_loop();
            found = active.iter().any(|(_, client)| client.memory.has_next()) || stop.load(Relaxed);
            found
        });
        found
    }

    /// Does what is asked in the active channels; false if nothing was.
    fn serve_active(&mut self) -> bool {
        let mut any = false;
        let mut at = 0;
        while let Some((key, client)) = self.active.get(at).cloned() {
            match self.serve(&client) {
                Ok(served) => {
                    any |= served;
                    at += 1;
                }
                Err(why) => {
                    log::info!("channel of process {} is ended: {why}", client.peer.caller.pid);
                    self.end(key);
                }
            }
        }
        any
    }

    fn serve(&mut self, client: &Arc<Client>) -> Result<bool, polytropo_queue::Error> {
        for served in 0..BURST_MAX {
            match client.memory.next()? {
                Some(request) => {
                    self.keep_apart(client);
                    self.answer(client, request);
                }
                None => return Ok(served > 0),
            }
        }
        Ok(true)
    }

    /// Leaves the program's CPU if both stay on one.
    fn keep_apart(&mut self, client: &Client) {
        let (mut own, theirs) = (current_cpu(), client.memory.client_cpu());
        if self.placement.should_move(own, theirs) && leave(own) {
            self.waiting.counters.moves.fetch_add(1, Relaxed);
            own = current_cpu();
        }
        if own != self.cpu {
            self.cpu = own;
            self.active.iter().for_each(|(_, client)| client.memory.publish_cpu(own));
        }
    }

    fn answer(&mut self, client: &Client, request: Request) {
        let counters = &self.waiting.counters;
        counters.requests.fetch_add(1, Relaxed);
        let reply = [0; REPLY_WORDS];
        let mut work = Work { door: &self.shared, client, desk: &mut self.desk, request, reply, notes: None };
        let done = catch_unwind(AssertUnwindSafe(|| work.run()));
        let reply = work.reply;
        let code = match done {
            Ok(Ok(())) => 0,
            Ok(Err(Failure::Kernel)) => {
                counters.to_kernel.fetch_add(1, Relaxed);
                outcome::KERNEL
            }
            Ok(Err(Failure::Error(error))) => {
                counters.errors.fetch_add(1, Relaxed);
                log::trace!("{:?}: {error}", request.operation);
                error.errno().raw_os_error() as u32
            }
            Err(_) => {
                if !std::mem::replace(&mut self.panicked, true) {
                    let (door, what) = (self.shared.id.0, request.operation);
                    log::error!(
                        "channel door {door}: a layer of the stack panicked in {what:?}; the program got EIO"
                    );
                }
                Errno::IO.raw_os_error() as u32
            }
        };
        client.memory.answer(request.slot, code, &reply);
    }

    /// Whether a program that may ask soon runs on another CPU.
    fn may_spin(&self) -> bool {
        let own = current_cpu();
        self.active.iter().any(|(_, client)| {
            let theirs = client.memory.client_cpu();
            theirs != 0 && theirs != own
        })
    }

    /// Says in each channel that the bell must be rung. False if something came in meanwhile.
    fn fall_asleep(&mut self) -> bool {
        for (_, client) in &self.active {
            client.memory.publish_cpu(0);
            client.memory.fence();
        }
        if self.active.iter().any(|(_, client)| client.memory.has_next()) {
            let own = current_cpu();
            self.active.iter().for_each(|(_, client)| client.memory.publish_cpu(own));
            return false;
        }
        self.active.clear();
        true
    }

    /// Takes in what happened; sleeps until something does.
    fn wait(&mut self, sleep: bool) {
        let mut space = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
        let none = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = if sleep { None } else { Some(&none) };
        let happened = match epoll::wait(&self.epoll, &mut space, timeout) {
            Ok((events, _)) => events.iter().map(|event| event.data.u64()).collect::<Vec<_>>(),
            Err(Errno::INTR) => return,
            Err(errno) => {
                log::error!("channel door {}: cannot wait: {errno}", self.shared.id.0);
                return;
            }
        };
        for number in happened {
            match (number >> 2, number & 3) {
                (0, _) => {
                    silence(self.waiting.wake.as_fd());
                    self.welcome_arrivals();
                }
                (key, BELL) => self.rung(key),
                (key, _) => self.end(key),
            }
        }
    }

    fn rung(&mut self, key: u64) {
        let Some(client) = self.clients.get(&key) else { return };
        silence(client.bell.as_fd());
        client.memory.publish_cpu(current_cpu());
        if !self.active.iter().any(|(other, _)| *other == key) {
            self.active.push((key, client.clone()));
        }
    }

    /// The program is gone, or is not to be served any more.
    fn end(&mut self, key: u64) {
        self.active.retain(|(other, _)| *other != key);
        let Some(client) = self.clients.remove(&key) else { return };
        self.waiting.counters.channels.fetch_sub(1, Relaxed);
        for descriptor in [
            client.bell.as_fd(),
            client.peer.socket.as_fd(),
            client.peer.process.as_fd(),
            client.peer.mounts.as_fd(),
        ] {
            // Would else be told of as long as the program keeps its own descriptor.
            if let Err(errno) = epoll::delete(&self.epoll, descriptor) {
                log::debug!("descriptor {} was not waited for: {errno}", descriptor.as_raw_fd());
            }
        }
        client.memory.end();
    }

    fn welcome_arrivals(&mut self) {
        let arrivals = std::mem::take(&mut *self.waiting.arrivals.lock());
        for peer in arrivals {
            if self.clients.len() >= CLIENTS_MAX {
                refuse(peer.socket.as_fd(), Verdict::TooMany);
                continue;
            }
            let pid = peer.caller.pid;
            let Some(shown) = &self.shared.shown else {
                refuse(peer.socket.as_fd(), Verdict::Failed);
                continue;
            };
            match open_channel(&self.shared, shown, &self.epoll, self.last_key + 1, peer) {
                Ok(client) => {
                    self.last_key += 1;
                    self.clients.insert(self.last_key, Arc::new(client));
                    self.waiting.counters.channels.fetch_add(1, Relaxed);
                    self.waiting.counters.channels_opened.fetch_add(1, Relaxed);
                }
                Err(errno) => log::warn!("a channel for process {pid} cannot be opened: {errno}"),
            }
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        let keys: Vec<_> = self.clients.keys().copied().collect();
        keys.into_iter().for_each(|key| self.end(key));
    }
}

/// Makes a channel and tells the program.
fn open_channel(
    shared: &Arc<Shared>,
    shown: &OwnedFd,
    epoll: &OwnedFd,
    key: u64,
    peer: Peer,
) -> rustix::io::Result<Client> {
    let made = ChannelMemory::new().and_then(|memory| {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok((memory, bell))
    });
    let (memory, bell) = made.inspect_err(|_| refuse(peer.socket.as_fd(), Verdict::Failed))?;
    let covered = covered_nodes(shared, &peer);
    let client = Client::new(memory, bell, peer, shared.clone(), covered);
    let entered = watch(epoll, key, &client).and_then(|()| greet(&client, shown));
    if let Err(errno) = entered {
        refuse(client.peer.socket.as_fd(), Verdict::Failed);
        for descriptor in [
            client.bell.as_fd(),
            client.peer.socket.as_fd(),
            client.peer.process.as_fd(),
            client.peer.mounts.as_fd(),
        ] {
            // Those that were not added yet are not there.
            let _ = epoll::delete(epoll, descriptor);
        }
        return Err(errno);
    }
    Ok(client)
}

fn watch(epoll: &OwnedFd, key: u64, client: &Client) -> rustix::io::Result<()> {
    use epoll::EventFlags;
    let add = |descriptor: BorrowedFd<'_>, kind: u64, flags: EventFlags| {
        epoll::add(epoll, descriptor, epoll::EventData::new_u64(key << 2 | kind), flags)
    };
    add(client.bell.as_fd(), BELL, EventFlags::IN)?;
    add(client.peer.socket.as_fd(), SOCKET, EventFlags::IN | EventFlags::RDHUP)?;
    add(client.peer.process.as_fd(), PROCESS, EventFlags::IN)?;
    add(client.peer.mounts.as_fd(), MOUNTS, EventFlags::PRI)
}

fn greet(client: &Client, shown: &OwnedFd) -> rustix::io::Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let welcome = Welcome {
        version: VERSION,
        verdict: Verdict::Welcome as u32,
        channel_bytes: TOTAL_BYTES as u64,
        device: client.peer.device,
        mount_id: client.peer.mount_id,
        epochs_bytes: client.door.epochs.table().map_or(0, |_| epochs::TOTAL_BYTES as u64),
    };
    let epochs = client.door.epochs.table().map(Table::descriptor);
    // Without a table the number of bytes says so, and some descriptor holds the place.
    let descriptors =
        [client.memory.descriptor(), client.bell.as_fd(), shown.as_fd(), epochs.unwrap_or(shown.as_fd())];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::MSGSIZE);
    }
    let bytes = welcome.to_bytes();
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(&client.peer.socket, &[io::IoSlice::new(&bytes)], &mut control, flags).map(drop)
}

/// Nodes on which the process has something else mounted, each looked up once.
fn covered_nodes(shared: &Arc<Shared>, peer: &Peer) -> FxHashSet<polytropo_libservices::NodeId> {
    let caller =
        polytropo_libservices::Caller { door: shared.id, ..polytropo_libservices::Caller::service() };
    let nothing = FxHashSet::default();
    let ground = super::walk::Ground {
        notes: None,
        stack: &*shared.stack,
        caller: &caller,
        covered: &nothing,
        is_root: peer.is_root,
        kept: &shared.kept,
    };
    let mut found = FxHashSet::default();
    for path in &peer.covered {
        let root = shared.stack.getattr(&caller, polytropo_libservices::NodeId::ROOT, None);
        let Ok(root) = root else { continue };
        let start = (polytropo_libservices::NodeId::ROOT, root);
        // What is not there is not met either.
        let Ok(mut target) = walk(&ground, start, path, Last { follow: false }) else { continue };
        if let Some(held) = target.found.take() {
            let (node, _) = held.into_node();
            if !found.insert(node) {
                shared.stack.forget(node, 1);
            }
        }
    }
    found
}

fn ring(bell: BorrowedFd<'_>) {
    // EAGAIN: it rings already.
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

fn silence(bell: BorrowedFd<'_>) {
    // EAGAIN: it did not ring.
    let _ = rustix::io::read(bell, &mut [0; 8]);
}
