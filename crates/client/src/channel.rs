//! One channel: slots, posting, waiting.

use core::ptr::NonNull;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, fence};

use polytropo_queue::{Borrowed, Rcqs};
use polytropo_wire::channel::{
    AREA_BYTES, Header, MAGIC, POSTS_PART_AT, QUEUE_AT, QUEUE_BYTES, SLOTS, SLOTS_AT, Slot, TOLD, area_at,
    progress, state,
};
use polytropo_wire::hello::Welcome;
use polytropo_wire::message::{FILES_MAX, Operation, REPLY_WORDS, REQUEST_WORDS, outcome};
use polytropo_wire::posts::{Ledger, PERMITS_AT, POST_AREAS_AT, POST_BYTES, POSTS, POSTS_AT, Post, Turn};

use crate::answers::Answers;
use crate::arena::Arena;
use crate::connect::Refused;
use crate::copies::{Copies, Situation};
use crate::listings::Listings;
use crate::lookups::Lookups;
use crate::posts::Posts;
use crate::spin::Spin;
use crate::sys::{self, Descriptor, Mapping};
use crate::{Amid, EAGAIN, EPROTO, Error, Result};

/// Turns of the loop that waits while the service runs on another CPU: some 20 us.
const SPIN_TURNS: u32 = 2_000;
/// The same for what makes, removes or moves names, or may: the host alone takes 10 to 20 us for it, and who sleeps is woken just then.
const SPIN_TURNS_OF_CHANGES: u32 = 5_000;
/// The longest sleep before a look whether the service is still there.
const NAP_NS: i64 = 100_000_000;
/// How many naps a write that a dead service was at waits for somebody to finish it.
const NAPS_AFTER_DEATH_MAX: u32 = 100;
/// How often a thread tries to get a slot before it says so, in naps of a millisecond.
const SLOT_NAPS_MAX: u32 = 10_000;

/// What happened on this channel.
#[derive(Default, Debug)]
pub struct Counters {
    pub requests: AtomicU64,
    /// Reads that were answered from a window or from carried bytes.
    pub local_reads: AtomicU64,
    /// Questions about paths that were answered from what is kept.
    pub local_answers: AtomicU64,
    pub sleeps: AtomicU64,
    pub rings: AtomicU64,
    pub window_misses: AtomicU64,
    /// Writes that did not wait.
    pub posted_writes: AtomicU64,
}

/// One process's way to its service.
pub struct Channel {
    queue: Rcqs<Borrowed>,
    memory: Mapping,
    socket: Descriptor,
    bell: Descriptor,
    pub(crate) windows: Descriptor,
    pub(crate) arena: Arena,
    /// None: nothing may be kept.
    pub(crate) lookups: Option<Lookups>,
    pub(crate) listings: Option<Listings>,
    pub(crate) copies: Copies,
    /// A bit for each slot in use.
    taken: AtomicU32,
    /// A bit for each slot in use whose answer nobody waits for.
    posted: AtomicU32,
    pub(crate) posts: Posts,
    quick_cpu: bool,
    spin: Spin,
    post_spin: Spin,
    pub counters: Counters,
    /// `st_dev` of the mount, as statx(2) tells it (major << 32 | minor), and the mount's number.
    pub device: u64,
    pub mount_id: u64,
    /// Which of a process's channels it is, for those who had several.
    label: u32,
    /// Nothing more is expected of it; its descriptors may belong to another.
    given_up: AtomicBool,
}

/// A slot that this thread holds.
pub(crate) struct Claim<'a> {
    channel: &'a Channel,
    number: usize,
}

/// What came back.
pub(crate) struct Reply {
    /// As it stands in the slot.
    pub outcome: u32,
    pub words: [u64; REPLY_WORDS],
}

