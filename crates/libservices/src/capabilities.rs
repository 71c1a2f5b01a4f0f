//! What a libservice can do, so that tests ask for exactly that and stacks are checked whole.

use bitflags::bitflags;

bitflags! {
    /// Declared by every libservice. An operation that is not declared answers EOPNOTSUPP (EROFS for
    /// changes where `WRITE` is missing).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Capabilities: u32 {
        /// Anything may be changed at all.
        const WRITE = 1 << 0;
        /// More than one name for a file.
        const HARD_LINKS = 1 << 1;
        const SYMLINKS = 1 << 2;
        /// Device nodes, FIFOs and sockets.
        const SPECIAL_FILES = 1 << 3;
        const XATTRS = 1 << 4;
        /// POSIX access and default ACLs through `system.posix_acl_*`.
        const POSIX_ACLS = 1 << 5;
        const TMPFILE = 1 << 6;
        const RENAME_NOREPLACE = 1 << 7;
        const RENAME_EXCHANGE = 1 << 8;
        const FALLOCATE = 1 << 9;
        const PUNCH_HOLE = 1 << 10;
        /// SEEK_DATA and SEEK_HOLE tell holes apart.
        const SPARSE_SEEK = 1 << 11;
        const COPY_RANGE = 1 << 12;
        const BIRTH_TIME = 1 << 13;
        /// Owners other than the service's own user are kept.
        const OWNERS = 1 << 14;
        /// `flush` never has anything to report, and one open file of an inode is as good as another with the same
        /// access: doors may leave `flush` out, and open a file when it is first read or written instead of when a program
        /// opens it.
        const STATELESS_OPEN = 1 << 15;
    }
}

/// Who else may change what lies below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Coherence {
    /// Nobody ever changes it: an image layer.
    Immutable,
    /// Only this instance changes it: doors may cache until told.
    Exclusive,
    /// Others change it too (a directory of the host): doors must ask again.
    Shared,
}
