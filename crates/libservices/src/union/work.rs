//! The work area in the upper's root: files on their way up, and the index of files that need one.
//!
//! `work/` holds what is being copied; it is cleared at start. `links/` has one name, `ORDINAL-INO` of the lower inode,
//! for every copied file of several names, so that all of them lead to the copy; and for symbolic links and special files,
//! which cannot carry their origin themselves; of these, `ORDINAL-INO-COUNT` says how many names the union has, where the
//! lower had several. `removed/` has one name, `ORDINAL-INO-COUNT`, for every lower inode of several names that lost
//! some of them without having been copied. `whiteout` is the file that whiteouts are links to. `format-N` says that no version may use the upper
//! that does not know N; without one it is 1.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use super::Union;
use super::layers::{Held, Layer, OpenDir, Origin, marks, names};
use super::lookup::mark;
use super::tally::Tally;
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// Bound on nesting when leftovers are cleared.
const DEPTH_MAX: usize = 64;

/// Files of which the upper has only some blocks came with 2.
const FORMAT: u32 = 2;
const FORMAT_NAME: &str = "format-";
/// Where copies were made at first. As a file, it keeps versions out that know no more than format 1.
const OLD_TMP: &str = "tmp";

/// Where the whiteout that others are links to is kept.
const WHITEOUT: &str = "whiteout";

pub struct Work {
    pub tmp: Arc<Held>,
    pub links: Arc<Held>,
    /// How many names of a lower inode that was not copied are gone.
    pub removed: Tally,
    /// How many names a copy in `links/` has that cannot carry the number itself.
    names: Tally,
    area: Arc<Held>,
    /// The upper says that it is of the format that has partial files.
    partial_files: AtomicBool,
    making_format: Mutex<()>,
    /// One empty file whose names are whiteouts: a name costs less than an inode.
    whiteout: Mutex<Option<Arc<Held>>>,
    next: AtomicU64,
    pub index: Mutex<Index>,
}

/// What `links/` holds, in memory.
#[derive(Default)]
pub struct Index {
    origins: FxHashMap<Origin, u64>,
    upper_inos: FxHashMap<u64, Origin>,
}

impl Index {
    pub fn contains(&self, origin: Origin) -> bool {
        self.origins.contains_key(&origin)
    }

    pub fn by_upper_ino(&self, ino: u64) -> Option<Origin> {
        self.upper_inos.get(&ino).copied()
    }

    pub fn insert(&mut self, origin: Origin, upper_ino: u64) {
        self.origins.insert(origin, upper_ino);
        self.upper_inos.insert(upper_ino, origin);
    }

    pub fn remove(&mut self, origin: Origin) {
        if let Some(ino) = self.origins.remove(&origin) {
            self.upper_inos.remove(&ino);
        }
    }
}

impl Work {
    /// Finds or makes the work area, and clears what an earlier life left half done.
    pub fn open(caller: &Caller, upper: &Arc<Layer>) -> Result<Self> {
        let root = Held::new(upper, NodeId::ROOT);
        let area = directory(caller, &root, names::work_area())?;
        let partial_files = read_format(caller, &area)? > 1;
        clear_old_tmp(caller, &area)?;
        let tmp = directory(caller, &area, names::fixed("work"))?;
        let links = directory(caller, &area, names::fixed("links"))?;
        let removed = directory(caller, &area, names::fixed("removed"))?;
        clear(caller, &tmp, 0)?;
        let (removed, names) = (Tally::read(caller, &removed)?, Tally::read(caller, &links)?);
        let index = Mutex::new(read_index(caller, &links, &names)?);
        let whiteout = area.find(caller, names::fixed(WHITEOUT))?.map(|(held, _)| Arc::new(held));
        let whiteout = Mutex::new(whiteout);
        let (partial_files, making_format) = (AtomicBool::new(partial_files), Mutex::default());
        let next = AtomicU64::new(0);
        Ok(Self { tmp, links, removed, names, area, partial_files, making_format, whiteout, next, index })
    }

    pub fn has_partial_files(&self) -> bool {
        self.partial_files.load(Acquire)
    }

    /// Says on disk, before the first of them is there, that the upper has partial files.
    pub fn allow_partial_files(&self, caller: &Caller) -> Result<()> {
        if self.has_partial_files() {
            return Ok(());
        }
        let _making = self.making_format.lock();
        let name = format!("{FORMAT_NAME}{FORMAT}");
        for name in [OLD_TMP, &name] {
            make_empty(caller, &self.area, Name::new(name.as_bytes())?)?;
        }
        self.partial_files.store(true, Release);
        Ok(())
    }

