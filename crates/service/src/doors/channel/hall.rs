//! What the threads of a door have in common: its programs, which of them are looked at, and who of the threads does what.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use polytropo_wire::channel::{SLOTS, TOLD};
use rustc_hash::FxHashMap;
use rustix::event::{EventfdFlags, epoll};
use serde::Serialize;

use super::Shared;
use super::client::{Client, Peer};
use super::driver::{WAKE, ring};
use super::memory::{ChannelMemory, Request};
use super::placement::current_cpu;
use crate::doors::crew::Crew;

/// Threads of one door: one looks for requests, the others stand by or are at something that takes long.
pub const THREADS_MAX: usize = 8;
/// How often a thread that stands by looks whether the one that looks for requests is stuck.
const WATCH_INTERVAL: Duration = Duration::from_millis(5);

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
    /// Requests that took a thread for themselves.
    pub slow: u64,
    pub threads: u64,
    /// What became of programs' calls, as they say.
    pub calls: BTreeMap<&'static str, u64>,
}

impl ChannelStatistics {
    /// Adds what another door did.
    pub fn add(&mut self, other: &Self) {
        let Self {
            channels,
            channels_opened,
            requests,
            to_kernel,
            errors,
            sleeps,
            moves,
            slow,
            threads,
            calls,
        } = other;
        self.channels += channels;
        self.channels_opened += channels_opened;
        self.requests += requests;
        self.to_kernel += to_kernel;
        self.errors += errors;
        self.sleeps += sleeps;
        self.moves += moves;
        self.slow += slow;
        self.threads += threads;
        for (&name, &count) in calls {
            let sum = self.calls.entry(name).or_default();
            *sum = sum.saturating_add(count);
        }
    }
}

#[derive(Default)]
pub struct Counters {
    pub channels: AtomicU64,
    pub channels_opened: AtomicU64,
    pub requests: AtomicU64,
    pub to_kernel: AtomicU64,
    pub errors: AtomicU64,
    pub sleeps: AtomicU64,
    pub moves: AtomicU64,
    pub slow: AtomicU64,
    /// What programs told that are gone.
    told: Mutex<[u64; TOLD.len()]>,
}

pub type Active = Arc<Vec<(u64, Arc<Client>)>>;
type Later = (Arc<Client>, Request);

pub struct Hall {
    pub shared: Arc<Shared>,
    pub epoll: OwnedFd,
    /// Programs that wait to be served.
    pub arrivals: Mutex<Vec<Peer>>,
    pub wake: OwnedFd,
    pub stop: AtomicBool,
    pub counters: Counters,
    pub crew: Crew,
    pub clients: Mutex<FxHashMap<u64, Arc<Client>>>,
    pub last_key: AtomicU64,
    panicked: AtomicBool,
    /// Those who are looked at without being rung for; the number counts changes.
    active: Mutex<Active>,
    changes: AtomicU64,
    /// What takes long and found no thread that could go without.
    later: Mutex<VecDeque<Later>>,
    any_later: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
    started: AtomicUsize,
    /// Memory for the next program, made while nobody waits for it.
    ready: Mutex<Option<ChannelMemory>>,
}

fn add_told(sums: &mut [u64; TOLD.len()], client: &Client) {
    for (sum, count) in sums.iter_mut().zip(client.memory.told()) {
        *sum = sum.saturating_add(count);
    }
}

