//! Renaming.
//!
//! A directory that merges with lowers keeps doing so wherever it goes: the path of what it merges with is written on it
//! (`user.polytropo.redirect`) before it moves. One that merges with nothing is made opaque where the lowers have its new name. So
//! the move itself is one rename in the upper, and nothing visible changes before or after it.

use std::sync::Arc;

use super::Union;
use super::layers::{Held, marks, names};
use super::nodes::{DEPTH_MAX, Node};
use super::remove::{TRIES_MAX, lock_entries, restless};
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// One end of a rename.
struct End<'a> {
    parent: Arc<Node>,
    name: &'a Name,
    /// What the name stands for.
    node: Option<Arc<Node>>,
    nlink: u32,
}

impl Union {
    pub(super) fn move_name(
        &self,
        caller: &Caller,
        from: (NodeId, &Name),
        to: (NodeId, &Name),
        flags: RenameFlags,
    ) -> Result<()> {
        let both = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
        if flags.contains(RenameFlags::WHITEOUT) || flags.contains(both) {
            return Err(Error::new(Errno::INVAL, "rename with these flags"));
        }
        names::check_new(to.1)?;
        self.work()?;
        let mut old = End { parent: self.directory(from.0)?, name: from.1, node: None, nlink: 0 };
        let mut new = End { parent: self.directory(to.0)?, name: to.1, node: None, nlink: 0 };
        for _ in 0..TRIES_MAX {
            old.node = Some(self.find_or_fail(caller, &old.parent, old.name)?);
            let target = self.find_shared(caller, &new.parent, new.name)?;
            new.nlink = target.as_ref().map_or(0, |found| found.attr.nlink);
            new.node = target.map(|found| found.node);
            if self.try_move(caller, &old, &new, flags)? {
                return Ok(());
            }
        }
        Err(restless())
    }

    /// Says whether it is done; if not, names changed meanwhile.
    fn try_move(&self, caller: &Caller, old: &End<'_>, new: &End<'_>, flags: RenameFlags) -> Result<bool> {
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        let Some(source) = &old.node else { return Ok(false) };
        let dirs_move = source.is_dir() || exchange && new.node.as_ref().is_some_and(|node| node.is_dir());
        check(old, new, source, flags)?;
        if new.node.as_ref().is_some_and(|target| Arc::ptr_eq(target, source)) {
            return Ok(true);
        }
        let old_upper = self.raise(&old.parent)?;
        let new_upper = self.raise(&new.parent)?;
        self.raise(source)?;
        if let Some(target) = new.node.as_ref().filter(|target| exchange || target.is_dir()) {
            self.raise(target)?;
        }
        // Directories move one at a time, so that what lies above one stands still.
        let _moving = dirs_move.then(|| self.moves.lock());
        check(old, new, source, flags)?;
        let victim = new.node.as_ref().filter(|target| target.is_dir() && !exchange);
        let directories: Vec<_> = [&old.parent, &new.parent].into_iter().chain(victim).collect();
        let guards = lock_entries(&directories);
        if !self.still(caller, old)? || !self.still(caller, new)? || new.parent.is_dead() {
            return if new.parent.is_dead() { Err(gone()) } else { Ok(false) };
        }
        let (old_side, new_side) = ((old, &old_upper), (new, &new_upper));
        self.prepare(caller, source, old_side, new_side)?;
        match &new.node {
            Some(target) if exchange => self.prepare(caller, target, new_side, old_side)?,
            Some(target) if target.is_dir() => {
                self.check_empty(caller, target)?;
                self.cover(caller, &new.parent, &new_upper, new.name)?;
                if let Some(held) = target.upper() {
                    self.strip(&held)?;
                }
            }
            _ => {}
        }
        if !exchange {
            self.cover(caller, &old.parent, &old_upper, old.name)?;
        }
        let host_flags = if exchange { RenameFlags::EXCHANGE } else { RenameFlags::empty() };
        let service = old_upper.service();
        service.rename(
            &self.inside(caller),
            old_upper.node,
            old.name,
            new_upper.node,
            new.name,
            host_flags,
        )?;
        let recorded = self.record_move(source, old, new, &new_upper, exchange);
        drop(guards);
        self.tell_move(caller, source, old, new);
        recorded
    }

    fn still(&self, caller: &Caller, end: &End<'_>) -> Result<bool> {
        let now = self.find(caller, &end.parent, end.name)?.map(|found| found.node);
        Ok(match (&now, &end.node) {
            (Some(now), Some(then)) => Arc::ptr_eq(now, then),
            (None, None) => true,
            _ => false,
        })
    }

