//! The FUSE door: the kernel's FUSE protocol, spoken directly on `/dev/fuse`.
//!
//! A message is read ([`device`]), taken apart ([`request`]), given to the function that answers it ([`session`], then
//! [`names`], [`files`], [`directories`]) and answered ([`reply`]). What others change goes to the kernel by [`invalidate`]. Node and handle numbers are the stack's own.

mod abi;
mod answerer;
mod backings;
mod device;
mod directories;
mod files;
mod init;
mod invalidate;
mod late;
mod late_errors;
mod marks;
mod names;
mod numbers;
mod once;
mod open_directories;
mod open_files;
mod opens;
mod parted;
mod recover;
mod registrar;
mod renewed;
mod reply;
mod request;
mod session;
mod statistics;
#[cfg(test)]
mod tests;
mod times;
mod told;
mod uring;
mod worker;
mod written;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use polytropo_libservices::{DoorId, Libservice, NodeId};

pub use backings::BACKINGS_MAX;
pub use opens::Passthrough;
pub use registrar::{OwnRegistrar, Registrar};
pub use statistics::{DoorStatistics, OperationStatistics};
pub use uring::{DOORS_MAX, RingPool};

use super::crew::Crew;
use crate::doors::modes::Modes;
use crate::state::{Agreed, DoorState, Past};
use abi::notify;
use answerer::Answerer;
use device::{Device, PAYLOAD_BYTES_MAX};
use invalidate::Notifier;
use late::Late;
use recover::Recovered;
use session::Session;
use statistics::AllCounters;
use uring::{Common, Gate, RingSet, RingThreads};
use worker::{Threads, Worker};

/// How often somebody looks whether all threads are stuck.
const WATCH_INTERVAL: Duration = Duration::from_millis(20);

/// Which way requests travel. The device is there in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// Whatever is faster as a rule.
    #[default]
    Auto,
    /// All over the device.
    Device,
    /// Over io_uring where the kernel offers it.
    Uring,
}

/// How a door works.
#[derive(Clone, Debug)]
pub struct FuseOptions {
    /// Threads that may answer requests at once; at least 1. Only as many as are needed do.
    pub threads: usize,
    /// How long the kernel may believe what others can change ([`polytropo_libservices::Coherence::Shared`]).
    pub shared_timeout: Duration,
    /// Lets the kernel hold back writes where the stack is `Exclusive`. Only for a stack with one door: another one
    /// would not see what is held back.
    pub writeback_cache: bool,
    /// Opened `/dev/fuse`s that are in no use yet, for the threads but the first. Where they are too few, threads open
    /// their own or share one.
    pub spare_devices: Vec<Arc<OwnedFd>>,
    /// Lets the kernel open files without asking, where the stack allows it. Only for a stack that nobody else writes to: the kernel
    /// places what is appended by the size that it knows.
    pub stateless_open: bool,
    /// Lets the kernel use files of immutable layers in place of the door. The kernel has this or write-back, not both;
    /// and every open is asked for.
    pub passthrough: Option<Passthrough>,
    /// Who has which inode open, shared with the other doors of the stack; without it the door keeps count for itself.
    pub modes: Option<Arc<Modes>>,
    pub transport: Transport,
    /// Rings that were made ahead; without them the door makes its own, if it may.
    pub rings: Option<Arc<RingPool>>,
    /// Where open files, nodes and what is under way are written down for a worker to come.
    pub state: Option<Arc<DoorState>>,
}

impl Default for FuseOptions {
    fn default() -> Self {
        Self {
            threads: 4,
            shared_timeout: Duration::ZERO,
            writeback_cache: true,
            spare_devices: Vec::new(),
            stateless_open: true,
            passthrough: None,
            modes: None,
            transport: Transport::Auto,
            rings: None,
            state: None,
        }
    }
}

/// One FUSE mount being served.
pub struct FuseDoor {
    counters: Arc<AllCounters>,
    notifier: Mutex<Notifier>,
    late: Mutex<Late>,
    threads: Mutex<Threads>,
    rings: Mutex<Option<RingThreads>>,
    live: Arc<Live>,
}

/// How many threads still run.
#[derive(Default)]
struct Live {
    count: Mutex<usize>,
    none: Condvar,
}

