//! The state area's memory. `crates/service/STATE.md` draws it byte by byte.

use std::sync::atomic::{AtomicU32, AtomicU64};

use polytropo_libservices::{HostInode, OpenFlags, Timestamp};

pub const MAGIC: u64 = u64::from_le_bytes(*b"POLYSTAT");
/// Changed with every change of a layout or a meaning.
pub const VERSION: u32 = 5;

pub const HEADER_BYTES: usize = 4096;
/// What threads are doing: one slot each.
pub const JOURNAL_START: usize = HEADER_BYTES;
/// Threads beyond work unrecorded.
pub const SLOTS: usize = 256;
pub const OPENS_START: usize = JOURNAL_START + SLOTS * size_of::<Slot>();
/// Open files of one door. Beyond it they are served as well, and counted as untold.
pub const CAPACITY: usize = 65_536;
pub const NODES_START: usize = OPENS_START + CAPACITY * size_of::<Entry>();
/// Nodes that the kernel holds. Beyond it they are served as well, and counted as untold.
pub const NODES_CAPACITY: usize = 262_144;
pub const LONG_NAMES_START: usize = NODES_START + NODES_CAPACITY * size_of::<Entry>();
/// Names that do not fit into the node's own entry. Nodes whose name finds no room have none.
pub const LONG_NAMES_CAPACITY: usize = 16_384;
pub const TOTAL_BYTES: usize = LONG_NAMES_START + LONG_NAMES_CAPACITY * size_of::<LongName>();

#[repr(C, align(128))]
pub struct Header {
    pub magic: AtomicU64,
    pub version: AtomicU32,
    pub entry_bytes: AtomicU32,
    pub capacity: AtomicU64,
    pub door: AtomicU64,
    /// Entries that were ever in use: a first look need not go further.
    pub used: AtomicU64,
    /// Open files for which there was no room.
    pub untold: AtomicU64,
    pub nodes_capacity: AtomicU64,
    pub nodes_used: AtomicU64,
    pub nodes_untold: AtomicU64,
    pub long_names_used: AtomicU64,
    /// What was agreed on with the kernel, before it hears of it: the protocol's minor version, 0 before, and its flags.
    pub minor: AtomicU64,
    pub flags: AtomicU64,
    /// Requests that workers died of, perhaps.
    pub suspects: [Suspect; SUSPECTS],
    /// Not 0 while programs watch files.
    pub watched: AtomicU64,
}

pub const SUSPECTS: usize = 64;

/// A request that was being done when workers died.
#[repr(C)]
pub struct Suspect {
    /// The kernel's number of it.
    pub unique: AtomicU64,
    /// How much of these deaths it is blamed for; 0: free.
    pub blame: AtomicU64,
}

/// Name bytes of one node, padded with zeros.
#[repr(C, align(128))]
pub struct LongName {
    pub words: [AtomicU64; 32],
}

pub const SLOT_WORDS: usize = 126;

/// What one thread is doing. Written by that thread alone; counts once its worker is dead.
#[repr(C, align(128))]
pub struct Slot {
    /// 0 nothing, 1 begun, 2 done.
    pub stage: AtomicU64,
    /// The kernel's number of the request.
    pub unique: AtomicU64,
    pub words: [AtomicU64; SLOT_WORDS],
}

/// What lies in sections of the area: atomics alone, so that any bytes are a value.
pub trait Section {}
impl Section for Entry {}
impl Section for LongName {}
impl Section for Slot {}

pub const WORDS: usize = 15;

/// One open file.
#[repr(C, align(128))]
pub struct Entry {
    /// Odd while the words are whole and the file is open; even while the entry is free or being filled. Goes up by one each time.
    pub commit: AtomicU64,
    pub words: [AtomicU64; WORDS],
}

const _: () = assert!(size_of::<Header>() <= HEADER_BYTES && size_of::<Entry>() == 128);
const _: () = assert!(size_of::<LongName>() == 256 && size_of::<Slot>() == 1024);
const _: () = assert!(OPENS_START % 128 == 0 && NODES_START % 128 == 0 && LONG_NAMES_START % 256 == 0);

macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident { $($item:ident = $number:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
        #[serde(rename_all = "lowercase")]
        pub enum $name {
            $($item = $number,)*
        }

        impl $name {
            fn from_number(number: u64) -> Option<Self> {
                match number {
                    $($number => Some(Self::$item),)*
                    _ => None,
                }
            }
        }
    };
}

