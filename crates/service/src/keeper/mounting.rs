//! FUSE superblocks and the mounts of them.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::control::Refusal;

/// The type that mount tables show.
pub const FILESYSTEM_TYPE: &str = "fuse.polytropo";
const SUBTYPE: &str = "polytropo";

/// A FUSE superblock with a mount of it that is not yet anywhere.
pub struct Unattached {
    mount: OwnedFd,
}

/// What the kernel calls a mount and its superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The number in the mount table, which the kernel gives to another mount after this one.
    pub mount_id: u64,
    /// The number that is never given again (Linux 6.8).
    pub unique_id: Option<u64>,
    pub device: (u32, u32),
}

pub fn open_device() -> Result<OwnedFd, Refusal> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open("/dev/fuse", flags, Mode::empty()).map_err(|errno| {
        let advice = match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => "; this kernel offers no FUSE: run `modprobe fuse`",
            Errno::ACCESS | Errno::PERM => "; run as root, or let this user read and write /dev/fuse",
            _ => "",
        };
        let why = crate::control::describe(errno);
        Refusal::with_errno(errno, format!("/dev/fuse cannot be opened: {why}{advice}"))
    })
}

impl Unattached {
    /// Makes a superblock that is served at `device`. `source` is what mount tables show.
    pub fn make(device: &OwnedFd, source: &str) -> rustix::io::Result<Self> {
        use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", source)?;
        fsconfig_set_string(&context, "subtype", SUBTYPE)?;
        let options = crate::doors::fuse::mount_options(device.as_raw_fd(), 0, 0);
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(&context, key, value)?,
                None => fsconfig_set_flag(&context, option)?,
            }
        }
        fsconfig_create(&context)?;
        // Device nodes of an image are data here; containers get their devices from their runtime.
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
        Ok(Self { mount: fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)? })
    }

    /// Another mount of the superblock that is mounted at `place`. ESTALE when it is not `device`.
    pub fn clone_of(place: &Path, device: (u32, u32)) -> rustix::io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_NO_AUTOMOUNT
            | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
        let mount = rustix::mount::open_tree(CWD, place, flags)?;
        let made = Self { mount };
        if made.identity()?.device == device { Ok(made) } else { Err(Errno::STALE) }
    }

    pub fn set_read_only(&self, read_only: bool) -> rustix::io::Result<()> {
        let (set, clear) =
            if read_only { (libc::MOUNT_ATTR_RDONLY, 0) } else { (0, libc::MOUNT_ATTR_RDONLY) };
        set_attributes(&self.mount, set, clear, None)
    }

    /// Puts the mount at the directory `place`.
    pub fn attach(self, place: &OwnedFd) -> rustix::io::Result<Identity> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(&self.mount, "", place, "", flags)?;
        self.identity()
    }

    pub fn identity(&self) -> rustix::io::Result<Identity> {
        identity_of(&self.mount)
    }
}

pub fn identity_of(mount: &OwnedFd) -> rustix::io::Result<Identity> {
    // Not synchronised: nobody may be there yet to answer a request.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(mount, "", flags, StatxFlags::MNT_ID)?;
    let unique = StatxFlags::from_bits_retain(STATX_MNT_ID_UNIQUE);
    let again = rustix::fs::statx(mount, "", flags, unique)?;
    Ok(Identity {
        mount_id: stat.stx_mnt_id,
        unique_id: (again.stx_mask & STATX_MNT_ID_UNIQUE != 0).then_some(again.stx_mnt_id),
        device: (stat.stx_dev_major, stat.stx_dev_minor),
    })
}

const STATX_MNT_ID_UNIQUE: u32 = 0x4000;

/// Whether `wanted` is mounted at `place`, and not one that got its number later.
pub fn is_at(wanted: &Identity, place: &Path) -> rustix::io::Result<bool> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::open(place, flags, Mode::empty())?;
    Ok(identity_of(&found)? == *wanted)
}

/// mount_setattr(2) of one mount: sets and clears attributes; with `namespace`, idmaps it by that user namespace.
pub fn set_attributes(
    mount: &OwnedFd,
    set: u64,
    clear: u64,
    namespace: Option<&OwnedFd>,
) -> rustix::io::Result<()> {
    let wanted = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation: 0,
        userns_fd: namespace.map_or(0, |namespace| namespace.as_raw_fd() as u64),
    };
    // SAFETY: the kernel reads an empty, NUL-terminated path and one structure whose size is told, and keeps neither.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Opens a mount point. Refuses what cannot be one, or is one already.
pub fn open_mountpoint(place: &Path) -> Result<OwnedFd, Refusal> {
    let shown = place.display();
    if !place.is_absolute() {
        return Err(Refusal::with_errno(
            Errno::INVAL,
            format!("the mount point {shown} is not an absolute path"),
        ));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(place, flags, Mode::empty()).map_err(|errno| {
        let sentence = match errno {
            Errno::NOENT => format!("the mount point {shown} does not exist; make it with mkdir"),
            Errno::NOTDIR | Errno::LOOP => format!("the mount point {shown} is not a directory"),
            Errno::NOTCONN => {
                format!("the mount point {shown} is a dead mount of an ended service; unmount it first")
            }
            errno => format!("the mount point {shown} cannot be opened: {}", crate::control::describe(errno)),
        };
        Refusal::with_errno(errno, sentence)
    })?;
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(&opened, "", flags, StatxFlags::TYPE)
        .map_err(|errno| Refusal::of(errno, format!("the mount point {shown} cannot be examined")))?;
    if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        let sentence = format!(
            "the mount point {shown} is in use: something is mounted there; unmount it or take another"
        );
        return Err(Refusal::with_errno(Errno::BUSY, sentence));
    }
    Ok(opened)
}

