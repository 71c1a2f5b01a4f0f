//! Whole directories: asked for, walked through, listed.

use core::sync::atomic::Ordering::{Acquire, Relaxed};
use core::sync::atomic::fence;

use polytropo_wire::epochs::{EVERYTHING, Epoch, Tag};
use polytropo_wire::listing::{COVERED, Entry, NAME_BYTES_MAX, Sample, UNTOLD, WORDS_MAX, Words};
use polytropo_wire::message::{Attributes, Operation, listed};

use crate::channel::{Channel, result_of};
use crate::listings::{Listings, Record};
use crate::lookups::PATH_BYTES_MAX;
use crate::operations::{At, put_path};
use crate::{EPROTO, Error, Result};

const ENOENT: i32 = 2;
const ENOTDIR: i32 = 20;
const AT_SYMLINK_NOFOLLOW: u32 = 0x100;
const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFLNK: u32 = 0o120_000;
/// What one answer may depend on: two counters a component, and one of everything.
const SAMPLES_MAX: usize = 48;
/// Parts in which a listing may come.
const PARTS_MAX: usize = 16;

/// A directory's listing as it was at one time. It is gone after much else was listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    pub ino: u64,
    record: Record,
}

/// A name in a listing.
#[derive(Clone, Copy, Debug)]
pub struct Name {
    pub ino: u64,
    pub mode: u32,
    pub next_offset: u64,
    bytes: [u8; NAME_BYTES_MAX + 1],
    count: usize,
}

impl Name {
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.count).unwrap_or(&[])
    }

    fn of<W: Words + ?Sized>(entry: &Entry<'_, W>) -> Self {
        let mut name = Self {
            ino: entry.ino(),
            mode: entry.mode(),
            next_offset: entry.next_offset(),
            bytes: [0; NAME_BYTES_MAX + 1],
            count: entry.name_bytes(),
        };
        for (at, chunk) in name.bytes.chunks_exact_mut(8).take(name.count.div_ceil(8)).enumerate() {
            chunk.copy_from_slice(&entry.name_word(at).to_le_bytes());
        }
        name
    }
}

/// What an answer depends on.
pub(crate) struct Premises {
    samples: [Sample; SAMPLES_MAX],
    count: usize,
}

impl Premises {
    fn new() -> Self {
        Self { samples: [(0, 0); SAMPLES_MAX], count: 0 }
    }

    /// All of it as a tag, to be kept with something that depends on `more` besides.
    pub(crate) fn tag_with(&self, more: [Sample; 2]) -> Tag {
        let samples = self.samples.get(..self.count).unwrap_or(&[]);
        let mut tag = Tag::default();
        let known = |sample: &Sample| samples.contains(sample);
        more.iter()
            .filter(|sample| !known(sample))
            .for_each(|(counter, sample)| tag.add(*counter, Some(*sample)));
        for (at, sample) in samples.iter().enumerate() {
            if !samples.get(..at).is_some_and(|before| before.contains(sample)) {
                tag.add(sample.0, Some(sample.1));
            }
        }
        tag
    }

    fn add(&mut self, sample: Sample) -> Option<()> {
        *self.samples.get_mut(self.count)? = sample;
        self.count += 1;
        Some(())
    }

    /// Whether all stand still; everything that rests on them was loaded before.
    fn hold(&self, epochs: &[Epoch]) -> bool {
        fence(Acquire);
        let held = |(counter, sample): &Sample| {
            epochs.get(usize::from(*counter)).is_some_and(|epoch| epoch.now() == *sample)
        };
        self.samples.get(..self.count).is_some_and(|samples| samples.iter().all(held))
    }
}

/// Where a walk among listings ended.
enum Walked {
    /// Answered.
    Done(Result<Attributes>),
    /// This directory has not been listed, or has changed since: what part of the path leads to it from the one that was.
    Unlisted { from: Record, begin: usize, end: usize, ino: u64 },
    /// Something that listings do not tell.
    Unknown,
}

impl Channel {
    /// What is kept of the directory with this inode; perhaps no longer true.
    pub fn listed(&self, ino: u64) -> Option<Listed> {
        let record = self.listings.as_ref()?.find(ino)?;
        Some(Listed { ino, record })
    }

    /// Of a listing, to find it again.
    pub fn number_of(of: &Listed) -> u64 {
        of.record.to_number()
    }

    /// Lists a directory again by the path by which it was listed before.
    pub fn list_again(&self, of: &Listed) -> Result<Listed> {
        let listings = self.listings.as_ref().ok_or(Error::Kernel)?;
        let mut path = [0; PATH_BYTES_MAX];
        let bytes = listings.path(of.record, &mut path).ok_or(Error::Kernel)?;
        self.list(&path[..bytes]).and_then(|now| if now.ino == of.ino { Ok(now) } else { Err(Error::Kernel) })
    }

    /// A listing by its number, which may have gone.
    pub fn listed_before(&self, ino: u64, number: u64) -> Option<Listed> {
        let record = Record::from_number(number)?;
        self.listings.as_ref()?.is_there(record).then_some(Listed { ino, record })
    }

