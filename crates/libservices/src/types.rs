//! What the operations carry: nodes, attributes, handles, callers, locks.

use std::sync::Arc;

use bitflags::bitflags;

use crate::name::Name;

/// A live inode of one libservice. Numbers are the libservice's own; a node stays valid
/// from the reply that named it until as many `forget`s as replies. Unlike `Attr::ino` it is not stable
/// across restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The root of every libservice; never forgotten.
    pub const ROOT: NodeId = NodeId(1);
}

/// An open file or directory of one libservice, from `open` to `release`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

/// An inode whose bytes never change. No other inode is ever called the same, not even a later one of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContentId {
    pub device: u64,
    pub ino: u64,
    pub born: Timestamp,
}

/// Bytes that never change: whose, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    pub id: ContentId,
    pub size_bytes: u64,
}

/// An inode of the host, as it can be told from all others at one time. The time of birth tells it from later ones of the same number, on
/// filesystems that keep one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostInode {
    pub device: u64,
    pub ino: u64,
    pub born: Option<Timestamp>,
}

/// Time since 1970, UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// inode(7): what `statx` tells. `mode` holds type and permission bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attr {
    /// `st_ino`: stable across copy-up and restart.
    pub ino: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// Device number of a device node, as `makedev(3)` packs it.
    pub rdev: u64,
    pub size_bytes: u64,
    pub blocks_512: u64,
    pub blksize_bytes: u32,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub btime: Option<Timestamp>,
}

impl Attr {
    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    pub fn is_dir(&self) -> bool {
        self.file_type() == libc::S_IFDIR
    }
}

/// The answer to everything that names an inode. Each one counts as one look-up of `node`.
#[derive(Clone, Debug)]
pub struct Entry {
    pub node: NodeId,
    /// Tells apart two lives of one node number.
    pub generation: u64,
    pub attr: Attr,
}

/// One name in a directory.
#[derive(Clone, Copy, Debug)]
pub struct DirEntry<'a> {
    /// Where reading goes on after this entry; opaque, never 0, valid while the handle is open.
    pub next_offset: u64,
    pub ino: u64,
    /// `S_IFMT` bits, or 0 when the directory does not tell.
    pub file_type: u32,
    /// Raw bytes, because `.` and `..` (which doors add) are not `Name`s.
    pub name: &'a Name,
}

/// Receives directory entries; returns false when it has no room (that entry was not taken).
pub type DirSink<'a> = dyn FnMut(DirEntry<'_>) -> bool + 'a;

/// Receives directory entries with their look-ups. Each taken entry counts as one look-up of
/// its node; of an entry that was refused nothing is held. `None`: the look-up failed (the name
/// may be gone, or may not be looked at), the name stands.
pub type DirPlusSink<'a> = dyn FnMut(DirEntry<'_>, Option<&Entry>) -> bool + 'a;

/// A new time in `SetAttr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    Now,
    At(Timestamp),
}

/// What `setattr` changes; `None` leaves as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits only.
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size_bytes: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
    /// Drop setuid, setgid (of group-executables) and file capabilities, as a write or chown by an ordinary user does.
    pub kill_privileges: bool,
}

bitflags! {
    /// How a file is opened; values as in open(2) on x86-64 are the door's business.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct OpenFlags: u32 {
        const READ = 1;
        const WRITE = 2;
        const APPEND = 4;
        const TRUNCATE = 8;
        /// `create` only: the name must be new.
        const EXCLUSIVE = 16;
        const DIRECT = 32;
        /// O_SYNC: each write durable with its metadata.
        const SYNC = 64;
        /// O_DSYNC: each write's bytes durable.
        const DSYNC = 128;
        const NOATIME = 256;
        /// `tmpfile` only: may never be linked (O_EXCL with O_TMPFILE).
        const UNLINKABLE = 512;
    }
}

bitflags! {
    /// renameat2(2)
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct RenameFlags: u32 {
        const NOREPLACE = 1;
        const EXCHANGE = 2;
        const WHITEOUT = 4;
    }
}

bitflags! {
    /// fallocate(2)
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct FallocateMode: u32 {
        const KEEP_SIZE = 1;
        const PUNCH_HOLE = 2;
        const COLLAPSE_RANGE = 8;
        const ZERO_RANGE = 16;
        const INSERT_RANGE = 32;
        const UNSHARE_RANGE = 64;
    }
}

bitflags! {
    /// setxattr(2)
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct XattrFlags: u32 {
        const CREATE = 1;
        const REPLACE = 2;
    }
}

bitflags! {
    /// The capabilities(7) that a filesystem looks at, by their number in linux/capability.h.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct FsCapabilities: u64 {
        const CHOWN = 1 << 0;
        const DAC_OVERRIDE = 1 << 1;
        const DAC_READ_SEARCH = 1 << 2;
        const FOWNER = 1 << 3;
        const FSETID = 1 << 4;
        const SYS_ADMIN = 1 << 21;
        const SYS_RESOURCE = 1 << 24;
        const MKNOD = 1 << 27;
        const SETFCAP = 1 << 31;
    }
}

/// Where seeking over sparse files goes (lseek(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekTo {
    Data,
    Hole,
}

/// What `open` answers.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    pub handle: HandleId,
    /// What was cached of this file before this open may still be used.
    pub keep_cache: bool,
    /// Reads and writes must not be cached by anybody above.
    pub direct: bool,
}

/// Who asks. Filled by the door from what the kernel says of the peer, never from a message.
#[derive(Clone, Debug)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups. Empty at doors where the kernel has checked permissions already.
    pub groups: Arc<[u32]>,
    pub capabilities: FsCapabilities,
    pub umask: u32,
    pub pid: u32,
    /// The mount (door instance) that the request came through: it needs no notice of its own changes.
    pub door: DoorId,
}

impl Caller {
    /// The service acting for itself: uid 0 with every capability, no umask.
    pub fn service() -> Self {
        Self {
            uid: 0,
            gid: 0,
            groups: Arc::from([]),
            capabilities: FsCapabilities::all(),
            umask: 0,
            pid: 0,
            door: DoorId(0),
        }
    }
}

/// One door instance (one FUSE mount, later one channel) of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DoorId(pub u32);

/// statvfs(3)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct StatFs {
    pub blocks: u64,
    pub blocks_free: u64,
    pub blocks_available: u64,
    pub files: u64,
    pub files_free: u64,
    pub block_size_bytes: u32,
    pub name_len_max: u32,
}
