//! What is remembered of the names in a merged directory, so that a look-up need not ask every layer.
//!
//! Only of layers that nobody else changes, only after a few look-ups in the directory, and only within a bound for
//! the whole union; without it every layer is asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::*};

use rustc_hash::{FxHashMap, FxHashSet};

use super::Union;
use super::layers::{Held, OpenDir, names};
use super::nodes::{Node, Stack};
use crate::error::Result;
use crate::name::Name;
use crate::types::*;

/// Look-ups in a directory before its names are gathered.
const ASKED_MIN: u32 = 4;
/// Bound on remembered names, over all directories of a union.
const NAMES_MAX: usize = 400_000;

#[derive(Default)]
pub struct LowerNames {
    asked: u32,
    refused: bool,
    table: Option<Arc<Table>>,
    /// What the upper part hides.
    upper_whiteouts: Option<FxHashSet<Box<Name>>>,
}

/// For every name that the lowers show: which of them have it, as positions among the directory's lowers.
pub struct Table {
    parts_of: FxHashMap<Box<Name>, Vec<u16>>,
    /// Names that a lower hides from those below stop here.
    budget: Arc<AtomicUsize>,
}

impl Table {
    pub fn parts_of(&self, name: &Name) -> &[u16] {
        self.parts_of.get(name).map_or(&[], Vec::as_slice)
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.budget.fetch_sub(self.parts_of.len(), Relaxed);
    }
}

impl LowerNames {
    pub fn hide(&mut self, name: &Name) {
        if let Some(known) = &mut self.upper_whiteouts {
            known.insert(name.to_boxed());
        }
    }

    pub fn unhide(&mut self, name: &Name) {
        if let Some(known) = &mut self.upper_whiteouts {
            known.remove(name);
        }
    }

    /// `None` when it is not remembered.
    pub fn hides(&self, name: &Name) -> Option<bool> {
        Some(self.upper_whiteouts.as_ref()?.contains(name))
    }
}

impl Union {
    /// The names in the lowers of a directory, where it pays to know them all.
    pub(super) fn lower_table(
        &self,
        caller: &Caller,
        parent: &Node,
        stack: &Stack,
    ) -> Result<Option<Arc<Table>>> {
        if !self.lowers_settled || stack.parts.len() < 2 {
            return Ok(None);
        }
        {
            let mut known = parent.lower_names.lock();
            if let Some(table) = &known.table {
                return Ok(Some(table.clone()));
            }
            known.asked = known.asked.saturating_add(1);
            if known.refused || known.asked < ASKED_MIN {
                return Ok(None);
            }
        }
        let table = self.gather(caller, stack.lowers())?.map(Arc::new);
        let mut known = parent.lower_names.lock();
        known.refused = table.is_none();
        known.table.clone_from(&table);
        Ok(table)
    }

    fn gather(&self, caller: &Caller, lowers: &[Arc<Held>]) -> Result<Option<Table>> {
        let mut table = Table { parts_of: FxHashMap::default(), budget: self.names_cached.clone() };
        let mut closed: FxHashSet<Box<Name>> = FxHashSet::default();
        let room = NAMES_MAX.saturating_sub(self.names_cached.load(Relaxed));
        for (position, lower) in lowers.iter().enumerate() {
            let mut whiteouts = Vec::new();
            OpenDir::open(caller, lower)?.read_all(caller, |entry| {
                if let Some(hidden) = names::hidden_by(entry.name) {
                    whiteouts.push(hidden.to_boxed());
                } else if !names::is_reserved(entry.name)
                    && !closed.contains(entry.name)
                    && table.parts_of.len() <= room
                {
                    let parts = table.parts_of.entry(entry.name.to_boxed()).or_default();
                    parts.push(position as u16);
                    if entry.file_type != libc::S_IFDIR && entry.file_type != 0 {
                        closed.insert(entry.name.to_boxed());
                    }
                }
            })?;
            closed.extend(whiteouts);
        }
        self.names_cached.fetch_add(table.parts_of.len(), Relaxed);
        Ok((table.parts_of.len() <= room).then_some(table))
    }

    /// Whether the upper part of `parent` hides `name` from the lowers. Under the parent's `entries`.
    pub(super) fn upper_hides(
        &self,
        caller: &Caller,
        parent: &Node,
        upper: &Arc<Held>,
        name: &Name,
    ) -> Result<bool> {
        if parent.stack().lowers().is_empty() {
            return Ok(false);
        }
        if !upper.layer.settled {
            return has_whiteout(caller, upper, name);
        }
        if let Some(known) = parent.lower_names.lock().hides(name) {
            return Ok(known);
        }
        let mut whiteouts = FxHashSet::default();
        OpenDir::open(caller, upper)?.read_all(caller, |entry| {
            if let Some(hidden) = names::hidden_by(entry.name) {
                whiteouts.insert(hidden.to_boxed());
            }
        })?;
        let hides = whiteouts.contains(name);
        parent.lower_names.lock().upper_whiteouts = Some(whiteouts);
        Ok(hides)
    }
}

/// Asks the layer itself.
pub fn has_whiteout(caller: &Caller, directory: &Held, name: &Name) -> Result<bool> {
    match names::whiteout(name) {
        Some(whiteout) => Ok(directory.find(caller, &whiteout)?.is_some()),
        None => Ok(false),
    }
}