impl Channel {
    pub(crate) fn over(
        memory: Mapping,
        socket: Descriptor,
        bell: Descriptor,
        windows: Descriptor,
        lookups: Option<Lookups>,
        answers: Option<Answers>,
        welcome: &Welcome,
    ) -> core::result::Result<Self, Refused> {
        // SAFETY: that part lies in the mapping, page-aligned, and the channel holds both.
        let queue_memory = unsafe { Borrowed::new(memory.base().add(QUEUE_AT), QUEUE_BYTES) };
        let queue = Rcqs::attach(queue_memory).map_err(|_| Refused::Protocol)?;
        let made = Self {
            queue,
            memory,
            socket,
            bell,
            windows,
            arena: Arena::new()?,
            listings: if lookups.is_some() { Listings::new(answers).ok() } else { None },
            lookups,
            copies: Copies::new(),
            taken: AtomicU32::new(0),
            posted: AtomicU32::new(0),
            posts: Posts::default(),
            quick_cpu: sys::has_quick_cpu(),
            spin: Spin::default(),
            post_spin: Spin::default(),
            counters: Counters::default(),
            device: welcome.device,
            mount_id: welcome.mount_id,
            label: 0,
            given_up: AtomicBool::new(false),
        };
        if made.header().magic.load(Acquire) != MAGIC {
            return Err(Refused::Protocol);
        }
        Ok(made)
    }

    pub(crate) fn header(&self) -> &Header {
        // SAFETY: the header lies at the beginning of the mapping, page-aligned, and is made of atomics.
        unsafe { self.memory.base().cast().as_ref() }
    }

    fn slot(&self, number: usize) -> &Slot {
        debug_assert!(number < SLOTS);
        // SAFETY: claims have numbers below SLOTS, all of which lie in the mapping, aligned; slots are made of atomics.
        unsafe { self.memory.base().add(SLOTS_AT).cast::<Slot>().add(number).as_ref() }
    }

    /// Tells the service what became of calls so far, in the order of [`TOLD`]; nothing depends on it.
    pub fn tell(&self, counts: [u64; TOLD.len()]) {
        for (place, count) in self.header().told.counts.iter().zip(counts) {
            place.store(count, Relaxed);
        }
    }

    fn part(&self, at: usize) -> NonNull<u8> {
        // SAFETY: the part of posted writes lies in the mapping, and callers name places in it.
        unsafe { self.memory.base().add(POSTS_PART_AT + at) }
    }

    /// Sequence numbers of posts.
    pub(crate) fn issued(&self) -> &AtomicU64 {
        // SAFETY: begins the part, aligned, made of atomics.
        &unsafe { self.part(0).cast::<Ledger>().as_ref() }.issued
    }

    pub(crate) fn post(&self, number: usize) -> &Post {
        debug_assert!(number < POSTS);
        // SAFETY: numbers are below POSTS, all of which lie in the part, aligned; posts are made of atomics.
        unsafe { self.part(POSTS_AT).cast::<Post>().add(number).as_ref() }
    }

    pub(crate) fn post_area(&self, number: usize) -> NonNull<u8> {
        debug_assert!(number < POSTS);
        self.part(POST_AREAS_AT + number * POST_BYTES)
    }

    /// Holds the number of the open file of that index while it may be written without waiting.
    pub(crate) fn permit(&self, file: u64) -> &AtomicU64 {
        let index = (file & 0xffff) as usize % FILES_MAX;
        // SAFETY: a word for each index lies in the part, aligned.
        unsafe { self.part(PERMITS_AT).cast::<AtomicU64>().add(index).as_ref() }
    }

    /// Has the service look at what was posted, if it does not anyway.
    pub(crate) fn notify_posts(&self) -> u32 {
        let cpu = sys::current_cpu(self.quick_cpu);
        self.notify(cpu);
        cpu
    }

    /// Looks out a while, if the service runs on another CPU than `cpu`, for the end of that write; tells whether it came.
    pub(crate) fn look_out_for(&self, post: &Post, turn: Turn, cpu: u32) -> bool {
        let service_cpu = self.header().service.cpu.load(Relaxed);
        if service_cpu == 0 || service_cpu == cpu || !self.post_spin.should_look() {
            return false;
        }
        for _ in 0..SPIN_TURNS {
            if post.pending_turn() != Some(turn) {
                self.post_spin.looked(true);
                return true;
            }
            core::hint::spin_loop();
        }
        self.post_spin.looked(false);
        false
    }

