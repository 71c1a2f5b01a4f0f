//! The threads that look for requests in all channels of a door, and end those whose programs are gone.
//!
//! One looks, as long as it can cope. What may wait for a disk makes another one look meanwhile, and so does a request that turns out to
//! take long. A channel is served by one thread at a time, which keeps its requests in order.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{Ordering::Relaxed, Ordering::SeqCst};
use std::time::{Duration, Instant};

use polytropo_wire::hello::Verdict;
use polytropo_wire::message::{Operation, REPLY_WORDS, outcome};
use polytropo_wire::posts::LINGER_MS;
use rustix::event::epoll;
use rustix::io::Errno;

use super::Shared;
use super::answers::KEPT;
use super::arrivals::{self, BELL, refuse};
use super::client::{Client, Peer};
use super::hall::{Active, ChannelStatistics, Hall};
use super::memory::Request;
use super::operations::{Desk, Work};
use super::placement::{Placement, current_cpu, leave};
use super::walk::Failure;
use crate::doors::spin::Spin;

/// Channels of one door.
const CLIENTS_MAX: usize = 4096;
/// Requests taken from one channel before the others have their turn.
const BURST_MAX: usize = 16;
/// And so long at the most.
const BURST_TIME_MAX: Duration = Duration::from_micros(100);
/// How long the thread looks out for a request before it sleeps, if a program runs on another CPU.
const LOOK_MAX: Duration = Duration::from_micros(20);
/// Rounds between looks at who hung up, under load.
const ROUNDS_PER_LOOK: u32 = 4096;

/// The door's own bell has no client.
pub const WAKE: u64 = 0;

pub struct Driver {
    hall: Arc<Hall>,
}

impl Driver {
    pub fn start(shared: Arc<Shared>) -> io::Result<Self> {
        let hall = Arc::new(Hall::new(shared)?);
        start_thread(&hall, true)?;
        Ok(Self { hall })
    }

    pub fn connect(&self, peer: Peer) {
        self.hall.arrivals.lock().push(peer);
        ring(self.hall.wake.as_fd());
    }

    pub fn statistics(&self) -> ChannelStatistics {
        self.hall.statistics()
    }

    pub fn stop(&mut self) {
        self.hall.end();
    }
}

/// Starts one more thread, which `looks` for requests at once or stands by; false if there are enough.
fn start_thread(hall: &Arc<Hall>, looks: bool) -> io::Result<bool> {
    hall.start_thread(|number| {
        let name = format!("channels{}.{number}", hall.shared.id.0);
        let thread = Thread::new(hall.clone(), number);
        std::thread::Builder::new().name(name).spawn(move || thread.run(looks))
    })
}

/// One of the door's threads.
struct Thread {
    hall: Arc<Hall>,
    shared: Arc<Shared>,
    /// Which one of the crew.
    number: usize,
    /// Those who are looked at without being rung for, as of the change `known`.
    active: Active,
    known: Option<u64>,
    desk: Desk,
    spin: Spin,
    placement: Placement,
    /// The CPU, plus one, that programs were told last.
    cpu: u32,
    rounds: u32,
}

impl Thread {
    fn new(hall: Arc<Hall>, number: usize) -> Self {
        Self {
            shared: hall.shared.clone(),
            spin: Spin::new(hall.crew.cpus(), LOOK_MAX),
            hall,
            number,
            active: Arc::default(),
            known: None,
            desk: Desk::default(),
            placement: Placement::new(),
            cpu: 0,
            rounds: 0,
        }
    }

    fn run(mut self, mut looks: bool) {
        while looks || self.hall.crew.stand_by(self.number) {
            looks = false;
            self.keep_standby();
            if !self.look() {
                break;
            }
        }
        self.hall.crew.end();
        // Whoever else sleeps at the bell is to end too.
        ring(self.hall.wake.as_fd());
    }

    /// Somebody is always to stand by, who sees when this thread is stuck.
    fn keep_standby(&self) {
        if !self.hall.crew.has_standby() {
            self.start_another(false);
        }
    }

    fn start_another(&self, looks: bool) -> bool {
        start_thread(&self.hall, looks).unwrap_or_else(|error| {
            log::warn!("channel door {}: no further thread: {error}", self.shared.id.0);
            false
        })
    }

    /// Looks for requests until another thread does so, which stays: true; or until the end.
    fn look(&mut self) -> bool {
        loop {
            self.hall.crew.reads(self.number);
            if self.hall.stop.load(Relaxed) {
                return false;
            }
            self.rounds = self.rounds.wrapping_add(1);
            if self.rounds % ROUNDS_PER_LOOK == 0 {
                self.wait(false);
            }
            if self.serve_put_off() || self.serve_active() {
                continue;
            }
            let others = (!self.hall.crew.is_alone()).then(|| self.hall.crew.beats());
            if self.may_spin() && self.look_out() {
                continue;
            }
            if others.is_some_and(|before| self.hall.crew.other_lives(self.number, &before))
                && self.hall.crew.may_leave()
            {
                // The other one may sleep, and what it was rung for this thread may have taken in.
                ring(self.hall.wake.as_fd());
                return true;
            }
            if self.hall.fall_asleep() {
                self.hall.counters.sleeps.fetch_add(1, Relaxed);
                self.hall.keep_memory_ready();
                self.wait(true);
            }
        }
    }

