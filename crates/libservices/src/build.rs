//! From a checked stack document and the directories it names to libservices.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::dir::Dir;
use crate::error::{Attempt, Errno, Error, Result};
use crate::fault::Fault;
use crate::lease::Lease;
use crate::libservice::Libservice;
use crate::owners::Owners;
use crate::stack::{DirCoherence, DirLayer, Layer, Ownership, StackDocument, UnionLayer};
use crate::union::Union;

/// Builds a stack. `roots` are the directories of `document.dirs()`, in that order; EINVAL when they are not as many.
pub fn build(document: &StackDocument, roots: Vec<OwnedFd>) -> Result<Arc<dyn Libservice>> {
    build_with(document, roots, &Interner::default())
}

/// `build`, where the same directory of the host, served in the same way by several stacks of one `interner`, is one
/// libservice: containers on one image share its nodes and descriptors.
pub fn build_with(
    document: &StackDocument,
    roots: Vec<OwnedFd>,
    interner: &Interner,
) -> Result<Arc<dyn Libservice>> {
    let wanted = document.dirs().len();
    if roots.len() != wanted {
        let problem = format!("build a stack of {wanted} directories from {} descriptors", roots.len());
        return Err(Error::new(Errno::INVAL, problem));
    }
    let stack = Builder { roots: roots.into_iter(), interner }.layer(&document.root)?;
    Ok(match document.root {
        // Keeps account of what it holds of its layers.
        Layer::Union(_) => stack,
        Layer::Dir(_) | Layer::Fault(_) => Arc::new(Lease::new(stack)),
    })
}

/// The directory layers that are alive, each once.
#[derive(Default)]
pub struct Interner {
    dirs: Mutex<FxHashMap<DirKey, Weak<dyn Libservice>>>,
}

/// Which directory, served how. The inode cannot be another one's while the layer lives, since that keeps it open.
#[derive(PartialEq, Eq, Hash)]
struct DirKey {
    device: u64,
    ino: u64,
    read_only: bool,
    coherence: DirCoherence,
    ownership: Ownership,
}

impl Interner {
    fn dir(&self, root: OwnedFd, config: &DirLayer) -> Result<Arc<dyn Libservice>> {
        let stat = rustix::fs::fstat(&root).attempt("look at the root of a directory layer")?;
        let key = DirKey {
            device: stat.st_dev,
            ino: stat.st_ino,
            read_only: config.read_only,
            coherence: config.coherence,
            ownership: config.ownership,
        };
        let mut dirs = self.dirs.lock();
        if let Some(present) = dirs.get(&key).and_then(Weak::upgrade) {
            return Ok(present);
        }
        let made: Arc<dyn Libservice> = match config.ownership {
            Ownership::Native => Arc::new(Dir::new(root, config)?),
            Ownership::Xattr => Arc::new(Owners::new(Arc::new(Dir::new(root, config)?))),
        };
        dirs.retain(|_, dir| dir.strong_count() > 0);
        dirs.insert(key, Arc::downgrade(&made));
        Ok(made)
    }
}

struct Builder<'a> {
    roots: std::vec::IntoIter<OwnedFd>,
    interner: &'a Interner,
}