    /// Sleeps until that write is done, which the service was notified of after it was published. One's own is taken back when the channel
    /// has ended.
    pub(crate) fn wait_post(&self, post: &Post, turn: Turn, own: bool) -> Result<()> {
        let mut naps_after_death = 0;
        let done = post.wait(turn, |word| {
            self.counters.sleeps.fetch_add(1, Relaxed);
            sys::futex_wait(&post.state, word, NAP_NS);
            if post.pending_turn() != Some(turn) {
                return true;
            }
            // One that was taken will be done: if the service died, by whoever ends the channel then. A service that ended it may die as well.
            let dead = self.has_hung_up();
            if (dead || self.has_ended()) && (!own || post.take_back()) {
                return false;
            }
            naps_after_death += u32::from(dead);
            naps_after_death <= NAPS_AFTER_DEATH_MAX
        });
        if done { Ok(()) } else { Err(Error::Gone) }
    }

    /// Whether the service has given this channel up. Its end by death shows only when something is asked.
    pub fn has_ended(&self) -> bool {
        self.header().ended.load(Acquire) != 0
    }

    fn has_hung_up(&self) -> bool {
        self.given_up.load(Acquire) || sys::has_hung_up(&self.socket)
    }

    pub fn label(&self) -> u32 {
        self.label
    }

    /// Takes the place of a channel that is of no use any more, which is never dropped: gets its descriptors' numbers, so that whoever still
    /// works with it does no harm by them.
    pub fn succeed(&mut self, former: &Channel, label: u32) {
        self.label = label;
        former.given_up.store(true, Release);
        self.socket.take_number_of(&former.socket);
        self.bell.take_number_of(&former.bell);
        self.windows.take_number_of(&former.windows);
        former.lookups.iter().for_each(Lookups::drop_memory);
        former.listings.iter().for_each(Listings::drop_memory);
    }

    /// In a forked child: the shared memory is not there, so nothing may touch it. Closes the descriptors.
    pub fn forget_in_child(self) {
        let this = core::mem::ManuallyDrop::new(self);
        // SAFETY: each is read once, and the value that they lie in is never used or dropped again. The mappings are left alone: they
        // are not there in a child, and by now perhaps something else is.
        unsafe {
            drop(core::ptr::read(&this.socket));
            drop(core::ptr::read(&this.bell));
            drop(core::ptr::read(&this.windows));
            drop(core::ptr::read(&this.arena));
            if let Some(lookups) = core::ptr::read(&this.lookups) {
                lookups.forget_in_child();
            }
            if let Some(listings) = core::ptr::read(&this.listings) {
                listings.forget_in_child();
            }
            // Its code is inherited.
            drop(core::ptr::read(&this.copies));
        }
    }

    /// Numbers of the descriptors that belong to this channel: programs must neither see nor close them.
    pub fn descriptors(&self) -> [i32; 3] {
        [self.socket.number(), self.bell.number(), self.windows.number()]
    }

