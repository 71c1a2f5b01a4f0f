//! Opens the directories that a stack names, as its owner means them, and hands over copies of their mounts.

use std::os::fd::OwnedFd;

use polytropo_libservices::stack::{DirLayer, Layer, StackDocument};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use crate::control::{Refusal, describe};

/// The directories of `document`, in its order. A refusal names the place in the document.
pub fn open_all(document: &StackDocument) -> Result<Vec<OwnedFd>, Refusal> {
    places(document).into_iter().map(|(place, layer)| open(&place, layer)).collect()
}

/// Every directory layer with its place, in the order of `StackDocument::dirs`.
fn places(document: &StackDocument) -> Vec<(String, &DirLayer)> {
    let mut found = Vec::new();
    collect(&document.root, "root".into(), &mut found);
    found
}

fn collect<'a>(layer: &'a Layer, place: String, found: &mut Vec<(String, &'a DirLayer)>) {
    match layer {
        Layer::Dir(dir) => found.push((place, dir)),
        Layer::Union(union) => {
            if let Some(upper) = &union.upper {
                collect(upper, format!("{place}.upper"), found);
            }
            for (index, lower) in union.lowers.iter().enumerate() {
                collect(lower, format!("{place}.lowers[{index}]"), found);
            }
        }
        Layer::Fault(fault) => collect(&fault.below, format!("{place}.below"), found),
    }
}

fn open(place: &str, layer: &DirLayer) -> Result<OwnedFd, Refusal> {
    let shown = layer.path.display();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(&layer.path, flags, Mode::empty()).map_err(|errno| {
        let sentence = match errno {
            Errno::NOENT => format!("{place}.path: {shown} does not exist"),
            Errno::NOTDIR => format!("{place}.path: {shown} is not a directory"),
            errno => format!("{place}.path: {shown} cannot be opened: {}", describe(errno)),
        };
        Refusal::with_errno(errno, sentence)
    })?;
    clone_mount(&directory).map_err(|errno| {
        let why = describe(errno);
        Refusal::with_errno(errno, format!("{place}.path: {shown} cannot be handed to the service: {why}"))
    })
}

/// A detached copy of the mount below `directory`, without what is mounted inside of it.
fn clone_mount(directory: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(directory, "", flags).or_else(|errno| match errno {
        // An unattached or foreign mount cannot be cloned before Linux 6.15.
        Errno::INVAL => rustix::fs::openat(
            CWD,
            format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(directory)),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        ),
        errno => Err(errno),
    })
}