/// Where an opened directory is now.
pub fn path_of(place: &OwnedFd) -> rustix::io::Result<PathBuf> {
    let link = format!("/proc/self/fd/{}", place.as_raw_fd());
    let path = rustix::fs::readlink(link, Vec::new())?;
    Ok(OsStr::from_bytes(path.to_bytes()).into())
}

pub enum Detach {
    /// EBUSY while programs use it.
    WhenUnused,
    /// At once; programs that use it keep it.
    Lazily,
    /// At once, and what programs still want of it fails.
    ForGood,
}

pub fn unmount(place: &Path, how: Detach) -> rustix::io::Result<()> {
    let lazy = match how {
        Detach::WhenUnused => UnmountFlags::empty(),
        Detach::Lazily => UnmountFlags::DETACH,
        Detach::ForGood => UnmountFlags::DETACH | UnmountFlags::FORCE,
    };
    rustix::mount::unmount(place, lazy | UnmountFlags::NOFOLLOW)
}

/// Ends the connection of the FUSE mount at `place`, which stays mounted.
pub fn abort(place: &Path) -> rustix::io::Result<()> {
    // While it is open it cannot be unmounted; the kernel aborts the connection before it finds that out.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let _used = rustix::fs::open(place, flags, Mode::empty())?;
    match rustix::mount::unmount(place, UnmountFlags::FORCE | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// One line of this process's mount table.
#[derive(Debug, PartialEq, Eq)]
pub struct TableLine {
    pub mount_id: u64,
    pub mountpoint: Vec<u8>,
    pub ours: bool,
}

/// This process's mount table, in order: of several mounts at one place the last is on top.
pub fn mount_table() -> std::io::Result<Vec<TableLine>> {
    Ok(std::fs::read("/proc/self/mountinfo")?.split(|&byte| byte == b'\n').filter_map(table_line).collect())
}

fn table_line(line: &[u8]) -> Option<TableLine> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mount_id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let mountpoint = unescape(fields.nth(3)?);
    let filesystem = fields.skip_while(|field| field != b"-").nth(1)?;
    Some(TableLine { mount_id, mountpoint, ours: filesystem == FILESYSTEM_TYPE.as_bytes() })
}

/// One line of the mount table of another process.
#[derive(Debug, PartialEq, Eq)]
pub struct ProcessLine {
    pub mount_id: u64,
    pub parent: u64,
    pub device: (u32, u32),
    pub root: Vec<u8>,
    pub mountpoint: Vec<u8>,
    pub read_only: bool,
}

pub fn process_line(line: &[u8]) -> Option<ProcessLine> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (mount_id, parent) = (number()?, number()?);
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let (root, mountpoint) = (unescape(fields.next()?), unescape(fields.next()?));
    let read_only = fields.next()?.split(|&byte| byte == b',').any(|option| option == b"ro");
    Some(ProcessLine { mount_id, parent, device, root, mountpoint, read_only })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|d| first == b'\\' && d.iter().all(|d| (b'0'..=b'7').contains(d)));
        if let Some(digits) = digits {
            bytes.push(digits.iter().fold(0, |value: u8, d| value.wrapping_mul(8).wrapping_add(d - b'0')));
            rest = &after[3..];
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    bytes
}

impl TableLine {
    pub fn path(&self) -> PathBuf {
        OsStr::from_bytes(&self.mountpoint).into()
    }

    /// Whether nothing is mounted over it.
    pub fn is_on_top(&self, lines: &[TableLine]) -> bool {
        let top = lines.iter().rev().find(|line| line.mountpoint == self.mountpoint);
        top.is_some_and(|line| line.mount_id == self.mount_id)
    }
}

/// Opens the mount table for watching: poll(2) tells POLLPRI when it changed.
pub fn watch_table() -> std::io::Result<std::fs::File> {
    std::fs::File::open("/proc/self/mountinfo")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_mount_table() {
        let line = br"77 29 0:55 / /mnt/a\040b\134c rw,nodev shared:1 master:2 - fuse.polytropo polytropo rw,user_id=0";
        let read = table_line(line).unwrap();
        assert_eq!(read, TableLine { mount_id: 77, mountpoint: br"/mnt/a b\c".to_vec(), ours: true });
        assert_eq!(read.path(), Path::new(r"/mnt/a b\c"));
        let other = table_line(b"21 29 0:19 / /proc rw - proc proc rw").unwrap();
        assert!(!other.ours && other.path() == Path::new("/proc"));
        assert_eq!(table_line(b""), None);
        assert!(mount_table().unwrap().iter().any(|line| line.path() == Path::new("/")));
    }
}