    /// A slot for one request. EAGAIN when all are taken for ten seconds.
    pub(crate) fn claim(&self) -> Result<Claim<'_>> {
        if self.posted.load(Relaxed) != 0 {
            self.reclaim_posted();
        }
        for nap in 0..SLOT_NAPS_MAX {
            let taken = self.taken.load(Relaxed);
            if taken != u32::MAX {
                let bit = 1 << taken.trailing_ones();
                if self.taken.fetch_or(bit, AcqRel) & bit == 0 {
                    return Ok(Claim { channel: self, number: bit.trailing_zeros() as usize });
                }
                continue;
            }
            if self.reclaim_posted() {
                continue;
            }
            if self.has_ended() || (nap % 100 == 99 && self.has_hung_up()) {
                return Err(Error::Gone);
            }
            sys::futex_wait(&self.taken, u32::MAX, 1_000_000);
        }
        Err(Error::Errno(EAGAIN))
    }

    /// Frees posted slots that are done.
    fn reclaim_posted(&self) -> bool {
        let mut posted = self.posted.load(Acquire);
        let mut any = false;
        while posted != 0 {
            let number = posted.trailing_zeros() as usize;
            let bit = 1 << number;
            posted &= !bit;
            let slot = self.slot(number);
            if slot.state.load(Acquire) == state::DONE && self.posted.fetch_and(!bit, AcqRel) & bit != 0 {
                slot.state.store(state::FREE, Relaxed);
                self.taken.fetch_and(!bit, Release);
                any = true;
            }
        }
        any
    }

    /// Has the service look at the queue.
    fn notify(&self, cpu: u32) {
        self.header().client.cpu.store(cpu, Relaxed);
        // The number is in the queue before we look whether the service sleeps; it does the two in the other order.
        fence(SeqCst);
        if self.header().service.cpu.load(Relaxed) == 0 {
            self.counters.rings.fetch_add(1, Relaxed);
            sys::ring(&self.bell);
        }
    }

    fn put(&self, number: usize) -> Result<()> {
        if self.has_ended() {
            return Err(Error::Gone);
        }
        self.counters.requests.fetch_add(1, Relaxed);
        // An honest queue has room for every slot.
        self.queue.handle().try_enqueue(number as u64).map_err(|_| Error::Gone)
    }

    fn wait(&self, slot: &Slot, cpu: u32, turns: u32) -> Result<()> {
        let service_cpu = self.header().service.cpu.load(Relaxed);
        if service_cpu != 0 && service_cpu != cpu && self.spin.should_look() {
            for _ in 0..turns {
                if slot.state.load(Acquire) == state::DONE {
                    self.spin.looked(true);
                    return Ok(());
                }
                core::hint::spin_loop();
            }
            self.spin.looked(false);
        }
        loop {
            match slot.state.compare_exchange(state::POSTED, state::AWAITED, AcqRel, Acquire) {
                Ok(_) | Err(state::AWAITED) => {}
                Err(_) => return Ok(()),
            }
            self.counters.sleeps.fetch_add(1, Relaxed);
            sys::futex_wait(&slot.state, state::AWAITED, NAP_NS);
            if slot.state.load(Acquire) == state::DONE {
                return Ok(());
            }
            if self.has_ended() || self.has_hung_up() {
                return Err(Error::Gone);
            }
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.arena.unmap_windows();
    }
}

