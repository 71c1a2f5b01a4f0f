//! A thread that answers the requests of one CPU.
//!
//! It has one entry in the kernel's queue, so it never has a request waiting behind the one that it works on: the kernel
//! gives it to the queue's other thread, or keeps it until one of them is done. An answer and the wait for the next
//! request are one system call.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Instant;

use parking_lot::Mutex;
use polytropo_libservices::Errno;
use rustix::event::{EventfdFlags, eventfd};

use super::Gate;
use super::entry::{Arrived, Entry};
use super::pool::Share;
use super::ring::{Command, Completion, Ring};
use crate::doors::fuse::abi::{InHeader, RetrieveOut, notify, opcode};
use crate::doors::fuse::answerer::Answerer;
use crate::doors::fuse::device::Device;
use crate::doors::fuse::late::{Question, Way};
use crate::doors::fuse::request::Request;
use crate::doors::fuse::worker::be_io_flusher;
use zerocopy::IntoBytes;

/// Names and the like are taken out of the payload up to this size, so that the answer can be put there.
const SCRATCH_BYTES: usize = 16 << 10;
/// Entries of one thread, with those whose questions are answered late.
const LATE_ENTRIES_MAX: usize = 64;
/// Numbers of notices begin where those of requests, which count from 0, never come.
const RETRIEVALS_START: u64 = 1 << 62;
/// `user_data` of the wait for `Mailbox::wake`.
const WAKE: u64 = u64::MAX;

/// How others reach the thread.
pub struct Mailbox {
    answers: Mutex<Vec<LateAnswer>>,
    wake: OwnedFd,
}

struct LateAnswer {
    entry: usize,
    unique: u64,
    error: i32,
    payload: Vec<u8>,
}

impl Mailbox {
    pub fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { answers: Mutex::default(), wake })
    }

    pub fn wake(&self) {
        // Fails only when it is about to overflow, and then the thread is woken as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Takes one late answer to the thread whose entry the question lies in.
pub struct Return {
    mailbox: Arc<Mailbox>,
    entry: usize,
}

impl Return {
    pub fn give(self, unique: u64, error: i32, payload: &[u8]) {
        let answer = LateAnswer { entry: self.entry, unique, error, payload: payload.to_vec() };
        self.mailbox.answers.lock().push(answer);
        self.mailbox.wake();
    }
}

/// Where an entry is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whereabouts {
    /// With the kernel, waiting for a request, or with this thread at the moment.
    InUse,
    /// Its question is answered late.
    Late,
    /// The kernel gave it back for good.
    Ended,
}

/// One thread's belongings. It has to outlive the thread: until then the kernel may write to the entries.
pub struct Server {
    answerer: Answerer,
    device: Device,
    ring: Ring,
    entries: Vec<(Entry, Whereabouts)>,
    payload_bytes: usize,
    share: Share,
    scratch: Box<[u8]>,
    mailbox: Arc<Mailbox>,
    stop: Arc<AtomicBool>,
    late: Sender<Option<Question>>,
    /// Numbers of notices, two apart as those of requests.
    retrievals: u64,
}

/// What a door gives each of its threads.
pub struct Common {
    pub device: Device,
    pub payload_bytes: usize,
    pub stop: Arc<AtomicBool>,
    pub late: Sender<Option<Question>>,
}

impl Server {
    pub fn new(answerer: Answerer, ring: Ring, share: Share, common: &Common) -> io::Result<Self> {
        let entry = |&queue: &u16| Ok((Entry::new(queue, common.payload_bytes)?, Whereabouts::InUse));
        Ok(Self {
            answerer,
            device: common.device.clone(),
            ring,
            entries: share.queues.iter().map(entry).collect::<io::Result<_>>()?,
            payload_bytes: common.payload_bytes,
            share: share.clone(),
            scratch: vec![0; SCRATCH_BYTES].into(),
            mailbox: Arc::new(Mailbox::new()?),
            stop: common.stop.clone(),
            late: common.late.clone(),
            retrievals: u64::from(share.queues.first().copied().unwrap_or(0)) << 40,
        })
    }

    pub fn mailbox(&self) -> Arc<Mailbox> {
        self.mailbox.clone()
    }

    /// Once the thread has ended.
    pub fn into_ring(self) -> Ring {
        self.ring
    }