impl FuseDoor {
    /// Serves `stack` on `device`: an opened `/dev/fuse` that was mounted with [`mount_options`].
    pub fn start(
        device: OwnedFd,
        stack: Arc<dyn Libservice>,
        options: FuseOptions,
        door: DoorId,
    ) -> io::Result<FuseDoor> {
        Self::begin(device, stack, options, door, None)
    }

    /// Goes on serving where a dead worker left off, on the same devices, all of which are the connection's.
    pub fn resume(
        device: OwnedFd,
        stack: Arc<dyn Libservice>,
        options: FuseOptions,
        door: DoorId,
        past: Past,
    ) -> io::Result<FuseDoor> {
        let options = FuseOptions { transport: Transport::Device, ..options };
        Self::begin(device, stack, options, door, Some(past))
    }

    fn begin(
        device: OwnedFd,
        stack: Arc<dyn Libservice>,
        mut options: FuseOptions,
        door: DoorId,
        past: Option<Past>,
    ) -> io::Result<FuseDoor> {
        let resumes = past.is_some();
        let mut spares = std::mem::take(&mut options.spare_devices).into_iter();
        worker::prepare_wake_signal()?;
        let device = Device::new(device);
        let rings = ring_set(&options);
        let payload_bytes = rings.as_ref().map(RingSet::payload_bytes);
        let session = Arc::new(Session::new(stack, door, options).offering_rings(payload_bytes));
        let recovered = past.map(|past| {
            session.told.everything();
            session.resume(past.agreed);
            recover::recover(&session, past)
        });
        let gate = Arc::<Gate>::default();
        let stop = Arc::new(AtomicBool::new(false));
        let count = session.options.threads.max(1);
        let crew = Arc::new(Crew::new(count, WATCH_INTERVAL));
        let threads = Threads { stop: stop.clone(), crew: crew.clone(), handles: Vec::new() };
        let counters = Arc::<AllCounters>::default();
        let late = Late::start(format!("fuse{}", door.0), &device, || {
            let answerer = Answerer::new(session.clone(), counters.of_new_thread());
            Worker::new(answerer, device.clone(), (crew.clone(), count), stop.clone(), None, gate.clone())
        })?;
        let messages = late.messages();
        let started = FuseDoor {
            counters,
            late: Mutex::new(late),
            notifier: Mutex::new(Notifier::start(session.clone(), &device)?),
            threads: Mutex::new(threads),
            rings: Mutex::new(None),
            live: Arc::new(Live::default()),
        };
        if let Some(set) = rings {
            let (device, stop, late) = (device.clone(), stop.clone(), messages.clone());
            let common = Common { device, payload_bytes: set.payload_bytes(), stop, late };
            let answerer = || Answerer::new(session.clone(), started.counters.of_ring_thread());
            let alive = || Alive::new(&started.live);
            let threads = RingThreads::start(set, &common, gate.clone(), answerer, alive)?;
            *started.rings.lock() = Some(threads);
        }
        if recovered.is_some_and(|recovered| recovered.nodes_lost > 0) {
            // Before any answer: names that lead to what was lost are looked up again. Only then, since it parts open files from their names.
            if let Err(errno) = device.notify(notify::INC_EPOCH, &[]) {
                log::warn!("FUSE door {}: names that may lead elsewhere now stay: {errno}", door.0);
            }
        }
        if let Some(recovered) = recovered {
            // Before anything is read: it moves all that was read and not answered, be it by whom it may.
            started.ask_again(&device, &session, recovered);
        }
        for number in 0..count {
            let own = match number {
                0 => device.clone(),
                _ if resumes => spares.next().map_or_else(|| device.clone(), Device::of),
                _ => device.clone_or_share(spares.next()),
            };
            let place = (crew.clone(), number);
            let answerer = Answerer::new(session.clone(), started.counters.of_new_thread());
            let late = Some(messages.clone());
            let worker = Worker::new(answerer, own, place, stop.clone(), late, gate.clone())?;
            started.spawn(worker, format!("fuse{}.{number}", door.0))?;
        }
        Ok(started)
    }

