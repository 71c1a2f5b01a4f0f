//! Reading directories.
//!
//! A directory is read whole when a handle begins to read it. Offsets are made of the names, so that they mean the same through every
//! handle, whatever comes and goes, also where the directory begins to have entries of its own on the upper: the kernel
//! keeps the first part of a listing and may ask another handle for the rest.

use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use parking_lot::Mutex;
use rustc_hash::{FxHashSet, FxHasher};

use super::Union;
use super::layers::{Held, Layer, OpenDir, Origin, names};
use super::lookup::mark;
use super::nodes::{Node, Stack};
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// Offsets are below this, so that what stands above the union has numbers of its own.
const OFFSET_BITS: u32 = 62;

/// One open directory of the union.
pub struct Listing {
    node: Arc<Node>,
    /// What one reading of the directory, from its beginning, goes by.
    lines: Mutex<Option<Arc<[Line]>>>,
}

#[derive(Clone)]
struct Line {
    next_offset: u64,
    ino: u64,
    file_type: u32,
    name: Box<Name>,
}

impl Line {
    fn entry(&self) -> DirEntry<'_> {
        DirEntry { next_offset: self.next_offset, ino: self.ino, file_type: self.file_type, name: &self.name }
    }

    fn of(layer: &Layer, entry: &DirEntry<'_>) -> Self {
        Self {
            next_offset: entry.next_offset,
            ino: Origin { ordinal: layer.ordinal, ino: entry.ino }.union_ino(),
            file_type: entry.file_type,
            name: entry.name.to_boxed(),
        }
    }
}

impl Union {
    pub(super) fn open_listing(&self, node: NodeId) -> Result<HandleId> {
        let node = self.node(node)?;
        if !node.is_dir() {
            return Err(Error::new(Errno::NOTDIR, "list something that is no directory"));
        }
        Ok(self.listings.insert(Listing { node, lines: Mutex::default() }))
    }

    pub(super) fn list(
        &self,
        caller: &Caller,
        handle: HandleId,
        offset: u64,
        sink: &mut DirSink<'_>,
    ) -> Result<()> {
        let listing = self.listings.get(handle)?;
        let lines = self.lines(caller, &listing, offset)?;
        after(&lines, offset).iter().map(Line::entry).find(|entry| !sink(*entry));
        Ok(())
    }

    pub(super) fn list_plus(
        &self,
        caller: &Caller,
        handle: HandleId,
        offset: u64,
        sink: &mut DirPlusSink<'_>,
    ) -> Result<()> {
        let listing = self.listings.get(handle)?;
        let lines = self.lines(caller, &listing, offset)?;
        for line in after(&lines, offset) {
            let found = self.find_shared(caller, &listing.node, &line.name).ok().flatten();
            let answer = found.map(|found| self.answer(&found));
            let mut entry = line.entry();
            if let Some(answer) = &answer {
                (entry.ino, entry.file_type) = (answer.attr.ino, answer.attr.file_type());
            }
            let taken = sink(entry, answer.as_ref());
            if !taken {
                if let Some(answer) = answer {
                    self.nodes.forget(answer.node, 1);
                }
                break;
            }
        }
        Ok(())
    }

    pub(super) fn sync_listing(&self, caller: &Caller, handle: HandleId, data_only: bool) -> Result<()> {
        let listing = self.listings.get(handle)?;
        let Some(upper) = listing.node.upper() else { return Ok(()) };
        OpenDir::open(caller, &upper)?.sync(caller, data_only)?;
        self.sync_names(&listing.node)
    }

    fn lines(&self, caller: &Caller, listing: &Listing, offset: u64) -> Result<Arc<[Line]>> {
        let mut kept = listing.lines.lock();
        match &*kept {
            Some(lines) if offset != 0 => Ok(lines.clone()),
            _ => {
                let lines = self.read_whole(caller, &listing.node)?;
                *kept = Some(lines.clone());
                Ok(lines)
            }
        }
    }

    fn read_whole(&self, caller: &Caller, node: &Arc<Node>) -> Result<Arc<[Line]>> {
        let _names = node.entries.read();
        if node.is_dead() {
            return Ok(Arc::from([]));
        }
        let mut lines = self.merged_lines(caller, node, &node.stack())?;
        place(&mut lines);
        Ok(lines.into())
    }

    /// Everything that a directory shows. Under its `entries`.
    fn merged_lines(&self, caller: &Caller, node: &Node, stack: &Stack) -> Result<Vec<Line>> {
        let mut lines: Vec<Line> = Vec::new();
        // Names that need no longer be looked for further down: shown or hidden already.
        let mut settled: FxHashSet<Box<Name>> = FxHashSet::default();
        for part in &stack.parts {
            let mut whiteouts = Vec::new();
            let begun = lines.len();
            OpenDir::open(caller, part)?.read_all(caller, |entry| {
                if let Some(hidden) = names::hidden_by(entry.name) {
                    whiteouts.push(hidden.to_boxed());
                } else if !names::is_reserved(entry.name) && settled.insert(entry.name.to_boxed()) {
                    lines.push(Line::of(&part.layer, &entry));
                }
            })?;
            settled.extend(whiteouts);
            if part.is_upper() && node.impure.load(Acquire) {
                self.correct_inos(caller, part, &mut lines[begun..])?;
            }
        }
        Ok(lines)
    }

    /// What was copied up shows the number that it had before.
    fn correct_inos(&self, caller: &Caller, upper: &Arc<Held>, lines: &mut [Line]) -> Result<()> {
        for line in lines {
            let Some((held, attr)) = upper.find(caller, &line.name)? else { continue };
            let origin = match self.nodes.by_key(held.key()) {
                Some(node) => node.origin,
                None if attr.is_dir() => mark_of_dir(caller, &held)?,
                None => self.recorded_origin(caller, &held, &attr)?,
            };
            if let Some(origin) = origin {
                line.ino = origin.union_ino();
            }
        }
        Ok(())
    }

    /// Whether a directory has no entries, under its `entries`.
    pub(super) fn shows_nothing(&self, caller: &Caller, node: &Arc<Node>) -> Result<bool> {
        Ok(self.merged_lines(caller, node, &node.stack())?.is_empty())
    }
}

fn mark_of_dir(caller: &Caller, held: &Held) -> Result<Option<Origin>> {
    Ok(mark(caller, held, super::layers::marks::ORIGIN)?.and_then(|text| Origin::parse(&text)))
}

/// Puts the lines into the order of their offsets. Names of one hash stand one after the other.
fn place(lines: &mut [Line]) {
    for line in &mut *lines {
        let mut hasher = FxHasher::default();
        hasher.write(line.name.as_bytes());
        line.next_offset = hasher.finish() >> (u64::BITS - OFFSET_BITS);
    }
    lines
        .sort_unstable_by(|a, b| (a.next_offset, a.name.as_bytes()).cmp(&(b.next_offset, b.name.as_bytes())));
    let mut last = 0;
    for line in lines {
        line.next_offset = line.next_offset.max(last + 1);
        last = line.next_offset;
    }
}

/// Those behind an offset, whether its own line is still there or not.
fn after(lines: &[Line], offset: u64) -> &[Line] {
    &lines[lines.partition_point(|line| line.next_offset <= offset)..]
}
