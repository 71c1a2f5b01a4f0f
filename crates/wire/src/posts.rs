//! Posted writes: the part of a channel's memory where programs leave bytes to be written, and the words by which they know that they need
//! not wait.
//!
//! A program that alone has a file open is given a *permit*: the file's number in the word of that number's index. It copies bytes into
//! a post's area, takes a sequence number, publishes the post and looks at the permit: if it is still there, write(2) returns. The service
//! takes a permit back before it lets anyone else near the file: it clears the word, and then applies all that was published. The two
//! orders meet in a fence on each side: either the service sees the post, or the program sees that the permit is gone and waits.
//!
//! Whatever stands here is believed by nobody but the program that wrote it: a post without a permit is a write like any other.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
#[cfg(not(loom))]
use core::sync::atomic::{AtomicU32, AtomicU64, fence};
// So that the model checker runs this very code.
#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, AtomicU64, fence};

use crate::message::FILES_MAX;

/// Writes of one channel that may be under way.
pub const POSTS: usize = 64;
/// Bytes of one post's area.
pub const POST_BYTES: usize = 16 << 10;
/// Posts of a sleeping service after which its bell is rung.
pub const RING_AT: u64 = 16;
/// How long a post may lie while the service sleeps and nobody asks for the file.
pub const LINGER_MS: u64 = 200;

/// What a post's state says in its low bits. Above them it has those of the write's sequence number, so that who waits for one write is not
/// kept by the next that the post is used for.
pub const STATE_FREE: u32 = 0;
pub const STATE_PUBLISHED: u32 = 1;
/// The service is at it.
pub const STATE_TAKEN: u32 = 2;
pub const STATE_DONE: u32 = 3;
const STATE_BITS: u32 = 3;
const STATE_MASK: u32 = (1 << STATE_BITS) - 1;

/// Which of the writes that a post was used for: the upper bits of its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn(u32);

/// Begins the part.
#[repr(C, align(128))]
pub struct Ledger {
    /// Sequence numbers given out.
    pub issued: AtomicU64,
}

/// One write.
#[repr(C, align(64))]
pub struct Post {
    /// One of `STATE_*` and a turn; a futex.
    pub state: AtomicU32,
    /// How many sleep on the state, or are about to. Whoever sleeps counts itself in and out, since who wakes may be late and meet those who
    /// wait for the next turn. One that was killed there stays counted, which costs its own program a futile futex(2) a post.
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
    /// One more than the sequence number of the post that was done, or failed, though that is not told yet.
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
    /// One of `STATE_*`.
    pub fn kind(&self) -> u32 {
        self.state.load(Acquire) & STATE_MASK
    }

    fn set(&self, kind: u32) {
        // Only who has the post at the moment calls this.
        self.state.store(self.state.load(Relaxed) & !STATE_MASK | kind, Release);
    }

    /// From one state to another; false if it is not in that.
    fn pass(&self, from: u32, to: u32) -> bool {
        let word = self.state.load(Relaxed);
        let to = word & !STATE_MASK | to;
        word & STATE_MASK == from && self.state.compare_exchange(word, to, AcqRel, Relaxed).is_ok()
    }

    /// Publishes a filled post. True if the program need not wait: whoever comes to the file from now on sees the write.
    pub fn publish(&self, issued: &AtomicU64, permit: &AtomicU64, file: u64) -> bool {
        // After all posts that have returned, for whoever reads it; see `limit`.
        let sequence = issued.fetch_add(1, AcqRel);
        self.sequence.store(sequence, Relaxed);
        self.state.swap((sequence as u32) << STATE_BITS | STATE_PUBLISHED, AcqRel);
        fence_after_update();
        permit.load(Relaxed) == file
    }

    /// For the program: the write that has yet to be done, if there is one.
    pub fn pending_turn(&self) -> Option<Turn> {
        turn_of(self.state.load(Acquire))
    }

    /// Returns once that write is done: true; or when `sleep` does not want to wait any longer. That sleeps while the state is the word that
    /// it is told, and may wake for no reason. Whoever calls this has the service look at posts, after it got to know the turn.
    pub fn wait(&self, turn: Turn, sleep: impl FnMut(u32) -> bool) -> bool {
        let done = self.wait_and_stay(turn, sleep);
        self.waiters.fetch_sub(1, Relaxed);
        done
    }

