//! Where a worker keeps cached bytes: a tmpfs that nobody sees, and a directory of it for each door that programs see
//! read-only.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Result;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags};

use super::mounting;
use crate::isolation::ids::Ids;

/// The tmpfs of one worker. It has no bound of its own (the size is beyond all memory, and lets statfs(2) tell how much is used): a program that reads where nothing is cached would use the bound up, and others
/// then die of it. The worker keeps to its budget. No huge pages: with them the kernel allocates 2 MiB where the worker asks for a block.
pub struct WindowStore {
    /// The mount; it goes when this is closed, and with it what was not opened through it.
    root: OwnedFd,
    owner: u32,
}

/// What a door gets.
pub struct WindowPlace {
    /// The whole tmpfs, in which the worker finds `door-N`.
    pub own: OwnedFd,
    /// That directory as programs see it.
    pub shown: OwnedFd,
    /// 0: programs cannot see windows.
    pub cache_bytes: u64,
    /// Programs may write through channels.
    pub channel_writes: bool,
}

impl WindowStore {
    pub fn make(ids: Ids) -> Result<Self> {
        let owner = match ids {
            Ids::Shifted { base, .. } => base,
            Ids::Same { .. } => 0,
        };
        let root = mount_tmpfs()?;
        Ok(Self { root, owner })
    }

    /// A directory for a door. Programs may open what they know the name of, and list nothing.
    pub fn place(&self, door: u64, cache_bytes: u64) -> Result<WindowPlace> {
        let name = format!("door-{door}");
        rustix::fs::mkdirat(&self.root, &name, Mode::from_raw_mode(0o711))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let own = rustix::fs::openat(&self.root, ".", flags, Mode::empty())?;
        let place = rustix::fs::openat(&self.root, &name, flags, Mode::empty())?;
        let (uid, gid) = (Uid::from_raw(self.owner), Gid::from_raw(self.owner));
        for directory in [&own, &place] {
            rustix::fs::chownat(directory, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        }
        rustix::fs::fchmod(&place, Mode::from_raw_mode(0o711))?;
        match read_only_view(&place) {
            Ok(shown) => Ok(WindowPlace { own, shown, cache_bytes, channel_writes: false }),
            Err(errno) => {
                // Before Linux 6.15 a mount that is nowhere cannot be copied.
                log::info!("programs get cached bytes by request only: {errno}");
                Ok(WindowPlace { own, shown: mount_tmpfs()?, cache_bytes: 0, channel_writes: false })
            }
        }
    }
}

fn mount_tmpfs() -> Result<OwnedFd> {
    use rustix::mount::{fsconfig_create, fsconfig_set_string, fsmount, fsopen};
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [
        ("source", "polytropo-windows"),
        ("mode", "0700"),
        ("size", "1152921504606846976"),
        ("nr_inodes", "0"),
    ] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// The directory through a mount of its own that is read-only for good: once its descriptor is closed the mount belongs to no
/// namespace, so nobody can change its attributes, and it lives as long as what was opened through it.
fn read_only_view(directory: &OwnedFd) -> Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let view = rustix::mount::open_tree(directory, "", flags)?;
    let attributes =
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    mounting::set_attributes(&view, attributes, 0, None)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&view, ".", flags, Mode::empty())
}
