//! What goes when room is needed, and what is tried: S3-FIFO (Yang et al., SOSP 2023) without counters of uses, which the service does not
//! see.
//!
//! Two queues, each first in, first out, and the old end of each *hidden*: the bytes stay, but readers have to ask for them. Whoever is
//! asked for there is used, and comes into the main queue. What is new passes the small queue; who leaves it without having
//! been asked for is remembered for a while as a ghost, and comes into the main queue at once if it is asked for again. So a scan goes
//! through the small queue and leaves the main one alone. Shares are those that missed least in `make bench-cache`.

use std::collections::VecDeque;
use std::hash::Hash;

use rustc_hash::FxHashMap;

/// Of all blocks, percent.
const SMALL_SHARE: usize = 40;
/// Of the small queue, percent.
const SMALL_HIDDEN: usize = 15;
/// Of the main queue, percent.
const MAIN_HIDDEN: usize = 10;

/// Nothing is hidden before so many of all blocks are there, percent: while there is room nobody has to be found out.
const FULL_SHARE: usize = 85;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Small,
    SmallHidden,
    Main,
    MainHidden,
}
use Part::{Main, MainHidden, Small, SmallHidden};

/// What is to be done with blocks.
#[derive(Debug, PartialEq, Eq)]
pub struct Moves<K> {
    /// Their bytes go.
    pub evict: Vec<K>,
    /// Their bytes stay, and readers have to ask.
    pub hide: Vec<K>,
}

impl<K> Default for Moves<K> {
    fn default() -> Self {
        Self { evict: Vec::new(), hide: Vec::new() }
    }
}

/// See the module.
pub struct Policy<K> {
    places: FxHashMap<K, (Part, u64)>,
    parts: [Queue<K>; 4],
    ghosts: FxHashMap<K, u64>,
    ghost_order: VecDeque<(K, u64)>,
    last_stamp: u64,
}

/// Those who left from the middle stay in `order` until it is their turn, or they are too many.
struct Queue<K> {
    order: VecDeque<(K, u64)>,
    alive: usize,
}

impl<K> Default for Queue<K> {
    fn default() -> Self {
        Self { order: VecDeque::new(), alive: 0 }
    }
}

impl<K> Default for Policy<K> {
    fn default() -> Self {
        Self {
            places: FxHashMap::default(),
            parts: Default::default(),
            ghosts: FxHashMap::default(),
            ghost_order: VecDeque::new(),
            last_stamp: 0,
        }
    }
}

impl<K: Copy + Eq + Hash> Policy<K> {
    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn contains(&self, key: &K) -> bool {
        self.places.contains_key(key)
    }

    /// Somebody asks for a block; false if it is not here, and has to be admitted.
    pub fn ask(&mut self, key: K, blocks_max: usize, moves: &mut Moves<K>) -> bool {
        let Some((part, _)) = self.places.get(&key).copied() else { return false };
        if matches!(part, SmallHidden | MainHidden) {
            self.remove(&key);
            self.put(Main, key);
            self.hide(blocks_max, moves);
        }
        true
    }

    /// Takes in a block that is not here, and makes room for it.
    pub fn admit(&mut self, key: K, blocks_max: usize, moves: &mut Moves<K>) {
        self.shrink(blocks_max.saturating_sub(1), moves);
        let known = self.ghosts.remove(&key).is_some();
        self.put(if known { Main } else { Small }, key);
        self.hide(blocks_max, moves);
    }

    /// The same for one that was used before, though not as this key.
    pub fn admit_used(&mut self, key: K, blocks_max: usize, moves: &mut Moves<K>) {
        self.shrink(blocks_max.saturating_sub(1), moves);
        self.put(Main, key);
        self.hide(blocks_max, moves);
    }

    /// Sees to it that there are not more than so many.
    pub fn shrink(&mut self, blocks: usize, moves: &mut Moves<K>) {
        let blocks_max = blocks + 1;
        let small_max = small_max(blocks_max);
        while self.places.len() > blocks {
            let from_small =
                self.alive([Small, SmallHidden]) >= small_max || self.alive([Main, MainHidden]) == 0;
            let parts = if from_small { [SmallHidden, Small] } else { [MainHidden, Main] };
            let Some(gone) = parts.into_iter().find_map(|part| self.take(part)) else { break };
            if from_small {
                self.remember(gone, blocks_max);
            }
            moves.evict.push(gone);
        }
    }

