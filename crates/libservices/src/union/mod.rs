//! `union`: any number of read-only lowers, the topmost first, under an optional writable upper.
//!
//! It stands on the trait alone: no path, no host. What a name stands for is merged from the layers (`lookup`); what is to
//! be changed is copied to the upper first (`copy_up`); what is removed is hidden there by a whiteout (`remove`); a directory
//! that moves remembers what it merges with (`rename`). The format is described in ARCHITECTURE.md.
//!
//! **Order of locks**: `Node::copying`, then `Union::moves`, then `Node::entries` (of several: by node number), then `Node::links`,
//! then `Partial::filling`, then what a node knows of its record (`Bytes`), then any
//! of the short ones (tables, places, stacks, names), under which no layer is called. Nothing is copied up while `entries` or
//! `moves` is held.

mod attributes;
mod copy_bytes;
mod copy_up;
mod crc32;
mod create;
mod files;
mod layers;
mod listing;
mod lookup;
mod lower_names;
mod merging;
mod nodes;
mod partial;
mod record;
mod relay;
mod remove;
mod rename;
mod tally;
#[cfg(test)]
mod tests;
mod work;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

use parking_lot::Mutex;

use crate::capabilities::{Capabilities, Coherence};
use crate::error::{Errno, Error, Result};
use crate::handles::Handles;
use crate::libservice::{Libservice, Observer};
use crate::name::Name;
use crate::notices::Notices;
use crate::types::*;

use files::File;
use layers::{Held, Layer, Origin};
use listing::Listing;
use lookup::Found;
use nodes::{Node, Nodes, Seed, Stack};
pub use partial::BlockSizes;
use work::Work;

/// Unions act in their layers as doors of their own, counted from here.
const FIRST_DOOR: u32 = 1 << 31;
static NEXT_DOOR: AtomicU32 = AtomicU32::new(FIRST_DOOR);

/// Read-only lowers under an optional writable upper.
pub struct Union {
    upper: Option<Arc<Layer>>,
    lowers: Vec<Arc<Layer>>,
    /// No layer is changed by others.
    settled: bool,
    lowers_settled: bool,
    nodes: Arc<Nodes>,
    files: Handles<File>,
    listings: Handles<Listing>,
    notices: Arc<Notices>,
    work: Option<Work>,
    sizes: BlockSizes,
    /// Held while directories move.
    moves: Mutex<()>,
    /// How many names are remembered in all directories' tables.
    names_cached: Arc<AtomicUsize>,
    /// The union acting for itself.
    own: Caller,
}

impl Union {
    /// `lowers` are the topmost first. EINVAL when there are too many, EROFS when the upper cannot be written.
    pub fn new(lowers: Vec<Arc<dyn Libservice>>, upper: Option<Arc<dyn Libservice>>) -> Result<Self> {
        Self::with_sizes(lowers, upper, BlockSizes::default())
    }

    /// `new`, with blocks of another size for files that are copied up from now on.
    pub fn with_sizes(
        lowers: Vec<Arc<dyn Libservice>>,
        upper: Option<Arc<dyn Libservice>>,
        sizes: BlockSizes,
    ) -> Result<Self> {
        if lowers.is_empty() || lowers.len() > crate::stack::LOWERS_MAX {
            return Err(Error::new(Errno::INVAL, "build a union of no lowers or of too many"));
        }
        let own = Caller { door: DoorId(NEXT_DOOR.fetch_add(1, Relaxed)), ..Caller::service() };
        let count = lowers.len() as u16;
        let number = |(i, lower)| Layer::new(lower, count - i as u16);
        let lowers: Vec<_> = lowers.into_iter().enumerate().map(number).collect();
        let upper = upper.map(|upper| Layer::new(upper, 0));
        let work = upper.as_ref().map(|upper| open_upper(&own, upper)).transpose()?;
        let lowers_settled = lowers.iter().all(|layer| layer.settled);
        let union = Self {
            nodes: Nodes::new(root(&own, &upper, &lowers)?),
            settled: lowers_settled && upper.as_ref().is_none_or(|upper| upper.settled),
            lowers_settled,
            files: Handles::default(),
            listings: Handles::default(),
            notices: Arc::default(),
            work,
            sizes,
            moves: Mutex::default(),
            names_cached: Arc::default(),
            own,
            upper,
            lowers,
        };
        union.upper.iter().chain(&union.lowers).for_each(|layer| union.listen(layer));
        union.watch_lowers(union.nodes.root());
        Ok(union)
    }

    fn node(&self, id: NodeId) -> Result<Arc<Node>> {
        self.nodes.get(id).ok_or_else(|| Error::new(Errno::STALE, "use a node that was forgotten"))
    }

    fn directory(&self, id: NodeId) -> Result<Arc<Node>> {
        let node = self.node(id)?;
        if !node.is_dir() {
            return Err(Error::new(Errno::NOTDIR, "use something as a directory"));
        }
        Ok(node)
    }

