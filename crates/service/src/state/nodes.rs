//! The nodes that the kernel holds: each with its number, its name and how often it was looked up.
//!
//! An entry counts by its commit word, as with open files. Look-ups change in place, one word; a node that moves gets a new
//! entry before the old one is struck out, and of two the later one counts.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use parking_lot::Mutex;
use polytropo_libservices::Name;
use polytropo_libservices::name::NAME_LEN_MAX;
use rustc_hash::FxHashMap;

use super::area::Area;
use super::layout::{Entry, LONG_NAMES_CAPACITY, NODES_CAPACITY};
use super::vacancies::Vacancies;

const SHARDS: usize = 16;

const NUMBER: usize = 0;
const PARENT: usize = 1;
const INO: usize = 2;
const LOOKUPS: usize = 3;
/// Grows with every entry: of two for one number the larger one counts.
const STAMP: usize = 4;
/// Length of the name, type (`S_IFMT` bits shifted down by 12) from bit 16, from bit 32 one more than the index of a long name.
const SHAPE: usize = 5;
const NAME: usize = 6;
const SHORT_NAME_BYTES: usize = (super::layout::WORDS - NAME) * 8;

/// What is known of one of the kernel's inodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRecord {
    /// The kernel's.
    pub number: u64,
    /// The kernel's number of the directory; 0 for what has no name.
    pub parent: u64,
    pub name: Vec<u8>,
    /// As the stack shows it: the same after a copy-up.
    pub ino: u64,
    /// `S_IFMT` bits.
    pub file_type: u32,
    pub lookups: u64,
}

/// Where a node was seen.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    pub number: u64,
    pub parent: u64,
    pub name: &'a [u8],
    pub ino: u64,
    pub file_type: u32,
}

/// The nodes of one door, as the worker writes them.
pub struct NodeTable {
    area: Arc<Area>,
    entries: Vacancies,
    long_names: Vacancies,
    /// The node's entry. Its words change under the lock of its shard.
    known: [Mutex<FxHashMap<u64, u32>>; SHARDS],
    stamp: std::sync::atomic::AtomicU64,
}

impl NodeTable {
    /// Of a new area.
    pub(super) fn new(area: Arc<Area>) -> Self {
        Self {
            area,
            entries: Vacancies::new(NODES_CAPACITY),
            long_names: Vacancies::new(LONG_NAMES_CAPACITY),
            known: std::array::from_fn(|_| Mutex::default()),
            stamp: std::sync::atomic::AtomicU64::new(1),
        }
    }

    /// Of an area that a dead worker has left. What makes no sense is struck out.
    pub(super) fn adopt(area: Arc<Area>) -> (Self, Vec<NodeRecord>) {
        let table = Self::new(area);
        let used = used(&table.area);
        let mut found: FxHashMap<u64, (u64, u32, NodeRecord)> = FxHashMap::default();
        for index in 0..used as u32 {
            let Look::Whole(stamp, record) = look(&table.area, index as usize) else { continue };
            let newer = found.get(&record.number).is_none_or(|(other, ..)| *other < stamp);
            if newer {
                found.insert(record.number, (stamp, index, record));
            }
        }
        let mut taken = vec![false; used];
        let mut long_taken = vec![false; LONG_NAMES_CAPACITY];
        let mut latest = 0;
        for (stamp, index, record) in found.values() {
            taken[*index as usize] = true;
            latest = latest.max(*stamp);
            if let Some(long) = long_name(table.word(*index, SHAPE)) {
                long_taken[long] = true;
            }
            table.shard(record.number).lock().insert(record.number, *index);
        }
        for index in (0..used as u32).filter(|index| !taken[*index as usize]) {
            strike(table.area.node(index as usize));
        }
        table.entries.adopt(&taken);
        table.long_names.adopt(&long_taken);
        table.stamp.store(latest.saturating_add(1), Relaxed);
        (table, found.into_values().map(|(.., record)| record).collect())
    }

