//! RCQB: items of any size up to a bound. The items lie in a pool of buffers; a ring as in RCQS carries their numbers.
//!
//! No operation waits for another one's copying: an item is in the queue once it is whole, and a slow or dead copier holds
//! one buffer, nothing else.

use crate::Error;
use crate::cell::{Cell, SingleCell};
use crate::handle::{Local, View};
use crate::lane::Refusal;
use crate::operation::{Put, TakeBuffer};
use crate::pool::{Held, Pool, Reaped};
use crate::sync::{Acquire, Relaxed, is_killed};

/// The parts of an RCQB without the bytes, wherever they lie.
#[derive(Clone, Copy)]
pub struct BytesView<'a> {
    pub words: View<'a, SingleCell>,
    pub pool: Pool<'a>,
    pub participant: u32,
    pub identity: u64,
}

impl BytesView<'_> {
    /// Takes a place, if need be that of someone dead.
    pub fn join(&mut self, is_dead: impl Fn(u64) -> bool) -> Result<(), Error> {
        if let Some(place) = self.pool.join(self.identity) {
            self.participant = place;
            return Ok(());
        }
        let taken = self.pool.take_place_of_dead(self.identity, is_dead);
        self.participant = taken.ok_or(Error::TooManyParticipants)?;
        self.reap_place(&mut Local::new(&self.words.lanes), self.participant);
        Ok(())
    }

    /// `fill` gets the number of the buffer to copy into.
    #[inline(always)]
    pub fn try_put(
        &self,
        local: &mut Local,
        near: &mut usize,
        fill: impl FnOnce(usize),
    ) -> Result<(), Error> {
        if self.words.events.closed.load(Acquire) != 0 {
            return Err(Error::Closed);
        }
        let claimed = self.pool.claim(near, self.participant).ok_or(Error::Full)?;
        fill(claimed.index);
        let held = self.pool.finish(claimed).ok_or(Error::Corrupt)?;
        if let Err(refusal) = self.publish(local, held) {
            self.pool.release(held);
            return Err(self.words.error(refusal));
        }
        self.words.events.items.notify(1, self.words.statistics);
        Ok(())
    }

    #[inline(always)]
    fn publish(&self, local: &mut Local, held: Held) -> Result<(), Refusal> {
        local.count(&self.words.lanes);
        let (item, cpu) = (held.ring_item(), local.cpu);
        self.words.lanes.turn(&mut local.enqueue, &mut Put { item, cpu })
    }

    /// `read` gets the number of the buffer to copy out of.
    #[inline(always)]
    pub fn try_get<R>(
        &self,
        local: &mut Local,
        near: &mut usize,
        read: impl FnOnce(usize) -> R,
    ) -> Result<R, Error> {
        let held = self.take(local)?;
        *near = held.index;
        let _released_also_if_this_panics = Release { view: self, held };
        Ok(read(held.index))
    }

    #[inline(always)]
    fn take(&self, local: &mut Local) -> Result<Held, Error> {
        local.count(&self.words.lanes);
        let cpu = local.cpu;
        // Each vain turn removes an entry that somebody who died or was overtaken has left; there are at most as many as slots,
        // unless a peer keeps making them up.
        for _ in 0..2 * self.words.lanes.slots.len() + 64 {
            let mut take = TakeBuffer { pool: self.pool, participant: self.participant, cpu };
            match self.words.lanes.turn(&mut local.dequeue, &mut take) {
                Ok(Some(held)) => return Ok(held),
                Ok(None) => {}
                Err(refusal) => self.words.after_empty(refusal)?,
            }
        }
        Err(Error::Corrupt)
    }

    /// Repairs what dead participants left behind.
    pub fn reap(&self, local: &mut Local, is_dead: impl Fn(u64) -> bool) -> Reaped {
        let mut all = Reaped::default();
        for _ in 0..self.pool.participants.len() {
            let Some(place) = self.pool.take_place_of_dead(self.identity, &is_dead) else { break };
            all.add(self.reap_place(local, place));
            self.pool.leave(place, self.identity);
        }
        all
    }

    fn reap_place(&self, local: &mut Local, place: u32) -> Reaped {
        let named = |tell: &mut dyn FnMut(u64)| {
            for cell in self.words.lanes.slots.iter() {
                if let Some(item) = SingleCell::held_item(cell.load()) {
                    tell(item);
                }
            }
        };
        let reaped = self.pool.reap_place(place, named, |held| self.publish(local, held).is_ok());
        let statistics = self.words.statistics;
        statistics.lost_enqueues.fetch_add(reaped.lost_enqueues, Relaxed);
        statistics.lost_dequeues.fetch_add(reaped.lost_dequeues, Relaxed);
        statistics.rescued.fetch_add(reaped.rescued, Relaxed);
        self.words.events.items.wake_all();
        self.words.events.spaces.wake_all();
        reaped
    }
}

struct Release<'a, 'b> {
    view: &'a BytesView<'b>,
    held: Held,
}