    /// The caller as layers see him: changes that come through here are told by the union, not by its layers.
    fn inside(&self, caller: &Caller) -> Caller {
        Caller { door: self.own.door, ..caller.clone() }
    }

    fn find_shared(&self, caller: &Caller, parent: &Arc<Node>, name: &Name) -> Result<Option<Found>> {
        let _names = parent.entries.read();
        self.find(caller, parent, name)
    }

    /// Hands a node out; the answer holds a look-up.
    fn answer(&self, found: &Found) -> Entry {
        self.nodes.remember(&found.node);
        Entry { node: found.node.id, generation: 0, attr: found.attr.clone() }
    }

    /// Of the layer that new things are made in.
    fn capabilities_below(&self) -> Capabilities {
        self.upper.as_ref().map_or(Capabilities::empty(), |upper| upper.service.capabilities())
    }

    fn top_layer(&self) -> &Arc<Layer> {
        self.upper.as_ref().unwrap_or(&self.lowers[0])
    }
}

fn open_upper(own: &Caller, upper: &Arc<Layer>) -> Result<Work> {
    if !upper.service.capabilities().contains(Capabilities::WRITE) {
        return Err(Error::new(Errno::ROFS, "use a read-only layer as the upper of a union"));
    }
    let root = Held::new(upper, NodeId::ROOT);
    let times = root.attr(own)?;
    let work = Work::open(own, upper)?;
    copy_up::restore_times(own, &root, &times)?;
    Ok(work)
}

fn root(own: &Caller, upper: &Option<Arc<Layer>>, lowers: &[Arc<Layer>]) -> Result<Seed> {
    let mut parts = Vec::new();
    for layer in upper.iter().chain(lowers) {
        let held = Arc::new(Held::new(layer, NodeId::ROOT));
        let opaque = lookup::is_opaque(own, &held)?;
        parts.push(held);
        if opaque {
            break;
        }
    }
    let attr = parts[0].attr(own)?;
    let ordinal = parts[0].layer.ordinal;
    let origin = Origin { ordinal, ino: attr.ino };
    let impure = match upper {
        Some(_) => lookup::mark(own, &parts[0], layers::marks::IMPURE)?.is_some(),
        None => false,
    };
    Ok(Seed {
        ino: origin.union_ino(),
        kind: attr.file_type(),
        origin: (ordinal > 0).then_some(origin),
        stack: Stack { parts, redirect: None },
        impure,
        links: None,
        names_removed: 0,
    })
}

