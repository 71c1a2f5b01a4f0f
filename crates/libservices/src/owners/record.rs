//! `user.polytropo.stat`: what the host's inode cannot say of owner, mode and device.

use crate::types::Attr;

/// The attribute that holds a record.
pub const STAT: &[u8] = b"user.polytropo.stat";
/// Longer values are not ours.
const LEN_MAX: usize = 64;

/// Owner, mode (with type bits) and device number of one inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
}

impl Record {
    /// What an inode without a record belongs to.
    pub fn of_host(host: &Attr) -> Self {
        Self { mode: host.mode, uid: 0, gid: 0, rdev: 0 }
    }

    /// Reads a value. `None` when it is malformed, or tells a type that an inode like `host` cannot stand for: nobody but
    /// the owner of the directory can have written that, and it must not make the file unremovable.
    pub fn parse(value: &[u8], host: &Attr) -> Option<Self> {
        if value.len() > LEN_MAX {
            return None;
        }
        let mut fields = std::str::from_utf8(value).ok()?.split(' ');
        let record = Self {
            mode: u32::from_str_radix(fields.next()?, 8).ok()?,
            uid: fields.next()?.parse().ok()?,
            gid: fields.next()?.parse().ok()?,
            rdev: fields.next()?.parse().ok()?,
        };
        let placeholder = [libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFBLK];
        let fits = record.file_type() == host.file_type()
            || host.file_type() == libc::S_IFREG && placeholder.contains(&record.file_type());
        let whole = fields.next().is_none() && record.mode <= 0o177_777;
        (fits && whole && record.uid != u32::MAX && record.gid != u32::MAX).then_some(record)
    }

    pub fn to_value(self) -> String {
        format!("{:o} {} {} {}", self.mode, self.uid, self.gid, self.rdev)
    }

    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// The attributes of the host's inode as programs are to see them.
    pub fn show(&self, host: Attr) -> Attr {
        Attr { mode: self.mode, uid: self.uid, gid: self.gid, rdev: self.rdev, ..host }
    }

    pub fn set_permissions(&mut self, bits: u32) {
        self.mode = self.file_type() | bits & 0o7777;
    }

    /// Drops setuid, and setgid of group-executables, of anything but directories.
    pub fn drop_privileges(&mut self) {
        if self.file_type() != libc::S_IFDIR {
            self.mode &= !libc::S_ISUID;
            if self.mode & libc::S_IXGRP != 0 {
                self.mode &= !libc::S_ISGID;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Timestamp;

    fn host(mode: u32) -> Attr {
        let never = Timestamp::default();
        Attr {
            ino: 1,
            mode,
            nlink: 1,
            uid: 5,
            gid: 5,
            rdev: 0,
            size_bytes: 0,
            blocks_512: 0,
            blksize_bytes: 4096,
            atime: never,
            mtime: never,
            ctime: never,
            btime: None,
        }
    }

    #[test]
    fn comes_back_as_written() {
        let record =
            Record { mode: libc::S_IFCHR | 0o620, uid: 7, gid: 4_000_000_000, rdev: libc::makedev(136, 300) };
        let file = host(libc::S_IFREG | 0o600);
        assert_eq!(Record::parse(record.to_value().as_bytes(), &file), Some(record));
        assert_eq!(Record::parse(b"100644 33 33 0", &file).unwrap().mode, libc::S_IFREG | 0o644);
    }

    #[test]
    fn nonsense_is_no_record() {
        let file = host(libc::S_IFREG | 0o600);
        for value in [
            &b""[..],
            b"100644",
            b"100644 1 2",
            b"100644 1 2 3 4",
            b"100644  1 2 3",
            b"100648 1 2 3",
            b"100644 -1 2 3",
            b"100644 4294967295 2 3",
            b"7777100644 1 2 3",
            b"40755 1 2 0",
            b"120777 1 2 0",
            b"100644 1 2 \xff",
            b"100644 1 2 99999999999999999999999999999999999999999999999999999999999999",
        ] {
            assert_eq!(Record::parse(value, &file), None, "{}", value.escape_ascii());
        }
        assert_eq!(Record::parse(b"20666 0 0 259", &host(libc::S_IFDIR | 0o700)), None);
    }
}
