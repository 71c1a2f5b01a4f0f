//! The memory that one process and its service share: a header, a queue of slot numbers, slots, and an area of bytes for each.
//!
//! A slot goes round: the program owns it (`FREE`), writes a request, sets `POSTED`, puts its number into the queue; the service
//! copies the request, works, writes the reply, sets `DONE` and wakes whoever waits; the program copies the reply and
//! sets `FREE`. The service looks at no slot whose number did not come through the queue, and believes nothing of what
//! stands there.

use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::copies::{Copied, PlanWords};
use crate::message::{REPLY_WORDS, REQUEST_WORDS};

pub const MAGIC: u64 = u64::from_le_bytes(*b"POLYCHAN");

/// Requests that one process may have under way.
pub const SLOTS: usize = 32;
/// Bytes of one slot's area: what one request carries at the most.
pub const AREA_BYTES: usize = 128 << 10;

pub const QUEUE_AT: usize = 4096;
pub const QUEUE_BYTES: usize = 12 << 10;
/// Items that the queue holds; more than there are slots, so that an honest program never finds it full.
pub const QUEUE_CAPACITY: usize = 64;
pub const SLOTS_AT: usize = QUEUE_AT + QUEUE_BYTES;
pub const AREAS_AT: usize = SLOTS_AT + SLOTS * size_of::<Slot>();
/// Posted writes: [`crate::posts`].
pub const POSTS_PART_AT: usize = AREAS_AT + SLOTS * AREA_BYTES;
pub const TOTAL_BYTES: usize = POSTS_PART_AT + crate::posts::PART_BYTES;

/// Begins the memory.
#[repr(C, align(128))]
pub struct Header {
    pub magic: AtomicU64,
    pub version: AtomicU32,
    /// Not 0: the service has given the channel up, and no request will be answered.
    pub ended: AtomicU32,
    pub service: ServiceLine,
    pub client: ClientLine,
    /// Written by the service before the welcome.
    pub plan: PlanLines,
    /// Counted by the program: what it copied.
    pub copied: CopiedLines,
    pub told: Told,
}

#[repr(C, align(128))]
pub struct PlanLines(pub PlanWords);

#[repr(C, align(128))]
pub struct CopiedLines(pub Copied);

/// Written by the service.
#[repr(C, align(128))]
pub struct ServiceLine {
    /// The CPU, plus one, of the thread that looks for requests; 0 while none does and the bell must be rung.
    pub cpu: AtomicU32,
}

/// Written by the program.
#[repr(C, align(128))]
pub struct ClientLine {
    /// The CPU, plus one, of the thread that asked last.
    pub cpu: AtomicU32,
}

/// What becomes of a program's calls, by the names that statistics show.
pub const TOLD: [&str; 11] = [
    "in the process",
    "by request",
    "not ours",
    "end of process",
    "not shared",
    "offset not held",
    "shares files",
    "unseen",
    "asked",
    "path not known",
    "changes its reach",
];

/// Written by the program now and then, for statistics alone: how many of each of [`TOLD`].
#[repr(C, align(128))]
pub struct Told {
    pub counts: [AtomicU64; TOLD.len()],
}

pub mod state {
    /// The program's own.
    pub const FREE: u32 = 0;
    /// Asked, and nobody sleeps until the answer comes.
    pub const POSTED: u32 = 1;
    /// Asked, and somebody sleeps on the state word.
    pub const AWAITED: u32 = 2;
    pub const DONE: u32 = 3;
}

/// How far a request came that must not be done twice, for the program whose service dies before it answers.
pub mod progress {
    /// Nothing was done, or nothing is told of such requests.
    pub const NONE: u32 = 0;
    /// It is being done, after all was looked at that could forbid it; the reply's first word is when that was, in nanoseconds since 1970.
    pub const BEGUN: u32 = 1;
    /// It is done, and the reply's words are there.
    pub const DONE: u32 = 2;
    /// A change of names is done; the reply's first word is the inode of what was made, if something was.
    pub const CHANGED: u32 = 3;
}

/// One request and its reply.
#[repr(C, align(128))]
pub struct Slot {
    /// One of [`state`]; a futex.
    pub state: AtomicU32,
    pub operation: AtomicU32,
    pub request: [AtomicU64; REQUEST_WORDS],
    /// 0, or an error number, or one of [`crate::message::outcome`].
    pub outcome: AtomicU32,
    /// One of [`progress`].
    pub progress: AtomicU32,
    pub reply: [AtomicU64; REPLY_WORDS],
}

const _: () = assert!(size_of::<Header>() <= QUEUE_AT && size_of::<Slot>() == 256);
const _: () = assert!(AREAS_AT % 4096 == 0 && POSTS_PART_AT % 4096 == 0 && TOTAL_BYTES % 4096 == 0);

/// Where a slot's bytes begin.
pub const fn area_at(slot: usize) -> usize {
    AREAS_AT + slot * AREA_BYTES
}