    /// It is gone for another reason.
    pub fn remove(&mut self, key: &K) {
        if let Some((part, _)) = self.places.remove(key) {
            let queue = &mut self.parts[part as usize];
            queue.alive -= 1;
            if queue.order.len() > 2 * queue.alive + 64 {
                let places = &self.places;
                queue.order.retain(|(key, stamp)| places.get(key) == Some(&(part, *stamp)));
            }
        }
    }

    fn alive(&self, parts: [Part; 2]) -> usize {
        parts.into_iter().map(|part| self.parts[part as usize].alive).sum()
    }

    fn put(&mut self, part: Part, key: K) {
        self.last_stamp += 1;
        self.places.insert(key, (part, self.last_stamp));
        let queue = &mut self.parts[part as usize];
        queue.order.push_back((key, self.last_stamp));
        queue.alive += 1;
    }

    /// The oldest one of a part.
    fn take(&mut self, part: Part) -> Option<K> {
        let queue = &mut self.parts[part as usize];
        while let Some((key, stamp)) = queue.order.pop_front() {
            if self.places.get(&key) == Some(&(part, stamp)) {
                queue.alive -= 1;
                self.places.remove(&key);
                return Some(key);
            }
        }
        None
    }

    fn hide(&mut self, blocks_max: usize, moves: &mut Moves<K>) {
        if self.places.len() < blocks_max / 100 * FULL_SHARE + blocks_max % 100 * FULL_SHARE / 100 {
            return;
        }
        let small_max = small_max(blocks_max);
        let main_max = blocks_max.saturating_sub(small_max);
        let shown_max = [
            (Small, SmallHidden, small_max - small_max * SMALL_HIDDEN / 100),
            (Main, MainHidden, main_max - main_max * MAIN_HIDDEN / 100),
        ];
        for (shown, hidden, shown_max) in shown_max {
            while self.parts[shown as usize].alive > shown_max.max(1) {
                let Some(key) = self.take(shown) else { break };
                self.put(hidden, key);
                moves.hide.push(key);
            }
        }
    }

    fn remember(&mut self, key: K, blocks_max: usize) {
        self.last_stamp += 1;
        self.ghosts.insert(key, self.last_stamp);
        self.ghost_order.push_back((key, self.last_stamp));
        while self.ghost_order.len() > blocks_max {
            let Some((key, stamp)) = self.ghost_order.pop_front() else { break };
            if self.ghosts.get(&key) == Some(&stamp) {
                self.ghosts.remove(&key);
            }
        }
    }
}

