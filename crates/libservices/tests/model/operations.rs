//! What is done at random, and what it answers.

use polytropo_libservices::{Errno, RenameFlags};
use proptest::prelude::*;

/// So few names that operations meet.
const NAMES: [&str; 3] = ["a", "b", "c"];
const DEPTH_MAX: usize = 3;
pub const SLOTS: usize = 3;

/// From the root, never empty.
pub type Path = Vec<&'static str>;

#[derive(Clone, Debug)]
pub enum Operation {
    Mkdir(Path),
    Create {
        path: Path,
        exclusive: bool,
        truncate: bool,
    },
    Mkfifo(Path),
    Symlink(Path, &'static str),
    Readlink(Path),
    Link(Path, Path),
    Unlink(Path),
    Rmdir(Path),
    Rename(Path, Path, RenameFlags),
    Read(Path),
    Write {
        path: Path,
        offset: u64,
        length: usize,
        byte: u8,
        append: bool,
    },
    Truncate(Path, u64),
    Chmod(Path, u32),
    Chown(Path, u32, u32),
    SetXattr(Path, &'static str, Vec<u8>),
    RemoveXattr(Path, &'static str),
    Open {
        slot: usize,
        path: Path,
        truncate: bool,
    },
    ReadOpen(usize, u64, usize),
    WriteOpen {
        slot: usize,
        offset: u64,
        length: usize,
        byte: u8,
    },
    TruncateOpen(usize, u64),
    PunchOpen {
        slot: usize,
        offset: u64,
        length: u64,
    },
    CopyOpen {
        from: usize,
        to: usize,
        from_offset: u64,
        to_offset: u64,
        length: u64,
    },
    AttributesOpen(usize),
    Close(usize),
    /// Closes everything and builds the stack anew over the same directories.
    Restart,
}

/// What an operation tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Bytes(Vec<u8>),
    Count(u64),
    Shown(Shown),
}

pub type Outcome = Result<Answer, Errno>;

/// Attributes that must be the same in model and stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Of anything but directories.
    pub nlink: Option<u32>,
    /// Of regular files.
    pub size_bytes: Option<u64>,
}

fn path() -> impl Strategy<Value = Path> {
    proptest::collection::vec(proptest::sample::select(&NAMES[..]), 1..=DEPTH_MAX)
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 0..5000u64, Just(4096), 100_000..110_000u64]
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![0..20usize, Just(4096), 0..9000usize]
}

fn flags() -> impl Strategy<Value = RenameFlags> {
    prop_oneof![
        4 => Just(RenameFlags::empty()),
        1 => Just(RenameFlags::NOREPLACE),
        1 => Just(RenameFlags::EXCHANGE),
    ]
}

fn key() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(&["user.x", "user.y"][..])
}

fn slot() -> impl Strategy<Value = usize> {
    0..SLOTS
}

fn names() -> impl Strategy<Value = Operation> {
    use Operation::*;
    prop_oneof![
        5 => path().prop_map(Mkdir),
        4 => (path(), any::<bool>(), any::<bool>())
            .prop_map(|(path, exclusive, truncate)| Create { path, exclusive, truncate }),
        1 => path().prop_map(Mkfifo),
        1 => (path(), proptest::sample::select(&["a", "/", "../b"][..])).prop_map(|(p, t)| Symlink(p, t)),
        1 => path().prop_map(Readlink),
        2 => (path(), path()).prop_map(|(a, b)| Link(a, b)),
        3 => path().prop_map(Unlink),
        2 => path().prop_map(Rmdir),
        5 => (path(), path(), flags()).prop_map(|(a, b, f)| Rename(a, b, f)),
    ]
}

fn contents() -> impl Strategy<Value = Operation> {
    use Operation::*;
    prop_oneof![
        2 => path().prop_map(Read),
        4 => (path(), offset(), length(), any::<u8>(), any::<bool>()).prop_map(
            |(path, offset, length, byte, append)| Write { path, offset, length, byte, append }),
        2 => (path(), offset()).prop_map(|(p, size)| Truncate(p, size)),
        2 => (path(), 0..0o1000u32).prop_map(|(p, mode)| Chmod(p, mode)),
        1 => (path(), 0..3u32, 0..3u32).prop_map(|(p, uid, gid)| Chown(p, uid, gid)),
        2 => (path(), key(), proptest::collection::vec(any::<u8>(), 0..40)).prop_map(|(p, k, v)| SetXattr(p, k, v)),
        1 => (path(), key()).prop_map(|(p, k)| RemoveXattr(p, k)),
    ]
}

fn open_files() -> impl Strategy<Value = Operation> {
    use Operation::*;
    prop_oneof![
        4 => (slot(), path(), any::<bool>()).prop_map(|(slot, path, truncate)| Open { slot, path, truncate }),
        2 => (slot(), offset(), length()).prop_map(|(s, o, l)| ReadOpen(s, o, l)),
        3 => (slot(), offset(), length(), any::<u8>())
            .prop_map(|(slot, offset, length, byte)| WriteOpen { slot, offset, length, byte }),
        1 => (slot(), offset()).prop_map(|(s, size)| TruncateOpen(s, size)),
        1 => (slot(), offset(), 1..9000u64).prop_map(|(slot, offset, length)| PunchOpen { slot, offset, length }),
        1 => (slot(), slot(), offset(), offset(), 0..9000u64).prop_map(
            |(from, to, from_offset, to_offset, length)| CopyOpen { from, to, from_offset, to_offset, length }),
        1 => slot().prop_map(AttributesOpen),
        1 => slot().prop_map(Close),
    ]
}

/// What makes the tree that is there before the stack is.
pub fn beginnings() -> impl Strategy<Value = Vec<Operation>> {
    proptest::collection::vec(unopened(), 0..25)
}

/// Those that need no open file.
pub fn unopened() -> impl Strategy<Value = Operation> {
    prop_oneof![3 => names(), 2 => contents()]
}

pub fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let one = prop_oneof![
        20 => names(),
        14 => contents(),
        10 => open_files(),
        1 => Just(Operation::Restart),
    ];
    proptest::collection::vec(one, 1..50)
}
