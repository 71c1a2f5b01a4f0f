//! The queues' own waiting policy around a queue that only tries: the same events, spins and sleeps.

use crate::rivals::{Handle, Item, Queue, Tries, TriesHandle};
use crossbeam_utils::CachePadded;
use polytropo_queue::wait::{Deadline, Event, Events, Spin, Statistics};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

const OPERATIONS_PER_LOOK: u32 = 64;

/// `Event::notify` counts on a locked instruction before it. The cheapest one, not the slower `mfence`.
#[inline(always)]
fn fence_unless(locked: bool) {
    if !locked {
        // SAFETY: adds nothing to the word at the top of the stack.
        unsafe { std::arch::asm!("lock or dword ptr [rsp], 0") };
    }
}

pub struct Waited<Q> {
    queue: Q,
    events: Box<Events>,
    statistics: Box<Statistics>,
    /// The CPU of the last producer and of the last consumer, plus one.
    producer_cpu: CachePadded<AtomicU32>,
    consumer_cpu: CachePadded<AtomicU32>,
}

impl<T: Item, Q: Tries<T>> Queue<T> for Waited<Q> {
    type Handle<'a>
        = WaitedHandle<'a, Q, Q::Handle<'a>>
    where
        Q: 'a;

    fn new(threads: usize) -> Self {
        Self {
            queue: Q::new(threads),
            events: Box::default(),
            statistics: Box::default(),
            producer_cpu: CachePadded::default(),
            consumer_cpu: CachePadded::default(),
        }
    }

    fn handle(&self, thread: usize) -> Self::Handle<'_> {
        let inner = self.queue.handle(thread);
        WaitedHandle { shared: self, inner, spin: Spin::default(), operations: OPERATIONS_PER_LOOK, cpu: 0 }
    }

    fn waits(&self) -> [u64; 3] {
        let statistics = &self.statistics;
        [&statistics.sleeps, &statistics.wakes, &statistics.spins_in_vain].map(|count| count.load(Relaxed))
    }
}

pub struct WaitedHandle<'a, Q, H> {
    shared: &'a Waited<Q>,
    inner: H,
    spin: Spin,
    operations: u32,
    cpu: u32,
}

impl<Q, H> WaitedHandle<'_, Q, H> {
    #[inline]
    fn publish_cpu(&mut self, mine: impl Fn(&Waited<Q>) -> &AtomicU32) {
        self.operations += 1;
        if self.operations >= OPERATIONS_PER_LOOK {
            self.operations = 0;
            self.cpu = crate::run::current_cpu() + 1;
            if mine(self.shared).load(Relaxed) != self.cpu {
                mine(self.shared).store(self.cpu, Relaxed);
            }
        }
    }

    #[cold]
    fn wait<R>(
        &mut self,
        event: &Event,
        peer: &AtomicU32,
        mut attempt: impl FnMut(&mut H) -> Option<R>,
    ) -> R {
        let cpu = crate::run::current_cpu() + 1;
        let peer = peer.load(Relaxed);
        let statistics = &*self.shared.statistics;
        if peer != 0 && peer != cpu {
            let mut result = None;
            let inner = &mut self.inner;
            self.spin.run(statistics, || {
                result = attempt(inner);
                result.is_some()
            });
            if let Some(done) = result {
                return done;
            }
        }
        let mut has_slept = false;
        loop {
            let prepared = event.prepare();
            if let Some(done) = attempt(&mut self.inner) {
                if has_slept {
                    // Others may be there to go on: these queues cannot tell without trying, so wake one.
                    event.notify(1, statistics);
                }
                return done;
            }
            event.sleep(prepared, Deadline::Never, statistics);
            has_slept = true;
        }
    }
}

impl<T: Item, Q: Tries<T>, H: TriesHandle<T>> Handle<T> for WaitedHandle<'_, Q, H> {
    #[inline]
    fn put(&mut self, item: T) {
        self.publish_cpu(|shared| &shared.producer_cpu);
        let shared = self.shared;
        if !self.inner.try_put(&item) {
            self.wait(&shared.events.spaces, &shared.consumer_cpu, |inner| {
                inner.try_put(&item).then_some(())
            });
        }
        fence_unless(Q::LOCKED.0);
        shared.events.items.notify(1, &shared.statistics);
    }

    #[inline]
    fn get(&mut self) -> T {
        self.publish_cpu(|shared| &shared.consumer_cpu);
        let shared = self.shared;
        let item = match self.inner.try_get() {
            Some(item) => item,
            None => self.wait(&shared.events.items, &shared.producer_cpu, TriesHandle::try_get),
        };
        fence_unless(Q::LOCKED.1);
        shared.events.spaces.notify(1, &shared.statistics);
        item
    }
}
