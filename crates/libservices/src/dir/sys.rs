//! System calls of the host, confined: every name is one component, reached from its parent's descriptor.

use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{self, AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::{Errno, Result};

use crate::name::Name;
use crate::types::{Attr, Timestamp};

/// What every resolution of a name must obey: one component beneath its parent, no link followed, no mount
/// entered (what is mounted over a served directory was not given to us to serve).
const CONFINED: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Opens `name` in `parent`. A symbolic link is opened only as O_PATH.
pub fn open_name(parent: impl AsFd, name: &Name, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    // openat2 refuses flags that mean nothing to O_PATH.
    let no_terminal = if flags.contains(OFlags::PATH) { OFlags::empty() } else { OFlags::NOCTTY };
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | no_terminal;
    fs::openat2(parent, name.as_bytes(), flags, mode, CONFINED)
}

/// Opens `parent` itself anew with other flags (also O_TMPFILE).
pub fn open_self(directory: impl AsFd, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    fs::openat2(directory, c".", flags | OFlags::CLOEXEC, mode, CONFINED)
}

/// Which inode of the host something is. The birth time tells apart two lives of one inode number, on
/// filesystems that keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InodeKey {
    pub device: u64,
    pub ino: u64,
    pub born: Option<Timestamp>,
}

/// What statx(2) told.
#[derive(Clone, Debug)]
pub struct Stat {
    pub key: InodeKey,
    pub mount: u64,
    pub attr: Attr,
}

/// Attributes of an open file, O_PATH included.
pub fn stat_fd(fd: impl AsFd) -> Result<Stat> {
    stat(fd, b"", AtFlags::EMPTY_PATH)
}

/// Attributes of `name` in `parent`, links not followed. The caller compares `Stat::mount`.
pub fn stat_name(parent: impl AsFd, name: &Name) -> Result<Stat> {
    stat(parent, name.as_bytes(), AtFlags::SYMLINK_NOFOLLOW)
}

fn stat(fd: impl AsFd, path: &[u8], flags: AtFlags) -> Result<Stat> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    let x = fs::statx(fd, path, flags | AtFlags::NO_AUTOMOUNT, wanted)?;
    let time = |t: fs::StatxTimestamp| Timestamp { seconds: t.tv_sec, nanoseconds: t.tv_nsec };
    let btime = (x.stx_mask & StatxFlags::BTIME.bits() != 0).then(|| time(x.stx_btime));
    Ok(Stat {
        key: InodeKey { device: fs::makedev(x.stx_dev_major, x.stx_dev_minor), ino: x.stx_ino, born: btime },
        mount: x.stx_mnt_id,
        attr: Attr {
            ino: x.stx_ino,
            mode: x.stx_mode.into(),
            nlink: x.stx_nlink,
            uid: x.stx_uid,
            gid: x.stx_gid,
            rdev: fs::makedev(x.stx_rdev_major, x.stx_rdev_minor),
            size_bytes: x.stx_size,
            blocks_512: x.stx_blocks,
            blksize_bytes: x.stx_blksize,
            atime: time(x.stx_atime),
            mtime: time(x.stx_mtime),
            ctime: time(x.stx_ctime),
            btime,
        },
    })
}

/// The process's `/proc/self/fd`, by which an O_PATH descriptor is opened for reading or writing.
static PROC_SELF_FD: OnceLock<Option<OwnedFd>> = OnceLock::new();

/// Opens `/proc/self/fd` for the life of the process. A process that gives up its root directory calls this
/// while it still sees a procfs of its own PID namespace. Says whether there is one.
pub fn keep_proc_self_fd() -> bool {
    proc_self_fd().is_ok()
}

/// ENOSYS when the process has no procfs.
pub fn proc_self_fd() -> Result<BorrowedFd<'static>> {
    let kept = PROC_SELF_FD.get_or_init(|| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::open(c"/proc/self/fd", flags, Mode::empty()).ok()?;
        (fs::fstatfs(&fd).ok()?.f_type == fs::PROC_SUPER_MAGIC).then_some(fd)
    });
    kept.as_ref().map(AsFd::as_fd).ok_or(Errno::NOSYS)
}

