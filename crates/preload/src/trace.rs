//! Counters of what became of calls, and their report at exit (`POLYTROPO_TRACE=1`).

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use polytropo_client::TOLD;

use crate::operations;
use crate::scan::Summary;
use crate::sys;
use crate::text::Text;

/// Why a call went to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Why {
    /// It names nothing of ours.
    NotOurs,
    EndOfProcess,
    /// Not opened at the service, or not to be read there now.
    NotShared,
    /// Its offset is the kernel's.
    NotHeld,
    /// Others will share the open files.
    Shares,
    /// What comes cannot be seen from here.
    Unseen,
    /// Made here on behalf of the program, to learn its result.
    Asked,
    /// A path that was not asked for before, or about which only the kernel may answer.
    Unknown,
    /// What may be reached, or by whom, changes.
    Reach,
}

const WHYS: [(Why, &[u8]); 9] = [
    (Why::NotOurs, b"not ours"),
    (Why::EndOfProcess, b"end of process"),
    (Why::NotShared, b"not shared"),
    (Why::NotHeld, b"offset not held"),
    (Why::Shares, b"shares files"),
    (Why::Unseen, b"unseen"),
    (Why::Asked, b"asked"),
    (Why::Unknown, b"path not known"),
    (Why::Reach, b"changes its reach"),
];

#[derive(Clone, Copy, Debug)]
pub enum Counter {
    /// Answered in the process.
    Process,
    /// Answered by a request to the service.
    Request,
    Kernel(Why),
}

/// Why nothing was redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Aside {
    NoProc = 1,
    Secure,
    Sanitizer,
    ShadowStack,
    Threads,
    NoLibrary,
    AlreadyRewritten,
    NoRoom,
    NotWritable,
    TurnedOff,
    NoService,
    OwnCalls,
}

const ASIDES: [(Aside, &[u8]); 12] = [
    (Aside::NoProc, b"/proc cannot be read"),
    (Aside::Secure, b"the program runs with rights that its caller does not have"),
    (Aside::Sanitizer, b"a sanitizer, valgrind or rr is at work"),
    (Aside::ShadowStack, b"shadow stacks are in use"),
    (Aside::Threads, b"threads run already"),
    (Aside::NoLibrary, b"no C library that we know"),
    (Aside::AlreadyRewritten, b"the C library is rewritten already"),
    (Aside::NoRoom, b"no room for trampolines near the C library"),
    (Aside::NotWritable, b"the C library's code cannot be written"),
    (Aside::TurnedOff, b"POLYTROPO_PRELOAD=off"),
    (Aside::NoService, b"no service to go to"),
    (Aside::OwnCalls, b"a library makes system calls itself (liburing)"),
];

const WHY_COUNT: usize = WHYS.len();
const _: () = assert!(WHY_COUNT + 2 == TOLD.len(), "a reason has no name in the channel's statistics");
const COUNTS_PER_TELLING: u64 = 256;
/// Closing and replacing descriptors between fork and exec.
const COUNTS_OF_CHILD: u64 = 10;
static ENABLED: AtomicBool = AtomicBool::new(false);
static PROCESS: AtomicU64 = AtomicU64::new(0);
static REQUEST: AtomicU64 = AtomicU64::new(0);
static KERNEL: [AtomicU64; WHY_COUNT] = [const { AtomicU64::new(0) }; WHY_COUNT];
static SITES: AtomicU32 = AtomicU32::new(0);
static INSTRUCTIONS: AtomicU32 = AtomicU32::new(0);
static PASSED: AtomicU32 = AtomicU32::new(0);
static LEFT_ALONE: AtomicU32 = AtomicU32::new(0);
static START_NS: AtomicU64 = AtomicU64::new(0);

const FILE_BYTES: usize = 512;
static FILE_SET: AtomicBool = AtomicBool::new(false);
static FILE: [core::sync::atomic::AtomicU8; FILE_BYTES] =
    [const { core::sync::atomic::AtomicU8::new(0) }; FILE_BYTES];

/// Turns the report on; `file` is where it goes, standard error without.
pub fn enable(file: Option<&[u8]>) {
    if let Some(file) = file.filter(|file| !file.is_empty() && file.len() < FILE_BYTES) {
        for (place, byte) in FILE.iter().zip(file) {
            place.store(*byte, Ordering::Relaxed);
        }
        FILE_SET.store(true, Ordering::Relaxed);
    }
    ENABLED.store(true, Ordering::Relaxed);
}

pub fn enabled() -> bool {
    ENABLED.load(Ordering::Relaxed)
}

/// True now and then: time to tell the service.
#[inline]
pub fn count(counter: Counter) -> bool {
    let counter = match counter {
        Counter::Process => &PROCESS,
        Counter::Request => &REQUEST,
        Counter::Kernel(why) => &KERNEL[why as usize],
    };
    let count = counter.load(Ordering::Relaxed);
    if enabled() {
        counter.fetch_add(1, Ordering::Relaxed);
    } else {
        // Several times cheaper. Of two threads at once one may not be counted.
        counter.store(count + 1, Ordering::Relaxed);
    }
    count % COUNTS_PER_TELLING == COUNTS_PER_TELLING - 1
}