impl Builder<'_> {
    fn layer(&mut self, layer: &Layer) -> Result<Arc<dyn Libservice>> {
        match layer {
            Layer::Dir(config) => self.dir(config),
            Layer::Union(config) => self.union(config),
            Layer::Fault(config) => Ok(Arc::new(Fault::new(self.layer(&config.below)?, config)?)),
        }
    }

    fn dir(&mut self, config: &DirLayer) -> Result<Arc<dyn Libservice>> {
        let root =
            self.roots.next().ok_or_else(|| Error::new(Errno::INVAL, "build a layer without its root"))?;
        self.interner.dir(root, config)
    }

    /// The upper first, as in `StackDocument::dirs`.
    fn union(&mut self, config: &UnionLayer) -> Result<Arc<dyn Libservice>> {
        let upper = config.upper.as_deref().map(|upper| self.layer(upper)).transpose()?;
        let lowers = config.lowers.iter().map(|lower| self.layer(lower)).collect::<Result<Vec<_>>>()?;
        Ok(Arc::new(Union::new(lowers, upper)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::Name;
    use crate::types::*;

    fn document(json: &str) -> StackDocument {
        StackDocument::parse(json).unwrap()
    }

    fn open(path: &std::path::Path) -> OwnedFd {
        std::fs::File::open(path).unwrap().into()
    }

    #[test]
    fn the_same_directory_served_in_the_same_way_is_one_libservice() {
        let temp = tempfile::tempdir().unwrap();
        let writable = document(r#"{"version":1,"root":{"kind":"dir","path":"/a"}}"#);
        let read_only = document(r#"{"version":1,"root":{"kind":"dir","path":"/b","read_only":true}}"#);
        let interner = Interner::default();
        let build = |document| build_with(document, vec![open(temp.path())], &interner).unwrap();
        let (first, again, other) = (build(&writable), build(&writable), build(&read_only));
        let (caller, name) = (Caller::service(), Name::new(b"d").unwrap());
        let made = first.mkdir(&caller, NodeId::ROOT, name, 0o755).unwrap();
        assert_eq!(again.lookup(&caller, NodeId::ROOT, name).unwrap().node, made.node);
        assert_eq!(interner.dirs.lock().len(), 2);
        other.lookup(&caller, NodeId::ROOT, name).unwrap();
        drop((first, again, other));
        assert!(interner.dirs.lock().values().all(|dir| dir.strong_count() == 0), "nothing is kept alive");
        build(&writable);
    }

    #[test]
    fn a_stack_that_ends_gives_back_what_it_holds_of_shared_layers() {
        let temp = tempfile::tempdir().unwrap();
        let document = document(r#"{"version":1,"root":{"kind":"dir","path":"/a"}}"#);
        let interner = Interner::default();
        let build = || build_with(&document, vec![open(temp.path())], &interner).unwrap();
        let (stays, ends) = (build(), build());
        let (caller, name) = (Caller::service(), Name::new(b"f").unwrap());
        let flags = OpenFlags::READ | OpenFlags::WRITE;
        let (entry, opened) = ends.create(&caller, NodeId::ROOT, name, 0o644, flags).unwrap();
        let listing = ends.opendir(&caller, NodeId::ROOT).unwrap();
        let mut twice = |_: DirEntry<'_>, _: Option<&Entry>| true;
        ends.readdir_plus(&caller, NodeId::ROOT, listing, 0, &mut twice).unwrap();
        // One stack forgets no more than its own.
        stays.forget(entry.node, 100);
        stays.release(entry.node, opened.handle);
        assert_eq!(stays.getattr(&caller, entry.node, Some(opened.handle)).unwrap().nlink, 1);
        drop(ends);
        assert!(stays.getattr(&caller, entry.node, None).unwrap_err().is(Errno::STALE));
        let gone = stays.write(&caller, entry.node, opened.handle, 0, b"x");
        assert!(gone.unwrap_err().is(Errno::BADF));
        let mut none = |_: DirEntry<'_>| true;
        assert!(stays.readdir(&caller, NodeId::ROOT, listing, 0, &mut none).unwrap_err().is(Errno::BADF));
    }

    #[test]
    fn refuses_roots_that_do_not_fit() {
        let temp = tempfile::tempdir().unwrap();
        let one = document(r#"{"version":1,"root":{"kind":"dir","path":"/a"}}"#);
        let too_few = build(&one, vec![]).err().unwrap();
        assert!(too_few.is(Errno::INVAL), "{too_few}");
        assert!(too_few.attempt().contains("1 directories from 0 descriptors"), "{too_few}");
        assert!(build(&one, vec![open(temp.path()), open(temp.path())]).err().unwrap().is(Errno::INVAL));
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(build(&one, vec![open(file.path())]).err().unwrap().is(Errno::NOTDIR));
    }
}