/// The name of `fd` in `/proc/self/fd`.
pub fn proc_name(fd: impl AsFd) -> String {
    fd.as_fd().as_raw_fd().to_string()
}

/// Opens the inode of an O_PATH descriptor for real.
pub fn reopen(fd: impl AsFd, flags: OFlags) -> Result<OwnedFd> {
    let flags = (flags | OFlags::NOCTTY | OFlags::CLOEXEC) - OFlags::NOFOLLOW;
    fs::openat(proc_self_fd()?, proc_name(fd), flags, Mode::empty())
}

/// Runs `operation` with a path that stands for the inode of `fd`: a link in `/proc/self/fd`, which becomes this
/// thread's working directory, since extended attributes are reached by path alone (before Linux 6.13).
pub fn by_proc_name<T>(fd: impl AsFd, operation: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    thread_local! {
        static IS_THERE: Cell<bool> = const { Cell::new(false) };
    }
    if !IS_THERE.get() {
        own_fs_struct()?;
        rustix::process::fchdir(proc_self_fd()?)?;
        IS_THERE.set(true);
    }
    operation(&proc_name(fd))
}

/// Writes a file's bytes to the device and waits for them (sync_file_range(2)); its metadata is not made durable.
pub fn write_out(fd: impl AsFd) -> Result<()> {
    sync_file_range(
        fd,
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER,
    )
}

/// `write_out` without waiting.
pub fn begin_to_write_out(fd: impl AsFd) -> Result<()> {
    sync_file_range(fd, libc::SYNC_FILE_RANGE_WRITE)
}

fn sync_file_range(fd: impl AsFd, how: libc::c_uint) -> Result<()> {
    // SAFETY: the call takes a descriptor, which `fd` keeps open, and numbers.
    let done = unsafe { libc::sync_file_range(fd.as_fd().as_raw_fd(), 0, 0, how) };
    if done == 0 { Ok(()) } else { Err(last_errno()) }
}

/// Changes the permission bits of any descriptor's inode. EOPNOTSUPP for symbolic links.
pub fn chmod_fd(fd: impl AsFd, mode: u32) -> Result<()> {
    // SAFETY: fchmodat2 reads an empty, NUL-terminated path and changes no memory of ours.
    let done = unsafe {
        libc::syscall(
            libc::SYS_fchmodat2,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::c_uint::from(mode as u16),
            libc::AT_EMPTY_PATH,
        )
    };
    if done == 0 {
        return Ok(());
    }
    match last_errno() {
        // Before Linux 6.6; and seccomp filters that do not know the call answer EPERM or ENOSYS.
        Errno::NOSYS => fs::chmodat(proc_self_fd()?, proc_name(fd), permissions(mode), AtFlags::empty()),
        errno => Err(errno),
    }
}

/// Gives the inode of `fd` the name `name` in `parent`.
pub fn link_fd(fd: impl AsFd, parent: impl AsFd, name: &Name) -> Result<()> {
    match fs::linkat(&fd, c"", &parent, name.as_bytes(), AtFlags::EMPTY_PATH) {
        // Without CAP_DAC_READ_SEARCH, or with other credentials than those that opened it, it is "not there".
        Err(Errno::NOENT) => {}
        done => return done,
    }
    fs::linkat(proc_self_fd()?, proc_name(fd), parent, name.as_bytes(), AtFlags::SYMLINK_FOLLOW)
}

/// Permission bits of a mode.
pub fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

pub fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Runs `operation` under `umask`, which is this thread's alone: the kernel applies it to what is made, or a
/// default ACL in its place, which no computation here could do without a race.
pub fn with_umask<T>(umask: u32, operation: impl FnOnce() -> Result<T>) -> Result<T> {
    own_fs_struct()?;
    let before = rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
    let done = operation();
    rustix::process::umask(before);
    done
}

thread_local! {
    static HAS_OWN_FS_STRUCT: Cell<bool> = const { Cell::new(false) };
}

/// Parts this thread's umask and working directory from those of the process's other threads.
pub fn own_fs_struct() -> Result<()> {
    if HAS_OWN_FS_STRUCT.get() {
        return Ok(());
    }
    // SAFETY: descriptors stay shared; only umask, root and working directory are parted.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS)? };
    HAS_OWN_FS_STRUCT.set(true);
    Ok(())
}
