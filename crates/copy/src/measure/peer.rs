//! The other core: writes sources, reads destinations, and tells how far away it is.

use super::memory::{Pinned, Pools};
use std::io;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

const IDLE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;
const ANSWER: u32 = 3;
const REST: u32 = 4;
const END: u32 = 5;

/// Exchanges timed at once, and how often: the least of all is not touched by interruptions.
const EXCHANGES: usize = 24;
const TRIES: usize = 3;

/// What the other core is asked to do, and how long it took. In a line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Turn {
    order: AtomicU32,
    slots: AtomicUsize,
    elapsed_ns: AtomicUsize,
    failed: AtomicBool,
    pools: AtomicPtr<Pools>,
}

/// A thread on another CPU. It spins between [`Peer::wake`] and the end of what that gives, else it sleeps.
pub struct Peer {
    cpu: usize,
    turn: Arc<Turn>,
    thread: Option<JoinHandle<()>>,
    awake: Mutex<()>,
}

impl Peer {
    pub fn on(cpu: usize) -> Self {
        let turn = Arc::new(Turn::default());
        turn.order.store(REST, Relaxed);
        let served = turn.clone();
        let thread = std::thread::spawn(move || serve(&served, cpu));
        Self { cpu, turn, thread: Some(thread), awake: Mutex::new(()) }
    }

    pub fn wake(&self) -> Awake<'_> {
        let alone = self.awake.lock().unwrap_or_else(PoisonError::into_inner);
        self.turn.order.store(IDLE, Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
        Awake { peer: self, _alone: alone }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.turn.order.store(END, Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It has nothing to tell: that it could not run is seen in `failed`.
            let _ = thread.join();
        }
    }
}

/// The peer while it spins.
pub struct Awake<'a> {
    peer: &'a Peer,
    _alone: std::sync::MutexGuard<'a, ()>,
}

impl Awake<'_> {
    /// Has the first sources of `pools` written. Tells how long that took.
    pub fn write(&self, pools: &Pools, slots: usize) -> io::Result<f64> {
        self.ask(WRITE, pools, slots)
    }

    /// Has the first destinations read. Tells how long that took.
    pub fn read(&self, pools: &Pools, slots: usize) -> io::Result<f64> {
        self.ask(READ, pools, slots)
    }

    /// How long a word takes there and back. Virtual CPUs change their places on the processor while they run: this tells
    /// cores that share a cache from cores that do not.
    pub fn round_trip_ns(&self) -> io::Result<f64> {
        let mut least = f64::INFINITY;
        for _ in 0..TRIES {
            let begin = Instant::now();
            for _ in 0..EXCHANGES {
                self.order(ANSWER)?;
            }
            least = least.min(begin.elapsed().as_nanos() as f64 / EXCHANGES as f64);
        }
        Ok(least)
    }

    fn ask(&self, order: u32, pools: &Pools, slots: usize) -> io::Result<f64> {
        let turn = &self.peer.turn;
        turn.slots.store(slots, Relaxed);
        turn.pools.store(std::ptr::from_ref(pools).cast_mut(), Relaxed);
        self.order(order)?;
        Ok(turn.elapsed_ns.load(Relaxed) as f64)
    }

    /// Asks and waits. Both spin, without a pause, which takes longer than the answer: they run on CPUs of their own.
    fn order(&self, order: u32) -> io::Result<()> {
        let turn = &self.peer.turn;
        turn.order.store(order, Release);
        while turn.order.load(Acquire) != IDLE {
            if turn.failed.load(Relaxed) {
                return Err(io::Error::other(format!("cannot run on CPU {}", self.peer.cpu)));
            }
        }
        Ok(())
    }
}

impl Drop for Awake<'_> {
    fn drop(&mut self) {
        self.peer.turn.order.store(REST, Release);
    }
}

fn serve(turn: &Turn, cpu: usize) {
    let Ok(_pinned) = Pinned::to(cpu) else {
        turn.failed.store(true, Relaxed);
        return;
    };
    let mut byte = 0u8;
    loop {
        let order = turn.order.load(Acquire);
        match order {
            IDLE => continue,
            ANSWER => {}
            WRITE | READ => {
                // SAFETY: who asks keeps the pools until the answer; it was stored before the order.
                let pools = unsafe { &*turn.pools.load(Relaxed) };
                let slots = turn.slots.load(Relaxed);
                let begin = Instant::now();
                if order == WRITE {
                    byte = byte.wrapping_add(1);
                    pools.write_sources(slots, byte);
                } else {
                    pools.read_destinations(slots);
                }
                turn.elapsed_ns.store(begin.elapsed().as_nanos() as usize, Relaxed);
            }
            REST => {
                std::thread::park();
                continue;
            }
            _ => return,
        }
        // Not over an order that came meanwhile: after a failure nobody waits any more.
        let _ = turn.order.compare_exchange(order, IDLE, Release, Relaxed);
    }
}
