//! Copying to the upper what lies in a lower, before it is changed.
//!
//! A copy is made in the work area, ordered on the device, and moved to its place in one step: at every moment the place
//! shows the lower inode or all of the copy. Of large files, and for changes of attributes and names of any, no bytes are
//! copied: the copy is a sparse file with a record of what it lacks (`partial`).

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::Union;
use super::copy_bytes::{copy_bytes, copy_dense};
use super::layers::{Held, OpenFile, Origin, marks};
use super::nodes::{DEPTH_MAX, Node, Place};
use super::partial::Partial;
use super::record::{self, BLOCKS_FEW, BLOCKS_MAX, Blocks, Identity, PATH_MAX_BYTES, Source};
use super::rename::lower_path;
use super::work::Work;
use crate::capabilities::Capabilities;
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// Files up to this size are not searched for holes when they seem to have none.
const DENSE_MAX_BYTES: u64 = 256 << 10;

/// What a file is copied up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Its attributes or names are to be changed.
    Attributes,
    /// Its bytes are to be changed.
    Bytes,
    /// It gets this size.
    Cut(u64),
}

/// A finished copy under a name of the work area.
struct Copy {
    held: Arc<Held>,
    name: Box<Name>,
    /// The copy carries its origin itself.
    marked: bool,
    ino: u64,
    nlink: u32,
    partial: Option<Arc<Partial>>,
}

/// A copy being made.
struct New<'a> {
    held: &'a Held,
    file: Option<&'a OpenFile>,
    /// As it was right after it was made.
    made: &'a Attr,
    /// It gets so many of the lower's bytes.
    size_bytes: u64,
}

impl Union {
    pub(super) fn work(&self) -> Result<&Work> {
        self.work.as_ref().ok_or_else(|| Error::new(Errno::ROFS, "change a union without an upper layer"))
    }

    /// The upper's inode of `node`, copied there if need be, for a change that leaves its bytes alone. No `entries` may be held.
    pub(super) fn raise(&self, node: &Arc<Node>) -> Result<Arc<Held>> {
        self.raise_for(node, Use::Attributes)
    }

    pub(super) fn raise_for(&self, node: &Arc<Node>, purpose: Use) -> Result<Arc<Held>> {
        let work = self.work()?;
        loop {
            if let Some(upper) = node.upper() {
                return Ok(upper);
            }
            // From the highest that is not there yet down to the node; nothing is held from one to the next.
            let mut chain = vec![node.clone()];
            while let Some(place) = chain.last().and_then(|last| last.place()) {
                if place.parent.is_raised() {
                    break;
                }
                if chain.len() >= DEPTH_MAX {
                    return Err(Error::new(Errno::LOOP, "copy up a directory nested too deep"));
                }
                chain.push(place.parent);
            }
            while let Some(next) = chain.pop() {
                if !self.raise_one(work, &next, purpose)? {
                    break;
                }
            }
        }
    }

    /// Says whether it is on the upper now; if not, its parent went elsewhere meanwhile.
    fn raise_one(&self, work: &Work, node: &Arc<Node>, purpose: Use) -> Result<bool> {
        let _copying = node.copying.lock();
        if node.is_raised() {
            return Ok(true);
        }
        let place = node.place();
        if place.as_ref().is_some_and(|place| !place.parent.is_raised()) {
            return Ok(false);
        }
        if node.is_dir() && place.is_none() {
            return Err(Error::new(Errno::NOENT, "change a directory that was removed"));
        }
        let copy = self.copy(work, node, purpose)?;
        let published = self.publish(work, node, place, &copy);
        if published.is_err() && !node.is_raised() {
            self.discard(work, node.is_dir(), &copy.name);
        }
        published?;
        Ok(true)
    }

    /// Best effort: what stays is cleared at the next start.
    fn discard(&self, work: &Work, is_dir: bool, name: &Name) {
        let (service, tmp) = (work.tmp.service(), work.tmp.node);
        let _ = match is_dir {
            true => service.rmdir(&self.own, tmp, name),
            false => service.unlink(&self.own, tmp, name),
        };
    }

