//! Requests over io_uring: a queue for each CPU, in memory that the kernel copies to and from, beside the device, which keeps
//! the first message, FORGET, INTERRUPT and notices.

mod entry;
mod pool;
mod ring;
mod server;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

pub use pool::{DOORS_MAX, RingPool};
pub use server::{Common, Return};

use super::answerer::Answerer;
use ring::Ring;
use server::{Mailbox, Server};

/// Opens when the kernel has agreed to FUSE over io_uring: it takes no entries before.
#[derive(Default)]
pub struct Gate {
    open: Mutex<Option<bool>>,
    changed: Condvar,
}

impl Gate {
    /// What counts is what is said first.
    pub fn decide(&self, open: bool) {
        self.open.lock().get_or_insert(open);
        self.changed.notify_all();
    }

    /// Waits for the decision.
    fn pass(&self) -> bool {
        let mut open = self.open.lock();
        loop {
            match *open {
                Some(open) => return open,
                None => self.changed.wait(&mut open),
            }
        }
    }
}

/// The rings of one door, before it begins.
pub struct RingSet {
    pool: Arc<RingPool>,
    rings: Vec<Ring>,
    payload_bytes: usize,
}

impl RingSet {
    pub fn take(pool: Arc<RingPool>) -> Option<Self> {
        let payload_bytes = pool.cpus().payload_bytes()?;
        let rings = pool.take();
        if rings.is_none() {
            log::info!("a FUSE door does without io_uring: the rings are all in use");
        }
        Some(Self { rings: rings?, pool, payload_bytes })
    }

    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }
}

/// The threads that answer over rings.
pub struct RingThreads {
    pool: Arc<RingPool>,
    gate: Arc<Gate>,
    stop: Arc<AtomicBool>,
    threads: Vec<(JoinHandle<Server>, Arc<Mailbox>)>,
}

impl RingThreads {
    /// `alive` is kept by each thread while it runs.
    pub fn start<A: Send + 'static>(
        set: RingSet,
        common: &Common,
        gate: Arc<Gate>,
        mut answerer: impl FnMut() -> Answerer,
        mut alive: impl FnMut() -> A,
    ) -> io::Result<Self> {
        let RingSet { pool, rings, .. } = set;
        let mut started = Self { pool, gate, stop: common.stop.clone(), threads: Vec::new() };
        let plan = started.pool.cpus().plan();
        for (number, (ring, share)) in rings.into_iter().zip(plan).enumerate() {
            let answerer = answerer();
            let name = format!("fuse{}.ring{number}", answerer.session.door.0);
            let mut server = Server::new(answerer, ring, share, common)?;
            let (gate, alive, mailbox) = (started.gate.clone(), alive(), server.mailbox());
            let thread = std::thread::Builder::new().name(name).spawn(move || {
                let _alive = alive;
                // The server has to outlive the thread, even one that panics (which the panic hook has logged).
                let _ = catch_unwind(AssertUnwindSafe(|| server.run(&gate)));
                server
            })?;
            started.threads.push((thread, mailbox));
        }
        Ok(started)
    }

    /// Ends the threads; what they have begun is answered.
    pub fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.gate.decide(false);
        for (_, mailbox) in &self.threads {
            mailbox.wake();
        }
        for (thread, _) in self.threads.drain(..) {
            if let Ok(server) = thread.join() {
                self.pool.give_back(server.into_ring());
            }
        }
    }
}

impl Drop for RingThreads {
    fn drop(&mut self) {
        self.end();
    }
}