fn small_max(blocks_max: usize) -> usize {
    (blocks_max * SMALL_SHARE / 100).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same in the plainest way, without counts or stamps.
    #[derive(Default)]
    struct Plain {
        parts: [Vec<u8>; 4],
        ghosts: Vec<Option<u8>>,
    }

    impl Plain {
        fn remove(&mut self, key: u8) {
            self.parts.iter_mut().for_each(|part| part.retain(|other| *other != key));
        }

        fn hide(&mut self, max: usize, moves: &mut Moves<u8>) {
            if self.parts.iter().map(Vec::len).sum::<usize>() < max * 85 / 100 {
                return;
            }
            let small = (max * 2 / 5).max(1);
            let limits = [small - small * 15 / 100, (max - small.min(max)) - (max - small.min(max)) / 10];
            for (at, limit) in [0, 2].into_iter().zip(limits) {
                while self.parts[at].len() > limit.max(1) {
                    let key = self.parts[at].remove(0);
                    self.parts[at + 1].push(key);
                    moves.hide.push(key);
                }
            }
        }

        fn ask(&mut self, key: u8, max: usize, moves: &mut Moves<u8>) -> bool {
            let Some(part) = self.parts.iter().position(|part| part.contains(&key)) else { return false };
            if part % 2 == 1 {
                self.remove(key);
                self.parts[2].push(key);
                self.hide(max, moves);
            }
            true
        }

        fn admit(&mut self, key: u8, max: usize, moves: &mut Moves<u8>) {
            while self.parts.iter().map(Vec::len).sum::<usize>() >= max {
                let small = self.parts[0].len() + self.parts[1].len() >= (max * 2 / 5).max(1)
                    || self.parts[2].len() + self.parts[3].len() == 0;
                let at = if small { 0 } else { 2 };
                let from = if self.parts[at + 1].is_empty() { at } else { at + 1 };
                let gone = self.parts[from].remove(0);
                if small {
                    self.ghosts
                        .iter_mut()
                        .filter(|ghost| **ghost == Some(gone))
                        .for_each(|ghost| *ghost = None);
                    self.ghosts.push(Some(gone));
                    if self.ghosts.len() > max {
                        self.ghosts.remove(0);
                    }
                }
                moves.evict.push(gone);
            }
            let known = self.ghosts.contains(&Some(key));
            self.ghosts.iter_mut().filter(|ghost| **ghost == Some(key)).for_each(|ghost| *ghost = None);
            self.parts[if known { 2 } else { 0 }].push(key);
            self.hide(max, moves);
        }
    }

    proptest! {
        #[test]
        fn does_what_the_plain_one_does(max in 1usize..40, steps in prop::collection::vec((0u8..80, 0u8..10), 0..600)) {
            let (mut policy, mut plain) = (Policy::default(), Plain::default());
            for (key, kind) in steps {
                let (mut moves, mut expected) = (Moves::default(), Moves::default());
                if kind == 0 {
                    policy.remove(&key);
                    plain.remove(key);
                } else {
                    let found = policy.ask(key, max, &mut moves);
                    prop_assert_eq!(found, plain.ask(key, max, &mut expected));
                    if !found {
                        policy.admit(key, max, &mut moves);
                        plain.admit(key, max, &mut expected);
                    }
                }
                prop_assert_eq!(moves, expected);
                prop_assert!(policy.len() <= max && policy.ghosts.len() <= max);
                prop_assert!(policy.parts.iter().all(|queue| queue.order.len() <= 2 * queue.alive + 65));
                prop_assert_eq!(policy.parts.iter().map(|queue| queue.alive).sum::<usize>(), policy.len());
            }
        }
    }

    /// As readers use it: of what is shown nobody hears.
    fn uses(policy: &mut Policy<u32>, shown: &mut FxHashMap<u32, bool>, key: u32, max: usize) -> bool {
        if shown.get(&key) == Some(&true) {
            return true;
        }
        let mut moves = Moves::default();
        let here = policy.ask(key, max, &mut moves);
        if !here {
            policy.admit(key, max, &mut moves);
        }
        shown.insert(key, true);
        for key in moves.hide {
            shown.insert(key, false);
        }
        for key in moves.evict {
            shown.remove(&key);
        }
        here
    }

    #[test]
    fn a_scan_does_not_flush_what_is_used_often() {
        let (mut policy, mut shown, max) = (Policy::default(), FxHashMap::default(), 1000);
        let working = 0..400;
        // Used beside other things, so that it is asked for in the hidden end, or soon after.
        for round in 0..20 {
            for key in working.clone() {
                uses(&mut policy, &mut shown, key, max);
            }
            for other in 0..300 {
                uses(&mut policy, &mut shown, 10_000 + round * 300 + other, max);
            }
        }
        for key in 1_000_000..1_000_000 + 20 * max as u32 {
            uses(&mut policy, &mut shown, key, max);
        }
        let kept = working.clone().filter(|key| policy.contains(key)).count();
        assert!(kept >= 390, "{kept} of {} blocks are left", working.len());
    }

    #[test]
    fn nobody_is_asked_about_what_fits() {
        let (mut policy, mut shown, max) = (Policy::default(), FxHashMap::default(), 1000);
        for round in 0..5 {
            for key in 0..840 {
                assert_eq!(uses(&mut policy, &mut shown, key, max), round > 0);
            }
        }
        assert!(shown.values().all(|shown| *shown));
    }

    #[test]
    fn what_is_used_no_more_makes_room() {
        let (mut policy, mut shown, max) = (Policy::default(), FxHashMap::default(), 100);
        for base in [0, 1000] {
            for _ in 0..30 {
                for key in base..base + 80 {
                    uses(&mut policy, &mut shown, key, max);
                }
            }
        }
        let hits = (1000..1080).filter(|key| uses(&mut policy, &mut shown, *key, max)).count();
        assert!(hits >= 70, "{hits} of 80 blocks are there");
    }
}
