//! Answers that programs of the same rights share: what one was told the others read without asking.
//!
//! The memory is written here and mapped read-only by programs that are alike in everything by which answers are weighed ([`Rights`]). What is in it
//! stays true as the table of epochs says, so nobody has to tell it of changes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use polytropo_wire::VERSION;
use polytropo_wire::answers::{
    Header, Kind, LOG_AT, LOG_WORDS, MAGIC, New, PLACES, PLACES_AT, TOTAL_BYTES, View, bytes,
};

use polytropo_wire::listing::Sample;

use super::client::Peer;
use crate::sealed::{self, Mapping};
use crate::windows::{Budget, Use};

/// Memories of one door: so many kinds of programs.
const MEMORIES_MAX: usize = 16;
/// How long one is kept that nobody has.
pub const KEPT: Duration = Duration::from_secs(60);
/// Taken from the cache's budget at a time.
const STEP_WORDS: usize = 32 << 10;
const STEP_BYTES: u64 = STEP_WORDS as u64 * 8;
const INDEX_BYTES: u64 = LOG_AT as u64;

/// All that an answer depends on of who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rights {
    uid: u32,
    gid: u32,
    /// In order.
    groups: Vec<u32>,
    capabilities: u64,
    read_only: bool,
    is_root: bool,
    /// Inodes on which something else is mounted, in order.
    covered: Vec<u64>,
}

impl Rights {
    pub fn of(peer: &Peer, covered: impl IntoIterator<Item = u64>) -> Self {
        let mut groups = peer.caller.groups.to_vec();
        groups.sort_unstable();
        groups.dedup();
        let mut covered: Vec<_> = covered.into_iter().collect();
        covered.sort_unstable();
        Self {
            uid: peer.caller.uid,
            gid: peer.caller.gid,
            groups,
            capabilities: peer.caller.capabilities.bits(),
            read_only: peer.read_only,
            is_root: peer.is_root,
            covered,
        }
    }
}

/// The memories of one door.
pub struct Memories {
    budget: Arc<Budget>,
    kept: Mutex<Vec<Kept>>,
}

struct Kept {
    rights: Rights,
    answers: Arc<Answers>,
    /// When somebody was last seen to have it.
    used: Instant,
}

impl Memories {
    pub fn new(budget: Arc<Budget>) -> Self {
        Self { budget, kept: Mutex::default() }
    }

    /// The memory of programs with these rights. None: there is no room for one more.
    pub fn of(&self, rights: Rights) -> Option<Arc<Answers>> {
        let mut kept = self.kept.lock();
        if let Some(found) = kept.iter_mut().find(|kept| kept.rights == rights) {
            found.used = Instant::now();
            return Some(found.answers.clone());
        }
        if kept.len() >= MEMORIES_MAX {
            let unused = kept.iter().enumerate().filter(|(_, kept)| kept.is_unused());
            let (oldest, _) = unused.min_by_key(|(_, kept)| kept.used)?;
            kept.swap_remove(oldest);
        }
        let made = Answers::new(self.budget.clone())
            .inspect_err(|errno| log::warn!("programs cannot share what they are told: {errno}"));
        let answers = Arc::new(made.ok()??);
        kept.push(Kept { rights, answers: answers.clone(), used: Instant::now() });
        Some(answers)
    }

    /// Gives back what nobody had for a while.
    pub fn sweep(&self) {
        self.kept.lock().retain_mut(|kept| {
            if !kept.is_unused() {
                kept.used = Instant::now();
            }
            kept.used.elapsed() < KEPT
        });
    }

    pub fn any(&self) -> bool {
        !self.kept.lock().is_empty()
    }
}

impl Kept {
    fn is_unused(&self) -> bool {
        Arc::strong_count(&self.answers) == 1
    }
}

/// One memory.
pub struct Answers {
    descriptor: OwnedFd,
    memory: Mapping,
    budget: Arc<Budget>,
    state: Mutex<State>,
}

struct State {
    /// The log's end.
    head: u64,
    /// Words of the log that are paid for.
    paid: usize,
}

impl Answers {
    /// None where the cache has no room for it.
    fn new(budget: Arc<Budget>) -> rustix::io::Result<Option<Self>> {
        if !budget.take(Use::Answers, INDEX_BYTES + STEP_BYTES) {
            return Ok(None);
        }
        let made = sealed::make_shown("polytropo-answers", TOTAL_BYTES);
        let (descriptor, memory) =
            made.inspect_err(|_| budget.give_back(Use::Answers, INDEX_BYTES + STEP_BYTES))?;
        // Those of the log come as they are written, and nobody is told of any before.
        memory.allocate(LOG_AT);
        let state = State { head: LOG_WORDS as u64, paid: STEP_WORDS };
        let made = Self { descriptor, memory, budget, state: Mutex::new(state) };
        let header = made.view().header;
        header.log_words.store(LOG_WORDS as u64, Relaxed);
        header.reserved.store(LOG_WORDS as u64, Relaxed);
        header.version.store(VERSION.into(), Relaxed);
        header.magic.store(MAGIC, Release);
        Ok(Some(made))
    }

    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    fn view(&self) -> View<'_> {
        let base = self.memory.base();
        // SAFETY: header, places and log lie in the mapping, one behind the other and aligned; all are atomics.
        unsafe {
            View {
                header: base.cast::<Header>().as_ref(),
                places: NonNull::slice_from_raw_parts(base.add(PLACES_AT).cast(), PLACES).as_ref(),
                log: NonNull::slice_from_raw_parts(base.add(LOG_AT).cast(), LOG_WORDS).as_ref(),
            }
        }
    }

    /// Whether a file's bytes are there, as they are while these counters are what they are.
    pub fn has_bytes(&self, ino: u64, everything: u64, sample: Sample) -> bool {
        let found = self.view().find(Kind::Bytes, ino);
        found.is_some_and(|record| {
            let known = bytes::View::of(record.payload());
            record.everything() == everything && known.is_some_and(|known| known.sample() == sample)
        })
    }

    /// Where programs find it; it is put there unless it is there already. None: there is no room, and nothing is told of that inode.
    pub fn put(&self, new: &New<'_>) -> Option<u64> {
        let mut state = self.state.lock();
        let view = self.view();
        if let Some(same) = view.find(new.kind, new.ino).filter(|record| record.is(new)) {
            return Some(same.position);
        }
        let Some(position) = self.room_for(&mut state, &view, new.words()) else {
            view.drop_of(new.ino);
            return None;
        };
        state.head = view.put(position, new);
        Some(position)
    }

    /// As long as the cache has room the log grows; after that it comes round.
    fn room_for(&self, state: &mut State, view: &View<'_>, words: usize) -> Option<u64> {
        let end = (state.head % LOG_WORDS as u64) as usize + words;
        while state.paid < end.min(LOG_WORDS) && self.budget.take(Use::Answers, STEP_BYTES) {
            state.paid += STEP_WORDS;
        }
        view.room_for(state.head, words, state.paid)
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        let paid = INDEX_BYTES + self.state.get_mut().paid as u64 * 8;
        self.budget.give_back(Use::Answers, paid);
    }
}