    /// Has the kernel send again what was not answered.
    fn ask_again(&self, device: &Device, session: &Session, recovered: Recovered) {
        let door = session.door;
        log::warn!("FUSE door {}: taken over from a worker that died: {recovered:?}", door.0);
        if let Err(errno) = device.notify(notify::RESEND, &[]) {
            // Unmounted meanwhile, or programs wait for ever, which the keeper's end of the connection ends.
            log::error!("FUSE door {}: unanswered requests are not sent again: {errno}", door.0);
        }
        let notifier = self.notifier.lock();
        // What programs wrote through channels the dead worker may not have told the kernel of.
        if !session.writes_ahead() {
            session.numbers.recovered_nodes().into_iter().for_each(|node| notifier.outdate(node));
        }
    }

    fn spawn(&self, worker: Worker, name: String) -> io::Result<()> {
        let alive = Alive::new(&self.live);
        let handle = std::thread::Builder::new().name(name).spawn(move || {
            let _alive = alive;
            worker.run();
        })?;
        self.threads.lock().handles.push(handle);
        Ok(())
    }

    /// Waits until the filesystem is unmounted or its connection aborted, or the door stopped.
    pub fn wait_ended(&self) {
        let mut count = self.live.count.lock();
        while *count > 0 {
            self.live.none.wait(&mut count);
        }
    }

    /// Ends the threads. Requests that they have begun are answered; later ones wait in the kernel for whoever
    /// serves the device next, or for its last descriptor to be closed.
    pub fn stop(&self) {
        // In this order: a notice may wait in the kernel for a request to be answered.
        self.notifier.lock().end();
        self.late.lock().end();
        if let Some(rings) = &mut *self.rings.lock() {
            rings.end();
        }
        self.threads.lock().end();
    }

    /// Something that waits until the kernel was told of all changes so far.
    pub fn settle(&self) -> Box<dyn Fn() + Send + Sync> {
        let queue = self.notifier.lock().queue();
        Box::new(move || {
            if let Some(queue) = queue.upgrade() {
                queue.wait_sent();
            }
        })
    }

    /// Something that has the kernel forget what it knows of an inode, before the next `settle` returns.
    pub fn outdate(&self) -> Box<dyn Fn(NodeId) + Send + Sync> {
        let (queue, told) = {
            let notifier = self.notifier.lock();
            (notifier.queue(), notifier.told())
        };
        Box::new(move |node| {
            told.look();
            if let (true, Some(queue)) = (told.knows_inode(node), queue.upgrade()) {
                queue.outdate(node);
            }
        })
    }

    pub fn statistics(&self) -> DoorStatistics {
        self.counters.sum()
    }
}

impl Drop for FuseDoor {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Transport {
    /// As in options of programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Device => "device",
            Self::Uring => "uring",
        }
    }
}

/// The rings of one door, where they are wanted and to be had.
fn ring_set(options: &FuseOptions) -> Option<RingSet> {
    match options.transport {
        Transport::Device => None,
        Transport::Auto | Transport::Uring => {
            RingSet::take(options.rings.clone().or_else(|| RingPool::new(1))?)
        }
    }
}

/// Whether another worker could take over a connection of which this was agreed on.
pub fn can_be_resumed(agreed: Agreed) -> bool {
    init::can_be_resumed(agreed)
}

/// Counts one thread as running while it lives.
struct Alive(Arc<Live>);

impl Alive {
    fn new(live: &Arc<Live>) -> Self {
        *live.count.lock() += 1;
        Self(live.clone())
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        let mut count = self.0.count.lock();
        *count -= 1;
        if *count == 0 {
            self.0.none.notify_all();
        }
    }
}

/// The share of the memory that the kernel allows to be dirty which one mount may take, in per cent. It gives FUSE 1,
/// which stops a program that writes in bulk after some 40 MiB; the rest is left to others should a service be stuck.
const DIRTY_SHARE_PERCENT: u32 = 10;

/// Lets programs write ahead of the service on the mount whose device is `major`:`minor`. Needs root of the host.
pub fn raise_dirty_share((major, minor): (u32, u32)) -> io::Result<()> {
    std::fs::write(format!("/sys/class/bdi/{major}:{minor}/max_ratio"), DIRTY_SHARE_PERCENT.to_string())
}

/// The data of mount(2) for a device that `fd` names in the calling process. The kernel checks permissions;
/// all users may enter.
pub fn mount_options(fd: i32, user_id: u32, group_id: u32) -> String {
    format!(
        "fd={fd},rootmode=40000,user_id={user_id},group_id={group_id},allow_other,default_permissions,\
         max_read={PAYLOAD_BYTES_MAX}"
    )
}