    /// Whether something is asked within a short time.
    fn look_out(&mut self) -> bool {
        let mut found = false;
        let (active, stop) = (&self.active, &self.hall.stop);
        self.spin.look_out(|| {
            std::hint::spin_loop();
            found = active.iter().any(|(_, client)| client.wants_service()) || stop.load(Relaxed);
            found
        });
        found
    }

    /// Does what is asked in the active channels; false if nothing was.
    fn serve_active(&mut self) -> bool {
        if let Some(active) = self.hall.active(&mut self.known) {
            self.active = active;
        }
        let mut any = false;
        for (key, client) in self.active.clone().iter() {
            if !client.turn.take() {
                continue;
            }
            match self.serve(client) {
                Ok(Served::Nothing) => {}
                Ok(Served::Some) => any = true,
                Ok(Served::Slow(request)) => {
                    any = true;
                    self.let_go(*key, client);
                    self.answer_slow(client, request);
                    continue;
                }
                Err(why) => {
                    log::info!("channel of process {} is ended: {why}", client.peer.caller.pid);
                    self.hall.end_channel(*key);
                }
            }
            self.let_go(*key, client);
        }
        any
    }

    fn let_go(&self, key: u64, client: &Arc<Client>) {
        if client.turn.give_back() {
            self.hall.activate(key, client);
        }
    }

    /// Serves one channel for a while, in turn with the others.
    fn serve(&mut self, client: &Arc<Client>) -> Result<Served, polytropo_queue::Error> {
        let begun = (self.active.len() > 1).then(Instant::now);
        let posted = client.has_posts() && client.drain_and_settle();
        for served in 0..BURST_MAX {
            let Some(request) = client.memory.next()? else {
                return Ok(if served > 0 || posted { Served::Some } else { Served::Nothing });
            };
            self.keep_apart(client);
            match pace(client, &request) {
                Pace::Quick => self.answer(client, request),
                Pace::SlowInOrder => self.answer_slow(client, request),
                Pace::Slow if self.hall.may_be_slow() => return Ok(Served::Slow(request)),
                Pace::Slow if self.hall.put_off(client, request) => {}
                Pace::Slow => {
                    let nothing = [0; REPLY_WORDS];
                    client.memory.answer(request.slot, Errno::AGAIN.raw_os_error() as u32, &nothing);
                }
            }
            if begun.is_some_and(|begun| begun.elapsed() > BURST_TIME_MAX) {
                break;
            }
        }
        Ok(Served::Some)
    }

    /// Answers while another thread looks for requests, if there is one left.
    fn answer_slow(&mut self, client: &Arc<Client>, request: Request) {
        if !self.hall.may_be_slow() {
            return self.answer(client, request);
        }
        self.hall.counters.slow.fetch_add(1, Relaxed);
        if !self.hall.crew.begin_slow() {
            // Counted before it runs, so that nobody else is called for the same.
            self.hall.crew.joins();
            if !self.start_another(true) {
                self.hall.crew.leaves();
            }
        }
        self.answer(client, request);
        while let Some((client, request)) = self.hall.take_put_off() {
            self.answer(&client, request);
        }
        self.hall.crew.end_slow();
    }

    /// Does what was put off, if that is possible now.
    fn serve_put_off(&mut self) -> bool {
        if !self.hall.has_put_off() || !self.hall.may_be_slow() {
            return false;
        }
        let Some((client, request)) = self.hall.take_put_off() else { return false };
        self.answer_slow(&client, request);
        true
    }

    /// Leaves the program's CPU if both stay on one.
    fn keep_apart(&mut self, client: &Client) {
        let (mut own, theirs) = (current_cpu(), client.memory.client_cpu());
        if self.placement.should_move(own, theirs) && leave(own) {
            self.hall.counters.moves.fetch_add(1, Relaxed);
            own = current_cpu();
        }
        if own != self.cpu {
            self.cpu = own;
            self.hall.publish_cpu(own);
        }
    }

