//! A channel's memory as the service sees it. Everything that stands there is copied before it is looked at.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU64, fence};
use std::time::{SystemTime, UNIX_EPOCH};

use polytropo_copy::plan::Situation;
use polytropo_queue::{Borrowed, Config, Rcqs};
use polytropo_wire::VERSION;
use polytropo_wire::channel::{
    AREA_BYTES, AREAS_AT, Header, MAGIC, POSTS_PART_AT, QUEUE_AT, QUEUE_BYTES, QUEUE_CAPACITY, SLOTS,
    SLOTS_AT, Slot, TOLD, TOTAL_BYTES, area_at, progress, state,
};
use polytropo_wire::copies::Counts;
use polytropo_wire::message::{FILES_MAX, Operation, REPLY_WORDS, REQUEST_WORDS};
use polytropo_wire::posts::{
    self, Ledger, PERMITS_AT, POST_AREAS_AT, POST_BYTES, POSTS, POSTS_AT, Post, limit,
};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::copies::{Counting, Tally};
use crate::futex::wake_all;
use crate::held::Source;

/// A request, copied out of its slot.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub slot: usize,
    pub operation: Option<Operation>,
    pub words: [u64; REQUEST_WORDS],
}

/// A post that was taken, its words copied.
#[derive(Clone, Copy, Debug)]
pub struct Posted {
    pub number: usize,
    pub file: u64,
    pub offset: u64,
    pub bytes: usize,
}

/// The memory of one channel.
pub struct ChannelMemory {
    region: Arc<Region>,
    descriptor: OwnedFd,
    queue: Rcqs<Borrowed>,
}

/// The mapping itself.
struct Region {
    base: NonNull<u8>,
    tally: Arc<Tally>,
}

// SAFETY: the mapping belongs to the value; what lies in it is used through atomics, or copied as bytes.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn header(&self) -> &Header {
        // SAFETY: the header lies at the mapping's base, page-aligned, and is made of atomics.
        unsafe { self.base.cast().as_ref() }
    }
}

impl Counting for Region {
    fn counts(&self) -> Counts {
        self.header().copied.0.counts()
    }
}

