//! Directories that programs listed lately, with all that lies in them, as they are sent.
//!
//! Each name and each inode is kept with the counter that its truth depends on, so nobody has to tell this cache of changes: whether an entry is
//! still true is seen in the table of epochs, here as by the programs that have a copy. Permissions are not in it: who asks was weighed
//! on the way.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use polytropo_libservices::{Caller, Entry, HandleId, Name, NodeId};
use polytropo_wire::epochs::EVERYTHING;
use polytropo_wire::listing::{ENTRY_WORDS, HEAD_WORDS, UNTOLD, View, WORDS_MAX, hash, name_words};
use polytropo_wire::message::ATTRIBUTE_WORDS;
use rustc_hash::FxHashMap;

use super::Shared;
use super::operations::attributes;
use super::walk::Failure;
use crate::epochs::Table;

/// Words of all listings that a door keeps: 16 MiB.
const KEPT_WORDS_MAX: usize = 2 << 20;
/// Of the attributes of one that is kept so many may be outdated, in parts of 8, before all are looked up again.
const STALE_EIGHTHS_MAX: usize = 1;

/// One directory's.
pub type Listing = Arc<[u64]>;

#[derive(Default)]
pub struct Listings(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    /// The root's inode, once somebody listed it.
    root: Option<u64>,
    by_ino: FxHashMap<u64, Listing>,
    /// First in, first out.
    order: VecDeque<u64>,
    words: usize,
}

impl Listings {
    /// The directory's listing, if it is still what the directory shows and most attributes are true.
    pub fn recall(&self, ino: u64, table: &Table) -> Option<Listing> {
        let kept = self.0.lock().by_ino.get(&ino).cloned()?;
        let view = View::new(&kept[..]);
        let (counter, sample) = view.sample();
        (table.sample(counter) == Some(sample)).then_some(())?;
        let (mut at, mut stale) = (view.first(), 0);
        while let Some(entry) = view.entry(at) {
            let (counter, sample) = entry.inode_sample();
            stale += usize::from(counter != EVERYTHING && table.epoch(counter).now() != sample);
            stale += usize::from(entry.flags() & UNTOLD != 0);
            at = entry.end();
        }
        (stale * 8 <= view.count() * STALE_EIGHTHS_MAX).then_some(kept)
    }

    /// What was listed last, true or not.
    pub fn peek(&self, ino: u64) -> Option<Listing> {
        self.0.lock().by_ino.get(&ino).cloned()
    }

    pub fn root(&self) -> Option<u64> {
        self.0.lock().root
    }

    fn keep(&self, node: NodeId, ino: u64, listing: &Listing) {
        let inner = &mut *self.0.lock();
        if node == NodeId::ROOT {
            inner.root = Some(ino);
        }
        inner.words += listing.len();
        match inner.by_ino.insert(ino, listing.clone()) {
            Some(former) => inner.words -= former.len(),
            None => inner.order.push_back(ino),
        }
        while inner.words > KEPT_WORDS_MAX {
            let Some(oldest) = inner.order.pop_front() else { break };
            inner.words -= inner.by_ino.remove(&oldest).map_or(0, |gone| gone.len());
        }
    }
}

/// A name that was listed.
struct Line {
    name: Box<Name>,
    next_offset: u64,
    ino: u64,
    file_type: u32,
    found: Option<Entry>,
    name_sample: Option<u64>,
}

/// What is listed, and by whom.
struct Reading<'a> {
    door: &'a Shared,
    table: &'a Table,
    caller: &'a Caller,
    node: NodeId,
    ino: u64,
}

/// Lists a directory whose permissions were weighed, from what is kept or anew.
pub fn list(door: &Shared, caller: &Caller, node: NodeId, ino: u64) -> Result<Listing, Failure> {
    let Some(table) = door.epochs.table() else { return Err(Failure::Kernel) };
    if let Some(kept) = door.listings.recall(ino, table) {
        return if is_too_large(&kept) { Err(Failure::Kernel) } else { Ok(kept) };
    }
    let reading = Reading { door, table, caller, node, ino };
    let handle = door.stack.opendir(caller, node)?;
    let listed = reading.read(handle);
    door.stack.releasedir(node, handle);
    let listing: Listing = listed?.into();
    door.listings.keep(node, ino, &listing);
    Ok(listing)
}

/// One that is kept so that nobody tries again before the directory has changed.
pub fn is_too_large(listing: &Listing) -> bool {
    listing[0] == 0
}