impl Libservice for Union {
    fn kind(&self) -> &'static str {
        "union"
    }

    fn capabilities(&self) -> Capabilities {
        let lowers = self.lowers.iter().map(|lower| lower.service.capabilities());
        let common = lowers.fold(Capabilities::all(), |common, each| common & each);
        match &self.upper {
            // Files of lowers are opened as well.
            Some(upper) => upper.service.capabilities() - (Capabilities::STATELESS_OPEN - common),
            None => common - Capabilities::WRITE,
        }
    }

    fn coherence(&self) -> Coherence {
        let lowers = self.lowers.iter().map(|lower| lower.service.coherence()).max();
        let upper = self.upper.as_ref().map(|upper| upper.service.coherence());
        match (lowers.unwrap_or(Coherence::Immutable), upper) {
            (lowers, None) => lowers,
            (
                Coherence::Immutable | Coherence::Exclusive,
                Some(Coherence::Immutable | Coherence::Exclusive),
            ) => Coherence::Exclusive,
            _ => Coherence::Shared,
        }
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<Entry> {
        let parent = self.directory(parent)?;
        match self.find_shared(caller, &parent, name)? {
            Some(found) => Ok(self.answer(&found)),
            None => Err(Error::new(Errno::NOENT, "look up a name")),
        }
    }

    fn look_up_again(&self, caller: &Caller, node: NodeId) -> Result<Entry> {
        let found = self.node(node)?;
        let attr = self.attributes(caller, &found, None)?;
        self.nodes.remember(&found);
        Ok(Entry { node, generation: 0, attr })
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.nodes.forget(node, count);
    }

    fn getattr(&self, caller: &Caller, node: NodeId, handle: Option<HandleId>) -> Result<Attr> {
        self.attributes(caller, &self.node(node)?, handle)
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<HandleId>,
        changes: &SetAttr,
    ) -> Result<Attr> {
        self.set_attributes(caller, &self.node(node)?, handle, changes)
    }

    fn readlink(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        let stack = self.node(node)?.stack();
        stack.top().service().readlink(caller, stack.top().node)
    }

    fn mknod(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32, rdev: u64) -> Result<Entry> {
        let made = self.make(caller, parent, name, |caller, upper| {
            Ok((upper.service().mknod(caller, upper.node, name, mode, rdev)?, ()))
        });
        Ok(made?.0)
    }

    fn mkdir(&self, caller: &Caller, parent: NodeId, name: &Name, mode: u32) -> Result<Entry> {
        let made = self.make(caller, parent, name, |caller, upper| {
            Ok((upper.service().mkdir(caller, upper.node, name, mode)?, ()))
        });
        Ok(made?.0)
    }

    fn symlink(&self, caller: &Caller, parent: NodeId, name: &Name, target: &[u8]) -> Result<Entry> {
        let made = self.make(caller, parent, name, |caller, upper| {
            Ok((upper.service().symlink(caller, upper.node, name, target)?, ()))
        });
        Ok(made?.0)
    }

    fn link(&self, caller: &Caller, node: NodeId, new_parent: NodeId, new_name: &Name) -> Result<Entry> {
        self.make_link(caller, node, new_parent, new_name)
    }

    fn unlink(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<()> {
        self.remove_file(caller, parent, name)
    }

    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &Name) -> Result<()> {
        self.remove_directory(caller, parent, name)
    }

    fn rename(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        new_parent: NodeId,
        new_name: &Name,
        flags: RenameFlags,
    ) -> Result<()> {
        self.move_name(caller, (parent, name), (new_parent, new_name), flags)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<Opened> {
        self.open_file(caller, &self.node(node)?, flags)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &Name,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        self.create_file(caller, parent, name, mode, flags)
    }

    fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        mode: u32,
        flags: OpenFlags,
    ) -> Result<(Entry, Opened)> {
        self.make_tmpfile(caller, parent, mode, flags)
    }

    fn read(
        &self,
        caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        self.read_file(caller, handle, offset, buffer)
    }

    fn write(
        &self,
        caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        self.write_file(caller, handle, offset, data)
    }

    fn flush(&self, caller: &Caller, _node: NodeId, handle: HandleId) -> Result<()> {
        self.flush_file(caller, handle)
    }

    fn fsync(&self, caller: &Caller, _node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.sync_file(caller, handle, data_only)
    }

    fn release(&self, _node: NodeId, handle: HandleId) {
        drop(self.files.remove(handle));
    }

    fn opendir(&self, _caller: &Caller, node: NodeId) -> Result<HandleId> {
        self.open_listing(node)
    }

    fn readdir(
        &self,
        caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirSink<'_>,
    ) -> Result<()> {
        self.list(caller, handle, offset, sink)
    }

    fn readdir_plus(
        &self,
        caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        offset: u64,
        sink: &mut DirPlusSink<'_>,
    ) -> Result<()> {
        self.list_plus(caller, handle, offset, sink)
    }

    fn fsyncdir(&self, caller: &Caller, _node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.sync_listing(caller, handle, data_only)
    }

    fn releasedir(&self, _node: NodeId, handle: HandleId) {
        drop(self.listings.remove(handle));
    }

    fn statfs(&self, caller: &Caller, _node: NodeId) -> Result<StatFs> {
        self.top_layer().service.statfs(caller, NodeId::ROOT)
    }

    fn getxattr(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<Vec<u8>> {
        self.get_attribute(caller, node, name)
    }

    fn listxattr(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        self.attribute_names(caller, node)
    }

    fn setxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        self.set_attribute(caller, node, name, value, flags)
    }

    fn removexattr(&self, caller: &Caller, node: NodeId, name: &[u8]) -> Result<()> {
        self.remove_attribute(caller, node, name)
    }

    fn fallocate(
        &self,
        caller: &Caller,
        _node: NodeId,
        handle: HandleId,
        mode: FallocateMode,
        offset: u64,
        length: u64,
    ) -> Result<()> {
        self.allocate(caller, handle, mode, (offset, length))
    }

    fn seek(&self, caller: &Caller, _node: NodeId, handle: HandleId, offset: u64, to: SeekTo) -> Result<u64> {
        self.seek_sparse(caller, handle, offset, to)
    }

    fn copy_range(
        &self,
        caller: &Caller,
        from: (NodeId, HandleId, u64),
        to: (NodeId, HandleId, u64),
        length: u64,
    ) -> Result<u64> {
        self.copy_between(caller, (from.1, from.2), (to.1, to.2), length)
    }

    fn host_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        self.file_of_host(handle)
    }

    fn immutable_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        self.immutable_file_of_host(handle)
    }

    fn content(&self, handle: HandleId) -> Option<ContentId> {
        self.content_below(handle)
    }

    fn content_of(&self, node: NodeId) -> Option<Content> {
        self.content_of_node(node)
    }

    fn host_inode(&self, handle: HandleId) -> Option<HostInode> {
        self.host_inode_below(handle)
    }

    fn observe(&self, observer: Arc<dyn Observer>) {
        self.notices.add(observer);
    }
}
