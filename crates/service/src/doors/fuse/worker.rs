//! The threads that wait for messages and answer them.

use std::io;
use std::ops::ControlFlow;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use polytropo_libservices::Errno;

use super::abi::{OutHeader, opcode};
use super::answerer::{Answered, Answerer};
use super::device::{Device, MessageBuffer, PAYLOAD_BYTES_MAX, Pages, Received};
use super::late::{Question, Way};
use super::parted::Flusher;
use super::request::Request;
use super::uring::Gate;
use crate::doors::crew::{Advice, Crew, Load};
use crate::doors::spin::Spin;

/// Longer than it takes to wake a program and to have it ask again.
const LOOK_MAX: Duration = Duration::from_micros(50);

/// One thread's belongings.
pub struct Worker {
    answerer: Answerer,
    device: Device,
    message: MessageBuffer,
    payload: Pages,
    crew: Arc<Crew>,
    /// Which one of the crew.
    number: usize,
    stop: Arc<AtomicBool>,
    /// Takes questions that have to be answered late; the thread that does so has none.
    late: Option<Sender<Option<Question>>>,
    /// Told whether the kernel agreed to io_uring, or that there will be no agreement.
    gate: Arc<Gate>,
}

impl Worker {
    pub fn new(
        answerer: Answerer,
        device: Device,
        (crew, number): (Arc<Crew>, usize),
        stop: Arc<AtomicBool>,
        late: Option<Sender<Option<Question>>>,
        gate: Arc<Gate>,
    ) -> io::Result<Self> {
        Ok(Self {
            answerer,
            device,
            message: MessageBuffer::new()?,
            payload: Pages::new(PAYLOAD_BYTES_MAX)?,
            crew,
            number,
            stop,
            late,
            gate,
        })
    }

    /// Until the connection ends or `stop` is set.
    pub fn run(mut self) {
        be_io_flusher();
        let mut reading = self.number == 0;
        let mut touched = false;
        while reading || self.crew.stand_by(self.number) {
            if !std::mem::replace(&mut touched, true) {
                self.message.touch();
            }
            if let ControlFlow::Break(()) = self.read_on() {
                break;
            }
            reading = false;
        }
        self.crew.end();
        self.gate.decide(false);
    }

    /// Serves messages as long as this thread is needed. Breaks when the door has ended.
    fn read_on(&mut self) -> ControlFlow<()> {
        let mut load = Load::default();
        let mut spin = Spin::new(self.crew.cpus(), LOOK_MAX);
        let mut ready = Instant::now();
        while !self.stop.load(Ordering::Acquire) {
            self.crew.reads(self.number);
            match self.device.receive(&mut self.message) {
                Ok(Received::Message(count)) => {
                    let began = Instant::now();
                    self.crew.works(self.number);
                    let advice = load.message(began - ready, count, self.message.sender(count));
                    if let Advice::Call(limit) = advice {
                        self.crew.call_up_to(limit);
                    }
                    ready = self.serve(count, began);
                    if advice == Advice::Leave && self.crew.may_leave() {
                        return ControlFlow::Continue(());
                    }
                    if self.crew.is_alone() {
                        spin.look_out(|| self.device.has_message());
                    }
                }
                Ok(Received::Nothing) => {}
                Ok(Received::Ended) => break,
                Err(errno) => {
                    log::error!("FUSE door {}: cannot read from the device: {errno}", self.door());
                    break;
                }
            }
        }
        ControlFlow::Break(())
    }

    /// Answers the message of `count` bytes that was read. Returns when the answer was begun: while it is written, the
    /// program may take the CPU and come back with its next request.
    fn serve(&mut self, count: usize, began: Instant) -> Instant {
        let Some(request) = Request::parse(self.message.message(count)) else {
            log::error!("FUSE door {}: a message of {count} bytes has no whole header", self.door());
            return began;
        };
        let header = request.header;
        if self.answerer.session.must_ask_late(&header) {
            if let Some(late) = &self.late {
                let way = Way::Device(self.device.clone());
                let question = Question { way, message: self.message.message(count).to_vec() };
                if late.send(Some(question)).is_err() {
                    // The door is being closed: what the kernel has not written back cannot be told.
                    self.refuse(header.unique, Errno::INTR);
                }
                return Instant::now();
            }
        }
        let slow = is_slow(header.opcode);
        if slow {
            self.crew.begin_slow();
        }
        let answered = self.answerer.answer(request, &mut self.payload, began);
        if slow {
            self.crew.end_slow();
        }
        self.send(&answered);
        self.answerer.answered();
        if header.opcode == opcode::INIT {
            // The kernel takes entries of rings once it has this answer.
            self.gate.decide(answered.error == 0 && self.answerer.session.over_rings());
        }
        self.answerer.record(&answered, &self.payload);
        answered.at
    }

