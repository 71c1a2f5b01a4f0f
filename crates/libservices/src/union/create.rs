//! Making names.

use std::sync::Arc;

use super::Union;
use super::layers::{Held, OpenFile, Origin, names};
use super::lookup::Found;
use super::nodes::{Node, Seed, Stack};
use crate::capabilities::Capabilities;
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// A name that comes and goes under `create` is given up on after this many tries.
const CREATE_TRIES_MAX: usize = 16;

impl Union {
    /// Makes `name` in the upper's part of `parent` by `make`.
    pub(super) fn make<T>(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        make: impl FnOnce(&Caller, &Held) -> Result<(Entry, T)>,
    ) -> Result<(Entry, Arc<Node>, T)> {
        names::check_new(name)?;
        let parent = self.directory(parent)?;
        let upper = self.raise_to_make(caller, &parent, name)?;
        let names = parent.entries.write();
        let covered = self.check_free(caller, &parent, name)?;
        let (entry, more) = make(&self.inside(caller), &upper)?;
        let (held, attr) = upper.take(entry);
        let seed = Seed {
            ino: Origin { ordinal: 0, ino: attr.ino }.union_ino(),
            kind: attr.file_type(),
            origin: None,
            stack: Stack { parts: vec![Arc::new(held)], redirect: None },
            impure: false,
            links: None,
            names_removed: 0,
        };
        let node = self.nodes.intern(seed);
        node.set_place(&parent, name);
        if covered {
            self.uncover(&parent, &upper, name, &node)?;
        }
        drop(names);
        self.notices.entry(caller, parent.id, name);
        let attr = node.shown(attr);
        Ok((self.answer(&Found { node: node.clone(), attr }), node, more))
    }

    /// `parent` on the upper, unless there is a `name` in it already.
    fn raise_to_make(&self, caller: &Caller, parent: &Arc<Node>, name: &Name) -> Result<Arc<Held>> {
        self.work()?;
        if let Some(upper) = parent.upper() {
            return Ok(upper);
        }
        if self.find_shared(caller, parent, name)?.is_some() {
            return Err(exists());
        }
        self.raise(parent)
    }

    /// EEXIST when `name` shows. Says whether the upper has a whiteout of it. Under `entries`, exclusively.
    fn check_free(&self, caller: &Caller, parent: &Arc<Node>, name: &Name) -> Result<bool> {
        if parent.is_dead() {
            return Err(Error::new(Errno::NOENT, "make a name in a directory that was removed"));
        }
        let stack = parent.stack();
        if stack.lowers().is_empty() {
            // The upper itself refuses what is there.
            return Ok(false);
        }
        if self.find(caller, parent, name)?.is_some() {
            return Err(exists());
        }
        match stack.upper() {
            Some(upper) => self.upper_hides(caller, parent, upper, name),
            None => Ok(false),
        }
    }

    pub(super) fn make_link(
        &self,
        caller: &Caller,
        node: NodeId,
        new_parent: NodeId,
        name: &Name,
    ) -> Result<Entry> {
        names::check_new(name)?;
        let node = self.node(node)?;
        if node.is_dir() {
            return Err(Error::new(Errno::PERM, "give a directory a second name"));
        }
        let parent = self.directory(new_parent)?;
        let upper = self.raise_to_make(caller, &parent, name)?;
        let held = self.raise(&node)?;
        let names = parent.entries.write();
        let covered = self.check_free(caller, &parent, name)?;
        if node.origin.is_some() {
            self.mark_impure(&parent, &upper)?;
        }
        // Counted before it is there: a count that is too high keeps an entry of the index too long, one that is too
        // low would part the names.
        self.count_links(&node, &held, 1)?;
        let linked = upper.service().link(&self.inside(caller), held.node, upper.node, name);
        if linked.is_err() {
            self.count_links(&node, &held, -1)?;
        }
        let (_, attr) = upper.take(linked?);
        node.set_place(&parent, name);
        if covered {
            self.uncover(&parent, &upper, name, &node)?;
        }
        drop(names);
        self.notices.inode(caller, node.id);
        self.notices.entry(caller, parent.id, name);
        let attr = node.shown(attr);
        Ok(self.answer(&Found { node, attr }))
    }