/// What was counted, in the order of the channel's `TOLD`.
pub fn counts() -> [u64; TOLD.len()] {
    let mut counts = [0; TOLD.len()];
    for (place, counter) in counts.iter_mut().zip([&PROCESS, &REQUEST].into_iter().chain(&KERNEL)) {
        *place = counter.load(Ordering::Relaxed);
    }
    counts
}

/// The process is about to become another program, and its counters with it.
pub fn report_before_exec() {
    let [process, request, kernel @ ..] = counts();
    // Of a child that was made only to become another program there is nothing to tell.
    if process + request > 0 || kernel.iter().sum::<u64>() > COUNTS_OF_CHILD {
        report();
    }
}

/// Files that the service would not read for us any more, and the last error number of those (0: the kernel has the file).
static REFUSALS: AtomicU32 = AtomicU32::new(0);
static LAST_ERRNO: AtomicU32 = AtomicU32::new(0);

/// A file goes back to the kernel.
pub fn note_refusal(errno: i32) {
    REFUSALS.fetch_add(1, Ordering::Relaxed);
    LAST_ERRNO.store(errno.unsigned_abs(), Ordering::Relaxed);
}

/// A child counts for itself.
pub fn reset() {
    for counter in KERNEL.iter().chain([&PROCESS, &REQUEST]) {
        counter.store(0, Ordering::Relaxed);
    }
}

/// Notes what was found in one library.
pub fn found(summary: &Summary) {
    INSTRUCTIONS.fetch_add(summary.instructions, Ordering::Relaxed);
    SITES.fetch_add(summary.sites, Ordering::Relaxed);
    PASSED.fetch_add(summary.passed, Ordering::Relaxed);
    LEFT_ALONE.fetch_add(summary.no_room + summary.unsure, Ordering::Relaxed);
}

pub fn started(duration_ns: u64) {
    START_NS.store(duration_ns, Ordering::Relaxed);
}

/// Says why nothing was redirected, if anybody asked.
pub fn step_aside(why: Aside) {
    if !enabled() {
        return;
    }
    let reason = ASIDES.iter().find(|(aside, _)| *aside == why).map_or(&b"unknown"[..], |(_, text)| text);
    let mut text = Text::<256>::default();
    text.push(b"polytropo: process ")
        .number(sys::process().into())
        .push(b" stepped aside: ")
        .push(reason)
        .push(b"\n");
    write(text.bytes());
}

/// Prints the counters, if anybody asked.
pub fn report() {
    if !enabled() {
        return;
    }
    let mut text = Text::<2048>::default();
    text.push(b"polytropo: process ").number(sys::process().into());
    text.push(b": sites ").number(u64::from(SITES.load(Ordering::Relaxed)));
    text.push(b" of ").number(u64::from(INSTRUCTIONS.load(Ordering::Relaxed)));
    text.push(b", never ours ").number(u64::from(PASSED.load(Ordering::Relaxed)));
    text.push(b", left alone ").number(u64::from(LEFT_ALONE.load(Ordering::Relaxed)));
    text.push(b"; start ").number(START_NS.load(Ordering::Relaxed) / 1000).push(b" us");
    text.push(b"; answered in the process ").number(PROCESS.load(Ordering::Relaxed));
    text.push(b", by request ").number(REQUEST.load(Ordering::Relaxed));
    text.push(b", by the kernel ");
    text.number(KERNEL.iter().map(|count| count.load(Ordering::Relaxed)).sum());
    let mut separator = &b" ("[..];
    for (why, name) in &WHYS {
        let count = KERNEL[*why as usize].load(Ordering::Relaxed);
        if count > 0 {
            text.push(separator).push(name).push(b" ").number(count);
            separator = b", ";
        }
    }
    text.push(if separator == b", " { b")" } else { b"" });
    let (requests, rings) = operations::asked();
    text.push(b"; requests ").number(requests).push(b", rings ").number(rings);
    let refusals = REFUSALS.load(Ordering::Relaxed);
    if refusals > 0 {
        text.push(b"; given back ").number(refusals.into());
        text.push(b" files, last for error ").number(LAST_ERRNO.load(Ordering::Relaxed).into());
    }
    text.push(b"\n");
    write(text.bytes());
}

fn write(text: &[u8]) {
    if !FILE_SET.load(Ordering::Relaxed) {
        sys::write_all(2, text);
        return;
    }
    let mut path = [0; FILE_BYTES];
    for (byte, place) in path.iter_mut().zip(&FILE) {
        *byte = place.load(Ordering::Relaxed);
    }
    let descriptor = sys::open(&path, sys::O_WRONLY | sys::O_CREAT | sys::O_APPEND, 0o644);
    if descriptor >= 0 {
        sys::write_all(descriptor as i32, text);
        sys::close(descriptor as i32);
    }
}
