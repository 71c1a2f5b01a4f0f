//! Reading directories.
//!
//! A directory of one layer is passed through. A merged one is read whole when a handle begins to read it, so that offsets
//! stay what they are while names come and go.

use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use parking_lot::Mutex;
use rustc_hash::FxHashSet;

use super::Union;
use super::layers::{Held, Layer, OpenDir, Origin, names};
use super::lookup::mark;
use super::nodes::{Node, Stack};
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// Entries taken from a layer at a time when each is to be looked up.
const BATCH_MAX: usize = 128;

/// One open directory of the union.
pub struct Listing {
    node: Arc<Node>,
    view: Mutex<View>,
}

/// What one reading of a directory, from its beginning, goes by.
#[derive(Clone)]
enum View {
    Unread,
    /// The layer's own listing and offsets.
    Through(Arc<OpenDir>),
    /// Offsets are positions, counted from 1.
    Snapshot(Arc<[Line]>),
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
        Ok(self.listings.insert(Listing { node, view: Mutex::new(View::Unread) }))
    }

    pub(super) fn list(
        &self,
        caller: &Caller,
        handle: HandleId,
        offset: u64,
        sink: &mut DirSink<'_>,
    ) -> Result<()> {
        let listing = self.listings.get(handle)?;
        match self.view(caller, &listing, offset)? {
            View::Through(open) => open.read(caller, offset, &mut |entry| {
                names::is_reserved(entry.name) || sink(Line::of(&open.held.layer, &entry).entry())
            }),
            View::Snapshot(lines) => {
                let rest = lines.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
                rest.map(Line::entry).find(|entry| !sink(*entry));
                Ok(())
            }
            View::Unread => Ok(()),
        }
    }

    pub(super) fn list_plus(
        &self,
        caller: &Caller,
        handle: HandleId,
        mut offset: u64,
        sink: &mut DirPlusSink<'_>,
    ) -> Result<()> {
        let listing = self.listings.get(handle)?;
        let view = self.view(caller, &listing, offset)?;
        loop {
            let batch = batch(caller, &view, offset)?;
            let Some(last) = batch.last() else { return Ok(()) };
            offset = last.next_offset;
            for line in batch.iter().filter(|line| !names::is_reserved(&line.name)) {
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
                    return Ok(());
                }
            }
        }
    }

    pub(super) fn sync_listing(&self, caller: &Caller, handle: HandleId, data_only: bool) -> Result<()> {
        let listing = self.listings.get(handle)?;
        let Some(upper) = listing.node.upper() else { return Ok(()) };
        OpenDir::open(caller, &upper)?.sync(caller, data_only)?;
        self.sync_names(&listing.node)
    }

    fn view(&self, caller: &Caller, listing: &Listing, offset: u64) -> Result<View> {
        let mut view = listing.view.lock();
        if offset == 0 || matches!(*view, View::Unread) {
            *view = self.begin(caller, &listing.node, &view)?;
        }
        Ok(view.clone())
    }

    fn begin(&self, caller: &Caller, node: &Arc<Node>, before: &View) -> Result<View> {
        let _names = node.entries.read();
        if node.is_dead() {
            return Ok(View::Snapshot(Arc::from([])));
        }
        let stack = node.stack();
        let top = stack.top();
        if stack.parts.len() > 1 || top.is_upper() && node.impure.load(Acquire) {
            return Ok(View::Snapshot(self.merged_lines(caller, node, &stack)?.into()));
        }
        match before {
            View::Through(open) if open.held.key() == top.key() => Ok(before.clone()),
            _ => Ok(View::Through(Arc::new(OpenDir::open(caller, top)?))),
        }
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
                    let mut line = Line::of(&part.layer, &entry);
                    line.next_offset = lines.len() as u64 + 1;
                    lines.push(line);
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

/// The next lines of a view, as the layer names them.
fn batch(caller: &Caller, view: &View, offset: u64) -> Result<Vec<Line>> {
    match view {
        View::Unread => Ok(Vec::new()),
        View::Snapshot(lines) => {
            let from = usize::try_from(offset).unwrap_or(usize::MAX).min(lines.len());
            Ok(lines[from..lines.len().min(from.saturating_add(BATCH_MAX))].to_vec())
        }
        View::Through(open) => {
            let mut lines = Vec::with_capacity(BATCH_MAX);
            open.read(caller, offset, &mut |entry| {
                if lines.len() == BATCH_MAX {
                    return false;
                }
                lines.push(Line::of(&open.held.layer, &entry));
                true
            })?;
            Ok(lines)
        }
    }
}
