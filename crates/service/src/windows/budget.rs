//! How much memory all windows of a service take together, and which blocks have it.
//!
//! The tmpfs knows no bound, so all that is allocated there is counted here first: blocks, and the pages of words that each window
//! begins with.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use polytropo_wire::window::BLOCK_BYTES;
use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;

use super::file::Window;
use super::policy::{Moves, Policy};

/// Fewer blocks are no cache.
const BLOCKS_MIN: usize = 4;
/// Of the budget, the part that words of windows may have.
const WORDS_SHARE: u64 = 8;

/// And the part that shared answers may have.
const ANSWERS_SHARE: u64 = 8;

/// What is no window and takes a part of the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Writes that the layers have not got yet.
    Held,
    /// What programs of the same rights were told.
    Answers,
}

/// What has blocks in the budget: a window, or all slabs together.
pub trait Owner: Send + Sync {
    fn number(&self) -> u64;

    /// Who uses the block next is to be noticed.
    fn hide(&self, block: u64);

    /// Gives the block's memory back.
    fn evict(&self, block: u64);
}

/// Windows count from 1.
pub const SLABS_NUMBER: u64 = 0;

/// Why a block is taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    New,
    /// It was used again, which the policy did not see.
    Used,
}

/// An owner's number, and a block of it.
type Key = (u64, u64);

/// See the module.
pub struct Budget {
    bytes_max: u64,
    state: Mutex<State>,
    counters: Counters,
}

#[derive(Default)]
struct State {
    policy: Policy<Key>,
    windows: FxHashMap<u64, Account>,
    words_bytes: u64,
    held_bytes: u64,
    answers_bytes: u64,
    /// Fills between making room and the end. Each may take memory that the policy counts as free again.
    under_way: usize,
}

struct Account {
    owner: Weak<dyn Owner>,
    blocks: FxHashSet<u64>,
}

/// Blocks whose state is to change.
struct Decided {
    hide: Vec<(Weak<dyn Owner>, u64)>,
    evict: Vec<(Weak<dyn Owner>, u64)>,
}

#[derive(Default)]
struct Counters {
    fills: AtomicU64,
    shown_again: AtomicU64,
    evictions: AtomicU64,
}

/// What windows hold, and what became of requests for their blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WindowStatistics {
    pub bytes_max: u64,
    /// Allocated, of `bytes_max`.
    pub bytes: u64,
    /// Of these, for writes that the layers have not got yet.
    pub held_bytes: u64,
    /// Of these, for answers that programs share.
    pub answers_bytes: u64,
    pub windows: u64,
    /// Blocks read from the layers below.
    pub fills: u64,
    /// Requests for blocks that were still there: what is used was found out by them.
    pub shown_again: u64,
    pub evictions: u64,
}

