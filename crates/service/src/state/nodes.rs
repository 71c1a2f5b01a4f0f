//! The nodes that the kernel holds: each with its number, its name and how often it was looked up.
//!
//! An entry counts by its commit word, as with open files. Look-ups change in place, one word; a node that moves gets a new
//! entry before the old one is struck out, and of two the later one counts. Further names of a file have entries without look-ups.

use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use parking_lot::Mutex;
use polytropo_libservices::Name;
use polytropo_libservices::name::NAME_LEN_MAX;
use rustc_hash::FxHashMap;

use super::area::Area;
use super::layout::{self, LONG_NAMES_CAPACITY, NODES_CAPACITY};
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
const SHORT_NAME_BYTES: usize = (layout::WORDS - NAME) * 8;

/// What is known of one of the kernel's inodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRecord {
    /// The kernel's.
    pub number: u64,
    /// Directories, by the kernel's numbers, and names there; the likeliest first. None for what never had a name.
    pub places: Vec<(u64, Vec<u8>)>,
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
    /// It may have other names, which stay.
    pub linked: bool,
}

/// The entries of one node: one with its look-ups, and for each further name one without.
struct Places {
    first: u32,
    others: Vec<u32>,
}

/// Further names that are kept of a file.
const OTHERS_MAX: usize = 8;

