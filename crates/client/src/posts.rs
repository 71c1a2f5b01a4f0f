//! Posted writes: the program's side. See [`polytropo_wire::posts`].

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64};

use polytropo_wire::message::{Operation, opened_flags};
use polytropo_wire::posts::{POST_BYTES, POSTS, Post, RING_AT, STATE_DONE, Turn};

use crate::channel::Channel;
use crate::files::{File, InUse};
use crate::sys;
use crate::{EINVAL, EIO, Error, Result};

/// How long a file is not closed whose writes are not known to be done, though the service is dead, or has ended the channel.
const NAPS_AFTER_DEATH_MAX: u32 = 10_000;
const NAPS_AFTER_END_MAX: u32 = 100;
const NAP_NS: i64 = 1_000_000;
/// Looks whether another thread is through with what it reclaims, which takes it a microsecond, and naps in case it does not run: or is the one
/// whose handler of a signal waits here, and never gets through.
const LOOKS_AT_RECLAIMING: u32 = 1_000;
const NAPS_FOR_RECLAIMING_MAX: u32 = 100;
/// How often a thread waits for room that others take, before it asks instead.
const TRIES_MAX: usize = 16;

/// Which posts are in use.
#[derive(Default)]
pub(crate) struct Posts {
    /// A bit for each one that is taken.
    taken: AtomicU64,
    /// A bit for each taken one whose write has returned: freed by whoever finds it done.
    left: AtomicU64,
    /// Threads that have taken bits out of `left` and have not told all of what failed.
    reclaiming: AtomicU32,
}

/// Numbers of the bits that are set.
fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let number = (word != 0).then(|| word.trailing_zeros() as usize)?;
        word &= word - 1;
        Some(number)
    })
}

