//! A participant's way to a queue of words (RCQS, RCQD).

use crate::cell::Cell;
use crate::lane::{Lane, Refusal};
use crate::lanes::{Choice, Lanes};
use crate::operation::{Put, PutMany, Take, TakeMany};
use crate::sync::{Acquire, Relaxed, SeqCst};
use crate::wait::{Deadline, Event, Events, Spin, Statistics, peer_elsewhere};
use crate::{Error, Stats, sys};

/// The parts of a queue of words, wherever they lie.
pub struct View<'a, C> {
    pub lanes: Lanes<'a, C>,
    pub events: &'a Events,
    pub statistics: &'a Statistics,
}

impl<C> Clone for View<'_, C> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<C> Copy for View<'_, C> {}

/// After this many operations a participant looks again on which CPU it runs.
const OPERATIONS_PER_LOOK: u32 = 64;

/// What a participant keeps for itself.
#[derive(Clone, Copy)]
pub struct Local {
    pub enqueue: Choice,
    pub dequeue: Choice,
    /// The CPU's number plus one, as it is published.
    pub cpu: u32,
    operations: u32,
    quick: bool,
    pub spin: Spin,
}

impl Local {
    pub fn new<C: Cell>(lanes: &Lanes<'_, C>) -> Self {
        let quick = sys::has_quick_cpu();
        Self::on(lanes, if cfg!(modeled) { 0 } else { sys::current_cpu(quick) }, quick)
    }

    pub(crate) fn on<C: Cell>(lanes: &Lanes<'_, C>, cpu: u32, quick: bool) -> Self {
        let home = lanes.home(cpu);
        let spin = Spin::default();
        Self { enqueue: home, dequeue: home, cpu: cpu + 1, operations: 0, quick, spin }
    }

    #[inline(always)]
    pub(crate) fn count<C: Cell>(&mut self, lanes: &Lanes<'_, C>) {
        self.operations += 1;
        if self.operations >= OPERATIONS_PER_LOOK {
            self.look(lanes);
        }
    }

    #[inline(never)]
    pub fn look<C: Cell>(&mut self, lanes: &Lanes<'_, C>) {
        self.operations = 0;
        if cfg!(modeled) {
            return;
        }
        let cpu = sys::current_cpu(self.quick);
        self.cpu = cpu + 1;
        let home = lanes.home(cpu).lane;
        for choice in [&mut self.enqueue, &mut self.dequeue] {
            if choice.lane != home {
                choice.lane = home;
                choice.bounds.from = 0;
            }
        }
    }
}

impl<'a, C: Cell> View<'a, C> {
    #[inline(always)]
    pub fn try_enqueue(&self, local: &mut Local, item: C::Item) -> Result<(), Error> {
        if self.events.closed.load(Acquire) != 0 {
            return Err(Error::Closed);
        }
        local.count(&self.lanes);
        let cpu = local.cpu;
        self.lanes.turn(&mut local.enqueue, &mut Put { item, cpu }).map_err(|r| self.error(r))?;
        self.events.items.notify(1, self.statistics);
        Ok(())
    }

    /// Puts in as many as there is room for in one lane; at least one, or an error.
    pub fn try_enqueue_batch(&self, local: &mut Local, items: &[C::Item]) -> Result<usize, Error> {
        if self.events.closed.load(Acquire) != 0 {
            return Err(Error::Closed);
        }
        local.count(&self.lanes);
        let cpu = local.cpu;
        let done = self
            .lanes
            .turn(&mut local.enqueue, &mut PutMany::<C> { items, cpu })
            .map_err(|r| self.error(r))?;
        self.events.items.notify(done, self.statistics);
        Ok(done)
    }

    #[inline(always)]
    pub fn try_dequeue(&self, local: &mut Local) -> Result<C::Item, Error> {
        local.count(&self.lanes);
        let cpu = local.cpu;
        let item = loop {
            match self.lanes.turn(&mut local.dequeue, &mut Take { cpu }) {
                Ok(item) => break item,
                Err(refusal) => self.after_empty(refusal)?,
            }
        };
        self.events.spaces.notify(1, self.statistics);
        Ok(item)
    }

