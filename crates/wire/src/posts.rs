//! Posted writes: the part of a channel's memory where programs leave bytes to be written, and the words by which they know that they need
//! not wait.
//!
//! A program that alone has a file open is given a *permit*: the file's number in the word of that number's index. It copies bytes into
//! a post's area, takes a sequence number, publishes the post and looks at the permit: if it is still there, write(2) returns. The service
//! takes a permit back before it lets anyone else near the file: it clears the word, and then applies all that was published. The two
//! orders meet in a fence on each side: either the service sees the post, or the program sees that the permit is gone and waits.
//!
//! Whatever stands here is believed by nobody but the program that wrote it: a post without a permit is a write like any other.

#[cfg(not(loom))]
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
// So that the model checker runs this very code.
#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::message::FILES_MAX;

/// Writes of one channel that may be under way.
pub const POSTS: usize = 64;
/// Bytes of one post's area.
pub const POST_BYTES: usize = 16 << 10;
/// Posts of a sleeping service after which its bell is rung.
pub const RING_AT: usize = 16;
/// How long a post may lie while the service sleeps and nobody asks for the file.
pub const LINGER_MS: u64 = 200;

pub const STATE_FREE: u32 = 0;
pub const STATE_PUBLISHED: u32 = 1;
/// The service is at it.
pub const STATE_TAKEN: u32 = 2;
pub const STATE_DONE: u32 = 3;
/// The program gives it back to itself; the service has nothing to do with it.
pub const STATE_RECLAIMED: u32 = 4;

/// Begins the part.
#[repr(C, align(128))]
pub struct Ledger {
    /// Sequence numbers given out.
    pub issued: AtomicU64,
}

/// One write.
#[repr(C, align(64))]
pub struct Post {
    /// One of `STATE_*`; a futex.
    pub state: AtomicU32,
    /// Not 0: somebody sleeps on the state.
    pub waiters: AtomicU32,
    pub file: AtomicU64,
    pub offset: AtomicU64,
    pub sequence: AtomicU64,
    pub bytes: AtomicU32,
    /// 0 or an error number.
    pub outcome: AtomicU32,
    /// Where the bytes of a file open for appending go, and one more than the sequence number of the post that this is true of: said by the
    /// service before it writes them.
    pub place: AtomicU64,
    pub place_of: AtomicU64,
    /// One more than the sequence number of the post whose bytes are with the layers, though it is not told to be done yet.
    pub applied_of: AtomicU64,
}

/// Offsets in the part.
pub const POSTS_AT: usize = 4096;
pub const PERMITS_AT: usize = POSTS_AT + POSTS * 64;
pub const POST_AREAS_AT: usize = PERMITS_AT + FILES_MAX * 8;
pub const PART_BYTES: usize = POST_AREAS_AT + POSTS * POST_BYTES;

#[cfg(not(loom))]
const _: () =
    assert!(size_of::<Post>() == 64 && POST_AREAS_AT % 4096 == 0 && size_of::<Ledger>() <= POSTS_AT);
const _: () = assert!(POSTS == u64::BITS as usize);

impl Post {
    /// Publishes a filled post. True if the program need not wait: whoever comes to the file from now on sees the write.
    pub fn publish(&self, issued: &AtomicU64, permit: &AtomicU64, file: u64) -> bool {
        // After all posts that have returned, for whoever reads it; see `limit`.
        let sequence = issued.fetch_add(1, Ordering::AcqRel);
        self.sequence.store(sequence, Ordering::Relaxed);
        self.state.store(STATE_PUBLISHED, Ordering::Release);
        fence(Ordering::SeqCst);
        permit.load(Ordering::Relaxed) == file
    }

    /// Takes a published post back that nobody took. False: it is, or will be, applied.
    pub fn take_back(&self) -> bool {
        let taken =
            self.state.compare_exchange(STATE_PUBLISHED, STATE_FREE, Ordering::AcqRel, Ordering::Relaxed);
        taken.is_ok()
    }

    /// Whether its program takes a post that is done back now: nobody else does then. `is_left` clears the mark that says that nobody waits
    /// for the post, and tells whether it was there: who has just written it may still have to set it.
    pub fn reclaim(&self, is_left: impl FnOnce() -> bool) -> bool {
        let won =
            self.state.compare_exchange(STATE_DONE, STATE_RECLAIMED, Ordering::AcqRel, Ordering::Relaxed);
        if won.is_err() {
            return false;
        }
        let ours = is_left();
        if !ours {
            self.state.store(STATE_DONE, Ordering::Release);
        }
        ours
    }

    /// For the service: the sequence number if the post is published and of those that `limit` allows.
    pub fn pending(&self, limit: u64) -> Option<u64> {
        if self.state.load(Ordering::Acquire) != STATE_PUBLISHED {
            return None;
        }
        Some(self.sequence.load(Ordering::Relaxed)).filter(|sequence| *sequence < limit)
    }

    /// For the service: false if the program took it back.
    pub fn take(&self) -> bool {
        let taken =
            self.state.compare_exchange(STATE_PUBLISHED, STATE_TAKEN, Ordering::AcqRel, Ordering::Relaxed);
        taken.is_ok()
    }

    /// For whoever ends the channel of a dead service: one that was taken is its program's again, which waits and takes it back.
    pub fn hand_back(&self) {
        // It was taken, so nobody else changes it.
        self.state.store(STATE_PUBLISHED, Ordering::Release);
    }

    /// For the service, before it appends the bytes of a post that it has taken.
    pub fn say_place(&self, offset: u64) {
        self.place.store(offset, Ordering::Relaxed);
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.place_of.store(sequence.wrapping_add(1), Ordering::Release);
    }

    /// For the service, once the bytes of a post that it has taken are with the layers.
    pub fn say_applied(&self) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.applied_of.store(sequence.wrapping_add(1), Ordering::Release);
    }

    /// Whether the bytes of a post that was taken are with the layers. What was posted later may be there, too, so it must not be done again.
    pub fn is_applied(&self) -> bool {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.applied_of.load(Ordering::Acquire) == sequence.wrapping_add(1)
    }

    /// Where the bytes of a post that was taken go, if that was said.
    pub fn place(&self) -> Option<u64> {
        let sequence = self.sequence.load(Ordering::Relaxed);
        let said = self.place_of.load(Ordering::Acquire) == sequence.wrapping_add(1);
        said.then(|| self.place.load(Ordering::Relaxed))
    }

    /// For the service. True if somebody is to be woken.
    pub fn finish(&self, outcome: u32) -> bool {
        self.mark_done(outcome);
        fence(Ordering::SeqCst);
        self.is_awaited()
    }

    /// For the service, which then has a fence (SeqCst) before it asks `is_awaited`.
    pub fn mark_done(&self, outcome: u32) {
        self.outcome.store(outcome, Ordering::Relaxed);
        self.state.store(STATE_DONE, Ordering::Release);
    }

    pub fn is_awaited(&self) -> bool {
        self.waiters.load(Ordering::Relaxed) != 0
    }
}

/// To be read before the posts are looked through: those that begin while that goes on are left for the next time. Else one could
/// be met whose predecessor, which had returned before it began, was published behind the back of the one who looks.
pub fn limit(issued: &AtomicU64) -> u64 {
    issued.load(Ordering::Acquire)
}

/// For the service, which then applies all that is published.
pub fn withdraw(permit: &AtomicU64) {
    permit.store(0, Ordering::Relaxed);
    fence(Ordering::SeqCst);
}
