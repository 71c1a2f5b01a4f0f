//! From a name in a union directory to the node that it stands for.

use std::sync::Arc;

use super::Union;
use super::layers::{Held, Origin, marks, names};
use super::lower_names::has_whiteout;
use super::nodes::{Node, Seed, Stack};
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// A node and its attributes, as the union shows them.
pub struct Found {
    pub node: Arc<Node>,
    pub attr: Attr,
}

/// What the layers together say of a name.
struct Merged {
    parts: Vec<Arc<Held>>,
    attr: Attr,
    marks: Marks,
    known: Option<Arc<Node>>,
}

/// What is written on an inode of the upper.
#[derive(Default)]
pub struct Marks {
    pub redirect: Option<Box<[u8]>>,
    pub impure: bool,
    pub origin: Option<Origin>,
}

impl Union {
    /// Finds `name`, under the parent's `entries` (shared or exclusive). Holds no look-up.
    pub(super) fn find(&self, caller: &Caller, parent: &Arc<Node>, name: &Name) -> Result<Option<Found>> {
        if !parent.is_dir() {
            return Err(Error::new(Errno::NOTDIR, "look for a name in something that is no directory"));
        }
        if names::is_reserved(name) || parent.is_dead() {
            return Ok(None);
        }
        let stack = parent.stack();
        let Some(merged) = self.merge_in(caller, parent, &stack, name)? else { return Ok(None) };
        let found = self.settle(caller, parent, merged)?;
        found.node.set_place(parent, name);
        Ok(Some(found))
    }