    fn copy(&self, work: &Work, node: &Arc<Node>, purpose: Use) -> Result<Copy> {
        let stack = node.stack();
        let (lower, name) = (stack.top(), work.fresh_name());
        let mut attr = lower.attr(&self.own)?;
        node.with_last_times(&mut attr);
        let nameless = node.place().is_none() && node.shown(attr.clone()).nlink == 0;
        let plan = if nameless { None } else { self.plan_to_leave(node, lower, &attr, purpose)? };
        let size_bytes = match purpose {
            Use::Cut(size_bytes) => attr.size_bytes.min(size_bytes),
            _ => attr.size_bytes,
        };
        let (held, file, made) = self.make_like(work, lower, &attr, &name)?;
        let copy = New { held: &held, file: file.as_ref(), made: &made, size_bytes };
        let filled = self.fill(work, (lower, &attr), &copy, plan).and_then(|partial| {
            // Without waiting, a power cut could leave a short file where a whole one was.
            let ordered = copy.file.filter(|_| size_bytes > 0 && !nameless && partial.is_none());
            if let Some(file) = ordered {
                file.service().begin_order(&self.own, held.node, file.handle)?;
            }
            let marked = self.mark_origin(&held, node.origin, &attr)?;
            self.dress(lower, &attr, &copy)?;
            if let Some(file) = ordered {
                file.service().order(&self.own, held.node, file.handle)?;
            }
            Ok((marked, partial))
        });
        match filled {
            Ok((marked, partial)) => {
                drop(file);
                Ok(Copy { held, name, marked, ino: made.ino, nlink: attr.nlink, partial })
            }
            Err(e) => {
                self.discard(work, attr.is_dir(), &name);
                Err(e)
            }
        }
    }

    fn make_like(
        &self,
        work: &Work,
        lower: &Held,
        attr: &Attr,
        name: &Name,
    ) -> Result<(Arc<Held>, Option<OpenFile>, Attr)> {
        let (service, tmp, own) = (work.tmp.service(), work.tmp.node, &self.own);
        // Nobody else comes into the work area; bits that a change of owner drops come later.
        let mode = attr.mode & 0o777;
        let mut handle = None;
        let entry = match attr.file_type() {
            libc::S_IFDIR => service.mkdir(own, tmp, name, mode)?,
            libc::S_IFLNK => {
                let target = lower.service().readlink(own, lower.node)?;
                service.symlink(own, tmp, name, &target)?
            }
            libc::S_IFREG => {
                let flags = OpenFlags::WRITE | OpenFlags::EXCLUSIVE;
                let (entry, opened) = service.create(own, tmp, name, libc::S_IFREG | mode, flags)?;
                handle = Some(opened.handle);
                entry
            }
            special => service.mknod(own, tmp, name, special | mode, attr.rdev)?,
        };
        let (held, made) = work.tmp.take(entry);
        let held = Arc::new(held);
        let file = handle.map(|handle| OpenFile { held: held.clone(), handle });
        Ok((held, file, made))
    }

    /// The bytes, or a record of where they are.
    fn fill(
        &self,
        work: &Work,
        (lower, attr): (&Arc<Held>, &Attr),
        copy: &New<'_>,
        plan: Option<Source>,
    ) -> Result<Option<Arc<Partial>>> {
        let &New { held, file, size_bytes, .. } = copy;
        let Some(file) = file.filter(|_| size_bytes > 0) else { return Ok(None) };
        let size = SetAttr { size_bytes: Some(size_bytes), ..SetAttr::default() };
        let resize = || held.service().setattr(&self.own, held.node, Some(file.handle), &size);
        if let Some(source) = plan {
            if clone_whole(&self.own, lower, file) {
                resize()?;
                return Ok(None);
            }
            if let Some(blocks) = self.record(work, held, &source, size_bytes)? {
                resize()?;
                return Ok(Some(Partial::new(source, lower.clone(), attr.blocks_512, blocks)));
            }
        }
        let (source, _) = OpenFile::open(&self.own, lower, OpenFlags::READ | OpenFlags::NOATIME)?;
        let dense = size_bytes <= DENSE_MAX_BYTES && attr.blocks_512.saturating_mul(512) >= attr.size_bytes;
        let copy = if dense { copy_dense } else { copy_bytes };
        if copy(&self.own, &source, file, size_bytes)? < size_bytes {
            // A hole at the end.
            resize()?;
        }
        Ok(None)
    }

    /// Where the bytes of a lower file are to stay for now. `None` when it is better to copy them.
    fn plan_to_leave(
        &self,
        node: &Arc<Node>,
        lower: &Held,
        attr: &Attr,
        purpose: Use,
    ) -> Result<Option<Source>> {
        let small = attr.size_bytes <= self.sizes.whole_max_bytes && matches!(purpose, Use::Cut(_));
        // What others may change does not stay as it is.
        let stays = lower.layer.settled && self.capabilities_below().contains(Capabilities::XATTRS);
        let (Some(origin), false, true, libc::S_IFREG) = (node.origin, small, stays, attr.file_type()) else {
            return Ok(None);
        };
        let Ok(path) = lower_path(node) else { return Ok(None) };
        let source = Source { origin, identity: Identity::of(attr), path: path.into_boxed_slice() };
        if attr.size_bytes == 0 || source.path.len() > PATH_MAX_BYTES {
            return Ok(None);
        }
        let found = self.find_source(&source)?;
        Ok(found.is_some_and(|(found, _)| found.key() == lower.key()).then_some(source))
    }

