//! Opens the directories that a stack names, as its owner means them, and hands over copies of their mounts.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use libc::{MOUNT_ATTR_IDMAP, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use polytropo_libservices::stack::{DirCoherence, DirLayer, Layer, StackDocument};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use super::mounting::set_attributes;
use crate::control::{Refusal, describe};

/// A directory that a stack names, opened.
pub struct Root {
    place: String,
    path: PathBuf,
    read_only: bool,
    /// Nobody ever changes what lies in it.
    immutable: bool,
    /// A union writes here and keeps its records here, so no second one may.
    upper: bool,
    /// Only one service and stack changes it, which is what its caches count on.
    exclusive: bool,
    device: (u32, u32),
    directory: OwnedFd,
}

/// Why directories were not handed over.
pub enum Obstacle {
    /// The filesystem of one cannot be idmapped; the sentence says which.
    NotMappable(String),
    Refused(Refusal),
}

/// The directories of `document`, in its order. A refusal names the place in the document.
pub fn open_all(document: &StackDocument) -> Result<Vec<Root>, Refusal> {
    places(document).into_iter().map(open).collect()
}

/// Detached copies of the directories' mounts: without what is mounted inside of them, without devices, programs and
/// set-id bits, read-only where the stack says so, and with `namespace` idmapped into that user namespace.
pub fn hand_over(roots: &[Root], namespace: Option<&OwnedFd>) -> Result<Vec<OwnedFd>, Obstacle> {
    roots.iter().map(|root| root.hand_over(namespace)).collect()
}

/// Holds for one stack what no other may change meanwhile, in this process and any other, until the locks are dropped.
pub fn lock(roots: &[Root]) -> Result<Vec<OwnedFd>, Refusal> {
    let held = roots.iter().filter(|root| root.upper || root.exclusive);
    held.filter_map(|root| root.lock().transpose()).collect()
}

/// Refuses directories that lie on one of `devices`, the superblocks of this service: it would wait for itself.
pub fn refuse_own(roots: &[Root], devices: &[(u32, u32)]) -> Result<(), Refusal> {
    let Some(own) = roots.iter().find(|root| devices.contains(&root.device)) else { return Ok(()) };
    let (place, path) = (&own.place, own.path.display());
    let sentence = format!(
        "{place}.path: {path} lies in a mount of this same service; name the directories that are shown there"
    );
    Err(Refusal::with_errno(Errno::LOOP, sentence))
}

/// A directory layer and where it stands in its document.
struct Place<'a> {
    name: String,
    layer: &'a DirLayer,
    upper: bool,
}

/// Every directory layer, in the order of `StackDocument::dirs`.
fn places(document: &StackDocument) -> Vec<Place<'_>> {
    let mut found = Vec::new();
    collect(&document.root, "root".into(), false, &mut found);
    found
}

fn collect<'a>(layer: &'a Layer, name: String, upper: bool, found: &mut Vec<Place<'a>>) {
    match layer {
        Layer::Dir(layer) => found.push(Place { name, layer, upper }),
        Layer::Union(union) => {
            if let Some(layer) = &union.upper {
                collect(layer, format!("{name}.upper"), true, found);
            }
            for (index, layer) in union.lowers.iter().enumerate() {
                collect(layer, format!("{name}.lowers[{index}]"), false, found);
            }
        }
        Layer::Fault(fault) => collect(&fault.below, format!("{name}.below"), upper, found),
    }
}

fn open(found: Place<'_>) -> Result<Root, Refusal> {
    let Place { name: place, layer, upper } = found;
    let shown = layer.path.display();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(&layer.path, flags, Mode::empty()).and_then(|directory| {
        // Not synchronised: whoever serves it need not be asked for this.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(&directory, "", flags, StatxFlags::TYPE)?;
        Ok((directory, (stat.stx_dev_major, stat.stx_dev_minor)))
    });
    let (directory, device) = opened.map_err(|errno| {
        let sentence = match errno {
            Errno::NOENT => format!("{place}.path: {shown} does not exist"),
            Errno::NOTDIR => format!("{place}.path: {shown} is not a directory"),
            errno => format!("{place}.path: {shown} cannot be opened: {}", describe(errno)),
        };
        Refusal::with_errno(errno, sentence)
    })?;
    let immutable = layer.read_only && layer.coherence == DirCoherence::Immutable;
    let exclusive = layer.coherence == DirCoherence::Exclusive;
    let (path, read_only) = (layer.path.clone(), layer.read_only);
    Ok(Root { place, path, read_only, immutable, upper, exclusive, device, directory })
}

impl Root {
    pub fn is_immutable(&self) -> bool {
        self.immutable
    }

    fn hand_over(&self, namespace: Option<&OwnedFd>) -> Result<OwnedFd, Obstacle> {
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let clone = |more| rustix::mount::open_tree(&self.directory, "", flags | more);
        // An ordinary user may not see what the host's mounts cover up: then they come along, and are never entered.
        let copy = clone(OpenTreeFlags::empty())
            .or_else(|_| clone(OpenTreeFlags::AT_RECURSIVE))
            .map_err(|e| self.refused(e))?;
        let mut attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
        if self.read_only {
            attributes |= MOUNT_ATTR_RDONLY;
        }
        set_attributes(&copy, attributes, 0, None).map_err(|e| self.refused(e))?;
        if let Some(namespace) = namespace {
            set_attributes(&copy, MOUNT_ATTR_IDMAP, 0, Some(namespace)).map_err(|errno| match errno {
                // The filesystem has no idmapped mounts; this one is idmapped already.
                Errno::INVAL | Errno::PERM => {
                    let (place, path) = (&self.place, self.path.display());
                    Obstacle::NotMappable(format!(
                        "{place}.path: {path} cannot be idmapped: {}",
                        describe(errno)
                    ))
                }
                errno => self.refused(errno),
            })?;
        }
        Ok(copy)
    }

    /// None where the filesystem has no locks.
    fn lock(&self) -> Result<Option<OwnedFd>, Refusal> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // Several may only read.
        let how = match self.read_only && !self.upper {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        let locked = rustix::fs::openat(&self.directory, ".", flags, Mode::empty()).and_then(|lock| {
            rustix::fs::flock(&lock, how)?;
            Ok(lock)
        });
        let (place, path) = (&self.place, self.path.display());
        match locked {
            Ok(lock) => Ok(Some(lock)),
            Err(Errno::WOULDBLOCK) => {
                let sentence = match self.upper {
                    true => format!(
                        "{place}.path: {path} is the upper layer of another mounted stack; unmount that first"
                    ),
                    false => format!(
                        "{place}.path: {path} is in another mounted stack that counts on being the only one to change it; unmount \
                         that first, or give the directory the coherence \"shared\" in both"
                    ),
                };
                Err(Refusal::with_errno(Errno::BUSY, sentence))
            }
            Err(errno) => {
                log::warn!("{place}.path: {path} cannot be locked: {}", describe(errno));
                Ok(None)
            }
        }
    }

    fn refused(&self, errno: Errno) -> Obstacle {
        let (place, path, why) = (&self.place, self.path.display(), describe(errno));
        let sentence = format!("{place}.path: {path} cannot be handed to the service: {why}");
        Obstacle::Refused(Refusal::with_errno(errno, sentence))
    }
}
