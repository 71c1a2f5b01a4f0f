//! What the windows of all doors of a worker have in common: the tmpfs that they lie in, the memory that they may take, and the windows of
//! files that never change, which doors share.
//!
//! A window's file has a name in the root of the tmpfs, which the worker alone can open, and one more, a secret, in the directory of each
//! door that told a program of it. So a program finds there what was opened through its own door, and nothing else, even where it may
//! list that directory.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;
use polytropo_libservices::{Attempt, ContentId, Errno, Error, NodeId, Result};
use polytropo_wire::window::Geometry;
use rustc_hash::FxHashMap;
use rustix::fs::{AtFlags, Mode, OFlags};

use super::budget::Budget;
use super::file::Window;
use crate::slabs::Slabs;

/// Windows that doors share, in use or not: each is a descriptor.
const SHARED_MAX: usize = 1024;
/// Of the process's descriptors, the part that they may have.
const DESCRIPTORS_SHARE: u64 = 4;

/// See the module.
pub struct Store {
    /// None: there are no windows.
    root: Option<Arc<OwnedFd>>,
    budget: Arc<Budget>,
    shared: Mutex<Shared>,
    last_number: AtomicU64,
    slabs: Option<Arc<Slabs>>,
}

struct Shared {
    windows_max: usize,
    windows: FxHashMap<ContentId, Arc<Window>>,
    uses: u64,
}

/// Where programs of one door find windows.
pub struct Place {
    pub(super) directory: OwnedFd,
    root: Arc<OwnedFd>,
    name: String,
}

impl Store {
    pub fn new(root: Option<OwnedFd>, bytes: u64) -> Arc<Self> {
        let budget = Budget::new(bytes);
        Arc::new(Self {
            slabs: if root.is_some() { Slabs::new(budget.clone()) } else { None },
            root: root.map(Arc::new),
            budget,
            shared: Mutex::new(Shared { windows_max: shared_max(), windows: FxHashMap::default(), uses: 0 }),
            last_number: AtomicU64::new(0),
        })
    }

    /// The directory of a door, which the keeper has made; None where there are no windows.
    pub fn place(&self, name: &str) -> Result<Option<Arc<Place>>> {
        let Some(root) = &self.root else { return Ok(None) };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let directory = rustix::fs::openat(root, name, flags, Mode::empty())
            .attempt("open a door's directory of windows")?;
        Ok(Some(Arc::new(Place { directory, root: root.clone(), name: name.to_owned() })))
    }

    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// Where small files of images are cached; None where they are not.
    pub fn slabs(&self) -> Option<&Arc<Slabs>> {
        self.slabs.as_ref()
    }

    /// A window with room for `bytes`, of a door's `node` or to be shared.
    pub(super) fn make(&self, node: Option<NodeId>, bytes: u64) -> Result<Arc<Window>> {
        let Some(root) = &self.root else {
            return Err(Error::new(Errno::NOSPC, "make a window where there are none"));
        };
        let geometry =
            Geometry::of(bytes).ok_or_else(|| Error::new(Errno::FBIG, "make a window of so large a file"))?;
        let number = self.last_number.fetch_add(1, Relaxed) + 1;
        let made = Window::make(root, number, node, geometry, self.budget.clone());
        Ok(Arc::new(made.attempt("make a window")?))
    }

    /// The window of a file that never changes, of any door.
    pub(super) fn shared(
        &self,
        content: ContentId,
        size_bytes: impl FnOnce() -> Result<u64>,
    ) -> Result<Arc<Window>> {
        if let Some(found) = self.shared.lock().find(&content) {
            return Ok(found);
        }
        let made = self.make(None, size_bytes()?)?;
        let (window, dropped) = self.shared.lock().keep(content, made);
        if let Some(dropped) = dropped {
            dropped.discard();
        }
        Ok(window)
    }

    /// Programs of a door that has ended find nothing any more.
    pub(super) fn leave(&self, place: &Arc<Place>) {
        let windows: Vec<_> = self.shared.lock().windows.values().cloned().collect();
        windows.iter().for_each(|window| window.unlink_from(place));
        if let Err(errno) = rustix::fs::unlinkat(&place.root, &place.name, AtFlags::REMOVEDIR) {
            log::warn!("a directory of windows stays behind: {errno}");
        }
    }
}

impl Shared {
    fn find(&mut self, content: &ContentId) -> Option<Arc<Window>> {
        self.uses += 1;
        let found = self.windows.get(content).filter(|window| !window.is_retired())?;
        found.use_at(self.uses);
        Some(found.clone())
    }

    /// Keeps a window, or tells the one that somebody else made meanwhile; and what had to go for it.
    fn keep(&mut self, content: ContentId, made: Arc<Window>) -> (Arc<Window>, Option<Arc<Window>>) {
        if let Some(found) = self.find(&content) {
            return (found, Some(made));
        }
        made.use_at(self.uses);
        let mut dropped = self.windows.insert(content, made.clone());
        if self.windows.len() > self.windows_max {
            let oldest = self.windows.iter().min_by_key(|(_, window)| window.last_use()).map(|(id, _)| *id);
            dropped = oldest.and_then(|content| self.windows.remove(&content));
        }
        (made, dropped)
    }
}

fn shared_max() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let part = limit.map_or(u64::MAX, |limit| limit / DESCRIPTORS_SHARE);
    usize::try_from(part).unwrap_or(usize::MAX).clamp(16, SHARED_MAX)
}