    /// Changes the count of an inode of the link index; the others' are counted by the upper.
    pub(super) fn count_links(&self, node: &Node, held: &Held, change: i32) -> Result<()> {
        let mut links = node.links.lock();
        let Some(before) = *links else { return Ok(()) };
        let after = before.saturating_add_signed(change);
        if let (Some(work), Some(origin)) = (&self.work, node.origin) {
            let apart = work.counts_names(origin);
            let carries =
                node.kind == libc::S_IFREG && self.capabilities_below().contains(Capabilities::XATTRS);
            if apart || carries {
                work.record_names(&self.own, held, origin, carries && !apart, after)?;
            }
        }
        *links = Some(after);
        Ok(())
    }

    pub(super) fn create_file(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        for _ in 0..CREATE_TRIES_MAX {
            match self.create_new(caller, parent, name, mode, flags) {
                Err(e) if e.is(Errno::EXIST) && !flags.contains(OpenFlags::EXCLUSIVE) => {}
                // What is there may be opened all the same.
                Err(e) if e.is(Errno::ROFS) && !names::is_reserved(name) => {
                    let parent = self.directory(parent)?;
                    if self.find_shared(caller, &parent, name)?.is_none() {
                        return Err(e);
                    }
                    if flags.contains(OpenFlags::EXCLUSIVE) {
                        return Err(exists());
                    }
                }
                done => return done,
            }
            match self.open_present(caller, parent, name, flags) {
                Err(e) if e.is(Errno::NOENT) || e.is(Errno::STALE) => {}
                done => return done,
            }
        }
        Err(Error::new(Errno::STALE, "create a name that comes and goes"))
    }

    fn open_present(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let parent = self.directory(parent)?;
        let found = self.find_shared(caller, &parent, name)?;
        let mut found = found.ok_or_else(|| Error::new(Errno::NOENT, "open a name"))?;
        let opened = self.open_file(caller, &found.node, flags)?;
        if flags.contains(OpenFlags::TRUNCATE) {
            found.attr = self.attributes(caller, &found.node, Some(opened.handle)).inspect_err(|_| {
                self.files.remove(opened.handle);
            })?;
        }
        Ok((self.answer(&found), opened))
    }

    fn create_new(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let (entry, node, opened) = self.make(caller, parent, name, |caller, upper| {
            upper.service().create(caller, upper.node, name, mode, flags | OpenFlags::EXCLUSIVE)
        })?;
        Ok((entry, self.keep_open(&node, opened, flags)))
    }

    pub(super) fn make_tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        let parent = self.directory(parent)?;
        let upper = self.raise(&parent)?;
        let (entry, opened) = upper.service().tmpfile(&self.inside(caller), upper.node, mode, flags)?;
        let (held, attr) = upper.take(entry);
        let seed = Seed {
            ino: Origin { ordinal: 0, ino: attr.ino }.union_ino(),
            kind: attr.file_type(),
            origin: None,
            stack: Stack { parts: vec![Arc::new(held)], redirect: None },
            impure: false,
            links: None,
            names_removed: 0,
        };
        let node = self.nodes.intern(seed);
        let attr = node.shown(attr);
        let entry = self.answer(&Found { node: node.clone(), attr });
        Ok((entry, self.keep_open(&node, opened, flags)))
    }

    /// Keeps what the upper opened with the node that it made.
    fn keep_open(&self, node: &Arc<Node>, opened: Opened, flags: OpenFlags) -> Opened {
        let open = OpenFile { held: node.stack().top().clone(), handle: opened.handle };
        self.opened(node, open, opened, flags)
    }
}

fn exists() -> Error {
    Error::new(Errno::EXIST, "make a name that is there already")
}