    /// Until the connection ends or `stop` is set; not at all if `gate` stays shut.
    pub fn run(&mut self, gate: &Gate) {
        be_io_flusher();
        self.stay_on_cpu();
        if !gate.pass() {
            return;
        }
        if let Err(errno) = self.begin().and_then(|()| self.serve_on()) {
            let door = self.answerer.session.door.0;
            log::error!("FUSE door {door}: the ring of {:?} ended: {errno}", self.share);
        }
    }

    /// The point of it all: a request is answered where its sender waits, with no other CPU to wake.
    fn stay_on_cpu(&self) {
        let Some(cpu) = self.share.cpu else { return };
        let mut set = rustix::thread::CpuSet::new();
        if cpu >= rustix::thread::CpuSet::MAX_CPU {
            return;
        }
        set.set(cpu);
        if let Err(errno) = rustix::thread::sched_setaffinity(None, &set) {
            log::debug!("a thread of a FUSE door may not stay on CPU {cpu}: {errno}");
        }
    }

    fn begin(&mut self) -> rustix::io::Result<()> {
        self.wait_for_wake()?;
        for index in 0..self.entries.len() {
            self.register(index)?;
        }
        Ok(())
    }

    fn wait_for_wake(&mut self) -> rustix::io::Result<()> {
        let command = Command::wait_readable(self.mailbox.wake.as_fd(), WAKE);
        // SAFETY: the mailbox lives as long as `self`, which outlives the thread.
        unsafe { self.ring.push(&command) }
    }

    fn register(&mut self, index: usize) -> rustix::io::Result<()> {
        let entry = &self.entries[index].0;
        let command = Command::register(self.device.as_fd(), entry.queue, entry.parts(), index as u64);
        // SAFETY: device and entries live as long as `self`, which outlives the thread; entries are mappings of
        // their own, so that the vector may move.
        unsafe { self.ring.push(&command) }
    }

    fn serve_on(&mut self) -> rustix::io::Result<()> {
        while self.entries.iter().any(|(_, at)| *at != Whereabouts::Ended) {
            match self.ring.submit_and_wait() {
                Ok(()) | Err(Errno::INTR | Errno::AGAIN | Errno::BUSY) => {}
                Err(errno) => return Err(errno),
            }
            while let Some(completion) = self.ring.completed() {
                self.completed(completion)?;
            }
            if self.stop.load(Ordering::Acquire) {
                self.give_late_answers()?;
                return self.ring.submit();
            }
        }
        self.leave()
    }