impl Channel {
    /// pwrite(2) without waiting; None if this file's writes wait, or if there are too many bytes.
    ///
    /// # Safety
    /// `from` must be readable for `count` bytes, as far as the caller wants to answer for faults.
    #[inline]
    pub(crate) unsafe fn post_write(
        &self,
        used: &InUse<'_>,
        from: *const u8,
        count: usize,
        offset: u64,
    ) -> Result<Option<usize>> {
        let permit = self.permit(used.file.0);
        if permit.load(Relaxed) != used.file.0 || count == 0 || count > POST_BYTES {
            return Ok(None);
        }
        if used.flags() & opened_flags::POSTS == 0 {
            return Ok(None);
        }
        self.told(used)?;
        if offset.checked_add(count as u64).is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(Error::Errno(EINVAL));
        }
        let Some(number) = self.take_post()? else { return Ok(None) };
        let (post, bit) = (self.post(number), 1 << number);
        // SAFETY: the area is as long as checked above, and this thread's own until the post is published; `from` is the caller's word.
        unsafe { core::ptr::copy_nonoverlapping(from, self.post_area(number).as_ptr(), count) };
        post.file.store(used.file.0, Relaxed);
        post.offset.store(offset, Relaxed);
        post.bytes.store(count as u32, Relaxed);
        // Before it can be done: whoever frees it counts down.
        used.state.posted.fetch_add(1, Relaxed);
        used.state.posted_any.store(1, Relaxed);
        if post.publish(self.issued(), permit, used.file.0) {
            self.posts.left.fetch_or(bit, AcqRel);
            // Threads may lose a count to each other.
            let posted = &self.counters.posted_writes;
            posted.store(posted.load(Relaxed) + 1, Relaxed);
            if post.sequence.load(Relaxed) % RING_AT == 0 {
                self.reclaim_posts();
                self.notify_posts();
            }
            return Ok(Some(count));
        }
        // Somebody else came to the file meanwhile.
        let waited = self.wait_own_post(post);
        used.state.posted.fetch_sub(1, Relaxed);
        waited?;
        let outcome = post.outcome.load(Relaxed);
        self.free_post(number);
        match outcome {
            0 => Ok(Some(count)),
            errno @ 1..4096 => Err(Error::Errno(errno as i32)),
            _ => Err(Error::Errno(EIO)),
        }
    }

    fn wait_own_post(&self, post: &Post) -> Result<()> {
        let Some(turn) = post.pending_turn() else { return Ok(()) };
        let cpu = self.notify_posts();
        if self.look_out_for(post, turn, cpu) { Ok(()) } else { self.wait_post(post, turn, true) }
    }

    fn free_post(&self, number: usize) {
        self.post(number).free();
        self.posts.taken.fetch_and(!(1 << number), Release);
    }

    /// A post of this thread's own. None if the service does not get on, or others are faster: then by request.
    fn take_post(&self) -> Result<Option<usize>> {
        for _ in 0..TRIES_MAX {
            let mut taken = self.posts.taken.load(Relaxed);
            while taken != u64::MAX {
                let bit = 1 << taken.trailing_ones();
                taken = self.posts.taken.fetch_or(bit, AcqRel);
                if taken & bit == 0 {
                    return Ok(Some(bit.trailing_zeros() as usize));
                }
            }
            if self.reclaim_posts() {
                continue;
            }
            let left = self.posts.left.load(Acquire);
            if left == 0 {
                return Ok(None);
            }
            self.wait_for_room(left)?;
            self.reclaim_posts();
        }
        Ok(None)
    }

    /// Waits until one of those writes is done, awake, or else until half of them are: who sleeps until the first one is done keeps the service
    /// from the others.
    #[cold]
    fn wait_for_room(&self, left: u64) -> Result<()> {
        let mut order = [(0, Turn::default(), 0); POSTS];
        let mut count = 0;
        for number in bits(left) {
            let post = self.post(number);
            // The next write that the post is used for may be one that nobody tells the service of, so this is waited for and no other.
            let Some(turn) = post.pending_turn() else { return Ok(()) };
            order[count] = (post.sequence.load(Relaxed), turn, number);
            count += 1;
        }
        let cpu = self.notify_posts();
        let by_sequence = |entry: &(u64, Turn, usize)| entry.0;
        let (first, &mut (_, turn, number), _) =
            order[..count].select_nth_unstable_by_key(count / 2, by_sequence);
        if let Some(&(_, turn, number)) = first.iter().min_by_key(|entry| entry.0)
            && self.look_out_for(self.post(number), turn, cpu)
        {
            return Ok(());
        }
        self.wait_post(self.post(number), turn, false)
    }

    /// Frees posts that are done; what failed is kept for the next call on the file.
    pub(crate) fn reclaim_posts(&self) -> bool {
        let is_done = |number: &usize| self.post(*number).kind() == STATE_DONE;
        let done =
            bits(self.posts.left.load(Acquire)).filter(is_done).fold(0, |done, number| done | 1 << number);
        if done == 0 {
            return false;
        }
        // Before they are missing from `left`, for whoever waits until all is told.
        self.posts.reclaiming.fetch_add(1, AcqRel);
        // From here on they are this thread's own. Some may be the next write's by now, which is left again.
        let ours = self.posts.left.fetch_and(!done, AcqRel) & done;
        let mut freed = 0;
        for number in bits(ours) {
            let post = self.post(number);
            if post.kind() != STATE_DONE {
                self.posts.left.fetch_or(1 << number, AcqRel);
                continue;
            }
            if let Some(state) = self.arena.file((post.file.load(Relaxed) & 0xffff) as usize) {
                let outcome = post.outcome.load(Relaxed);
                if outcome != 0 {
                    state.error.store(outcome, Relaxed);
                }
                // After the error, for whoever waits for the last one.
                state.posted.fetch_sub(1, Release);
            }
            post.free();
            freed |= 1 << number;
        }
        if freed != 0 {
            self.posts.taken.fetch_and(!freed, Release);
        }
        self.posts.reclaiming.fetch_sub(1, Release);
        freed != 0
    }

    /// Frees what is done. Returns when what had failed of the file's writes is known, also where another thread is just about to tell it.
    fn reclaim_all(&self, used: &InUse<'_>) {
        let mut looks = 0;
        loop {
            self.reclaim_posts();
            // What others go on posting to the file need not be waited for: mostly nobody reclaims at this moment.
            if used.state.posted.load(Acquire) == 0 || self.posts.reclaiming.load(Acquire) == 0 {
                break;
            }
            looks += 1;
            match looks {
                0..LOOKS_AT_RECLAIMING => core::hint::spin_loop(),
                _ if looks < LOOKS_AT_RECLAIMING + NAPS_FOR_RECLAIMING_MAX => {
                    sys::futex_wait(&AtomicU32::new(0), 0, NAP_NS);
                }
                _ => break,
            }
        }
        // What that thread put back since the look, because it was the next write's.
        self.reclaim_posts();
    }

    /// Returns when all that this process wrote to the file without waiting is applied; tells what failed, once.
    #[inline]
    pub(crate) fn settle(&self, used: &InUse<'_>) -> Result<()> {
        if used.state.posted.load(Acquire) != 0 {
            self.settle_posts(used)?;
        }
        self.told(used)
    }

    /// As `settle`, and what was posted is no longer held by the service either.
    pub(crate) fn settle_all(&self, used: &InUse<'_>) -> Result<()> {
        if used.state.posted_any.load(Relaxed) != 0 {
            self.claim()?.ask(Operation::Ping, &[used.file.0])?;
            self.reclaim_all(used);
        }
        self.told(used)
    }

    /// Returns when it is known what became of all that was written to the file without waiting, of a channel that is of no other use any
    /// more.
    pub fn settle_gone(&self, file: File) -> Result<()> {
        self.settle_dead(&self.enter(file)?)
    }

    /// As `settle_all`, where the service is gone: whoever ends the channel then does what was posted. What nobody did is lost.
    #[cold]
    pub(crate) fn settle_dead(&self, used: &InUse<'_>) -> Result<()> {
        let mut naps = 0;
        loop {
            self.reclaim_posts();
            if used.state.posted.load(Acquire) == 0 {
                return self.told(used);
            }
            // Others may just be about to say that they are through.
            let naps_max = if self.has_ended() { NAPS_AFTER_END_MAX } else { NAPS_AFTER_DEATH_MAX };
            if naps >= naps_max {
                return Err(Error::Errno(EIO));
            }
            naps += 1;
            sys::futex_wait(&AtomicU32::new(0), 0, NAP_NS);
        }
    }

    #[cold]
    fn settle_posts(&self, used: &InUse<'_>) -> Result<()> {
        // Before any request is done, what was posted is.
        self.claim()?.ask(Operation::Ping, &[0])?;
        self.reclaim_all(used);
        // Other threads may go on posting, which need not be waited for.
        Ok(())
    }

    /// What failed of writes that had returned, once.
    #[inline]
    pub(crate) fn told(&self, used: &InUse<'_>) -> Result<()> {
        if used.state.error.load(Relaxed) == 0 {
            return Ok(());
        }
        match used.state.error.swap(0, AcqRel) {
            0 => Ok(()),
            errno @ 1..4096 => Err(Error::Errno(errno as i32)),
            _ => Err(Error::Errno(EIO)),
        }
    }
}