    /// The same, but whoever calls this stays counted: in models those who sleep do not come back.
    pub fn wait_and_stay(&self, turn: Turn, mut sleep: impl FnMut(u32) -> bool) -> bool {
        self.waiters.fetch_add(1, Relaxed);
        // Either `finish` sees that somebody sleeps, or this sees the end.
        fence(SeqCst);
        loop {
            let word = self.state.load(Acquire);
            if turn_of(word) != Some(turn) {
                return true;
            }
            if !sleep(word) {
                return false;
            }
        }
    }

    /// Takes a published post back that nobody took. False: it is, or will be, applied.
    pub fn take_back(&self) -> bool {
        self.pass(STATE_PUBLISHED, STATE_FREE)
    }

    /// For the program, once it has seen that its write is done.
    pub fn free(&self) {
        self.set(STATE_FREE);
    }

    /// For the service: the sequence number if the post is published and of those that `limit` allows.
    pub fn pending(&self, limit: u64) -> Option<u64> {
        if self.kind() != STATE_PUBLISHED {
            return None;
        }
        Some(self.sequence.load(Relaxed)).filter(|sequence| *sequence < limit)
    }

    /// For the service: false if the program took it back.
    pub fn take(&self) -> bool {
        self.pass(STATE_PUBLISHED, STATE_TAKEN)
    }

    /// For whoever ends the channel of a dead service: one that was taken is its program's again, which waits and takes it back.
    pub fn hand_back(&self) {
        self.set(STATE_PUBLISHED);
    }

    /// For the service, before it appends the bytes of a post that it has taken.
    pub fn say_place(&self, offset: u64) {
        self.place.store(offset, Relaxed);
        let sequence = self.sequence.load(Relaxed);
        self.place_of.store(sequence.wrapping_add(1), Release);
    }

    /// For the service, once the bytes of a post that it has taken are with the layers, or cannot be.
    pub fn say_applied(&self, outcome: u32) {
        self.outcome.store(outcome, Relaxed);
        let sequence = self.sequence.load(Relaxed);
        self.applied_of.store(sequence.wrapping_add(1), Release);
    }

    /// What became of a post that was taken, if that was said. What was posted later may be done, too, so it must not be done again.
    pub fn applied(&self) -> Option<u32> {
        let sequence = self.sequence.load(Relaxed);
        let said = self.applied_of.load(Acquire) == sequence.wrapping_add(1);
        said.then(|| self.outcome.load(Relaxed))
    }

    /// Where the bytes of a post that was taken go, if that was said.
    pub fn place(&self) -> Option<u64> {
        let sequence = self.sequence.load(Relaxed);
        let said = self.place_of.load(Acquire) == sequence.wrapping_add(1);
        said.then(|| self.place.load(Relaxed))
    }

    /// For the service. True if somebody is to be woken.
    pub fn finish(&self, outcome: u32) -> bool {
        self.mark_done(outcome);
        fence(SeqCst);
        self.is_awaited()
    }

    /// For the service, which then has a fence (SeqCst) before it asks `is_awaited`.
    pub fn mark_done(&self, outcome: u32) {
        self.outcome.store(outcome, Relaxed);
        self.set(STATE_DONE);
    }

    /// For the service: whether all who sleep on the state are to be woken now.
    pub fn is_awaited(&self) -> bool {
        self.waiters.load(Relaxed) != 0
    }
}

/// Orders a read-modify-write before the loads that follow it. On x86-64 the locked instruction has emptied the store buffer, so that only
/// the compiler is to be held back: 10 ns less a write.
#[inline(always)]
fn fence_after_update() {
    #[cfg(all(not(loom), target_arch = "x86_64", not(miri)))]
    core::sync::atomic::compiler_fence(SeqCst);
    #[cfg(any(loom, not(target_arch = "x86_64"), miri))]
    fence(SeqCst);
}

fn turn_of(word: u32) -> Option<Turn> {
    matches!(word & STATE_MASK, STATE_PUBLISHED | STATE_TAKEN).then_some(Turn(word & !STATE_MASK))
}

/// To be read before the posts are looked through: those that begin while that goes on are left for the next time. Else one could
/// be met whose predecessor, which had returned before it began, was published behind the back of the one who looks.
pub fn limit(issued: &AtomicU64) -> u64 {
    issued.load(Acquire)
}

/// For the service, which then applies all that is published.
pub fn withdraw(permit: &AtomicU64) {
    permit.store(0, Relaxed);
    fence(SeqCst);
}