numbers! {
    /// What was opened.
    Kind { File = 1, Directory = 2, Place = 3, }
}
numbers! {
    /// Through which door.
    Through { Fuse = 1, Channel = 2, }
}
numbers! {
    /// How the file's bytes go; of what has none, `None`.
    Bytes { None = 0, Passthrough = 1, Cached = 2, Kernel = 3, Direct = 4, Window = 5, }
}

/// What recovery has to know of an open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenRecord {
    /// The stack's number.
    pub node: u64,
    /// The number by which the kernel knows it; 0 at a channel.
    pub kernel_node: u64,
    /// The stack's number of the open file; 0 for a place.
    pub handle: u64,
    pub flags: OpenFlags,
    pub kind: Kind,
    pub through: Through,
    pub bytes: Bytes,
    /// Who opened it: the thread at the FUSE door, the process at a channel.
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    /// The kernel's number of the file that it reads itself; 0 if it does not.
    pub backing: u32,
    /// Look-ups that the open file holds itself. The kernel's own, at the FUSE door, are not among them.
    pub lookups: u32,
    /// The number by which the program knows it; 0 at the FUSE door, where that is the handle.
    pub number: u64,
    /// Of the layer that held the bytes when it was opened.
    pub inode: Option<HostInode>,
}

impl serde::Serialize for OpenRecord {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut shown = serializer.serialize_struct("OpenRecord", 14)?;
        shown.serialize_field("node", &self.node)?;
        shown.serialize_field("kernel_node", &self.kernel_node)?;
        shown.serialize_field("handle", &self.handle)?;
        shown.serialize_field("flags", &self.flags.bits())?;
        shown.serialize_field("kind", &self.kind)?;
        shown.serialize_field("through", &self.through)?;
        shown.serialize_field("bytes", &self.bytes)?;
        shown.serialize_field("uid", &self.uid)?;
        shown.serialize_field("gid", &self.gid)?;
        shown.serialize_field("pid", &self.pid)?;
        shown.serialize_field("backing", &self.backing)?;
        shown.serialize_field("number", &self.number)?;
        shown.serialize_field("device", &self.inode.map(|inode| inode.device))?;
        shown.serialize_field("ino", &self.inode.map(|inode| inode.ino))?;
        shown.end()
    }
}

const INODE_KNOWN: u64 = 1;
const BIRTH_KNOWN: u64 = 2;

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn low(word: u64) -> u32 {
    word as u32
}

fn high(word: u64) -> u32 {
    (word >> 32) as u32
}

impl OpenRecord {
    pub fn to_words(&self) -> [u64; WORDS] {
        let inode = self.inode.unwrap_or(HostInode { device: 0, ino: 0, born: None });
        let born = inode.born.unwrap_or_default();
        let known = if self.inode.is_some() { INODE_KNOWN } else { 0 };
        let known = known | if inode.born.is_some() { BIRTH_KNOWN } else { 0 };
        [
            self.node,
            self.kernel_node,
            self.handle,
            pair(self.flags.bits(), self.kind as u32),
            pair(self.uid, self.gid),
            pair(self.pid, self.through as u32 | (self.bytes as u32) << 8),
            pair(self.backing, self.lookups),
            self.number,
            inode.device,
            inode.ino,
            born.seconds as u64,
            u64::from(born.nanoseconds) | known << 32,
            0,
            0,
            0,
        ]
    }

    /// None for what makes no sense.
    pub fn from_words(words: &[u64; WORDS]) -> Option<Self> {
        let known = words[11] >> 32;
        let nanoseconds = low(words[11]);
        if known & !(INODE_KNOWN | BIRTH_KNOWN) != 0 || nanoseconds >= 1_000_000_000 || words[12..] != [0; 3]
        {
            return None;
        }
        let born = Timestamp { seconds: words[10] as i64, nanoseconds };
        let born = (known & BIRTH_KNOWN != 0).then_some(born);
        let inode = HostInode { device: words[8], ino: words[9], born };
        let ways = u64::from(high(words[5]));
        if ways >> 16 != 0 {
            return None;
        }
        Some(Self {
            node: words[0],
            kernel_node: words[1],
            handle: words[2],
            flags: OpenFlags::from_bits(low(words[3]))?,
            kind: Kind::from_number(u64::from(high(words[3])))?,
            through: Through::from_number(ways & 0xff)?,
            bytes: Bytes::from_number(ways >> 8)?,
            uid: low(words[4]),
            gid: high(words[4]),
            pid: low(words[5]),
            backing: low(words[6]),
            lookups: high(words[6]),
            number: words[7],
            inode: (known & INODE_KNOWN != 0).then_some(inode),
        })
    }
}