    /// One more look-up of a node, told to the kernel after this.
    pub fn seen(&self, seen: &Seen<'_>) {
        let mut known = self.shard(seen.number).lock();
        let Some(&index) = known.get(&seen.number) else {
            if let Some(index) = self.write(seen, 1) {
                known.insert(seen.number, index);
            }
            return;
        };
        let lookups = self.word(index, LOOKUPS).saturating_add(1);
        if self.is_at(index, seen) || seen.name.is_empty() {
            return self.area.node(index as usize).words[LOOKUPS].store(lookups, Relaxed);
        }
        self.replace(&mut known, index, seen, lookups);
    }

    /// The node has another name from now on. Unknown ones stay so.
    pub fn moved(&self, number: u64, parent: u64, name: &Name) {
        let mut known = self.shard(number).lock();
        let Some(&index) = known.get(&number) else { return };
        let seen = Seen {
            number,
            parent,
            name: name.as_bytes(),
            ino: self.word(index, INO),
            file_type: file_type(self.word(index, SHAPE)),
        };
        if !self.is_at(index, &seen) {
            self.replace(&mut known, index, &seen, self.word(index, LOOKUPS));
        }
    }

    /// The kernel dropped look-ups. Says whether it has none left.
    pub fn forget(&self, number: u64, count: u64) -> bool {
        let mut known = self.shard(number).lock();
        let Some(&index) = known.get(&number) else { return true };
        let left = self.word(index, LOOKUPS).saturating_sub(count);
        if left > 0 {
            self.area.node(index as usize).words[LOOKUPS].store(left, Relaxed);
            return false;
        }
        known.remove(&number);
        drop(known);
        self.free(index);
        true
    }

    pub fn knows(&self, number: u64) -> bool {
        self.shard(number).lock().contains_key(&number)
    }

    fn replace(&self, known: &mut FxHashMap<u64, u32>, old: u32, seen: &Seen<'_>, lookups: u64) {
        match self.write(seen, lookups) {
            Some(index) => {
                known.insert(seen.number, index);
                self.free(old);
            }
            // The old name is as good as none, and look-ups must not be lost.
            None => self.area.node(old as usize).words[LOOKUPS].store(lookups, Relaxed),
        }
    }

    fn write(&self, seen: &Seen<'_>, lookups: u64) -> Option<u32> {
        let header = self.area.header();
        let Some(index) = self.entries.take(&header.nodes_used) else {
            header.nodes_untold.fetch_add(1, Relaxed);
            return None;
        };
        let mut name = seen.name;
        let mut long = 0;
        if name.len() > SHORT_NAME_BYTES {
            match self.long_names.take(&header.long_names_used) {
                Some(place) => long = u64::from(place) + 1,
                None => name = &[],
            }
        }
        let entry = self.area.node(index as usize);
        let commit = entry.commit.load(Relaxed);
        // After the last strike, for who reads it meanwhile.
        fence(Release);
        entry.words[NUMBER].store(seen.number, Relaxed);
        entry.words[PARENT].store(seen.parent, Relaxed);
        entry.words[INO].store(seen.ino, Relaxed);
        entry.words[LOOKUPS].store(lookups, Relaxed);
        entry.words[STAMP].store(self.stamp.fetch_add(1, Relaxed), Relaxed);
        let kind = u64::from(seen.file_type & libc::S_IFMT) >> 12;
        entry.words[SHAPE].store(name.len() as u64 | kind << 16 | long << 32, Relaxed);
        let place = match long {
            0 => &entry.words[NAME..],
            index => &self.area.long_name(index as usize - 1).words[..],
        };
        for (place, bytes) in place.iter().zip(name.chunks(8)) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            place.store(u64::from_le_bytes(word), Relaxed);
        }
        entry.commit.store(commit.wrapping_add(1) | 1, Release);
        Some(index)
    }

    fn free(&self, index: u32) {
        let long = long_name(self.word(index, SHAPE));
        strike(self.area.node(index as usize));
        self.entries.give_back(index);
        if let Some(long) = long {
            self.long_names.give_back(long as u32);
        }
    }

    fn is_at(&self, index: u32, seen: &Seen<'_>) -> bool {
        let entry = self.area.node(index as usize);
        let shape = self.word(index, SHAPE);
        entry.words[PARENT].load(Relaxed) == seen.parent
            && shape as u16 as usize == seen.name.len()
            && name_words(&self.area, entry, shape).is_some_and(|words| {
                words
                    .iter()
                    .zip(seen.name.chunks(8))
                    .all(|(word, bytes)| word.load(Relaxed).to_le_bytes()[..bytes.len()] == *bytes)
            })
    }

    fn word(&self, index: u32, word: usize) -> u64 {
        self.area.node(index as usize).words[word].load(Relaxed)
    }

    fn shard(&self, number: u64) -> &Mutex<FxHashMap<u64, u32>> {
        &self.known[number as usize % SHARDS]
    }
}