    /// Takes what is there in one lane, at least one item, or an error.
    pub fn try_dequeue_batch(&self, local: &mut Local, out: &mut [C::Item]) -> Result<usize, Error> {
        local.count(&self.lanes);
        let cpu = local.cpu;
        let done = loop {
            match self.lanes.turn(&mut local.dequeue, &mut TakeMany::<C> { out, cpu }) {
                Ok(done) => break done,
                Err(refusal) => self.after_empty(refusal)?,
            }
        };
        self.events.spaces.notify(done, self.statistics);
        Ok(done)
    }

    /// An empty queue that is closed is sealed before that is told, so that no enqueue succeeds after it. Returns if an item
    /// came in between: at most as often as there are enqueues that began before the close.
    #[cold]
    pub fn after_empty(&self, refusal: Refusal) -> Result<(), Error> {
        if !matches!(refusal, Refusal::Empty) || self.events.closed.load(Acquire) == 0 {
            return Err(self.error(refusal));
        }
        if self.lanes.seal_empty().map_err(|r| self.error(r))? {
            return Err(Error::Closed);
        }
        Ok(())
    }

    pub fn error(&self, refusal: Refusal) -> Error {
        match refusal {
            Refusal::Full => Error::Full,
            Refusal::Empty => Error::Empty,
            Refusal::Sealed => Error::Closed,
            // With one lane the limit is never reached; with several the search deals with it.
            Refusal::Beyond | Refusal::Corrupt => Error::Corrupt,
        }
    }

    pub fn close(&self) {
        self.events.closed.fetch_or(1, SeqCst);
        self.events.items.wake_all();
        self.events.spaces.wake_all();
    }

    pub fn stats(&self) -> Stats {
        let sum =
            |of: fn(&Lane<'a, C>) -> u64| self.lanes.all().map(|lane| of(&lane)).fold(0, u64::wrapping_add);
        let dequeued = sum(Lane::settled_head);
        Stats {
            enqueued: sum(Lane::settled_tail),
            dequeued,
            sleeps: self.statistics.sleeps.load(Relaxed),
            wakes: self.statistics.wakes.load(Relaxed),
            spins_in_vain: self.statistics.spins_in_vain.load(Relaxed),
            lost_enqueues: self.statistics.lost_enqueues.load(Relaxed),
            lost_dequeues: self.statistics.lost_dequeues.load(Relaxed),
            rescued: self.statistics.rescued.load(Relaxed),
        }
    }

    /// Called after `attempt` said `again`. Tries until it says something else: spins where that can help, then sleeps.
    #[cold]
    #[inline(never)]
    pub fn wait_for<R>(
        &self,
        local: &mut Local,
        deadline: Deadline,
        again: Error,
        mut attempt: impl FnMut(&mut Local) -> Result<R, Error>,
        mut on_nap: impl FnMut(),
    ) -> Result<R, Error> {
        let enqueuing = again == Error::Full;
        let event: &Event = if enqueuing { &self.events.spaces } else { &self.events.items };
        let lanes = self.lanes;
        let ready =
            || lanes.all().any(|lane| if enqueuing { lane.seems_roomy() } else { lane.seems_ready(0) });
        local.look(&lanes);
        if peer_elsewhere(&lanes, local.cpu, !enqueuing) && local.spin.run(self.statistics, ready) {
            match attempt(local) {
                Err(error) if error == again => {}
                outcome => return outcome,
            }
        }
        let mut has_slept = false;
        loop {
            let prepared = event.prepare();
            match attempt(local) {
                Err(error) if error == again => {}
                outcome => {
                    if has_slept && ready() {
                        event.notify(1, self.statistics);
                    }
                    return outcome;
                }
            }
            if deadline.has_passed() {
                return Err(Error::TimedOut);
            }
            if event.sleep(prepared, deadline, self.statistics) {
                on_nap();
            }
            has_slept = true;
        }
    }
}

/// A participant of a queue of words: one a thread.
pub struct Handle<'a, C> {
    view: View<'a, C>,
    local: Local,
}

impl<'a, C: Cell> Handle<'a, C> {
    pub fn new(view: View<'a, C>) -> Self {
        let local = Local::new(&view.lanes);
        Self { view, local }
    }