impl Drop for Release<'_, '_> {
    #[inline(always)]
    fn drop(&mut self) {
        if is_killed() {
            return;
        }
        // A failure means that this process was thought dead and its item reported lost; it has it nevertheless.
        self.view.pool.release(self.held);
        self.view.words.events.spaces.notify(1, self.view.words.statistics);
    }
}

#[cfg(not(modeled))]
pub use in_memory::{BytesHandle, BytesState, Rcqb};

#[cfg(not(modeled))]
mod in_memory {
    use super::*;
    use crate::Stats;
    use crate::layout::{self, Config, Geometry, Kind, Memory};
    use crate::wait::Deadline;
    use core::ptr::NonNull;

    /// Tells whether a participant with this identity is surely dead.
    pub type IsDead = fn(u64) -> bool;

    /// Who takes part, and how it finds out that others are dead.
    #[derive(Clone, Copy)]
    pub struct Identity {
        pub own: u64,
        pub is_dead: IsDead,
    }

    /// A queue of byte strings, in memory of its own or shared; one value a process.
    pub struct Rcqb<M: Memory> {
        memory: M,
        geometry: Geometry,
        participant: u32,
        identity: Identity,
    }

    #[cfg(feature = "alloc")]
    impl Rcqb<layout::Heap> {
        /// A queue inside this process, where nobody dies alone.
        pub fn new(config: &Config) -> Result<Self, Error> {
            let memory = layout::Heap::new(Self::size_bytes(config)?)?;
            Self::create(memory, config, Identity { own: 1, is_dead: |_| false })
        }
    }

    impl<M: Memory> Rcqb<M> {
        pub fn size_bytes(config: &Config) -> Result<usize, Error> {
            Ok(Geometry::new(Kind::Bytes, config)?.total_size())
        }

        /// Makes a queue in zeroed memory that nobody else uses yet.
        pub fn create(memory: M, config: &Config, identity: Identity) -> Result<Self, Error> {
            layout::create(&memory, &Geometry::new(Kind::Bytes, config)?)?;
            Self::attach(memory, identity)
        }

        /// Takes part in a queue that exists in the memory.
        pub fn attach(memory: M, identity: Identity) -> Result<Self, Error> {
            let geometry = layout::attach(&memory)?;
            if geometry.kind != Kind::Bytes {
                return Err(Error::NotAQueue);
            }
            if identity.own == 0 {
                return Err(Error::Invalid);
            }
            let mut queue = Self { memory, geometry, participant: u32::MAX, identity };
            let (mut view, _) = queue.view();
            view.join(identity.is_dead)?;
            queue.participant = view.participant;
            Ok(queue)
        }

        fn view(&self) -> (BytesView<'_>, NonNull<u8>) {
            let (pool, payload) = layout::pool(&self.memory, &self.geometry);
            let words = layout::view(&self.memory, &self.geometry);
            let (participant, identity) = (self.participant, self.identity.own);
            (BytesView { words, pool, participant, identity }, payload)
        }

        /// A participant; each thread has its own.
        pub fn handle(&self) -> BytesHandle<'_> {
            let (view, payload) = self.view();
            BytesHandle {
                view,
                payload,
                stride: self.geometry.stride(),
                item_size: self.geometry.item_size as usize,
                local: Local::new(&view.words.lanes),
                near: 0,
                is_dead: self.identity.is_dead,
                vain: 0,
            }
        }