    /// A name in `tmp/` that is not in use.
    pub fn fresh_name(&self) -> Box<Name> {
        let number = self.next.fetch_add(1, Relaxed).to_string();
        Name::new(number.as_bytes()).expect("a number is a name").to_boxed()
    }

    /// Makes a whiteout in a directory of the upper.
    pub fn make_whiteout(&self, caller: &Caller, directory: &Held, name: &Name) -> Result<()> {
        let service = directory.service();
        let shared = self.whiteout.lock().clone();
        if let Some(shared) = shared {
            match service.link(caller, shared.node, directory.node, name) {
                Ok(entry) => drop(directory.take(entry)),
                Err(e) if e.is(Errno::EXIST) => {}
                // It has as many names as an inode may have, or the upper knows no links.
                Err(e) if e.is(Errno::MLINK) || e.is(Errno::PERM) || e.is(Errno::OPNOTSUPP) => {
                    *self.whiteout.lock() = None;
                    return make_empty(caller, directory, name);
                }
                Err(e) => return Err(e),
            }
            return Ok(());
        }
        make_empty(caller, directory, name)?;
        let Some((held, _)) = directory.find(caller, name)? else { return Ok(()) };
        self.share(caller, held);
        Ok(())
    }

    /// Keeps a new whiteout for the next ones. If that fails, each is a file of its own.
    fn share(&self, caller: &Caller, held: Held) {
        let (service, area, kept) = (self.area.service(), self.area.node, names::fixed(WHITEOUT));
        let _ = service.unlink(caller, area, kept);
        if let Ok(entry) = service.link(caller, held.node, area, kept) {
            drop(self.area.take(entry));
            *self.whiteout.lock() = Some(Arc::new(held));
        }
    }

    /// Records how many names the union has for a copy of several names in `links/`.
    pub fn record_names(
        &self,
        caller: &Caller,
        held: &Held,
        origin: Origin,
        carries: bool,
        links: u32,
    ) -> Result<()> {
        if carries {
            let (text, none) = (links.to_string(), XattrFlags::empty());
            return held.service().setxattr(caller, held.node, marks::LINKS, text.as_bytes(), none);
        }
        self.names.set(caller, origin, Some(links))
    }

    /// Whether a copy in `links/` that cannot carry how many names it has had several in the lower.
    pub fn counts_names(&self, origin: Origin) -> bool {
        self.names.get(origin).is_some()
    }

    /// Takes a copy out of `links/` whose last name went.
    pub fn leave_index(&self, caller: &Caller, origin: Origin) -> Result<()> {
        let text = origin.text();
        self.links.service().unlink(caller, self.links.node, Name::new(text.as_bytes())?)?;
        self.index.lock().remove(origin);
        self.names.set(caller, origin, None)
    }
}

/// The format that an upper says it has. EPROTONOSUPPORT when it is a later one.
fn read_format(caller: &Caller, area: &Arc<Held>) -> Result<u32> {
    let mut format = 1;
    for name in list(caller, area)? {
        if let Some(number) = name.as_bytes().strip_prefix(FORMAT_NAME.as_bytes()) {
            format = format.max(count(number).unwrap_or(u32::MAX));
        }
    }
    if format > FORMAT {
        let problem = format!(
            "use an upper directory of format {format}, which a later version of polytropo wrote; this one knows {FORMAT}, so use that version"
        );
        return Err(Error::new(Errno::PROTONOSUPPORT, problem));
    }
    Ok(format)
}

/// What an earlier version left half done.
fn clear_old_tmp(caller: &Caller, area: &Arc<Held>) -> Result<()> {
    let old = names::fixed(OLD_TMP);
    match area.find(caller, old)? {
        Some((held, attr)) if attr.is_dir() => {
            clear(caller, &Arc::new(held), 0)?;
            area.service().rmdir(caller, area.node, old)
        }
        _ => Ok(()),
    }
}

fn make_empty(caller: &Caller, directory: &Held, name: &Name) -> Result<()> {
    match directory.service().mknod(caller, directory.node, name, libc::S_IFREG, 0) {
        Ok(entry) => drop(directory.take(entry)),
        Err(e) if e.is(Errno::EXIST) => {}
        Err(e) => return Err(e),
    }
    Ok(())
}