/// What was found of nodes.
#[derive(Debug, Default)]
pub struct Nodes {
    /// By number; of one that was moving when its worker died, the later place.
    pub nodes: Vec<NodeRecord>,
    pub untold: u64,
    pub damaged: u64,
}

/// Of an area whose worker may be dead, alive or hostile.
pub(super) fn read(area: &Area) -> Nodes {
    let untold = area.header().nodes_untold.load(Relaxed);
    let mut damaged = 0;
    let mut found: FxHashMap<u64, (u64, NodeRecord)> = FxHashMap::default();
    for index in 0..used(area) {
        match look(area, index) {
            Look::Nothing => {}
            Look::Damaged => damaged += 1,
            Look::Whole(stamp, record) => {
                if found.get(&record.number).is_none_or(|(other, _)| *other < stamp) {
                    found.insert(record.number, (stamp, record));
                }
            }
        }
    }
    let mut nodes: Vec<_> = found.into_values().map(|(_, record)| record).collect();
    nodes.sort_by_key(|record| record.number);
    Nodes { nodes, untold, damaged }
}

enum Look {
    Nothing,
    Whole(u64, NodeRecord),
    Damaged,
}

/// How often an entry is looked at that changes while it is read; a dead worker's do not.
const LOOKS_MAX: u32 = 8;

fn look(area: &Area, index: usize) -> Look {
    let entry = area.node(index);
    for _ in 0..LOOKS_MAX {
        let commit = entry.commit.load(Acquire);
        if commit & 1 == 0 {
            return Look::Nothing;
        }
        let record = record(area, entry);
        fence(Acquire);
        if entry.commit.load(Relaxed) == commit {
            return record.map_or(Look::Damaged, |(stamp, record)| Look::Whole(stamp, record));
        }
    }
    Look::Damaged
}

/// None for what makes no sense.
fn record(area: &Area, entry: &Entry) -> Option<(u64, NodeRecord)> {
    let word = |index: usize| entry.words[index].load(Relaxed);
    let shape = word(SHAPE);
    let length = usize::from(shape as u16);
    if length > NAME_LEN_MAX || word(NUMBER) == 0 || word(LOOKUPS) == 0 || shape >> 16 & 0xfff0 != 0 {
        return None;
    }
    let words = name_words(area, entry, shape)?;
    let bytes = words.iter().flat_map(|word| word.load(Relaxed).to_le_bytes());
    let name: Vec<u8> = bytes.take(length).collect();
    if name.len() != length || length > 0 && Name::new(&name).is_err() {
        return None;
    }
    let record = NodeRecord {
        number: word(NUMBER),
        parent: word(PARENT),
        name,
        ino: word(INO),
        file_type: file_type(shape),
        lookups: word(LOOKUPS),
    };
    Some((word(STAMP), record))
}

fn name_words<'a>(
    area: &'a Area,
    entry: &'a Entry,
    shape: u64,
) -> Option<&'a [std::sync::atomic::AtomicU64]> {
    match long_name(shape) {
        Some(index) if index < LONG_NAMES_CAPACITY => Some(&area.long_name(index).words),
        Some(_) => None,
        None => Some(&entry.words[NAME..]),
    }
}

fn long_name(shape: u64) -> Option<usize> {
    (shape >> 32).checked_sub(1).map(|index| index as usize)
}

fn file_type(shape: u64) -> u32 {
    (shape >> 16 & 0xf) as u32 * 0x1000
}

fn strike(entry: &Entry) {
    let commit = entry.commit.load(Relaxed);
    entry.commit.store(commit.wrapping_add(1) & !1, Release);
}

fn used(area: &Area) -> usize {
    usize::try_from(area.header().nodes_used.load(Acquire)).unwrap_or(NODES_CAPACITY).min(NODES_CAPACITY)
}
