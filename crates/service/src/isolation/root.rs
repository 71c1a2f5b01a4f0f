//! An empty root directory.

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};

/// Leaves the host's filesystems behind: a fresh, empty, read-only tmpfs becomes the root of this mount namespace. The
/// process keeps a descriptor of its own `/proc/self/fd`, the one thing that `dir` layers need.
pub fn make_empty() -> Result<(), (&'static str, Errno)> {
    let harmless = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|e| ("part its mounts from the host's", e))?;
    // Where the host's own procfs is masked an ordinary user may not mount one; then files are reached by name.
    if let Err(errno) = mount("proc", "/proc", "proc", harmless, Some(c"subset=pid")) {
        log::warn!("no procfs of its own ({errno}): unlinked files cannot be opened again");
    }
    polytropo_libservices::dir::keep_proc_self_fd();
    mount("polytropo", "/proc", "tmpfs", harmless, Some(c"mode=0555,size=4k,nr_inodes=2"))
        .map_err(|e| ("mount its root", e))?;
    rustix::process::chdir("/proc").map_err(|e| ("enter its root", e))?;
    rustix::process::pivot_root(".", ".").map_err(|e| ("change its root", e))?;
    unmount(".", UnmountFlags::DETACH).map_err(|e| ("leave the host's root", e))?;
    mount_remount("/", harmless | MountFlags::RDONLY, "").map_err(|e| ("close its root", e))?;
    rustix::process::chdir("/").map_err(|e| ("enter its root", e))?;
    rustix::process::umask(Mode::empty());
    Ok(())
}