    fn answer(&mut self, client: &Arc<Client>, request: Request) {
        // A program sees what it wrote before.
        if client.has_posts() {
            client.drain_and_settle();
        }
        self.hall.crew.works(self.number);
        let counters = &self.hall.counters;
        counters.requests.fetch_add(1, Relaxed);
        let reply = [0; REPLY_WORDS];
        let mut work = Work {
            door: &self.shared,
            client,
            desk: &mut self.desk,
            request,
            reply,
            notes: None,
            given: None,
        };
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
                self.hall.tell_of_panic(&request, "; the program got EIO");
                Errno::IO.raw_os_error() as u32
            }
        };
        client.memory.answer(request.slot, code, &reply);
        if let Some(given) = work.given.take().filter(|_| code == 0) {
            let ahead = catch_unwind(AssertUnwindSafe(|| work.read_ahead(&given)));
            if ahead.is_err() {
                self.hall.tell_of_panic(&request, ", reading ahead");
            }
        }
    }

    /// Whether a program that may ask soon runs on another CPU.
    fn may_spin(&self) -> bool {
        let own = current_cpu();
        self.active.iter().any(|(_, client)| {
            let theirs = client.memory.client_cpu();
            theirs != 0 && theirs != own
        })
    }

    /// Takes in what happened; sleeps until something does.
    fn wait(&mut self, sleep: bool) {
        let mut space = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
        let none = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let linger = rustix::time::Timespec { tv_sec: 0, tv_nsec: LINGER_MS as i64 * 1_000_000 };
        let grants = self.shared.grants.as_ref().filter(|grants| grants.any());
        let memories = self.shared.memories.as_ref().filter(|memories| memories.any());
        let kept = rustix::time::Timespec { tv_sec: KEPT.as_secs() as i64, tv_nsec: 0 };
        let timeout = match (sleep, grants, memories) {
            (false, ..) => Some(&none),
            (true, Some(_), _) => Some(&linger),
            (true, None, Some(_)) => Some(&kept),
            (true, None, None) => None,
        };
        let happened = match epoll::wait(&self.hall.epoll, &mut space, timeout) {
            Ok((events, _)) => events.iter().map(|event| event.data.u64()).collect::<Vec<_>>(),
            Err(Errno::INTR) => return,
            Err(errno) => {
                log::error!("channel door {}: cannot wait: {errno}", self.shared.id.0);
                return;
            }
        };
        if let (true, Some(grants)) = (happened.is_empty() && sleep, &self.shared.grants) {
            grants.drain_all();
        }
        if let (true, Some(memories)) = (happened.is_empty() && sleep, &self.shared.memories) {
            memories.sweep();
        }
        for number in happened {
            match (number >> 2, number & 3) {
                (0, _) => {
                    silence(self.hall.wake.as_fd());
                    self.welcome_arrivals();
                }
                (key, BELL) => self.rung(key),
                (key, _) => self.hall.end_channel(key),
            }
        }
    }

    fn rung(&mut self, key: u64) {
        let Some(client) = self.hall.clients.lock().get(&key).cloned() else { return };
        silence(client.bell.as_fd());
        self.hall.activate(key, &client);
    }

    fn welcome_arrivals(&mut self) {
        let hall = &self.hall;
        let arrivals = std::mem::take(&mut *hall.arrivals.lock());
        if let Some(memories) = &self.shared.memories {
            memories.sweep();
        }
        for peer in arrivals {
            if hall.clients.lock().len() >= CLIENTS_MAX {
                refuse(peer.socket.as_fd(), Verdict::TooMany);
                continue;
            }
            let pid = peer.caller.pid;
            let Some(shown) = &self.shared.shown else {
                refuse(peer.socket.as_fd(), Verdict::Failed);
                continue;
            };
            let key = hall.last_key.fetch_add(1, Relaxed) + 1;
            let memory = hall.take_memory();
            // Counted first: what is told of it meanwhile, to another thread, is to find it.
            let mut clients = hall.clients.lock();
            match arrivals::open_channel(&self.shared, shown, &hall.epoll, key, peer, memory) {
                Ok(client) => {
                    clients.insert(key, Arc::new(client));
                    hall.counters.channels.fetch_add(1, Relaxed);
                    hall.counters.channels_opened.fetch_add(1, Relaxed);
                }
                Err(errno) => log::warn!("a channel for process {pid} cannot be opened: {errno}"),
            }
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Nothing is served any more, so programs are to know.
            self.hall.stop.store(true, SeqCst);
            self.hall.crew.end();
            self.hall.end_all_channels();
        }
    }
}

/// What one look at a channel found.
enum Served {
    Nothing,
    Some,
    /// To be answered after the channel was let go, for it takes long.
    Slow(Request),
}

/// How a request is to be answered. Programs wait for most answers before they ask on, so that order matters for those only for which they do
/// not: what is posted comes before what follows.
enum Pace {
    Quick,
    /// May wait for a disk; nothing that follows in the channel has to wait for it.
    Slow,
    /// May wait for a disk, and so does what follows.
    SlowInOrder,
}

fn pace(client: &Client, request: &Request) -> Pace {
    match request.operation {
        Some(Operation::Sync) => Pace::Slow,
        Some(Operation::Write) if client.writes_through(request.words[0]) => Pace::SlowInOrder,
        _ => Pace::Quick,
    }
}

pub fn ring(bell: BorrowedFd<'_>) {
    // EAGAIN: it rings already.
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

fn silence(bell: BorrowedFd<'_>) {
    // EAGAIN: it did not ring.
    let _ = rustix::io::read(bell, &mut [0; 8]);
}