    /// Whether a listing shows what the directory has now.
    pub fn is_current(&self, of: &Listed) -> bool {
        let (Some(listings), Some(lookups)) = (&self.listings, &self.lookups) else { return false };
        let mut premises = Premises::new();
        let _ = premises.add((EVERYTHING, listings.everything(of.record)));
        let _ = premises.add(listings.view(of.record).sample());
        listings.is_there(of.record) && !self.has_ended() && premises.hold(lookups.epochs())
    }

    /// Lists the directory at `path` below the root, which this process may list and search, and keeps that.
    pub fn list(&self, path: &[u8]) -> Result<Listed> {
        let listings = self.listings.as_ref().ok_or(Error::Kernel)?;
        if path.len() > PATH_BYTES_MAX {
            return Err(Error::Kernel);
        }
        let asked = self.asked(Operation::List, At::Root, path, 0, 0);
        if let Some(known) = asked.as_ref().and_then(|asked| self.recall(asked, At::Root, &mut [])) {
            result_of(known.outcome)?;
        }
        let claim = self.claim()?;
        let mut room = None;
        let (mut first, mut sample, mut everything, mut for_itself) = (0, 0, 0, 0);
        for _ in 0..PARTS_MAX {
            let path_bytes = put_path(&claim, 0, path)?;
            let words = [At::Root.word(), path_bytes, first as u64, sample, for_itself];
            let reply = claim.ask_whole(Operation::List, &words)?;
            if reply.outcome != 0 {
                self.keep(asked.as_ref(), &reply, &[]);
                result_of(reply.outcome)?;
            }
            if let (0, position @ 1..) = (first, reply.words[listed::POSITION]) {
                if let Some((ino, record)) = listings.shared_at(position) {
                    return Ok(Listed { ino, record });
                }
                // The log came round before this thread could look.
                for_itself = 1;
                continue;
            }
            let total = reply.words[listed::WORDS] as usize;
            let here = reply.words[listed::HERE] as usize;
            if total > WORDS_MAX || here == 0 || here > claim.capacity() / 8 || first + here > total {
                return Err(Error::Errno(EPROTO));
            }
            if first == 0 {
                (sample, everything) = (reply.words[listed::SAMPLE], reply.words[listed::EVERYTHING]);
                room = listings.make_room(path, total).map(|room| (room, total));
            }
            let Some((room, planned)) = &room else { return Err(Error::Kernel) };
            if *planned != total {
                return Err(Error::Errno(EPROTO));
            }
            // SAFETY: the room has `total` words, and `first + here` are not more.
            unsafe { claim.take_raw(room.bytes().add(first * 8), here * 8) }?;
            first += here;
            if first == total {
                break;
            }
        }
        let (room, total) = room.ok_or(Error::Kernel)?;
        if first != total {
            return Err(Error::Kernel);
        }
        let ino = room.ino();
        let record = room.publish(ino, everything);
        Ok(Listed { ino, record })
    }

    /// The directory's own attributes, if they are known.
    pub fn stat_listed(&self, ino: u64) -> Option<Attributes> {
        let of = self.listed(ino)?;
        let listings = self.listings.as_ref()?;
        let attributes = listings.view(of.record).attributes();
        self.is_current(&of).then_some(attributes)
    }

    /// The first name at or after a place in a listing, and the place after it. None: it is gone; no name: it is at its end.
    pub fn name_in(&self, of: &Listed, at: usize) -> Option<Option<(Name, usize)>> {
        let listings = self.listings.as_ref()?;
        let view = listings.view(of.record);
        let found = view.entry(at.max(view.first())).map(|entry| (Name::of(&entry), entry.end()));
        listings.is_there(of.record).then_some(found)
    }

    /// The place after the name whose next offset this is.
    pub fn place_of(&self, of: &Listed, offset: u64) -> Option<usize> {
        let listings = self.listings.as_ref()?;
        let view = listings.view(of.record);
        let mut at = view.first();
        while let Some(entry) = view.entry(at) {
            at = entry.end();
            if entry.next_offset() == offset {
                return listings.is_there(of.record).then_some(at);
            }
        }
        None
    }

    /// `stat` of a path that begins in the directory with this inode, if listings tell.
    #[inline]
    pub fn stat_below(&self, ino: u64, path: &[u8], flags: u32) -> Option<Result<Attributes>> {
        match self.walk_listings(ino, path, flags) {
            Walked::Done(answer) => {
                self.counters.local_answers.fetch_add(1, Relaxed);
                Some(answer)
            }
            _ => None,
        }
    }

    /// Lists the directory on the path that stands in the way of an answer. False: listings are no help.
    pub fn learn_below(&self, ino: u64, path: &[u8], flags: u32) -> bool {
        let Walked::Unlisted { from, begin, end, ino } = self.walk_listings(ino, path, flags) else {
            return false;
        };
        let Some(listings) = &self.listings else { return false };
        let mut whole = [0; PATH_BYTES_MAX];
        let Some(bytes) = listings.path(from, &mut whole) else { return false };
        let part = path.get(begin..end).unwrap_or(&[]);
        let Some(bytes) = join(&mut whole, bytes, part) else { return false };
        self.list(&whole[..bytes]).is_ok_and(|listed| listed.ino == ino)
    }