    /// Makes `node` ready to move from one end to the other without a change of what it shows.
    fn prepare(
        &self,
        caller: &Caller,
        node: &Arc<Node>,
        (from, from_upper): (&End<'_>, &Arc<Held>),
        (to, to_upper): (&End<'_>, &Arc<Held>),
    ) -> Result<()> {
        let upper = self.raise_again(node)?;
        if node.origin.is_some() {
            self.mark_impure(&to.parent, to_upper)?;
        }
        if !node.is_dir() {
            if !self.upper_has(caller, node, from_upper, from.name)? {
                // A name that leads to its inode by the link index only.
                let linked = from_upper.service().link(&self.own, upper.node, from_upper.node, from.name)?;
                drop(from_upper.take(linked));
            }
            return Ok(());
        }
        let stack = node.stack();
        if stack.redirect.is_some() {
            return Ok(());
        }
        if stack.lowers().is_empty() {
            return if self.lowers_have(caller, &to.parent, to.name)? {
                self.make_opaque(&upper)
            } else {
                Ok(())
            };
        }
        let path = lower_path(node)?;
        match upper.service().setxattr(&self.own, upper.node, marks::REDIRECT, &path, XattrFlags::empty()) {
            Ok(()) => {}
            // The program moves the tree by hand then.
            Err(e) if e.is(Errno::OPNOTSUPP) => return Err(Error::new(Errno::XDEV, "redirect a directory")),
            Err(e) => return Err(e),
        }
        node.set_redirect(path.into_boxed_slice());
        Ok(())
    }

    fn raise_again(&self, node: &Arc<Node>) -> Result<Arc<Held>> {
        node.upper().ok_or_else(|| Error::new(Errno::STALE, "move what is not on the upper"))
    }

    fn record_move(
        &self,
        source: &Arc<Node>,
        old: &End<'_>,
        new: &End<'_>,
        new_upper: &Held,
        exchange: bool,
    ) -> Result<bool> {
        source.set_place(&new.parent, new.name);
        if let Some(target) = &new.node {
            if exchange {
                target.set_place(&old.parent, old.name);
            } else if target.is_dir() {
                target.bury();
            } else {
                self.name_removed(target, &new.parent, new.name, new.nlink)?;
            }
        }
        if self.upper_hides(&self.own, &new.parent, &new.parent.upper().ok_or_else(gone)?, new.name)? {
            self.uncover(&new.parent, new_upper, new.name, source)?;
        }
        Ok(true)
    }

    fn tell_move(&self, caller: &Caller, source: &Node, old: &End<'_>, new: &End<'_>) {
        if let Some(target) = &new.node {
            self.notices.inode(caller, target.id);
        }
        self.notices.inode(caller, source.id);
        self.notices.entry(caller, old.parent.id, old.name);
        self.notices.entry(caller, new.parent.id, new.name);
    }
}

fn check(old: &End<'_>, new: &End<'_>, source: &Arc<Node>, flags: RenameFlags) -> Result<()> {
    // In the order in which the kernel looks.
    let exchange = flags.contains(RenameFlags::EXCHANGE);
    match &new.node {
        Some(_) if flags.contains(RenameFlags::NOREPLACE) => {
            return Err(Error::new(Errno::EXIST, "rename without replacing"));
        }
        None if exchange => return Err(Error::new(Errno::NOENT, "exchange with a name")),
        _ => {}
    }
    if source.is_dir() && new.parent.lies_below(source) {
        return Err(Error::new(Errno::INVAL, "move a directory into itself"));
    }
    let Some(target) = &new.node else { return Ok(()) };
    if target.is_dir() && old.parent.lies_below(target) {
        let errno = if exchange { Errno::INVAL } else { Errno::NOTEMPTY };
        return Err(Error::new(errno, "rename over a directory above"));
    }
    match (source.is_dir(), target.is_dir()) {
        _ if exchange => Ok(()),
        (true, false) => Err(Error::new(Errno::NOTDIR, "rename a directory over something else")),
        (false, true) => Err(Error::new(Errno::ISDIR, "rename over a directory")),
        _ => Ok(()),
    }
}

/// Where in the lowers a directory's lower parts are.
pub(super) fn lower_path(node: &Arc<Node>) -> Result<Vec<u8>> {
    let mut names: Vec<Box<Name>> = Vec::new();
    let mut at = node.clone();
    let mut path = Vec::new();
    for _ in 0..DEPTH_MAX {
        if let Some(redirect) = &at.stack().redirect {
            path = redirect.to_vec();
            break;
        }
        let Some(place) = at.place() else { break };
        names.push(place.name);
        at = place.parent;
    }
    if names.is_empty() {
        return Err(gone());
    }
    for name in names.iter().rev() {
        path.push(b'/');
        path.extend_from_slice(name.as_bytes());
    }
    Ok(path)
}

fn gone() -> Error {
    Error::new(Errno::NOENT, "rename in a directory that was removed")
}
