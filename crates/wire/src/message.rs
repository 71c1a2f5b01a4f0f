//! What requests and replies say, as words.
//!
//! A path or a name lies at the beginning of the slot's area, its length in a word of the request. `at` is the number of an open file
//! of this channel, or 0 for the root. File numbers are the channel's own.

pub const REQUEST_WORDS: usize = 10;
pub const REPLY_WORDS: usize = 20;
/// Where replies to `Status`, `Access` and `ReadLink`, and failures of `Open`, have the tag with which they may be kept
/// ([`crate::epochs::Tag`]); failures, too.
pub const TAG_AT: usize = 14;

/// Where in the area the tag of a file that was opened lies, behind all bytes that may come along.
pub const OPENED_TAG_AT: usize = crate::channel::AREA_BYTES - crate::epochs::TAG_WORDS * 8;
const _: () = assert!(OPENED_TAG_AT >= CARRIED_BYTES_MAX);

/// Outcomes beyond error numbers, which are below 4096.
pub mod outcome {
    /// Not this door's business (a mount point inside, a way out of the mount, or a file that the kernel has in its hands): ask the kernel.
    pub const KERNEL: u32 = 0x1_0000;
}

/// Longest path in a request, as in the kernel (PATH_MAX with its NUL).
pub const PATH_BYTES_MAX: usize = 4095;
/// Files up to this size travel in the reply to `Open`.
pub const CARRIED_BYTES_MAX: usize = 64 << 10;
/// Open files of one channel.
pub const FILES_MAX: usize = 16_384;

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Operation {
            $($(#[$doc])* $name = $number,)*
        }

        impl Operation {
            pub const ALL: &'static [Operation] = &[$(Self::$name,)*];

            pub fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

operations! {
    /// Does nothing; the round trip alone.
    Ping = 0,
    /// at, path bytes, flags of open(2), mode, umask, 1 if the bytes will do, the inode of the directory that has to hold the name or 0 -> [`opened`]
    Open = 1,
    /// file
    Close = 2,
    /// file, offset, bytes -> bytes; the bytes lie in the area
    Read = 3,
    /// file -> [`Attributes`]
    FileStatus = 4,
    /// at, path bytes, flags (AT_SYMLINK_NOFOLLOW) -> [`Attributes`]
    Status = 5,
    /// at, path bytes, mode (R_OK...), flags (AT_EACCESS, AT_SYMLINK_NOFOLLOW)
    Access = 6,
    /// at, path bytes -> bytes of the target, in the area
    ReadLink = 7,
    /// file, offset, bytes, flags (1: append) -> bytes written, the file's size after; the bytes lie in the area
    Write = 8,
    /// file, size
    Truncate = 9,
    /// file, 1 for data only
    Sync = 10,
    /// file, position (0: from the beginning), room -> bytes, next position; entries in the area as getdents64(2) writes them
    ReadDirectory = 11,
    /// at, path bytes, mode, umask
    MakeDirectory = 12,
    /// at, path bytes, flags (AT_REMOVEDIR)
    Unlink = 13,
    /// at, path bytes, new at, new path bytes, flags of renameat2(2); both paths in the area, one after the other
    Rename = 14,
    /// at, path bytes, bytes of the target before it
    SymbolicLink = 15,
    /// at, path bytes, new at, new path bytes, flags (AT_SYMLINK_FOLLOW)
    Link = 16,
    /// at, path bytes, mode, flags (AT_SYMLINK_NOFOLLOW); an empty path means `at` itself
    ChangeMode = 17,
    /// at, path bytes, uid, gid (u32::MAX: as it is), flags
    ChangeOwner = 18,
    /// at, path bytes, atime s, atime ns, mtime s, mtime ns, flags; ns may be UTIME_NOW, UTIME_OMIT
    ChangeTimes = 19,
    /// at, path bytes, size
    TruncatePath = 20,
    /// file, offset, bytes wanted from there on -> what a window of the file is called, see [`window`]; makes some of them resident, and perhaps more
    Window = 21,
    /// file, mode, offset, bytes
    Allocate = 22,
    /// file, offset, whence (SEEK_DATA, SEEK_HOLE) -> offset
    Seek = 23,
    /// file -> block size, blocks, free, available, files, free files, longest name
    FileSystemStatus = 24,
    /// at, path bytes, name bytes, flags -> bytes of the value, in the area; an empty path means `at` itself
    GetAttribute = 25,
    /// at, path bytes, name bytes, value bytes, XATTR flags, flags
    SetAttribute = 26,
    /// at, path bytes, flags -> bytes of the names
    ListAttributes = 27,
    /// at, path bytes, name bytes, flags
    RemoveAttribute = 28,
    /// file, offset -> token (two words). The file's offset is the service's from now on.
    Share = 29,
    /// token (two words) -> [`opened`]
    Attach = 30,
    /// file, bytes: reads at the shared offset and moves it -> bytes
    ReadNext = 31,
    /// file, bytes: writes at the shared offset and moves it -> bytes
    WriteNext = 32,
    /// file, offset, whence: moves the shared offset -> offset
    SeekShared = 33,
    /// at, path bytes, first word wanted, sample of the part before, 1 if it must lie in the area -> [`listed`]; words of a [`crate::listing`] in the area
    List = 34,
    /// The program watches files (inotify(7) and the like), as long as its channel is there: changes are the kernel's from now on, who sees and tells of them.
    Watch = 35,
    /// file -> the two words of a name ([`handed_name`]) by which the kernel finds the file in the mount's root, once
    Hand = 36,
}

impl Operation {
    /// Whether it may change what somebody who watches files is told of. `Open` does by its flags.
    pub fn is_change(self) -> bool {
        use Operation::*;
        matches!(
            self,
            Write
                | Truncate
                | Allocate
                | MakeDirectory
                | Unlink
                | Rename
                | SymbolicLink
                | Link
                | ChangeMode
                | ChangeOwner
                | ChangeTimes
                | TruncatePath
                | SetAttribute
                | RemoveAttribute
                | WriteNext
        )
    }
}

/// Words of the reply to `Open`; the attributes follow from [`opened::ATTRIBUTES`] on.
pub mod opened {
    /// 0: there is no open file, since the bytes came along, and they will do while the tag holds.
    pub const FILE: usize = 0;
    /// Bits of [`super::opened_flags`].
    pub const FLAGS: usize = 1;
    /// Bytes of the file in the area, all that it has, if [`super::opened_flags::CARRIED`].
    pub const CARRIED_BYTES: usize = 2;
    pub const ATTRIBUTES: usize = 3;
}

pub mod opened_flags {
    /// The whole file lies in the area.
    pub const CARRIED: u64 = 1;
    /// A window may be asked for.
    pub const WINDOW: u64 = 2;
    /// Nobody can change the file's bytes while the stack is served.
    pub const IMMUTABLE: u64 = 4;
    /// The file may get a permit to be written without waiting: [`crate::posts`].
    pub const POSTS: u64 = 8;
    /// A tag lies at [`super::OPENED_TAG_AT`] in the area: as long as it holds, the same open gives the same file, with these attributes and
    /// with the bytes that came along.
    pub const TAGGED: u64 = 16;
    /// The file was made just now.
    pub const MADE: u64 = 32;
}

/// What names begin with by which the kernel finds files that have no other.
const HANDED_PREFIX: &[u8; 11] = b".polytropo-";
pub const HANDED_NAME_BYTES: usize = 43;

/// The name that two words stand for: 32 hexadecimal digits behind a prefix.
pub fn handed_name(words: [u64; 2]) -> [u8; HANDED_NAME_BYTES] {
    let mut name = [0; HANDED_NAME_BYTES];
    let (prefix, digits) = name.split_at_mut(HANDED_PREFIX.len());
    prefix.copy_from_slice(HANDED_PREFIX);
    for (at, digit) in digits.iter_mut().enumerate() {
        let nibble = words[at / 16] >> (60 - at % 16 * 4) & 15;
        *digit = b"0123456789abcdef"[nibble as usize];
    }
    name
}

/// What `handed_name` was made of; None for another name.
pub fn handed_words(name: &[u8]) -> Option<[u64; 2]> {
    let digits = name.strip_prefix(HANDED_PREFIX).filter(|digits| digits.len() == 32)?;
    let mut words = [0; 2];
    for (at, digit) in digits.iter().enumerate() {
        let nibble = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        words[at / 16] = words[at / 16] << 4 | u64::from(nibble);
    }
    Some(words)
}

/// Words of the reply to `List`.
pub mod listed {
    /// Words of the whole listing.
    pub const WORDS: usize = 0;
    /// How many of them lie in the area.
    pub const HERE: usize = 1;
    /// The sample by which parts of one listing are told from those of another.
    pub const SAMPLE: usize = 2;
    /// What the counter of everything was before the way was walked; all ones: none of it may be kept.
    pub const EVERYTHING: usize = 3;
    /// Where it begins in the shared [`crate::answers`]; 0: it lies in the area.
    pub const POSITION: usize = 4;
}

/// Words of the reply to `Window`.
pub mod window {
    /// The window's name, 128 bits, written as 32 hexadecimal digits, the first word first.
    pub const NAME: usize = 0;
    pub const NAME_MORE: usize = 1;
}

/// What statx(2) tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub ino: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    pub size_bytes: u64,
    pub blocks_512: u64,
    pub blksize_bytes: u32,
    pub atime_ns: u32,
    pub mtime_ns: u32,
    pub ctime_ns: u32,
    pub btime_ns: u32,
    pub has_btime: bool,
    pub atime_s: i64,
    pub mtime_s: i64,
    pub ctime_s: i64,
    pub btime_s: i64,
}

pub const ATTRIBUTE_WORDS: usize = 13;
const _: () = assert!(opened::ATTRIBUTES + ATTRIBUTE_WORDS <= REPLY_WORDS);

impl Attributes {
    pub fn to_words(&self) -> [u64; ATTRIBUTE_WORDS] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [
            self.ino,
            pair(self.mode, self.nlink),
            pair(self.uid, self.gid),
            self.rdev,
            self.size_bytes,
            self.blocks_512,
            pair(self.blksize_bytes, u32::from(self.has_btime)),
            pair(self.atime_ns, self.mtime_ns),
            pair(self.ctime_ns, self.btime_ns),
            self.atime_s as u64,
            self.mtime_s as u64,
            self.ctime_s as u64,
            self.btime_s as u64,
        ]
    }

    pub fn from_words(words: &[u64; ATTRIBUTE_WORDS]) -> Self {
        let [ino, w1, w2, rdev, size_bytes, blocks_512, w6, w7, w8, atime_s, mtime_s, ctime_s, btime_s] =
            *words;
        let (low, high) = (|word: u64| word as u32, |word: u64| (word >> 32) as u32);
        Self {
            ino,
            mode: low(w1),
            nlink: high(w1),
            uid: low(w2),
            gid: high(w2),
            rdev,
            size_bytes,
            blocks_512,
            blksize_bytes: low(w6),
            has_btime: high(w6) != 0,
            atime_ns: low(w7),
            mtime_ns: high(w7),
            ctime_ns: low(w8),
            btime_ns: high(w8),
            atime_s: atime_s as i64,
            mtime_s: mtime_s as i64,
            ctime_s: ctime_s as i64,
            btime_s: btime_s as i64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_survive_the_way() {
        let all = Attributes {
            ino: 1,
            mode: 2,
            nlink: 3,
            uid: 4,
            gid: 5,
            rdev: 6,
            size_bytes: 7,
            blocks_512: 8,
            blksize_bytes: 9,
            atime_ns: 10,
            mtime_ns: 11,
            ctime_ns: 12,
            btime_ns: 13,
            has_btime: true,
            atime_s: -14,
            mtime_s: 15,
            ctime_s: 16,
            btime_s: 17,
        };
        assert_eq!(Attributes::from_words(&all.to_words()), all);
    }

    #[test]
    fn operations_are_their_numbers() {
        for operation in Operation::ALL {
            assert_eq!(Operation::from_number(*operation as u32), Some(*operation));
        }
        assert_eq!(Operation::from_number(9999), None);
    }
}