    fn send(&mut self, answered: &Answered) {
        let sent = match answered.silent {
            true => Ok(()),
            false => self.reply(answered.unique, answered.error, answered.payload_bytes),
        };
        if let Err(errno) = sent {
            self.answerer.abandon();
            // NOENT: the program was killed meanwhile.
            if !matches!(errno, Errno::NOENT | Errno::NODEV) {
                log::error!(
                    "FUSE door {}: the kernel did not take the answer to {}: {errno}",
                    self.door(),
                    opcode::name(answered.opcode),
                );
            }
        }
    }

    /// Answers a message that another thread received, once the kernel has written the file's pages back.
    pub fn answer_late(&mut self, Question { way, message }: Question, flusher: &Flusher) {
        let began = Instant::now();
        let Some(request) = Request::parse(&message) else { return };
        let unique = request.header.unique;
        match (way, flusher.flush(request.header.nodeid)) {
            (Way::Device(device), Ok(())) => {
                self.device = device;
                self.message.put(&message);
                self.serve(message.len(), began);
            }
            (Way::Device(device), Err(errno)) => {
                self.device = device;
                self.refuse(unique, errno);
            }
            (Way::Ring(back), Ok(())) => {
                let answered = self.answerer.answer(request, &mut self.payload, began);
                self.answerer.record(&answered, &self.payload);
                back.give(unique, answered.error, &self.payload[..answered.payload_bytes]);
            }
            (Way::Ring(back), Err(errno)) => back.give(unique, -errno.raw_os_error(), &[]),
        }
    }

    fn refuse(&self, unique: u64, errno: Errno) {
        // The program or the mount may be gone meanwhile.
        if let Err(errno) = self.reply(unique, -errno.raw_os_error(), 0) {
            log::debug!("FUSE door {}: the kernel did not take a refusal: {errno}", self.door());
        }
    }

    fn reply(&self, unique: u64, error: i32, len: usize) -> rustix::io::Result<()> {
        let header = OutHeader { len: (size_of::<OutHeader>() + len) as u32, error, unique };
        self.device.reply(&header, &self.payload[..len])
    }

    fn door(&self) -> u32 {
        self.answerer.session.door.0
    }
}

/// What waits for a disk as a rule.
fn is_slow(code: u32) -> bool {
    matches!(
        code,
        opcode::FSYNC
            | opcode::FSYNCDIR
            | opcode::FALLOCATE
            | opcode::COPY_FILE_RANGE
            | opcode::COPY_FILE_RANGE_64
    )
}

/// The kernel must not make this thread write back pages of its own mount when memory is short. Needs
/// CAP_SYS_RESOURCE; without it the kernel's own precautions have to do.
pub fn be_io_flusher() {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: sets a flag of this thread and touches no memory.
    let done = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if done != 0 {
        log::debug!("FUSE door: not marked as an I/O flusher: {}", io::Error::last_os_error());
    }
}

/// Running threads, and how to end them.
pub struct Threads {
    pub stop: Arc<AtomicBool>,
    pub crew: Arc<Crew>,
    pub handles: Vec<JoinHandle<()>>,
}

/// Between two tries to wake a thread that may just have been about to wait.
const WAKE_INTERVAL: Duration = Duration::from_millis(1);

impl Threads {
    /// Ends all threads and waits for them. The device stays usable.
    pub fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.crew.end();
        for handle in self.handles.drain(..) {
            while !handle.is_finished() {
                // SAFETY: the thread was not joined yet, so its id is valid.
                unsafe { libc::pthread_kill(handle.as_pthread_t(), wake_signal()) };
                std::thread::sleep(WAKE_INTERVAL);
            }
            // A panic was logged by the panic hook already.
            let _ = handle.join();
        }
    }
}

/// The signal that takes a thread out of read(2).
fn wake_signal() -> libc::c_int {
    libc::SIGRTMIN() + 4
}

/// Makes the wake signal do nothing but interrupt.
pub fn prepare_wake_signal() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all zero is a valid sigaction; it is filled in below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // No SA_RESTART: read(2) has to return.
    // SAFETY: the handler does nothing, so it is safe in any thread at any time.
    let done = unsafe { libc::sigaction(wake_signal(), &action, std::ptr::null_mut()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