impl Budget {
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self { bytes_max, state: Mutex::default(), counters: Counters::default() })
    }

    /// How many blocks there may be.
    pub fn blocks_max(&self) -> u64 {
        self.bytes_max / BLOCK_BYTES
    }

    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Takes a part of the budget for something else; false if windows would have less than half, or it has its share.
    pub fn take(&self, what: Use, bytes: u64) -> bool {
        let decided = {
            let mut state = self.state.lock();
            if state.other_bytes() + bytes > self.bytes_max / 2 {
                return false;
            }
            if what == Use::Answers && state.answers_bytes + bytes > self.bytes_max / ANSWERS_SHARE {
                return false;
            }
            *state.bytes_of(what) += bytes;
            state.shrunk(self.bytes_max)
        };
        self.make(decided);
        true
    }

    /// What was taken is free again.
    pub fn give_back(&self, what: Use, bytes: u64) {
        *self.state.lock().bytes_of(what) -= bytes;
    }

    /// Counts a window's words; false if there is no room for so many.
    pub fn enter(&self, words_bytes: u64) -> bool {
        let decided = {
            let mut state = self.state.lock();
            let sum = state.words_bytes + words_bytes;
            if sum > self.bytes_max / WORDS_SHARE {
                return false;
            }
            state.words_bytes = sum;
            state.shrunk(self.bytes_max)
        };
        self.make(decided);
        true
    }

    /// A window is gone, and with it all of its memory.
    pub fn leave(&self, number: u64, words_bytes: u64) {
        let mut state = self.state.lock();
        state.words_bytes -= words_bytes;
        state.drop_blocks(number);
    }

    /// The memory of a window's blocks was given back.
    pub fn drop_blocks(&self, number: u64) {
        self.state.lock().drop_blocks(number);
    }

    /// A block that was reserved could not be had.
    pub fn drop_block(&self, number: u64, block: u64) {
        let mut state = self.state.lock();
        if let Some(account) = state.windows.get_mut(&number) {
            account.blocks.remove(&block);
        }
        state.policy.remove(&(number, block));
    }

    /// A block is asked for that readers do not see. False if it has to be read from below.
    pub fn ask(&self, window: &Window, block: u64) -> bool {
        let decided = {
            let mut state = self.state.lock();
            let blocks_max = state.blocks_max(self.bytes_max);
            let mut moves = Moves::default();
            if !state.policy.ask((window.number(), block), blocks_max, &mut moves) {
                return false;
            }
            state.decided(moves)
        };
        let shown = window.show_again(block);
        self.make(decided);
        self.counters.shown_again.fetch_add(u64::from(shown), Relaxed);
        shown
    }

    /// Makes room for a block that is about to be filled, and counts it.
    pub fn reserve<'a, O: Owner + 'static>(
        &'a self,
        owner: &'a Arc<O>,
        block: u64,
        admission: Admission,
    ) -> Reserved<'a> {
        let decided = {
            let mut state = self.state.lock();
            state.under_way += 1;
            let mut moves = Moves::default();
            let key = (owner.number(), block);
            if !state.policy.contains(&key) {
                let blocks_max = state.blocks_max(self.bytes_max);
                match admission {
                    Admission::New => state.policy.admit(key, blocks_max, &mut moves),
                    Admission::Used => state.policy.admit_used(key, blocks_max, &mut moves),
                }
                let known: Weak<dyn Owner> = Arc::<O>::downgrade(owner);
                let account = || Account { owner: known, blocks: FxHashSet::default() };
                state.windows.entry(key.0).or_insert_with(account).blocks.insert(block);
            }
            state.decided(moves)
        };
        if owner.number() != SLABS_NUMBER {
            self.counters.fills.fetch_add(1, Relaxed);
        }
        self.make(decided);
        Reserved { budget: self, owner: &**owner, block }
    }

    /// Does outside of the lock what was decided under it.
    fn make(&self, decided: Decided) {
        for (owner, block) in decided.hide {
            if let Some(owner) = owner.upgrade() {
                owner.hide(block);
            }
        }
        self.counters.evictions.fetch_add(decided.evict.len() as u64, Relaxed);
        for (owner, block) in decided.evict {
            if let Some(owner) = owner.upgrade() {
                owner.evict(block);
            }
        }
    }

    pub fn statistics(&self) -> WindowStatistics {
        let state = self.state.lock();
        WindowStatistics {
            bytes_max: self.bytes_max,
            bytes: state.words_bytes + state.other_bytes() + state.policy.len() as u64 * BLOCK_BYTES,
            held_bytes: state.held_bytes,
            answers_bytes: state.answers_bytes,
            windows: state.windows.keys().filter(|number| **number != SLABS_NUMBER).count() as u64,
            fills: self.counters.fills.load(Relaxed),
            shown_again: self.counters.shown_again.load(Relaxed),
            evictions: self.counters.evictions.load(Relaxed),
        }
    }
}

/// Room for a block while it is filled.
pub struct Reserved<'a> {
    budget: &'a Budget,
    owner: &'a dyn Owner,
    block: u64,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let counted = self.budget.state.lock().policy.contains(&(self.owner.number(), self.block));
        if !counted {
            // Somebody needed the room meanwhile.
            self.owner.evict(self.block);
        }
        self.budget.state.lock().under_way -= 1;
    }
}

impl State {
    fn other_bytes(&self) -> u64 {
        self.held_bytes + self.answers_bytes
    }

    fn bytes_of(&mut self, what: Use) -> &mut u64 {
        match what {
            Use::Held => &mut self.held_bytes,
            Use::Answers => &mut self.answers_bytes,
        }
    }

    /// What goes so that windows keep to what is left of the budget.
    fn shrunk(&mut self, bytes_max: u64) -> Decided {
        let blocks_max = self.blocks_max(bytes_max);
        let mut moves = Moves::default();
        self.policy.shrink(blocks_max, &mut moves);
        self.decided(moves)
    }

    /// Finds the windows of what was decided, while they are known.
    fn decided(&mut self, moves: Moves<Key>) -> Decided {
        let windows = &mut self.windows;
        let hide = moves.hide.into_iter().filter_map(|(number, block)| {
            let account = windows.get(&number)?;
            Some((account.owner.clone(), block))
        });
        let hide = hide.collect();
        let evict = moves.evict.into_iter().filter_map(|(number, block)| {
            let account = windows.get_mut(&number)?;
            account.blocks.remove(&block);
            Some((account.owner.clone(), block))
        });
        Decided { hide, evict: evict.collect() }
    }

    fn blocks_max(&self, bytes_max: u64) -> usize {
        let left = bytes_max.saturating_sub(self.words_bytes + self.other_bytes()) / BLOCK_BYTES;
        usize::try_from(left).unwrap_or(usize::MAX).saturating_sub(self.under_way).max(BLOCKS_MIN)
    }

    fn drop_blocks(&mut self, number: u64) {
        let Some(account) = self.windows.remove(&number) else { return };
        for block in account.blocks {
            self.policy.remove(&(number, block));
        }
    }
}