    /// Records that the upper has no block yet. `None` when there is no room for that.
    fn record(&self, work: &Work, held: &Held, source: &Source, size_bytes: u64) -> Result<Option<Blocks>> {
        work.allow_partial_files(&self.own)?;
        for count_max in [BLOCKS_MAX, BLOCKS_FEW] {
            let blocks = self.sizes.blocks(size_bytes, count_max);
            let value = record::encode(source, &blocks);
            match held.service().setxattr(&self.own, held.node, marks::BLOCKS, &value, XattrFlags::empty()) {
                Ok(()) => return Ok(Some(blocks)),
                Err(e) if [Errno::NOSPC, Errno::DQUOT, Errno::TOOBIG, Errno::RANGE].contains(&e.errno()) => {}
                Err(e) if e.is(Errno::OPNOTSUPP) || e.is(Errno::PERM) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// Owner, extended attributes (a change of owner drops capabilities), mode, times.
    fn dress(&self, lower: &Held, attr: &Attr, copy: &New<'_>) -> Result<()> {
        let (own, New { held, made, .. }) = (&self.own, copy);
        let handle = copy.file.map(|file| file.handle);
        if (attr.uid, attr.gid) != (made.uid, made.gid) {
            let owner = SetAttr { uid: Some(attr.uid), gid: Some(attr.gid), ..SetAttr::default() };
            held.service().setattr(own, held.node, handle, &owner)?;
        }
        // An ACL changes the mode.
        let changed = copy_attributes(own, lower, held)? || attr.mode != made.mode;
        let mode = (changed && attr.file_type() != libc::S_IFLNK).then_some(attr.mode & 0o7777);
        let (atime, mtime) = (Some(SetTime::At(attr.atime)), Some(SetTime::At(attr.mtime)));
        let rest = SetAttr { mode, atime, mtime, ..SetAttr::default() };
        held.service().setattr(own, held.node, handle, &rest)?;
        Ok(())
    }

    /// Says whether the copy could be marked.
    fn mark_origin(&self, held: &Held, origin: Option<Origin>, attr: &Attr) -> Result<bool> {
        let Some(origin) = origin else { return Ok(true) };
        if !matches!(attr.file_type(), libc::S_IFREG | libc::S_IFDIR) {
            return Ok(false);
        }
        let (text, none) = (origin.text(), XattrFlags::empty());
        match held.service().setxattr(&self.own, held.node, marks::ORIGIN, text.as_bytes(), none) {
            Ok(()) => Ok(true),
            Err(e) if e.is(Errno::OPNOTSUPP) || e.is(Errno::PERM) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Moves a finished copy to where it belongs. Where the name went away meanwhile, only open files lead to it.
    fn publish(&self, work: &Work, node: &Arc<Node>, place: Option<Place>, copy: &Copy) -> Result<()> {
        let (own, tmp) = (&self.own, &work.tmp);
        let can_link = self.capabilities_below().contains(Capabilities::HARD_LINKS);
        let indexed = !node.is_dir() && can_link && (copy.nlink > 1 || !copy.marked);
        let Some(Place { parent, name }) = place else {
            return self.publish_nameless(work, node, copy, indexed);
        };
        let _names = parent.entries.write();
        let lower_key = node.stack().top().key();
        // Where nobody else changes names, its place is known.
        let is_there =
            || Ok(self.find(own, &parent, &name)?.is_some_and(|found| Arc::ptr_eq(&found.node, node)));
        let stands = if self.settled { node.is_at(&parent, &name) && !parent.is_dead() } else { is_there()? };
        if !stands || node.stack().top().key() != lower_key {
            if node.is_dir() {
                return Err(Error::new(Errno::NOENT, "change a directory that was removed"));
            }
            node.lost_name(&parent, &name);
            return self.publish_nameless(work, node, copy, indexed);
        }
        let upper = parent.upper().ok_or_else(|| Error::new(Errno::STALE, "copy into a directory"))?;
        if copy.marked || indexed {
            self.mark_impure(&parent, &upper)?;
        }
        let times = upper.attr(own)?;
        if indexed {
            self.enter_index(work, node, copy)?;
            let linked = upper.service().link(own, copy.held.node, upper.node, &name)?;
            drop(upper.take(linked));
        } else {
            let none = RenameFlags::empty();
            upper.service().rename(own, tmp.node, &copy.name, upper.node, &name, none)?;
        }
        self.nodes.raise(node, copy.held.clone(), copy.partial.clone());
        node.fresh.store(true, Release);
        restore_times(own, &upper, &times)
    }

    fn publish_nameless(&self, work: &Work, node: &Arc<Node>, copy: &Copy, indexed: bool) -> Result<()> {
        let left = copy.nlink.saturating_sub(node.names_removed.load(Relaxed));
        if indexed && left > 0 {
            self.enter_index(work, node, copy)?;
        } else {
            work.tmp.service().unlink(&self.own, work.tmp.node, &copy.name)?;
        }
        self.nodes.raise(node, copy.held.clone(), copy.partial.clone());
        Ok(())
    }

    /// From now on every name of the lower inode leads to the copy.
    fn enter_index(&self, work: &Work, node: &Arc<Node>, copy: &Copy) -> Result<()> {
        let Some(origin) = node.origin else { return Ok(()) };
        let left = copy.nlink.saturating_sub(node.names_removed.load(Relaxed));
        // Of what cannot carry it and has one name, the upper's own count will do.
        if copy.marked || left > 1 {
            work.record_names(&self.own, &copy.held, origin, copy.marked, left)?;
        }
        let text = origin.text();
        let (links, name) = (&work.links, Name::new(text.as_bytes())?);
        let none = RenameFlags::empty();
        links.service().rename(&self.own, work.tmp.node, &copy.name, links.node, name, none)?;
        work.index.lock().insert(origin, copy.ino);
        *node.links.lock() = Some(left);
        work.removed.set(&self.own, origin, None)
    }

    /// Says on disk that entries of the directory may carry an origin, before the first does.
    pub(super) fn mark_impure(&self, parent: &Node, upper: &Held) -> Result<()> {
        if parent.impure.load(Acquire) {
            return Ok(());
        }
        match upper.service().setxattr(&self.own, upper.node, marks::IMPURE, b"y", XattrFlags::empty()) {
            Ok(()) => {}
            Err(e) if e.is(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e),
        }
        parent.impure.store(true, Release);
        Ok(())
    }
}

/// Makes `file` share all bytes of a lower file, where the host's filesystem can.
fn clone_whole(caller: &Caller, lower: &Arc<Held>, file: &OpenFile) -> bool {
    if lower.layer.no_clones.load(Relaxed) {
        return false;
    }
    let cloned = || {
        let (source, _) = OpenFile::open(caller, lower, OpenFlags::READ | OpenFlags::NOATIME).ok()?;
        let hosts = source.service().host_file(source.handle).zip(file.service().host_file(file.handle))?;
        rustix::fs::ioctl_ficlone(&*hosts.1, &*hosts.0).ok()
    };
    let done = cloned().is_some();
    lower.layer.no_clones.store(!done, Relaxed);
    done
}

/// Whatever a copy-up does to a directory of the upper, nobody changed the union's directory.
pub fn restore_times(caller: &Caller, upper: &Held, attr: &Attr) -> Result<()> {
    let (atime, mtime) = (Some(SetTime::At(attr.atime)), Some(SetTime::At(attr.mtime)));
    let times = SetAttr { atime, mtime, ..SetAttr::default() };
    upper.service().setattr(caller, upper.node, None, &times).map(drop)
}

/// Says whether there were any.
fn copy_attributes(caller: &Caller, lower: &Held, held: &Held) -> Result<bool> {
    let listed = match lower.service().listxattr(caller, lower.node) {
        Ok(listed) => listed,
        Err(e) if e.is(Errno::OPNOTSUPP) => return Ok(false),
        Err(e) => return Err(e),
    };
    let mut any = false;
    for name in listed.split(|byte| *byte == 0).filter(|name| !name.is_empty() && !marks::is_own(name)) {
        let value = match lower.service().getxattr(caller, lower.node, name) {
            Ok(value) => value,
            // Listed, but not for us to read (or gone by now).
            Err(e) if e.is(Errno::NODATA) || e.is(Errno::OPNOTSUPP) => continue,
            Err(e) => return Err(e),
        };
        any = true;
        match held.service().setxattr(caller, held.node, name, &value, XattrFlags::empty()) {
            Ok(()) => {}
            Err(e) if may_stay_behind(name, &e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(any)
}

/// What grants or refuses access must come along; anything else only where the upper can hold it.
fn may_stay_behind(name: &[u8], error: &Error) -> bool {
    let guards = name.starts_with(b"system.posix_acl_") || name == b"security.capability";
    let host_only = name.starts_with(b"trusted.") || name.starts_with(b"security.");
    !guards && (error.is(Errno::OPNOTSUPP) || host_only && error.is(Errno::PERM))
}