impl Claim<'_> {
    pub fn capacity(&self) -> usize {
        AREA_BYTES
    }

    fn area(&self) -> NonNull<u8> {
        // SAFETY: the areas lie in the mapping.
        unsafe { self.channel.memory.base().add(area_at(self.number)) }
    }

    /// Puts bytes into the slot's area. EINVAL beyond its end.
    pub fn put(&self, at: usize, bytes: &[u8]) -> Result<()> {
        // SAFETY: a slice is readable.
        unsafe { self.put_raw(at, bytes.as_ptr(), bytes.len()) }
    }

    /// # Safety
    /// `from` must be readable for `count` bytes, as far as the caller wants to answer for faults.
    pub unsafe fn put_raw(&self, at: usize, from: *const u8, count: usize) -> Result<()> {
        if at.checked_add(count).is_none_or(|end| end > AREA_BYTES) {
            return Err(Error::Errno(crate::EINVAL));
        }
        // SAFETY: the range lies in the area, just checked, which is this claim's own; the service reads it only after it was posted, as
        // bytes that may change at any time.
        unsafe { self.channel.copy(self.area().as_ptr().add(at), from, count, Situation::Handed) };
        Ok(())
    }

    /// Takes the first `count` bytes of the area.
    ///
    /// # Safety
    /// `to` must be writable for `count` bytes.
    pub unsafe fn take_raw(&self, to: *mut u8, count: usize) -> Result<()> {
        if count > AREA_BYTES {
            return Err(Error::Errno(EPROTO));
        }
        // SAFETY: as in `put_raw`.
        unsafe { self.channel.copy(to, self.area().as_ptr(), count, Situation::Fresh) };
        Ok(())
    }

    /// Words that lie in the area from `at` on, all of them below its end.
    pub fn take_words<const N: usize>(&self, at: usize, words: &mut [u64; N]) {
        assert!(at + N * 8 <= AREA_BYTES);
        for (index, word) in words.iter_mut().enumerate() {
            // SAFETY: within the area, just checked; the service may write there at any time, and then the words mean nothing.
            *word = unsafe { self.area().add(at + index * 8).cast::<u64>().read_unaligned() };
        }
    }

    fn write(&self, operation: Operation, request: &[u64]) {
        let slot = self.channel.slot(self.number);
        slot.operation.store(operation as u32, Relaxed);
        for (place, word) in slot.request.iter().zip(request.iter().chain(core::iter::repeat(&0))) {
            place.store(*word, Relaxed);
        }
        slot.progress.store(progress::NONE, Relaxed);
        slot.state.store(state::POSTED, Release);
    }

    /// Asks and waits for the answer.
    pub fn ask(&self, operation: Operation, request: &[u64]) -> Result<Reply> {
        let reply = self.ask_whole(operation, request)?;
        result_of(reply.outcome)?;
        Ok(reply)
    }

    /// The same, where a failure's words are of interest, too.
    pub fn ask_whole(&self, operation: Operation, request: &[u64]) -> Result<Reply> {
        debug_assert!(request.len() <= REQUEST_WORDS);
        let channel = self.channel;
        let slot = channel.slot(self.number);
        self.write(operation, request);
        channel.put(self.number)?;
        let cpu = sys::current_cpu(channel.quick_cpu);
        channel.notify(cpu);
        let changes = operation.is_change() || operation == Operation::Open;
        let turns = if changes { SPIN_TURNS_OF_CHANGES } else { SPIN_TURNS };
        let outcome = match channel.wait(slot, cpu, turns) {
            Ok(()) => slot.outcome.load(Relaxed),
            Err(Error::Gone) => match slot.progress.load(Acquire) {
                progress::DONE => 0,
                progress::BEGUN => {
                    return Err(Error::GoneAmid(Amid::Begun { at_ns: slot.reply[0].load(Relaxed) }));
                }
                progress::CHANGED => {
                    return Err(Error::GoneAmid(Amid::Done { inode: slot.reply[0].load(Relaxed) }));
                }
                _ => return Err(Error::Gone),
            },
            Err(error) => return Err(error),
        };
        let mut words = [0; REPLY_WORDS];
        for (word, place) in words.iter_mut().zip(&slot.reply) {
            *word = place.load(Relaxed);
        }
        Ok(Reply { outcome, words })
    }

    /// Asks and does not wait: for what cannot fail.
    pub fn post(self, operation: Operation, request: &[u64]) -> Result<()> {
        let (channel, bit) = (self.channel, 1 << self.number);
        self.write(operation, request);
        channel.put(self.number)?;
        channel.posted.fetch_or(bit, AcqRel);
        // Freed by whoever needs a slot and finds it done.
        core::mem::forget(self);
        channel.notify(sys::current_cpu(channel.quick_cpu));
        Ok(())
    }
}

/// What an outcome means.
pub(crate) fn result_of(outcome: u32) -> Result<()> {
    match outcome {
        0 => Ok(()),
        outcome::KERNEL => Err(Error::Kernel),
        errno @ 1..4096 => Err(Error::Errno(errno as i32)),
        _ => Err(Error::Errno(EPROTO)),
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let slot = self.channel.slot(self.number);
        // One that was asked and never answered (the service is gone) stays taken: the answer might still come.
        if matches!(slot.state.load(Acquire), state::POSTED | state::AWAITED) {
            return;
        }
        slot.state.store(state::FREE, Relaxed);
        self.channel.taken.fetch_and(!(1 << self.number), Release);
    }
}