    fn walk_listings(&self, start: u64, path: &[u8], flags: u32) -> Walked {
        self.try_walk(start, path, flags, &mut Premises::new()).unwrap_or(Walked::Unknown)
    }

    /// What lies at a path that begins in the directory with this inode, if listings tell, and what that depends on.
    pub(crate) fn look_below(&self, ino: u64, path: &[u8], flags: u32) -> Option<(Attributes, Premises)> {
        let mut premises = Premises::new();
        match self.try_walk(ino, path, flags, &mut premises)? {
            Walked::Done(found) => Some((found.ok()?, premises)),
            _ => None,
        }
    }

    /// The path, from the root, of what lies at `path` in a directory that was listed.
    pub fn path_below(&self, ino: u64, path: &[u8], to: &mut [u8; PATH_BYTES_MAX]) -> Option<usize> {
        let listings = self.listings.as_ref()?;
        let bytes = listings.path(listings.find(ino)?, to)?;
        join(to, bytes, path)
    }

    #[inline]
    fn try_walk(&self, start: u64, path: &[u8], flags: u32, premises: &mut Premises) -> Option<Walked> {
        let listings = self.listings.as_ref().filter(|_| !self.has_ended())?;
        let lookups = self.lookups.as_ref()?;
        let follow = flags & AT_SYMLINK_NOFOLLOW == 0;
        let mut way = Way { listings, records: [None; 3] };
        let (mut ino, mut at, mut above) = (start, 0, None::<(Listed, usize, usize)>);
        let done = |premises: &Premises,
                    way: &Way<'_>,
                    here: Listed,
                    above: Option<(Listed, usize, usize)>,
                    answer| {
            if way.is_there() && premises.hold(lookups.epochs()) {
                return Some(Walked::Done(answer));
            }
            let outdated = [Some(here), above.map(|(above, ..)| above)].into_iter().flatten();
            let outdated = outdated.into_iter().find(|of| !self.is_current(of))?;
            Some(Walked::Unlisted { from: outdated.record, begin: 0, end: 0, ino: outdated.ino })
        };
        loop {
            loop {
                match path.get(at..)? {
                    [b'/', ..] => at += 1,
                    [b'.', b'/', ..] => at += 2,
                    _ => break,
                }
            }
            let Some(record) = way.enter(ino) else {
                let (parent, begin, end) = above?;
                return Some(Walked::Unlisted { from: parent.record, begin, end, ino });
            };
            let here = Listed { ino, record };
            let rest = path.get(at..)?;
            let length = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
            let (name, after) = rest.split_at(length);
            if matches!(name, b"" | b".." | b".") || name.len() > NAME_BYTES_MAX {
                return None;
            }
            premises.add((EVERYTHING, listings.everything(record)))?;
            let view = listings.view(record);
            let Some(entry) = view.find(name) else {
                premises.add(view.sample())?;
                return done(premises, &way, here, above, Err(Error::Errno(ENOENT)));
            };
            if entry.flags() & COVERED != 0 {
                return None;
            }
            premises.add(entry.name_sample())?;
            let kind = entry.mode() & S_IFMT;
            let is_last = after.iter().all(|byte| *byte == b'/');
            let as_directory = !after.is_empty();
            if kind == S_IFLNK && (follow || as_directory) {
                return None;
            }
            if as_directory && kind != S_IFDIR {
                return done(premises, &way, here, above, Err(Error::Errno(ENOTDIR)));
            }
            if is_last {
                if entry.flags() & UNTOLD != 0 {
                    return None;
                }
                premises.add(entry.inode_sample())?;
                return done(premises, &way, here, above, Ok(entry.attributes()));
            }
            above = Some((here, at, at + length));
            at += length;
            ino = entry.ino();
        }
    }
}

/// Listings that a walk went through: of each part the one that is overwritten first.
struct Way<'a> {
    listings: &'a Listings,
    records: [Option<Record>; 3],
}

impl Way<'_> {
    fn enter(&mut self, ino: u64) -> Option<Record> {
        let record = self.listings.find(ino)?;
        let first = &mut self.records[record.part()];
        if first.is_none_or(|first| first.outlives(record)) {
            *first = Some(record);
        }
        Some(record)
    }

    fn is_there(&self) -> bool {
        self.records.iter().flatten().all(|record| self.listings.is_there(*record))
    }
}

fn join(path: &mut [u8; PATH_BYTES_MAX], mut bytes: usize, part: &[u8]) -> Option<usize> {
    if !part.is_empty() && bytes > 0 {
        *path.get_mut(bytes)? = b'/';
        bytes += 1;
    }
    path.get_mut(bytes..bytes + part.len())?.copy_from_slice(part);
    Some(bytes + part.len())
}