impl Union {
    /// The copy that stands for a lower inode of several names.
    pub(super) fn copied_link(
        &self,
        caller: &Caller,
        origin: Option<Origin>,
        attr: &Attr,
    ) -> Result<Option<Held>> {
        let (Some(work), Some(origin), false) = (&self.work, origin, attr.is_dir()) else { return Ok(None) };
        if !work.index.lock().contains(origin) {
            return Ok(None);
        }
        let text = origin.text();
        Ok(work.links.find(caller, Name::new(text.as_bytes())?)?.map(|(held, _)| held))
    }

    /// How many names an inode of the index has. `None` when it is not in the index.
    pub(super) fn links_of(
        &self,
        caller: &Caller,
        held: &Held,
        origin: Option<Origin>,
        attr: &Attr,
    ) -> Result<Option<u32>> {
        let (Some(work), Some(origin), true) = (&self.work, origin, held.is_upper()) else { return Ok(None) };
        if !work.index.lock().contains(origin) {
            return Ok(None);
        }
        // It was found by some name.
        let counted = || attr.nlink.saturating_sub(1).max(1);
        Ok(Some(recorded(caller, held, origin, attr, &work.names)?.unwrap_or_else(counted)))
    }
}

/// How many names a copy in `links/` has, where that is recorded.
fn recorded(caller: &Caller, held: &Held, origin: Origin, attr: &Attr, names: &Tally) -> Result<Option<u32>> {
    if let Some(apart) = names.get(origin) {
        return Ok(Some(apart));
    }
    let text = if attr.file_type() == libc::S_IFREG { mark(caller, held, marks::LINKS)? } else { None };
    Ok(text.and_then(|text| count(&text)))
}

pub fn count(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn directory(caller: &Caller, parent: &Held, name: &Name) -> Result<Arc<Held>> {
    if let Some((held, attr)) = parent.find(caller, name)? {
        if !attr.is_dir() {
            return Err(Error::new(Errno::NOTDIR, "use the work area of a union"));
        }
        return Ok(Arc::new(held));
    }
    let entry = parent.service().mkdir(caller, parent.node, name, 0o700)?;
    let (held, _) = parent.take(entry);
    // Files pass through here: nothing of the upper's root may be inherited by them.
    for acl in [&b"system.posix_acl_default"[..], b"system.posix_acl_access"] {
        match held.service().removexattr(caller, held.node, acl) {
            Ok(()) => {}
            Err(e) if e.is(Errno::NODATA) || e.is(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e),
        }
    }
    let private = SetAttr { mode: Some(0o700), ..SetAttr::default() };
    held.service().setattr(caller, held.node, None, &private)?;
    Ok(Arc::new(held))
}

/// Removes everything in a directory of the upper.
pub fn clear(caller: &Caller, directory: &Arc<Held>, depth: usize) -> Result<()> {
    if depth > DEPTH_MAX {
        return Err(Error::new(Errno::LOOP, "clear a directory nested too deep"));
    }
    for name in list(caller, directory)? {
        let Some((held, attr)) = directory.find(caller, &name)? else { continue };
        let service = directory.service();
        if attr.is_dir() {
            clear(caller, &Arc::new(held), depth + 1)?;
            service.rmdir(caller, directory.node, &name)?;
        } else {
            service.unlink(caller, directory.node, &name)?;
        }
    }
    Ok(())
}

/// The names in a directory of one layer.
pub fn list(caller: &Caller, directory: &Arc<Held>) -> Result<Vec<Box<Name>>> {
    let mut found = Vec::new();
    OpenDir::open(caller, directory)?.read_all(caller, |entry| found.push(entry.name.to_boxed()))?;
    Ok(found)
}

fn read_index(caller: &Caller, links: &Arc<Held>, names: &Tally) -> Result<Index> {
    let mut index = Index::default();
    for name in list(caller, links)? {
        let Some(origin) = Origin::parse(name.as_bytes()) else { continue };
        let Some((held, attr)) = links.find(caller, &name)? else { continue };
        if recorded(caller, &held, origin, &attr, names)? == Some(0) {
            // Its last name went, the entry stayed.
            links.service().unlink(caller, links.node, &name)?;
            continue;
        }
        index.insert(origin, attr.ino);
    }
    // Counted, but not copied any more, or not yet.
    for origin in names.origins().into_iter().filter(|origin| !index.contains(*origin)) {
        names.set(caller, origin, None)?;
    }
    Ok(index)
}
