//! Names: look-up, removal, renaming, link targets.

use std::sync::Arc;

use rustix::fs::{self, AtFlags, Mode, OFlags};

use super::nodes::{Moment, Node};
use super::{Dir, sys};
use crate::error::{Attempt, Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

impl Dir {
    pub(super) fn look_up(&self, parent: &Arc<Node>, name: &Name) -> Result<Entry> {
        let directory = self.reach(parent)?;
        let seen_at = self.nodes.now();
        let stat = self.stat_name(&*directory, name).attempt("look up a name")?;
        Ok(self.entry(&stat, parent, name, seen_at))
    }

    /// The answer for an inode just seen as `name` in `parent`; holds one look-up.
    pub(super) fn entry(&self, stat: &sys::Stat, parent: &Arc<Node>, name: &Name, seen_at: Moment) -> Entry {
        let node = self.nodes.look_up(stat);
        self.nodes.sighted(&node, (parent, name), stat.attr.nlink > 1, seen_at);
        let attr = self.with_settled_bits(&node, &stat.attr);
        Entry { node: node.id, generation: 0, attr }
    }

    pub(super) fn remove(&self, caller: &Caller, parent: NodeId, name: &Name, flags: AtFlags) -> Result<()> {
        self.writable()?;
        let parent = self.node(parent)?;
        let directory = self.reach(&parent)?;
        let _moving = self.moves.read();
        let victim = self.known(&directory, name)?;
        if let Err(errno) = fs::unlinkat(&*directory, name.as_bytes(), flags) {
            if let Some(victim) = &victim {
                self.nodes.sighted(victim, (&parent, name), true, self.nodes.now());
            }
            return Err(Error::new(errno, "remove a name"));
        }
        self.nodes.names_moved();
        if let Some(victim) = victim {
            self.nodes.lost(&victim, &parent, name);
            self.notices.inode(caller, victim.id);
        }
        self.notices.entry(caller, parent.id, name);
        Ok(())
    }

    /// The node that `name` stands for, if it is known, with its descriptor in place: it may lose its name next.
    fn known(&self, directory: &super::Descriptor, name: &Name) -> Result<Option<Arc<Node>>> {
        let open = || sys::open_name(directory, name, OFlags::PATH, Mode::empty());
        let fd = match self.with_room(open) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(Error::new(errno, "open what a name stands for")),
        };
        let stat = self.stat_fd(&fd).attempt("look at what a name stands for")?;
        let node = self.nodes.find(&stat.key);
        if let Some(node) = &node {
            self.nodes.install(node, fd);
            // It must not be evicted while its name goes; a sighting unpins it.
            node.pin();
        }
        Ok(node)
    }

    pub(super) fn move_name(
        &self,
        caller: &Caller,
        from: (NodeId, &Name),
        to: (NodeId, &Name),
        flags: RenameFlags,
    ) -> Result<()> {
        self.writable()?;
        let (old_parent, new_parent) = (self.node(from.0)?, self.node(to.0)?);
        let (old_fd, new_fd) = (self.reach(&old_parent)?, self.reach(&new_parent)?);
        let _moving = self.moves.read();
        let source = self.stat_name(&*old_fd, from.1).attempt("look up the name to rename")?;
        let source = self.nodes.find(&source.key);
        let victim = self.known(&new_fd, to.1)?;
        // renameat2 also without flags: one system call for workers to be allowed.
        let renamed = fs::renameat_with(
            &*old_fd,
            from.1.as_bytes(),
            &*new_fd,
            to.1.as_bytes(),
            fs::RenameFlags::from_bits_truncate(flags.bits()),
        );
        if let Err(errno) = renamed {
            if let Some(victim) = &victim {
                self.nodes.sighted(victim, (&new_parent, to.1), true, self.nodes.now());
            }
            return Err(Error::new(errno, "rename"));
        }
        self.nodes.names_moved();
        self.record_move(caller, (&old_parent, from.1, source), (&new_parent, to.1, victim), flags);
        Ok(())
    }

    fn record_move(
        &self,
        caller: &Caller,
        from: (&Arc<Node>, &Name, Option<Arc<Node>>),
        to: (&Arc<Node>, &Name, Option<Arc<Node>>),
        flags: RenameFlags,
    ) {
        let (old_parent, old_name, source) = from;
        let (new_parent, new_name, victim) = to;
        // Renaming one name of a file over another of its names does nothing.
        let same = match (&source, &victim) {
            (Some(source), Some(victim)) => Arc::ptr_eq(source, victim),
            _ => false,
        };
        if let Some(victim) = victim {
            if same {
                self.nodes.sighted(&victim, (new_parent, new_name), true, self.nodes.now());
            } else if flags.contains(RenameFlags::EXCHANGE) {
                self.nodes.renamed(&victim, (new_parent, new_name), (old_parent, old_name));
            } else {
                self.nodes.lost(&victim, new_parent, new_name);
            }
            self.notices.inode(caller, victim.id);
        }
        if let Some(source) = source {
            if !same {
                self.nodes.renamed(&source, (old_parent, old_name), (new_parent, new_name));
            }
            self.notices.inode(caller, source.id);
        }
        self.notices.entry(caller, old_parent.id, old_name);
        self.notices.entry(caller, new_parent.id, new_name);
    }

    pub(super) fn link_target(&self, node: &Arc<Node>) -> Result<Vec<u8>> {
        if node.host_type != libc::S_IFLNK {
            return Err(Error::new(Errno::INVAL, "read the target of something that is no link"));
        }
        let link = self.reach(node)?;
        let target = fs::readlinkat(&*link, c"", Vec::new()).attempt("read a link")?;
        Ok(target.into_bytes())
    }
}
