//! Removing names, and the whiteouts that hide them in the lowers.
//!
//! In one directory of one layer a name that is there counts more than its whiteout: the whiteout hides only what
//! lies below (so a directory beside its own whiteout merges with nothing). Hence a whiteout is made before a name goes and taken away after
//! one came, and at every moment the union shows the old state or the new one.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use parking_lot::RwLockWriteGuard;

use super::Union;
use super::layers::{Held, names};
use super::nodes::Node;
use super::work::list;
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// How often an operation starts again because names changed under it.
pub const TRIES_MAX: usize = 64;

/// Locks the names of several directories, each once, in the order of their numbers.
pub fn lock_entries<'a>(directories: &[&'a Arc<Node>]) -> Vec<RwLockWriteGuard<'a, ()>> {
    let mut sorted = directories.to_vec();
    sorted.sort_by_key(|node| node.id);
    sorted.dedup_by_key(|node| node.id);
    sorted.into_iter().map(|node| node.entries.write()).collect()
}

pub fn restless() -> Error {
    Error::new(Errno::STALE, "change names that others keep changing")
}

impl Union {
    /// Removes a name that is no directory's.
    pub(super) fn remove_file(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<()> {
        let parent = self.directory(parent)?;
        if !parent.is_raised() {
            // Before a directory is copied up for nothing.
            self.find_or_fail(caller, &parent, name)?;
        }
        let upper = self.raise(&parent)?;
        let guard = parent.entries.write();
        let Some(found) = self.find(caller, &parent, name)? else { return Err(absent()) };
        let node = found.node;
        if node.is_dir() {
            return Err(Error::new(Errno::ISDIR, "unlink a directory"));
        }
        self.cover(caller, &parent, &upper, name)?;
        if self.upper_has(caller, &node, &upper, name)? {
            upper.service().unlink(&self.inside(caller), upper.node, name)?;
        }
        let counted = self.name_removed(&node, &parent, name, found.attr.nlink);
        drop(guard);
        self.notices.inode(caller, node.id);
        self.notices.entry(caller, parent.id, name);
        counted
    }

    pub(super) fn remove_directory(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<()> {
        let parent = self.directory(parent)?;
        for _ in 0..TRIES_MAX {
            let node = self.find_or_fail(caller, &parent, name)?;
            if !node.is_dir() {
                return Err(Error::new(Errno::NOTDIR, "remove something that is no directory"));
            }
            let upper = self.raise(&parent)?;
            let guards = lock_entries(&[&parent, &node]);
            match self.find(caller, &parent, name)? {
                Some(found) if Arc::ptr_eq(&found.node, &node) => {}
                Some(_) => continue,
                None => return Err(absent()),
            }
            self.check_empty(caller, &node)?;
            self.cover(caller, &parent, &upper, name)?;
            if let Some(own) = node.upper() {
                self.strip(&own)?;
                upper.service().rmdir(&self.inside(caller), upper.node, name)?;
            }
            node.bury();
            drop(guards);
            self.notices.inode(caller, node.id);
            self.notices.entry(caller, parent.id, name);
            return Ok(());
        }
        Err(restless())
    }

    pub(super) fn find_or_fail(&self, caller: &Caller, parent: &Arc<Node>, name: &Name) -> Result<Arc<Node>> {
        self.find_shared(caller, parent, name)?.map(|found| found.node).ok_or_else(absent)
    }

    /// Whether the upper's part of the parent has the name by which `node` was found.
    pub(super) fn upper_has(&self, caller: &Caller, node: &Node, upper: &Held, name: &Name) -> Result<bool> {
        if node.links.lock().is_some() {
            // Found by way of the link index, maybe.
            return Ok(upper.find(caller, name)?.is_some());
        }
        Ok(node.is_raised())
    }

    /// Sees to it that the lowers do not show `name` once the upper has it no more.
    pub(super) fn cover(&self, caller: &Caller, parent: &Node, upper: &Arc<Held>, name: &Name) -> Result<()> {
        if !self.lowers_have(caller, parent, name)? || self.upper_hides(caller, parent, upper, name)? {
            return Ok(());
        }
        let Some(whiteout) = names::whiteout(name) else {
            return Err(Error::new(Errno::NAMETOOLONG, "hide a name of a lower layer"));
        };
        self.work()?.make_whiteout(&self.own, upper, &whiteout)?;
        parent.lower_names.lock().hide(name);
        Ok(())
    }

    /// Takes the whiteout of a name away that the upper has again. A directory becomes opaque first.
    pub(super) fn uncover(&self, parent: &Node, upper: &Held, name: &Name, node: &Node) -> Result<()> {
        let Some(whiteout) = names::whiteout(name) else { return Ok(()) };
        let stack = node.stack();
        if node.is_dir() && stack.redirect.is_none() && self.lowers_have(&self.own, parent, name)? {
            self.make_opaque(stack.top())?;
        }
        match upper.service().unlink(&self.own, upper.node, &whiteout) {
            Ok(()) => {}
            Err(e) if e.is(Errno::NOENT) => {}
            Err(e) => return Err(e),
        }
        parent.lower_names.lock().unhide(name);
        Ok(())
    }

    pub(super) fn make_opaque(&self, directory: &Held) -> Result<()> {
        let (service, node) = (directory.service(), directory.node);
        match service.mknod(&self.own, node, names::opaque(), libc::S_IFREG, 0) {
            Ok(entry) => drop(directory.take(entry)),
            Err(e) if e.is(Errno::EXIST) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Empties a directory of the upper that shows nothing: of whiteouts and markers. It must be covered by now.
    pub(super) fn strip(&self, directory: &Arc<Held>) -> Result<()> {
        for name in list(&self.own, directory)? {
            if !names::is_reserved(&name) {
                return Err(not_empty());
            }
            directory.service().unlink(&self.own, directory.node, &name)?;
        }
        Ok(())
    }

    pub(super) fn check_empty(&self, caller: &Caller, node: &Arc<Node>) -> Result<()> {
        if self.shows_nothing(caller, node)? { Ok(()) } else { Err(not_empty()) }
    }

    /// Keeps count after a name of `node` went away.
    pub(super) fn name_removed(
        &self,
        node: &Arc<Node>,
        parent: &Arc<Node>,
        name: &Name,
        nlink: u32,
    ) -> Result<()> {
        node.lost_name(parent, name);
        let Some(held) = node.upper() else {
            let _counting = node.links.lock();
            let gone = node.names_removed.load(Relaxed) + 1;
            node.names_removed.store(gone, Relaxed);
            return match (&self.work, node.origin) {
                // Of the last name, what was recorded of the others is forgotten.
                (Some(work), Some(origin)) => {
                    work.removed.set(&self.own, origin, (nlink > 1).then_some(gone))
                }
                _ => Ok(()),
            };
        };
        self.count_links(node, &held, -1)?;
        let last = *node.links.lock() == Some(0);
        if let (true, Some(origin), Some(work)) = (last, node.origin, &self.work) {
            work.leave_index(&self.own, origin)?;
        }
        Ok(())
    }
}

fn absent() -> Error {
    Error::new(Errno::NOENT, "find a name")
}

fn not_empty() -> Error {
    Error::new(Errno::NOTEMPTY, "remove a directory that is not empty")
}