impl Hall {
    pub fn new(shared: Arc<Shared>) -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        Ok(Self {
            shared,
            epoll,
            wake,
            arrivals: Mutex::default(),
            stop: AtomicBool::new(false),
            counters: Counters::default(),
            crew: Crew::new(THREADS_MAX, WATCH_INTERVAL),
            clients: Mutex::default(),
            last_key: AtomicU64::new(0),
            panicked: AtomicBool::new(false),
            active: Mutex::default(),
            changes: AtomicU64::new(0),
            later: Mutex::default(),
            any_later: AtomicBool::new(false),
            threads: Mutex::default(),
            started: AtomicUsize::new(0),
            ready: Mutex::default(),
        })
    }

    /// The first time. `outcome`: what became of it.
    pub fn tell_of_panic(&self, request: &Request, outcome: &str) {
        if !self.panicked.swap(true, Relaxed) {
            let (door, what) = (self.shared.id.0, request.operation);
            log::error!("channel door {door}: a layer of the stack panicked in {what:?}{outcome}");
        }
    }

    /// Memory for a program that has come.
    pub fn take_memory(&self) -> rustix::io::Result<ChannelMemory> {
        let ready = self.ready.lock().take();
        ready.map_or_else(|| ChannelMemory::new(self.shared.windows.tally().clone()), Ok)
    }

    /// Makes memory for the next one, at a door to which programs come.
    pub fn keep_memory_ready(&self) {
        if self.counters.channels_opened.load(Relaxed) == 0 || self.ready.lock().is_some() {
            return;
        }
        match ChannelMemory::new(self.shared.windows.tally().clone()) {
            Ok(memory) => *self.ready.lock() = Some(memory),
            // The next one that comes is told.
            Err(errno) => log::debug!("no memory for a channel is made ready: {errno}"),
        }
    }

    pub fn statistics(&self) -> ChannelStatistics {
        let counters = &self.counters;
        ChannelStatistics {
            channels: counters.channels.load(Relaxed),
            channels_opened: counters.channels_opened.load(Relaxed),
            requests: counters.requests.load(Relaxed),
            to_kernel: counters.to_kernel.load(Relaxed),
            errors: counters.errors.load(Relaxed),
            sleeps: counters.sleeps.load(Relaxed),
            moves: counters.moves.load(Relaxed),
            slow: counters.slow.load(Relaxed),
            threads: self.started.load(Relaxed) as u64,
            calls: self.calls(),
        }
    }

    fn calls(&self) -> BTreeMap<&'static str, u64> {
        let mut sums = *self.counters.told.lock();
        self.clients.lock().values().for_each(|client| add_told(&mut sums, client));
        TOLD.into_iter().zip(sums).filter(|(_, count)| *count > 0).collect()
    }

    /// Starts one more thread by `start`, which is told its number. False if there are enough.
    pub fn start_thread(&self, start: impl FnOnce(usize) -> io::Result<JoinHandle<()>>) -> io::Result<bool> {
        let mut threads = self.threads.lock();
        if threads.len() >= THREADS_MAX || self.stop.load(SeqCst) {
            return Ok(false);
        }
        let thread = start(threads.len())?;
        threads.push(thread);
        self.started.store(threads.len(), Relaxed);
        Ok(true)
    }

    /// Ends all threads, and then all channels.
    pub fn end(&self) {
        self.stop.store(true, SeqCst);
        self.crew.end();
        ring(self.wake.as_fd());
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            // A panic was logged by the panic hook already.
            let _ = thread.join();
        }
        self.end_all_channels();
    }

    pub fn end_all_channels(&self) {
        let keys: Vec<_> = self.clients.lock().keys().copied().collect();
        keys.into_iter().for_each(|key| self.end_channel(key));
    }

    /// The program is gone, or is not to be served any more.
    pub fn end_channel(&self, key: u64) {
        self.drop_active(|other| other == key);
        let Some(client) = self.clients.lock().remove(&key) else { return };
        self.counters.channels.fetch_sub(1, Relaxed);
        for descriptor in client.descriptors() {
            // Would else be told of as long as the program keeps its own descriptor.
            if let Err(errno) = epoll::delete(&self.epoll, descriptor) {
                log::debug!("descriptor {} was not waited for: {errno}", descriptor.as_raw_fd());
            }
        }
        client.stop_posting();
        client.memory.end();
        add_told(&mut self.counters.told.lock(), &client);
    }

    /// Whom to look at, if that changed since the change `known`.
    pub fn active(&self, known: &mut Option<u64>) -> Option<Active> {
        if *known == Some(self.changes.load(SeqCst)) {
            return None;
        }
        let active = self.active.lock();
        *known = Some(self.changes.load(SeqCst));
        Some(active.clone())
    }

    /// From now on the client is looked at without being rung for.
    pub fn activate(&self, key: u64, client: &Arc<Client>) {
        let mut active = self.active.lock();
        client.memory.publish_cpu(current_cpu());
        if active.iter().any(|(other, _)| *other == key) || !self.clients.lock().contains_key(&key) {
            return;
        }
        Arc::make_mut(&mut *active).push((key, client.clone()));
        self.changes.fetch_add(1, SeqCst);
        drop(active);
        // Another one that looks for requests may sleep, and know nothing of this client.
        if !self.crew.is_alone() {
            ring(self.wake.as_fd());
        }
    }

    /// Tells all whom somebody looks at on which CPU (plus one).
    pub fn publish_cpu(&self, cpu: u32) {
        // Under the lock: nobody is told so after he was told to ring.
        self.active.lock().iter().for_each(|(_, client)| client.memory.publish_cpu(cpu));
    }

    fn drop_active(&self, which: impl Fn(u64) -> bool) {
        let mut active = self.active.lock();
        if active.iter().any(|(key, _)| which(*key)) {
            Arc::make_mut(&mut *active).retain(|(key, _)| !which(*key));
            self.changes.fetch_add(1, SeqCst);
        }
    }

    /// Tells each program that the bell must be rung; those whom a thread is busy with are that thread's, which looks at them once more
    /// before it lets go. False if something came in meanwhile.
    pub fn fall_asleep(&self) -> bool {
        let mut active = self.active.lock();
        let mine = active.iter().filter(|(_, client)| !client.turn.leave_to_holder());
        let mine: Vec<_> = mine.map(|(_, client)| client.clone()).collect();
        for client in &mine {
            client.memory.publish_cpu(0);
            client.memory.fence();
        }
        let any = mine.iter().any(|client| client.wants_service());
        self.changes.fetch_add(1, SeqCst);
        if any {
            let own = current_cpu();
            mine.iter().for_each(|client| client.memory.publish_cpu(own));
            Arc::make_mut(&mut *active)
                .retain(|(_, client)| mine.iter().any(|other| Arc::ptr_eq(other, client)));
            return false;
        }
        *active = Arc::default();
        true
    }

    /// Whether the calling thread may take its time: another one looks for requests, or will.
    pub fn may_be_slow(&self) -> bool {
        !self.crew.is_alone() || self.started.load(Relaxed) < THREADS_MAX || self.crew.has_standby()
    }

    /// Keeps a request for a thread that has the time. False if the program has more under way than it has slots.
    pub fn put_off(&self, client: &Arc<Client>, request: Request) -> bool {
        let mut later = self.later.lock();
        if later.iter().filter(|(other, _)| Arc::ptr_eq(other, client)).count() >= SLOTS {
            return false;
        }
        later.push_back((client.clone(), request));
        self.any_later.store(true, SeqCst);
        true
    }

    pub fn has_put_off(&self) -> bool {
        self.any_later.load(SeqCst)
    }

    pub fn take_put_off(&self) -> Option<Later> {
        if !self.has_put_off() {
            return None;
        }
        let mut later = self.later.lock();
        let first = later.pop_front();
        self.any_later.store(!later.is_empty(), SeqCst);
        first
    }
}