impl Reading<'_> {
    fn read(&self, handle: HandleId) -> Result<Vec<u64>, Failure> {
        let door = self.door;
        let (calm, counter) = (door.epochs.calm(), self.table.of_inode(self.ino));
        // While it changes there is no telling what an answer is of: the kernel's, then.
        let Some(sample) = self.table.sample(counter) else { return Err(Failure::Kernel) };
        let attr = door.stack.getattr(self.caller, self.node, None)?;
        if attr.ino != self.ino {
            return Err(Failure::Kernel);
        }
        let lines = self.lines(handle)?;
        let mut words = vec![0; HEAD_WORDS];
        words[1] = self.ino;
        let Some(mut lines) = lines else {
            (words[2], words[3]) = (counter.into(), sample);
            self.door.listings.keep(self.node, self.ino, &words.into());
            return Err(Failure::Kernel);
        };
        words[2] = u64::from(counter) | (lines.len() as u64) << 32;
        words[3] = sample;
        words[6..HEAD_WORDS].copy_from_slice(&attributes(&attr).to_words());
        let mut places = Vec::with_capacity(lines.len());
        for line in &mut lines {
            places.push((hash(line.name.as_bytes()), words.len()));
            self.put(line, &mut words);
        }
        if calm.is_none() || door.epochs.calm() != calm {
            self.look_again(&lines, &places, &mut words);
        }
        lines.iter_mut().filter_map(|line| line.found.take()).for_each(|found| {
            door.stack.forget(found.node, 1);
        });
        put_index(&places, &mut words);
        words[0] = words.len() as u64;
        Ok(words)
    }

    /// The directory's names with what they stand for. Each is looked up once. None: there are too many.
    fn lines(&self, handle: HandleId) -> Result<Option<Vec<Line>>, Failure> {
        let (door, mut lines, mut words, mut full) = (self.door, Vec::new(), HEAD_WORDS, false);
        let mut offset = 0;
        loop {
            let before = lines.len();
            let read =
                door.stack.readdir_plus(self.caller, self.node, handle, offset, &mut |entry, found| {
                    // With its part of the index, which has at most 4 slots a name.
                    words += ENTRY_WORDS + entry.name.as_bytes().len().div_ceil(8) + 2;
                    full |= words + 1 > WORDS_MAX;
                    if full {
                        return false;
                    }
                    let counter = self.table.of_name(self.ino, entry.name);
                    lines.push(Line {
                        name: entry.name.to_boxed(),
                        next_offset: entry.next_offset,
                        ino: entry.ino,
                        file_type: entry.file_type,
                        found: found.cloned(),
                        name_sample: self.table.sample(counter),
                    });
                    true
                });
            if let Err(error) = read {
                self.give_back(lines);
                return Err(error.into());
            }
            if full {
                self.give_back(lines);
                return Ok(None);
            }
            match lines.last() {
                Some(last) if lines.len() > before => offset = last.next_offset,
                _ => return Ok(Some(lines)),
            }
        }
    }

    fn give_back(&self, lines: Vec<Line>) {
        lines.into_iter().filter_map(|line| line.found).for_each(|found| {
            self.door.stack.forget(found.node, 1);
        });
    }

    /// Appends an entry. Its samples count only if all was calm meanwhile, or after `look_again`.
    fn put(&self, line: &Line, words: &mut Vec<u64>) {
        let name = line.name.as_bytes();
        let name_counter = self.table.of_name(self.ino, &line.name);
        let mut told = [0; ATTRIBUTE_WORDS];
        (told[0], told[1]) = (line.ino, line.file_type.into());
        let (mut flags, mut inode_counter, mut inode_sample) = (UNTOLD, EVERYTHING, 0);
        if let Some(found) = &line.found {
            told = attributes(&found.attr).to_words();
            let counter = self.table.of_inode(found.attr.ino);
            let regular = found.attr.file_type() == libc::S_IFREG;
            if let Some(sample) = self.table.sample(counter)
                && (!regular || self.door.may_serve(found.node).is_ok())
            {
                (flags, inode_counter, inode_sample) = (0, counter, sample);
            }
        }
        words.push(line.name_sample.unwrap_or(u64::MAX));
        words.push(inode_sample);
        let counters = u64::from(name_counter) | u64::from(inode_counter) << 16;
        words.push(counters | (name.len() as u64) << 32 | flags << 48);
        words.push(line.next_offset);
        words.extend_from_slice(&told);
        words.extend(name_words(name));
    }

    /// Something changed meanwhile, and samples may be younger than what they are of: each inode's is taken first and the inode looked at then.
    fn look_again(&self, lines: &[Line], places: &[(u64, usize)], words: &mut [u64]) {
        for (line, (_, at)) in lines.iter().zip(places) {
            // What the name stands for was looked up before its sample was taken: true if the directory did not change from its sample on.
            let Some(found) = &line.found else { continue };
            let counter = self.table.of_inode(found.attr.ino);
            let sample = self.table.sample(counter);
            let attr = self.door.stack.getattr(self.caller, found.node, None);
            let regular = found.attr.file_type() == libc::S_IFREG;
            let served = !regular || self.door.may_serve(found.node).is_ok();
            let same = attr.ok().filter(|attr| attr.ino == found.attr.ino && served);
            if let (Some(sample), Some(attr)) = (sample, same) {
                words[at + 1] = sample;
                words[at + 4..at + 4 + ATTRIBUTE_WORDS].copy_from_slice(&attributes(&attr).to_words());
            } else {
                words[at + 2] |= UNTOLD << 48;
            }
        }
        // A name that came or went has changed the directory's own counter; names whose samples are too young are never true.
        let counter = self.table.of_inode(self.ino);
        if self.table.epoch(counter).now() != words[3] {
            places.iter().for_each(|(_, at)| words[*at] = u64::MAX);
        }
    }
}

/// The index by name, twice as many places as names.
pub(super) fn put_index(places: &[(u64, usize)], words: &mut Vec<u64>) {
    let slots = (places.len() * 2).next_power_of_two().max(2);
    let (begin, mask) = (words.len(), slots - 1);
    words.resize(begin + slots / 2, 0);
    for (hash, at) in places {
        let mut slot = *hash as usize & mask;
        while words[begin + slot / 2] >> (slot % 2 * 32) as u32 & 0xffff_ffff != 0 {
            slot = (slot + 1) & mask;
        }
        words[begin + slot / 2] |= (*at as u64) << (slot % 2 * 32);
    }
    words[4] = begin as u64 | (mask as u64) << 32;
}