        /// A participant that counts as running on `cpu` until it looks for itself.
        pub fn handle_on_cpu(&self, cpu: u32) -> BytesHandle<'_> {
            let handle = self.handle();
            let local = Local::on(&handle.view.words.lanes, cpu, false);
            BytesHandle { local, ..handle }
        }

        /// A participant that goes on with what an earlier one of this queue had learned.
        pub fn handle_with(&self, state: BytesState) -> BytesHandle<'_> {
            BytesHandle { local: state.local, near: state.near, vain: state.vain, ..self.handle() }
        }

        /// Looks for participants that died, and repairs what they left. Waiting operations do this by themselves.
        pub fn reap(&self) -> Reaped {
            let (view, _) = self.view();
            view.reap(&mut Local::new(&view.words.lanes), self.identity.is_dead)
        }

        pub fn close(&self) {
            self.view().0.words.close();
        }

        pub fn is_closed(&self) -> bool {
            self.view().0.words.events.closed.load(Acquire) != 0
        }

        pub fn len(&self) -> usize {
            self.view().0.words.lanes.item_count()
        }

        pub fn is_empty(&self) -> bool {
            self.len() == 0
        }

        pub fn capacity(&self) -> usize {
            self.geometry.capacity()
        }

        pub fn item_size(&self) -> usize {
            self.geometry.item_size as usize
        }

        pub fn stats(&self) -> Stats {
            self.view().0.words.stats()
        }

        pub fn memory(&self) -> &M {
            &self.memory
        }
    }

    impl<M: Memory> Drop for Rcqb<M> {
        fn drop(&mut self) {
            if self.participant != u32::MAX {
                self.view().0.pool.leave(self.participant, self.identity.own);
            }
        }
    }

    /// What a participant has learned, for callers that cannot keep a handle. Of use with the same queue only.
    #[derive(Clone, Copy)]
    pub struct BytesState {
        local: Local,
        near: usize,
        vain: u32,
    }

    /// A participant of an RCQB: one a thread.
    pub struct BytesHandle<'a> {
        view: BytesView<'a>,
        payload: NonNull<u8>,
        stride: usize,
        item_size: usize,
        local: Local,
        near: usize,
        is_dead: IsDead,
        /// Attempts in vain, and naps: now and then one of them looks for the dead.
        vain: u32,
    }

    const VAIN_ATTEMPTS_PER_REAP: u32 = 1024;

    // SAFETY: the payload is reached through buffers that the handle holds, one at a time, and lives as long as the queue's memory.
    unsafe impl Send for BytesHandle<'_> {}

    impl BytesHandle<'_> {
        pub fn state(&self) -> BytesState {
            BytesState { local: self.local, near: self.near, vain: self.vain }
        }

        /// Puts a copy of `item` in: `Full` if there is no room, `Closed`, or `TooLarge`.
        #[inline]
        pub fn try_put(&mut self, item: &[u8]) -> Result<(), Error> {
            if item.len() > self.item_size {
                return Err(Error::TooLarge);
            }
            let Self { view, payload, stride, local, near, .. } = self;
            let fill = |index: usize| {
                let header = &view.pool.headers[index];
                // SAFETY: the payload has a stride for each header, which is at least `item_size`; what was checked above fits. The
                // buffer is held by this participant alone; a peer that writes there all the same changes bytes, which is all that they are.
                unsafe {
                    let buffer = payload.add(index * *stride).as_ptr();
                    core::ptr::copy_nonoverlapping(item.as_ptr(), buffer, item.len());
                }
                header.length.store(item.len() as u32, Relaxed);
            };
            let outcome = view.try_put(local, near, fill);
            if outcome == Err(Error::Full) {
                self.count_vain(1);
            }
            outcome
        }

        /// Gives the item to `read` where it lies: an address and a number of bytes, good until `read` returns. Peers that do not
        /// keep to the rules may change the bytes meanwhile.
        #[inline]
        pub fn try_get_with<R>(&mut self, read: impl FnOnce(*const u8, usize) -> R) -> Result<R, Error> {
            let Self { view, payload, stride, item_size, local, near, .. } = self;
            let look = |index: usize| {
                let length = view.pool.headers[index].length.load(Relaxed) as usize;
                if length > *item_size {
                    return Err(Error::Corrupt);
                }
                // SAFETY: the payload has a stride for each header.
                Ok(read(unsafe { payload.add(index * *stride) }.as_ptr(), length))
            };
            let outcome = view.try_get(local, near, look);
            if matches!(outcome, Err(Error::Empty)) {
                self.count_vain(1);
            }
            outcome?
        }

        #[cold]
        fn count_vain(&mut self, weight: u32) {
            self.vain += weight;
            if self.vain >= VAIN_ATTEMPTS_PER_REAP {
                self.vain = 0;
                self.view.reap(&mut self.local, self.is_dead);
            }
        }

        /// Copies the item to the front of `out` and tells its length. `out` must be as long as the queue's items may be.
        pub fn try_get(&mut self, out: &mut [u8]) -> Result<usize, Error> {
            if out.len() < self.item_size {
                return Err(Error::TooLarge);
            }
            self.try_get_with(|item, length| {
                // SAFETY: `length` is at most the item size, and both sides are at least that long.
                unsafe { core::ptr::copy_nonoverlapping(item, out.as_mut_ptr(), length) };
                length
            })
        }

        /// Waits for room until the deadline.
        pub fn put(&mut self, item: &[u8], deadline: Deadline) -> Result<(), Error> {
            self.wait_for(Error::Full, deadline, |handle| handle.try_put(item))
        }

        /// Waits for an item until the deadline.
        pub fn get(&mut self, out: &mut [u8], deadline: Deadline) -> Result<usize, Error> {
            self.wait_for(Error::Empty, deadline, |handle| handle.try_get(out))
        }

        pub fn get_with<R>(
            &mut self,
            deadline: Deadline,
            mut read: impl FnMut(*const u8, usize) -> R,
        ) -> Result<R, Error> {
            self.wait_for(Error::Empty, deadline, |handle| handle.try_get_with(&mut read))
        }

        fn wait_for<R>(
            &mut self,
            again: Error,
            deadline: Deadline,
            mut attempt: impl FnMut(&mut Self) -> Result<R, Error>,
        ) -> Result<R, Error> {
            match attempt(self) {
                Err(error) if error == again => {}
                outcome => return outcome,
            }
            let (view, mut local) = (self.view, self.local);
            let this = core::cell::RefCell::new(self);
            let outcome = view.words.wait_for(
                &mut local,
                deadline,
                again,
                |_| attempt(&mut this.borrow_mut()),
                || this.borrow_mut().count_vain(VAIN_ATTEMPTS_PER_REAP / 2),
            );
            this.borrow_mut().local.spin = local.spin;
            outcome
        }
    }
}
#[cfg(not(modeled))]
pub use in_memory::{Identity, IsDead};