/// The nodes of one door, as the worker writes them.
pub struct NodeTable {
    area: Arc<Area>,
    entries: Vacancies,
    long_names: Vacancies,
    /// A node's words change under the lock of its shard.
    known: [Mutex<FxHashMap<u64, Places>>; SHARDS],
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
        let found = Found::read(&table.area);
        let mut taken = vec![false; used];
        let mut long_taken = vec![false; LONG_NAMES_CAPACITY];
        for (number, node) in &found.nodes {
            for index in std::iter::once(&node.index).chain(&node.others) {
                taken[*index as usize] = true;
                if let Some(long) = long_name(table.word(*index, SHAPE)) {
                    long_taken[long] = true;
                }
            }
            let places = Places { first: node.index, others: node.others.clone() };
            table.shard(*number).lock().insert(*number, places);
        }
        for index in (0..used as u32).filter(|index| !taken[*index as usize]) {
            strike(table.area.node(index as usize));
        }
        table.entries.adopt(&taken);
        table.long_names.adopt(&long_taken);
        table.stamp.store(found.latest.saturating_add(1), Relaxed);
        (table, found.nodes.into_values().map(|node| node.record).collect())
    }

    /// One more look-up of a node, told to the kernel after this.
    pub fn seen(&self, seen: &Seen<'_>) {
        let mut known = self.shard(seen.number).lock();
        let Some(places) = known.get_mut(&seen.number) else {
            if let Some(first) = self.write(seen, 1) {
                known.insert(seen.number, Places { first, others: Vec::new() });
            }
            return;
        };
        let lookups = self.word(places.first, LOOKUPS).saturating_add(1);
        if seen.linked || seen.name.is_empty() || self.is_at(places.first, seen) {
            self.area.node(places.first as usize).words[LOOKUPS].store(lookups, Relaxed);
            self.add_place(places, seen);
        } else {
            self.replace(places, seen, lookups);
        }
    }

    /// The node's name `from`, if that is known, is `to` from now on. Unknown nodes stay so.
    pub fn moved(&self, number: u64, from: (u64, &Name), to: (u64, &Name)) {
        let mut known = self.shard(number).lock();
        let Some(places) = known.get_mut(&number) else { return };
        let first = places.first;
        let (ino, file_type) = (self.word(first, INO), file_type(self.word(first, SHAPE)));
        let target = Seen { number, parent: to.0, name: to.1.as_bytes(), ino, file_type, linked: true };
        let origin = Seen { parent: from.0, name: from.1.as_bytes(), ..target };
        if self.is_at(first, &origin) {
            return self.replace(places, &target, self.word(first, LOOKUPS));
        }
        let other = places.others.iter().position(|index| self.is_at(*index, &origin));
        let gone = other.map(|other| places.others.remove(other));
        self.add_place(places, &target);
        if let Some(gone) = gone {
            self.free(gone);
        }
    }

    /// The kernel dropped look-ups. Says whether it has none left.
    pub fn forget(&self, number: u64, count: u64) -> bool {
        let mut known = self.shard(number).lock();
        let Some(places) = known.get(&number) else { return true };
        let left = self.word(places.first, LOOKUPS).saturating_sub(count);
        if left > 0 {
            self.area.node(places.first as usize).words[LOOKUPS].store(left, Relaxed);
            return false;
        }
        let places = known.remove(&number);
        drop(known);
        if let Some(Places { first, others }) = places {
            self.free(first);
            others.into_iter().for_each(|index| self.free(index));
        }
        true
    }

    fn replace(&self, places: &mut Places, seen: &Seen<'_>, lookups: u64) {
        match self.write(seen, lookups) {
            Some(index) => self.free(std::mem::replace(&mut places.first, index)),
            // The old name is as good as none, and look-ups must not be lost.
            None => self.area.node(places.first as usize).words[LOOKUPS].store(lookups, Relaxed),
        }
    }

    /// Remembers a further name, unless it is known.
    fn add_place(&self, places: &mut Places, seen: &Seen<'_>) {
        let mut known = std::iter::once(&places.first).chain(&places.others);
        if seen.name.is_empty() || known.any(|index| self.is_at(*index, seen)) {
            return;
        }
        if places.others.len() == OTHERS_MAX {
            self.free(places.others.remove(0));
        }
        places.others.extend(self.write(seen, 0));
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

    fn shard(&self, number: u64) -> &Mutex<FxHashMap<u64, Places>> {
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
    let found = Found::read(area);
    let mut nodes: Vec<_> = found.nodes.into_values().map(|node| node.record).collect();
    nodes.sort_by_key(|record| record.number);
    Nodes { nodes, untold, damaged: found.damaged }
}

/// The entries of an area, put together by node.
#[derive(Default)]
struct Found {
    nodes: FxHashMap<u64, FoundNode>,
    latest: u64,
    damaged: u64,
}

struct FoundNode {
    stamp: u64,
    index: u32,
    others: Vec<u32>,
    record: NodeRecord,
}

impl Found {
    fn read(area: &Area) -> Self {
        let mut found = Self::default();
        let mut others = Vec::new();
        for index in 0..used(area) as u32 {
            match look(area, index as usize) {
                Look::Nothing => {}
                Look::Damaged => found.damaged += 1,
                Look::Whole(_, record) if record.lookups == 0 => others.push((index, record)),
                Look::Whole(stamp, record) => {
                    found.latest = found.latest.max(stamp);
                    let node = FoundNode { stamp, index, others: Vec::new(), record };
                    match found.nodes.entry(node.record.number) {
                        Entry::Occupied(mut known) if known.get().stamp < stamp => drop(known.insert(node)),
                        Entry::Occupied(_) => {}
                        Entry::Vacant(place) => {
                            place.insert(node);
                        }
                    }
                }
            }
        }
        for (index, record) in others {
            if let Some(node) = found.nodes.get_mut(&record.number).filter(|n| n.others.len() < OTHERS_MAX) {
                node.others.push(index);
                node.record.places.extend(record.places);
            }
        }
        found
    }
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
fn record(area: &Area, entry: &layout::Entry) -> Option<(u64, NodeRecord)> {
    let word = |index: usize| entry.words[index].load(Relaxed);
    let shape = word(SHAPE);
    let length = usize::from(shape as u16);
    if length > NAME_LEN_MAX || word(NUMBER) == 0 || shape >> 16 & 0xfff0 != 0 {
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
        places: if length > 0 { vec![(word(PARENT), name)] } else { Vec::new() },
        ino: word(INO),
        file_type: file_type(shape),
        lookups: word(LOOKUPS),
    };
    Some((word(STAMP), record))
}

fn name_words<'a>(
    area: &'a Area,
    entry: &'a layout::Entry,
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

fn strike(entry: &layout::Entry) {
    let commit = entry.commit.load(Relaxed);
    entry.commit.store(commit.wrapping_add(1) & !1, Release);
}

fn used(area: &Area) -> usize {
    usize::try_from(area.header().nodes_used.load(Acquire)).unwrap_or(NODES_CAPACITY).min(NODES_CAPACITY)
}