impl ChannelMemory {
    /// `tally` counts what is copied in and out, on both sides.
    pub fn new(tally: Arc<Tally>) -> rustix::io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let descriptor = rustix::fs::memfd_create("polytropo-channel", flags)?;
        rustix::fs::ftruncate(&descriptor, TOTAL_BYTES as u64)?;
        // Nobody can shrink it under our hands, which would end this process.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&descriptor, seals)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, wherever the kernel likes.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), TOTAL_BYTES, protection, MapFlags::SHARED, &descriptor, 0)?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)?;
        // What every program uses, by one call instead of a fault a page. Older kernels cannot, and fault.
        // SAFETY: the beginning of the mapping, which stays what it is.
        let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), AREAS_AT, Advice::LinuxPopulateWrite) };
        let region = Arc::new(Region { base, tally });
        // SAFETY: that many bytes of the mapping, page-aligned; the value holds both this and the mapping.
        let queue_memory = unsafe { Borrowed::new(base.add(QUEUE_AT), QUEUE_BYTES) };
        let config = Config::strict(QUEUE_CAPACITY);
        let queue = Rcqs::create(queue_memory, &config).map_err(|_| Errno::NOMEM)?;
        let known: Arc<dyn Counting> = region.clone();
        region.tally.join(&known);
        let made = Self { region, descriptor, queue };
        crate::copies::hand_over(&made.header().plan.0);
        made.header().version.store(VERSION, Relaxed);
        made.header().magic.store(MAGIC, Release);
        Ok(made)
    }

    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    fn header(&self) -> &Header {
        self.region.header()
    }

    fn slot(&self, number: usize) -> &Slot {
        assert!(number < SLOTS);
        // SAFETY: all slots lie in the mapping, aligned, and are made of atomics.
        unsafe { self.region.base.add(SLOTS_AT).cast::<Slot>().add(number).as_ref() }
    }

    /// The program is told that nothing will be answered any more; those who wait are woken.
    pub fn end(&self) {
        self.header().ended.store(1, SeqCst);
        // Most channels end with their programs, and nobody sleeps. Who falls asleep just now looks again after a while.
        let sleeps = |number: &usize| self.slot(*number).state.load(SeqCst) == state::AWAITED;
        (0..SLOTS).filter(sleeps).for_each(|number| _ = wake_all(&self.slot(number).state));
        let sleeps = |number: &usize| self.post(*number).is_awaited();
        (0..POSTS).filter(sleeps).for_each(|number| _ = wake_all(&self.post(number).state));
    }

    /// Says that a thread on `cpu` (its number plus one) looks for requests, or with 0 that none does.
    pub fn publish_cpu(&self, cpu: u32) {
        self.header().service.cpu.store(cpu, Relaxed);
    }

    /// What the program says became of its calls: true or not, and small enough to be added up.
    pub fn told(&self) -> [u64; TOLD.len()] {
        const MOST: u64 = 1 << 48;
        std::array::from_fn(|place| self.header().told.counts[place].load(Relaxed).min(MOST))
    }

    /// To be called between saying that nobody looks and looking once more.
    pub fn fence(&self) {
        fence(SeqCst);
    }

    /// The CPU, plus one, on which the program asked last.
    pub fn client_cpu(&self) -> u32 {
        self.header().client.cpu.load(Relaxed)
    }

    /// The next request; None if there is none. An error means that the program has damaged the queue.
    pub fn next(&self) -> Result<Option<Request>, polytropo_queue::Error> {
        let mut participant = self.queue.handle();
        // An honest program puts in numbers of posted slots only; others are passed over, so many at a time.
        for _ in 0..QUEUE_CAPACITY {
            let number = match participant.try_dequeue() {
                Ok(number) => number,
                Err(polytropo_queue::Error::Empty) => return Ok(None),
                Err(error) => return Err(error),
            };
            let Some(number) = usize::try_from(number).ok().filter(|number| *number < SLOTS) else {
                continue;
            };
            let slot = self.slot(number);
            if !matches!(slot.state.load(Acquire), state::POSTED | state::AWAITED) {
                continue;
            }
            let operation = Operation::from_number(slot.operation.load(Relaxed));
            let words = std::array::from_fn(|at| slot.request[at].load(Relaxed));
            return Ok(Some(Request { slot: number, operation, words }));
        }
        Ok(None)
    }

    pub fn has_next(&self) -> bool {
        !self.queue.is_empty()
    }

    pub fn answer(&self, slot: usize, outcome: u32, words: &[u64; REPLY_WORDS]) {
        let slot = self.slot(slot);
        for (place, word) in slot.reply.iter().zip(words) {
            place.store(*word, Relaxed);
        }
        slot.outcome.store(outcome, Relaxed);
        if slot.state.swap(state::DONE, AcqRel) == state::AWAITED {
            wake_all(&slot.state);
        }
    }

    /// Before something is done that must not be done twice: its program may be left without an answer.
    pub fn begin(&self, slot: usize) {
        let slot = self.slot(slot);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        slot.reply[0].store(now.as_nanos() as u64, Relaxed);
        slot.progress.store(progress::BEGUN, Release);
    }

    /// A change of names is done, which made this inode, or none.
    pub fn changed(&self, slot: usize, inode: u64) {
        let slot = self.slot(slot);
        slot.reply[0].store(inode, Relaxed);
        slot.progress.store(progress::CHANGED, Release);
    }

    /// It is done, and these are the first words of the reply; or it failed, and nothing is.
    pub fn progress(&self, slot: usize, done: Option<&[u64]>) {
        let slot = self.slot(slot);
        for (place, word) in slot.reply.iter().zip(done.unwrap_or_default()) {
            place.store(*word, Relaxed);
        }
        let now = if done.is_some() { progress::DONE } else { progress::NONE };
        slot.progress.store(now, Release);
    }

    fn part(&self, at: usize) -> NonNull<u8> {
        // SAFETY: the part of posted writes lies in the mapping, and callers name places in it.
        unsafe { self.region.base.add(POSTS_PART_AT + at) }
    }

    fn post(&self, number: usize) -> &Post {
        assert!(number < POSTS);
        // SAFETY: all posts lie in the part, aligned, and are made of atomics.
        unsafe { self.part(POSTS_AT).cast::<Post>().add(number).as_ref() }
    }

    fn permit_word(&self, file: u64) -> &AtomicU64 {
        let index = (file & 0xffff) as usize;
        assert!(index < FILES_MAX);
        // SAFETY: a word for each index lies in the part, aligned.
        unsafe { self.part(PERMITS_AT).cast::<AtomicU64>().add(index).as_ref() }
    }

    /// The open file may be written without waiting.
    pub fn permit(&self, file: u64) {
        self.permit_word(file).store(file, SeqCst);
    }

    /// No more. What was posted is to be applied next.
    pub fn withdraw(&self, file: u64) {
        posts::withdraw(self.permit_word(file));
    }

    pub fn is_permitted(&self, file: u64) -> bool {
        self.permit_word(file).load(Relaxed) == file
    }

    /// Posts that were begun since the channel was made.
    pub fn posts_issued(&self) -> u64 {
        // SAFETY: begins the part, aligned, made of atomics.
        limit(unsafe { &self.part(0).cast::<Ledger>().as_ref().issued })
    }

    pub fn has_published(&self) -> bool {
        (0..POSTS).any(|number| self.post(number).pending(u64::MAX).is_some())
    }

    /// Takes what is published, in the order in which it is to be applied.
    pub fn take_posts(&self, taken: &mut Vec<Posted>) {
        taken.clear();
        let limit = self.posts_issued();
        let (mut found, mut count) = ([(0, 0); POSTS], 0);
        for number in 0..POSTS {
            if let Some(sequence) = self.post(number).pending(limit) {
                found[count] = (sequence, number);
                count += 1;
            }
        }
        let found = &mut found[..count];
        found.sort_unstable();
        let take = |(_, number): &(u64, usize)| {
            let post = self.post(*number);
            post.take().then(|| Posted {
                number: *number,
                file: post.file.load(Relaxed),
                offset: post.offset.load(Relaxed),
                bytes: (post.bytes.load(Relaxed) as usize).min(POST_BYTES),
            })
        };
        taken.extend(found.iter().filter_map(take));
    }

    /// Appends a post's bytes.
    pub fn copy_post(&self, post: &Posted, to: &mut Vec<u8>) {
        assert!(post.number < POSTS && post.bytes <= POST_BYTES);
        to.reserve(post.bytes);
        let from = self.part(POST_AREAS_AT + post.number * POST_BYTES);
        // SAFETY: the area lies in the part and there is room for so many bytes; the program may change them meanwhile, and any
        // bytes will do.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_mut_ptr().add(to.len()), post.bytes);
            to.set_len(to.len() + post.bytes);
        }
    }

    /// Of a post that is about to be appended: where that is.
    pub fn say_place(&self, number: usize, offset: u64) {
        self.post(number).say_place(offset);
    }

    /// Of a post that is done before that is told: it must not be done again, after later ones.
    pub fn say_applied(&self, number: usize, outcome: u32) {
        self.post(number).say_applied(outcome);
    }

    /// Where a post's bytes lie. The program may change them at any time.
    pub fn post_bytes(&self, post: &Posted) -> Source {
        assert!(post.number < POSTS && post.bytes <= POST_BYTES);
        Source { bytes: self.part(POST_AREAS_AT + post.number * POST_BYTES), count: post.bytes }
    }

    pub fn finish_post(&self, number: usize, outcome: u32) {
        let post = self.post(number);
        if post.finish(outcome) {
            wake_all(&post.state);
        }
    }

    /// As `finish_post`, for several: each is marked, and then all are told.
    pub fn mark_done(&self, number: usize, outcome: u32) {
        self.post(number).mark_done(outcome);
    }

    pub fn tell_done(&self, numbers: impl Iterator<Item = usize>) {
        fence(SeqCst);
        let awaited = numbers.filter(|number| self.post(*number).is_awaited());
        awaited.for_each(|number| _ = wake_all(&self.post(number).state));
    }

    /// Whether the service is at it still.
    pub fn is_taken(&self, number: usize) -> bool {
        self.post(number).kind() == posts::STATE_TAKEN
    }

    /// Copies the beginning of a slot's area. None beyond its end.
    pub fn take(&self, slot: usize, at: usize, bytes: &mut [u8]) -> Option<()> {
        let from = self.area(slot, at, bytes.len())?;
        // SAFETY: the range lies in the mapping; the program may change the bytes meanwhile, and any bytes will do.
        unsafe { self.copy(bytes.as_mut_ptr(), from, bytes.len(), Situation::Fresh) };
        Some(())
    }

    /// Puts bytes at the beginning of a slot's area. None beyond its end.
    pub fn put(&self, slot: usize, at: usize, bytes: &[u8]) -> Option<()> {
        let to = self.area(slot, at, bytes.len())?;
        // SAFETY: the range lies in the mapping; what the program does there meanwhile is its own loss.
        unsafe { self.copy(to, bytes.as_ptr(), bytes.len(), Situation::Handed) };
        Some(())
    }

    /// # Safety
    /// `from` may be read and `to` written for `count` bytes, and they do not overlap.
    unsafe fn copy(&self, to: *mut u8, from: *const u8, count: usize, situation: Situation) {
        self.region.tally.add(situation, count);
        // SAFETY: the caller's word.
        unsafe { crate::copies::copy(to, from, count, situation) }
    }

    fn area(&self, slot: usize, at: usize, count: usize) -> Option<*mut u8> {
        let end = at.checked_add(count)?;
        if slot >= SLOTS || end > AREA_BYTES {
            return None;
        }
        // SAFETY: the areas lie in the mapping, and `at` in the slot's one.
        Some(unsafe { self.region.base.add(area_at(slot) + at).as_ptr() })
    }
}

impl Drop for ChannelMemory {
    fn drop(&mut self) {
        let known: Arc<dyn Counting> = self.region.clone();
        self.region.tally.leave(&known);
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped in `ChannelMemory::new`; whoever uses the memory borrows from this value. A failure would only leave it mapped.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), TOTAL_BYTES) };
    }
}