    /// For tests and for those who know better: a participant that counts as running on `cpu`.
    pub fn on_cpu(view: View<'a, C>, cpu: u32) -> Self {
        let local = Local::on(&view.lanes, cpu, false);
        Self { view, local }
    }

    /// `Full` if there is no room, `Closed`, `TooLarge` if the item has more bits than a slot holds.
    #[inline(always)]
    pub fn try_enqueue(&mut self, item: C::Item) -> Result<(), Error> {
        if !C::fits(item) {
            return Err(Error::TooLarge);
        }
        self.view.try_enqueue(&mut self.local, item)
    }

    /// `Empty` if there is nothing, `Closed` if there never will be.
    #[inline(always)]
    pub fn try_dequeue(&mut self) -> Result<C::Item, Error> {
        self.view.try_dequeue(&mut self.local)
    }

    /// Puts in as many of `items`, from the first on, as there is room for now; at least one, or an error.
    pub fn try_enqueue_batch(&mut self, items: &[C::Item]) -> Result<usize, Error> {
        if items.iter().any(|item| !C::fits(*item)) {
            return Err(Error::TooLarge);
        }
        let (view, local) = (self.view, &mut self.local);
        gather(items.len(), |done| view.try_enqueue_batch(local, &items[done..]))
    }

    /// Takes as many items as are there now and `out` holds; at least one, or an error.
    pub fn try_dequeue_batch(&mut self, out: &mut [C::Item]) -> Result<usize, Error> {
        let (view, local) = (self.view, &mut self.local);
        gather(out.len(), |done| view.try_dequeue_batch(local, &mut out[done..]))
    }

    /// Waits for room until the deadline.
    #[inline]
    pub fn enqueue(&mut self, item: C::Item, deadline: Deadline) -> Result<(), Error> {
        match self.try_enqueue(item) {
            Err(Error::Full) => {}
            outcome => return outcome,
        }
        let view = self.view;
        view.wait_for(&mut self.local, deadline, Error::Full, |local| view.try_enqueue(local, item), || {})
    }

    /// Waits for an item until the deadline.
    #[inline]
    pub fn dequeue(&mut self, deadline: Deadline) -> Result<C::Item, Error> {
        match self.try_dequeue() {
            Err(Error::Empty) => {}
            outcome => return outcome,
        }
        let view = self.view;
        view.wait_for(&mut self.local, deadline, Error::Empty, |local| view.try_dequeue(local), || {})
    }

    /// Waits for room for all of `items`; tells how many went in if it gives up after the first.
    pub fn enqueue_batch(&mut self, items: &[C::Item], deadline: Deadline) -> Result<usize, Error> {
        if items.iter().any(|item| !C::fits(*item)) {
            return Err(Error::TooLarge);
        }
        let (view, local) = (self.view, &mut self.local);
        gather(items.len(), |done| {
            let attempt = |local: &mut Local| view.try_enqueue_batch(local, &items[done..]);
            match attempt(local) {
                Err(Error::Full) => view.wait_for(local, deadline, Error::Full, attempt, || {}),
                outcome => outcome,
            }
        })
    }

    /// Waits for the first item, then takes what is there.
    pub fn dequeue_batch(&mut self, out: &mut [C::Item], deadline: Deadline) -> Result<usize, Error> {
        if out.is_empty() {
            return Ok(0);
        }
        let (view, local) = (self.view, &mut self.local);
        let mut attempt =
            |local: &mut Local| gather(out.len(), |done| view.try_dequeue_batch(local, &mut out[done..]));
        match attempt(local) {
            Err(Error::Empty) => view.wait_for(local, deadline, Error::Empty, attempt, || {}),
            outcome => outcome,
        }
    }

    /// No enqueue that begins after this succeeds. What is in the queue can still be taken.
    pub fn close(&self) {
        self.view.close();
    }

    pub fn len(&self) -> usize {
        self.view.lanes.item_count()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn stats(&self) -> Stats {
        self.view.stats()
    }
}

/// Repeats a batch operation that may stop at the end of a lane. An error after the first success ends it without one.
fn gather(wanted: usize, mut step: impl FnMut(usize) -> Result<usize, Error>) -> Result<usize, Error> {
    let mut done = 0;
    while done < wanted {
        match step(done) {
            Ok(count) => done += count,
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