    /// Whether `name` would show if the upper had neither it nor a whiteout of it. Under the parent's `entries`.
    pub(super) fn lowers_have(&self, caller: &Caller, parent: &Node, name: &Name) -> Result<bool> {
        let stack = parent.stack();
        if stack.lowers().is_empty() {
            return Ok(false);
        }
        if let Some(table) = self.lower_table(caller, parent, &stack)? {
            return Ok(!table.parts_of(name).is_empty());
        }
        for lower in stack.lowers() {
            if lower.find(caller, name)?.is_some() {
                return Ok(true);
            }
            if has_whiteout(caller, lower, name)? {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// The lowers' parts of the directory at `path`, counted from the root.
    pub(super) fn lowers_at(&self, caller: &Caller, path: &[u8]) -> Result<Vec<Arc<Held>>> {
        let mut parts = self.nodes.root().stack().lowers().to_vec();
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            let Ok(name) = Name::new(name) else { return Ok(Vec::new()) };
            let search = Search { parent: None, hidden_known: false, reuse: false };
            match self.merge(caller, search, &parts, name)? {
                Some(merged) if merged.attr.is_dir() => parts = merged.parts,
                _ => return Ok(Vec::new()),
            }
        }
        Ok(parts)
    }

    fn merge_in(&self, caller: &Caller, parent: &Node, stack: &Stack, name: &Name) -> Result<Option<Merged>> {
        let Some(table) = self.lower_table(caller, parent, stack)? else {
            let search = Search { parent: Some(parent), hidden_known: false, reuse: self.settled };
            return self.merge(caller, search, &stack.parts, name);
        };
        let lowers = table.parts_of(name).iter().filter_map(|at| stack.lowers().get(usize::from(*at)));
        let parts: Vec<_> = stack.upper().into_iter().chain(lowers).cloned().collect();
        let search = Search { parent: Some(parent), hidden_known: true, reuse: self.settled };
        self.merge(caller, search, &parts, name)
    }

    fn merge(
        &self,
        caller: &Caller,
        search: Search<'_>,
        parts: &[Arc<Held>],
        name: &Name,
    ) -> Result<Option<Merged>> {
        let mut merged: Option<Merged> = None;
        for (i, part) in parts.iter().enumerate() {
            let more = i + 1 < parts.len();
            let Some((held, attr)) = part.find(caller, name)? else {
                if more && self.hides(caller, &search, part, name)? {
                    break;
                }
                continue;
            };
            let is_dir = attr.is_dir();
            if merged.is_some() && !is_dir {
                break;
            }
            let held = Arc::new(held);
            let first = merged.is_none();
            let so_far = merged.get_or_insert_with(|| Merged {
                parts: Vec::with_capacity(1),
                known: self.nodes.by_key(held.key()),
                marks: Marks::default(),
                attr,
            });
            so_far.parts.push(held.clone());
            if first && search.reuse && so_far.known.is_some() {
                break;
            }
            if !is_dir {
                so_far.marks.origin = self.origin_of_file(caller, &search, &held, &so_far.attr)?;
                break;
            }
            if part.is_upper() {
                so_far.marks = self.marks_of_dir(caller, &held)?;
                if let Some(redirect) = &so_far.marks.redirect {
                    so_far.parts.extend(self.lowers_at(caller, redirect)?);
                    break;
                }
            }
            if more && (self.hides(caller, &search, part, name)? || is_opaque(caller, &held)?) {
                break;
            }
        }
        Ok(merged)
    }

    fn hides(&self, caller: &Caller, search: &Search<'_>, part: &Arc<Held>, name: &Name) -> Result<bool> {
        match search.parent {
            Some(parent) if part.is_upper() => self.upper_hides(caller, parent, part, name),
            _ if search.hidden_known => Ok(false),
            _ => has_whiteout(caller, part, name),
        }
    }

    fn settle(&self, caller: &Caller, parent: &Node, merged: Merged) -> Result<Found> {
        let Merged { mut parts, mut attr, marks, known } = merged;
        if let Some(node) = known {
            return self.refresh(caller, node, parts, attr, marks);
        }
        let is_dir = attr.is_dir();
        let layer = &parts[0].layer;
        let mut origin = marks.origin;
        if !layer.is_upper() {
            origin = Some(Origin { ordinal: layer.ordinal, ino: attr.ino });
            if let (Some(copied), false) = (self.copied_link(caller, origin, &attr)?, is_dir) {
                attr = copied.attr(caller)?;
                parts.insert(0, Arc::new(copied));
            }
        }
        let own = Origin { ordinal: 0, ino: attr.ino };
        let links = if is_dir { None } else { self.links_of(caller, &parts[0], origin, &attr)? };
        let lower_key = parts.get(1).map(|lower| lower.key());
        let seed = Seed {
            ino: origin.unwrap_or(own).union_ino(),
            kind: attr.file_type(),
            origin,
            stack: Stack { parts, redirect: marks.redirect },
            impure: marks.impure,
            links,
            names_removed: match (&self.work, origin) {
                (Some(work), Some(origin)) => work.removed.get(origin).unwrap_or(0),
                _ => 0,
            },
        };
        let node = self.nodes.intern(seed);
        if let (false, Some(key)) = (is_dir, lower_key) {
            self.nodes.add_key(&node, key);
        }
        if is_dir {
            self.watch_lowers(&node);
        }
        let _ = parent;
        // What cannot be read can still be looked at, renamed and removed.
        let _ = self.partial(&node);
        let attr = node.shown(attr);
        Ok(Found { node, attr })
    }

    /// A node that is known already; what it merges with may have changed below us.
    fn refresh(
        &self,
        caller: &Caller,
        node: Arc<Node>,
        parts: Vec<Arc<Held>>,
        attr: Attr,
        marks: Marks,
    ) -> Result<Found> {
        let stack = node.stack();
        if node.is_dir() && !self.settled {
            let same = stack.parts.len() == parts.len()
                && stack.parts.iter().zip(&parts).all(|(old, new)| old.key() == new.key());
            if !same {
                self.nodes.restack(&node, Stack { parts, redirect: marks.redirect });
                self.watch_lowers(&node);
            }
        } else if stack.top().key() != parts[0].key() {
            // Found by the lower inode that it was copied from.
            let attr = node.shown(stack.top().attr(caller)?);
            return Ok(Found { node, attr });
        }
        let attr = node.shown(attr);
        Ok(Found { node, attr })
    }

    /// What is written on a directory of the upper.
    pub(super) fn marks_of_dir(&self, caller: &Caller, held: &Held) -> Result<Marks> {
        let listed = match held.service().listxattr(caller, held.node) {
            Ok(listed) => listed,
            Err(e) if e.is(Errno::OPNOTSUPP) => return Ok(Marks::default()),
            Err(e) => return Err(e),
        };
        let mut found = Marks::default();
        for name in listed.split(|byte| *byte == 0).filter(|name| marks::is_own(name)) {
            if name == marks::IMPURE {
                found.impure = true;
            } else if name == marks::REDIRECT {
                found.redirect = mark(caller, held, name)?.map(Vec::into_boxed_slice);
            } else if name == marks::ORIGIN {
                found.origin = mark(caller, held, name)?.and_then(|text| Origin::parse(&text));
            }
        }
        Ok(found)
    }

    fn origin_of_file(
        &self,
        caller: &Caller,
        search: &Search<'_>,
        held: &Held,
        attr: &Attr,
    ) -> Result<Option<Origin>> {
        let impure =
            search.parent.is_some_and(|parent| parent.impure.load(std::sync::atomic::Ordering::Acquire));
        if !held.is_upper() || !impure {
            return Ok(None);
        }
        self.recorded_origin(caller, held, attr)
    }

    /// The origin of something in the upper that is no directory.
    pub(super) fn recorded_origin(
        &self,
        caller: &Caller,
        held: &Held,
        attr: &Attr,
    ) -> Result<Option<Origin>> {
        if let Some(work) = &self.work {
            if let Some(origin) = work.index.lock().by_upper_ino(attr.ino) {
                return Ok(Some(origin));
            }
        }
        if attr.file_type() != libc::S_IFREG {
            return Ok(None);
        }
        Ok(mark(caller, held, marks::ORIGIN)?.and_then(|text| Origin::parse(&text)))
    }
}

/// How to search.
struct Search<'a> {
    /// The union's directory. `None` when only lowers are searched.
    parent: Option<&'a Node>,
    /// The parts given are those that lower whiteouts leave.
    hidden_known: bool,
    /// A known node need not be merged again.
    reuse: bool,
}

pub fn is_opaque(caller: &Caller, directory: &Held) -> Result<bool> {
    Ok(directory.find(caller, names::opaque())?.is_some())
}

/// The value of an attribute of the format, if it is there.
pub fn mark(caller: &Caller, held: &Held, name: &[u8]) -> Result<Option<Vec<u8>>> {
    match held.service().getxattr(caller, held.node, name) {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.is(Errno::NODATA) || e.is(Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e),
    }
}