    /// All entries are back: makes the last command complete, so that the ring can be used again.
    fn leave(&mut self) -> rustix::io::Result<()> {
        self.mailbox.wake();
        while !self.ring.is_idle() {
            match self.ring.submit_and_wait() {
                Ok(()) | Err(Errno::INTR) => while self.ring.completed().is_some() {},
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn completed(&mut self, completion: Completion) -> rustix::io::Result<()> {
        if completion.user_data == WAKE {
            // Nothing to read means that somebody else's wake was read with the last one.
            let _ = rustix::io::read(&self.mailbox.wake, &mut [0; 8]);
            self.give_late_answers()?;
            return self.wait_for_wake();
        }
        let index = completion.user_data as usize;
        if completion.result == 0 {
            return self.serve(index);
        }
        self.entries[index].1 = Whereabouts::Ended;
        let errno = Errno::from_raw_os_error(-completion.result);
        if !matches!(errno, Errno::NOTCONN | Errno::CONNABORTED | Errno::NODEV | Errno::CANCELED) {
            // It would hold what nobody has.
            self.answerer.abandon();
            let (door, queue) = (self.answerer.session.door.0, self.entries[index].0.queue);
            log::error!("FUSE door {door}: the kernel gave back an entry of queue {queue}: {errno}");
        }
        Ok(())
    }

    /// Answers the request in entry `index`.
    fn serve(&mut self, index: usize) -> rustix::io::Result<()> {
        let began = Instant::now();
        let entry = &mut self.entries[index].0;
        let Some(arrived) = entry.arrived() else {
            log::error!("FUSE door {}: a request contradicts itself", self.answerer.session.door.0);
            let unique = entry.commit_id();
            return self.commit(index, unique, Errno::IO, 0);
        };
        let header = arrived.header;
        if header.opcode == opcode::NOTIFY_REPLY {
            self.entries[index].0.answer(header.unique, 0, 0);
            return self.push_commit(index);
        }
        if self.answerer.session.must_ask_late(&header) {
            return self.ask_late(index, &arrived);
        }
        let (operation, room) = entry.split(&arrived);
        let payload = arrived.payload();
        // Bytes to be written stay where they are, and the short answer is made elsewhere; names make room for the answer.
        let apart = header.opcode == opcode::WRITE || payload.len() > SCRATCH_BYTES;
        let answered = if apart {
            let request = Request::of_parts(header, operation, &room[payload]);
            let answered = self.answerer.answer(request, &mut self.scratch, began);
            self.answerer.record(&answered, &self.scratch);
            room[..answered.payload_bytes].copy_from_slice(&self.scratch[..answered.payload_bytes]);
            answered
        } else {
            let names = &mut self.scratch[..payload.len()];
            names.copy_from_slice(&room[payload]);
            let request = Request::of_parts(header, operation, names);
            let answered = self.answerer.answer(request, room, began);
            self.answerer.record(&answered, room);
            answered
        };
        self.entries[index].0.answer(header.unique, answered.error, answered.payload_bytes);
        self.push_commit(index)
    }

    fn commit(
        &mut self,
        index: usize,
        unique: u64,
        errno: Errno,
        payload_bytes: usize,
    ) -> rustix::io::Result<()> {
        self.entries[index].0.answer(unique, -errno.raw_os_error(), payload_bytes);
        self.push_commit(index)
    }

    fn push_commit(&mut self, index: usize) -> rustix::io::Result<()> {
        let entry = &self.entries[index].0;
        let command =
            Command::commit_and_fetch(self.device.as_fd(), entry.queue, entry.commit_id(), index as u64);
        // SAFETY: as in `register`.
        unsafe { self.ring.push(&command) }
    }

    /// Has the question answered by another thread, and takes other requests meanwhile: those that the answer waits for
    /// may come to this very queue.
    fn ask_late(&mut self, index: usize, arrived: &Arrived) -> rustix::io::Result<()> {
        let queue = self.entries[index].0.queue;
        let takes = |(other, (entry, at)): (usize, &(Entry, Whereabouts))| {
            other != index && entry.queue == queue && *at == Whereabouts::InUse
        };
        let unique = arrived.header.unique;
        if !self.entries.iter().enumerate().any(takes) {
            if self.entries.len() >= self.share.queues.len() + LATE_ENTRIES_MAX {
                return self.commit(index, unique, Errno::AGAIN, 0);
            }
            match Entry::new(queue, self.payload_bytes) {
                Ok(entry) => self.entries.push((entry, Whereabouts::InUse)),
                Err(_) => return self.commit(index, unique, Errno::NOMEM, 0),
            }
            self.register(self.entries.len() - 1)?;
            self.have_waiting_requests_sent(arrived.header.nodeid)?;
        }
        let (operation, room) = self.entries[index].0.split(arrived);
        let message = [InHeader::as_bytes(&arrived.header), operation, &room[arrived.payload()]].concat();
        let back = Return { mailbox: self.mailbox.clone(), entry: index };
        if self.late.send(Some(Question { way: Way::Ring(back), message })).is_err() {
            // The door is being closed: what the kernel has not written back cannot be told.
            return self.commit(index, unique, Errno::INTR, 0);
        }
        self.entries[index].1 = Whereabouts::Late;
        Ok(())
    }

    /// A new entry gets no request that has been waiting, only later ones, and what waits may be what late answers wait for. So
    /// the kernel is made to send a request of its own, whose commit fetches the next. It asks for nothing: an answer to a
    /// notice that retrieves no bytes of the file.
    fn have_waiting_requests_sent(&mut self, nodeid: u64) -> rustix::io::Result<()> {
        self.ring.submit()?;
        self.retrievals += 2;
        let retrieve = RetrieveOut {
            notify_unique: RETRIEVALS_START + self.retrievals,
            nodeid,
            offset: 0,
            size: 0,
            padding: 0,
        };
        match self.device.notify(notify::RETRIEVE, &[retrieve.as_bytes()]) {
            // Unmounted meanwhile.
            Err(Errno::NODEV | Errno::NOTCONN | Errno::NOENT) => Ok(()),
            done => done,
        }
    }

    fn give_late_answers(&mut self) -> rustix::io::Result<()> {
        let answers = std::mem::take(&mut *self.mailbox.answers.lock());
        for LateAnswer { entry: index, unique, error, payload } in answers {
            let (entry, at) = &mut self.entries[index];
            *at = Whereabouts::InUse;
            entry.put_payload(&payload);
            entry.answer(unique, error, payload.len());
            self.push_commit(index)?;
        }
        Ok(())
    }
}
