//! Files of ours that are open for writing: made, written and cut without the kernel, by placeholders whose file nobody else uses.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64};

use polytropo_client::{At, Channel, Error, File, PATH_BYTES_MAX, Result, Time};

use super::link::label;
use super::placeholders::{self, Asked, Stood};
use super::process::{self, LINK};
use super::table::{AT_END, Entry, Held, Kind, NO_PLACE, Table};
use super::worth::{self, Event};
use super::{amid, directories, elsewhere, kept, names, standins};
use crate::hooks::Answer;
use crate::sys::{self, nr};
use crate::trace::{self, Counter, Why};

const O_ACCMODE: usize = 3;
const O_RDWR: usize = 2;
pub const O_EXCL: usize = 0o200;
pub const O_TRUNC: usize = 0o1000;
/// Flags of open(2) that are the service's business; those of placeholders beside them.
const FLAGS: usize = O_ACCMODE | sys::O_CREAT | O_EXCL | O_TRUNC | sys::O_APPEND | placeholders::O_NOFOLLOW;
/// What fcntl(2) tells of them.
const STATUS_FLAGS: usize = O_ACCMODE | sys::O_APPEND | placeholders::O_NONBLOCK | placeholders::O_NOFOLLOW;
const EBADF: isize = -9;
const EIO: isize = -5;
const EINVAL: isize = -22;
const EMFILE: isize = -24;
const RLIMIT_FSIZE: usize = 1;
const BYTES_MAX: usize = 0x7fff_f000;
/// What writev(2) puts together; more is the kernel's.
const GATHERED_BYTES_MAX: usize = 4096;

/// Opens in a row that the service left to the kernel; it is not asked any more after so many.
const REFUSED_MAX: u32 = 16;
static REFUSED: AtomicU32 = AtomicU32::new(0);
/// Files in a row that the kernel had to open after all before anything was written: as shells do, which hand them on. After some
/// of them many are opened by the kernel at once.
const WASTED_MAX: u32 = 3;
const SKIPPED: u32 = 64;
static WASTED: AtomicU32 = AtomicU32::new(0);

/// Limits on the size of files: each write beyond is a signal, which is the kernel's business.
const UNKNOWN: u32 = 0;
const NO_LIMIT: u32 = 1;
const LIMITED: u32 = 2;
static LIMIT: AtomicU32 = AtomicU32::new(UNKNOWN);
/// Whether modes do not bind this process. It has no placeholders after it changed its ids.
static OVERRIDES: AtomicU32 = AtomicU32::new(UNKNOWN);
const YES: u32 = 1;
const NO: u32 = 2;
/// One more than the process's umask; 0 while it is unknown.
static UMASK: AtomicU32 = AtomicU32::new(0);
/// Counts beginnings and ends of its changes.
static CHANGES_OF_UMASK: AtomicU64 = AtomicU64::new(0);

/// open(2) for writing; None if the kernel has to do it.
pub fn open(table: &Table, asked: Asked, mode: usize) -> Option<Answer> {
    let access = asked.flags & O_ACCMODE;
    let others = asked.flags & !FLAGS & !placeholders::FLAGS;
    // Where the next read begins that follows an append the kernel knows, whoever else appends.
    let reads_on = access == O_RDWR && asked.flags & sys::O_APPEND != 0;
    if reads_on || others != 0 || access == 0 || access == O_ACCMODE || names::has_ended() || !is_worth_it() {
        return None;
    }
    let path = names::read_path(asked.path)?;
    let Some(channel) = LINK.get().filter(|channel| channel.keeps_answers()) else {
        placeholders::count_open(path, asked.flags & (sys::O_CREAT | O_TRUNC) != 0);
        return None;
    };
    let mut buffer = None;
    let place = place(channel, asked.directory, path, &mut buffer)?;
    if has_limit() {
        return None;
    }
    let umask = if asked.flags & sys::O_CREAT == 0 { 0 } else { umask()? };
    if asked.flags & sys::O_CREAT != 0 && !may_open_again(access, mode & !(umask as usize)) {
        return None;
    }
    // Without room for one more descriptor the kernel neither makes nor cuts a file.
    let number = if asked.flags & (sys::O_CREAT | O_TRUNC) != 0 {
        Some(Number(standins::take_number(channel, asked.flags & sys::O_CLOEXEC != 0).ok()?))
    } else {
        None
    };
    // Who has it open for reading keeps it from being written without waiting.
    if let Some(Ok(word)) = channel.open_known(place.known.0, place.known.1, 0) {
        kept::give_up(word);
    }
    trace::count(Counter::Request);
    let (flags, mode) = ((asked.flags & FLAGS) as u32, mode as u32 & 0o7777);
    let opened = match place.parent {
        0 => channel.open(place.known.0, place.known.1, flags, mode, umask),
        parent => channel.open_in(parent, place.inside, flags, mode, umask),
    };
    let opened = match opened {
        Ok(opened) => opened,
        Err(error) => {
            match error {
                Error::Kernel => _ = REFUSED.fetch_add(1, Relaxed),
                Error::Gone => LINK.give_up(channel),
                Error::GoneAmid(amid) => {
                    LINK.give_up(channel);
                    // The lowest number is the kernel's to give.
                    drop(number);
                    return Some(Answer::Asked(amid::open(&asked, mode, umask, amid)));
                }
                // The kernel comes to the same.
                Error::Errno(_) => {}
            }
            return None;
        }
    };
    REFUSED.store(0, Relaxed);
    if elsewhere::is_locked(|| Some(opened.attributes.ino)) {
        let _ = channel.close(opened.file);
        drop(number);
        return Some(open_by_kernel(asked));
    }
    let stand_in = match (opened.made && number.is_some(), place.parent) {
        (false, _) => None,
        (true, 0) => standins::keep_path([path, b"", b""]),
        (true, _) => standins::keep_path([process::setting().mount(), b"/", place.inside]),
    };
    let named = match (stand_in, number) {
        (Some(_), Some(number)) => Ok(number.into_descriptor()),
        (_, number) => {
            drop(number);
            name(asked, opened.attributes.ino)
        }
    };
    let entry = named.ok().and_then(|named| table.entry(named));
    let (Ok(descriptor), Some(entry)) = (named, entry) else {
        let _ = channel.close(opened.file);
        stand_in.inspect(|index| standins::release(*index));
        return Some(named.map_or_else(Answer::Asked, |descriptor| {
            sys::close(descriptor as i32);
            open_by_kernel(asked)
        }));
    };
    let (file, flags) = (label(channel, opened.file), asked.flags & STATUS_FLAGS);
    placeholders::set(table, descriptor, entry, &Stood { file, place: NO_PLACE, flags, stand_in });
    Some(Answer::Asked(descriptor as isize))
}

/// Where a name is that is opened.
struct Place<'a> {
    /// As what is kept of it goes by.
    known: (At, &'a [u8]),
    /// The directory that is to hold it, if it was open, and the path that leads there from the mount's root; else 0.
    parent: u64,
    inside: &'a [u8],
}

fn place<'a>(
    channel: &Channel,
    directory: usize,
    path: &'a [u8],
    buffer: &'a mut Option<[u8; PATH_BYTES_MAX]>,
) -> Option<Place<'a>> {
    if path.first() == Some(&b'/') || directory as u32 == sys::AT_FDCWD as u32 {
        let known = names::place(channel, directory, path)?;
        return Some(Place { known, parent: 0, inside: b"" });
    }
    // As `tar -C` has it.
    let path = path.strip_prefix(b"./").unwrap_or(path);
    if path.contains(&b'/') || matches!(path, b"" | b"." | b"..") {
        return None;
    }
    let parent = directories::inode(channel, directory)?;
    // Filled here, since most opens do not need it.
    let buffer = buffer.insert([0; PATH_BYTES_MAX]);
    let bytes = channel.path_below(parent, path, buffer)?;
    Some(Place { known: (At::Inode(parent), path), parent, inside: &buffer[..bytes] })
}

/// A descriptor that was taken for its number; given back if nothing comes of it.
struct Number(usize);

impl Number {
    fn into_descriptor(self) -> usize {
        core::mem::ManuallyDrop::new(self).0
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        sys::close(self.0 as i32);
    }
}

/// A file that is made with a mode that forbids what it is open for (`cp` of a read-only file) could not be opened by the kernel later.
fn may_open_again(access: usize, mode: usize) -> bool {
    let rights = if access == O_RDWR { 0o600 } else { 0o200 };
    if mode & rights == rights {
        return true;
    }
    if OVERRIDES.load(Acquire) == UNKNOWN {
        // SAFETY: concerns no memory.
        let root = unsafe { sys::call(nr::GETEUID, [0; 6]) } == 0;
        OVERRIDES.store(if root { YES } else { NO }, Release);
    }
    OVERRIDES.load(Acquire) == YES
}

/// A descriptor that only names the file that the service has just opened, or made.
fn name(asked: Asked, inode: u64) -> core::result::Result<usize, isize> {
    let flags = sys::O_PATH | (asked.flags & (sys::O_CLOEXEC | placeholders::O_NOFOLLOW));
    // SAFETY: the program's own path.
    let mut named = unsafe { sys::call(nr::OPENAT, [asked.directory, asked.path, flags, 0, 0, 0]) };
    if named == EMFILE {
        kept::give_up_all();
        // SAFETY: as above.
        named = unsafe { sys::call(nr::OPENAT, [asked.directory, asked.path, flags, 0, 0, 0]) };
    }
    let descriptor = usize::try_from(named).map_err(|_| named)?;
    let same = sys::status(descriptor)
        .is_some_and(|seen| seen.device == process::setting().device() && seen.inode == inode);
    if same {
        return Ok(descriptor);
    }
    sys::close(descriptor as i32);
    match open_by_kernel(asked) {
        Answer::Asked(opened) => Err(opened),
        _ => Err(EIO),
    }
}

/// The file is there by now, and cut if it was to be.
fn open_by_kernel(asked: Asked) -> Answer {
    let flags = asked.flags & !(O_EXCL | O_TRUNC | sys::O_CREAT);
    // SAFETY: the program's own path.
    Answer::Asked(unsafe { sys::call(nr::OPENAT, [asked.directory, asked.path, flags, 0, 0, 0]) })
}

fn is_worth_it() -> bool {
    if REFUSED.load(Relaxed) >= REFUSED_MAX {
        return false;
    }
    let wasted = WASTED.load(Relaxed);
    if wasted < WASTED_MAX {
        return true;
    }
    WASTED.store(if wasted > WASTED_MAX + SKIPPED { 0 } else { wasted + 1 }, Relaxed);
    false
}

/// The kernel had to open a file that nobody wrote to.
pub fn was_wasted() {
    WASTED.fetch_add(1, Relaxed);
}

fn has_limit() -> bool {
    if LIMIT.load(Acquire) == UNKNOWN {
        let mut limits = [0u64; 2];
        let arguments = [0, RLIMIT_FSIZE, 0, limits.as_mut_ptr() as usize, 0, 0];
        // SAFETY: the kernel writes the two words.
        let done = unsafe { sys::call(nr::PRLIMIT64, arguments) };
        let none = done == 0 && limits[0] == u64::MAX;
        LIMIT.store(if none { NO_LIMIT } else { LIMITED }, Release);
    }
    LIMIT.load(Acquire) != NO_LIMIT
}

/// setrlimit(2), prlimit(2): with a limit on the size of files the kernel writes.
pub fn change_limit(table: &Table, number: usize, arguments: &[usize; 6]) -> Answer {
    let (resource, new) = match number {
        nr::SETRLIMIT => (arguments[0], arguments[1]),
        _ => (arguments[1], arguments[2]),
    };
    if resource != RLIMIT_FSIZE || new == 0 {
        return Answer::Pass(Why::NotOurs);
    }
    placeholders::upgrade_all(table, false);
    // SAFETY: the program's own call.
    let done = unsafe { sys::call(number, *arguments) };
    LIMIT.store(UNKNOWN, Release);
    Answer::Asked(done)
}

/// The process's umask.
pub fn umask() -> Option<u32> {
    let known = UMASK.load(Acquire);
    if let Some(umask) = known.checked_sub(1) {
        return Some(umask);
    }
    let changes = CHANGES_OF_UMASK.load(Acquire);
    let umask = sys::umask()?;
    // Who changes it meanwhile knows better.
    let _ = UMASK.compare_exchange(0, umask + 1, AcqRel, Relaxed);
    if CHANGES_OF_UMASK.load(Acquire) != changes {
        UMASK.store(0, Release);
        return None;
    }
    Some(umask)
}

/// umask(2).
pub fn change_umask(arguments: &[usize; 6]) -> Answer {
    let changes = CHANGES_OF_UMASK.fetch_add(1, AcqRel);
    // SAFETY: concerns no memory.
    let before = unsafe { sys::call(nr::UMASK, *arguments) };
    UMASK.store((arguments[0] as u32 & 0o777) + 1, Release);
    if CHANGES_OF_UMASK.fetch_add(1, AcqRel) != changes + 1 {
        // Another thread's change at the same time: the kernel knows which was the last.
        UMASK.store(0, Release);
    }
    Answer::Asked(before)
}

/// A placeholder that is open for writing, and its file.
#[inline]
fn writable(table: &Table, descriptor: usize) -> Option<(&Entry, File, &Channel)> {
    if !placeholders::any() {
        return None;
    }
    let entry = table.entry(descriptor)?;
    if placeholders::settled(entry) != Kind::Placeholder || entry.flags() & O_ACCMODE as u32 == 0 {
        return None;
    }
    let (channel, file) = LINK.of(entry.file()?)?;
    Some((entry, file, channel))
}

/// Whether it is a placeholder that cannot be read.
pub fn is_write_only(entry: &Entry) -> bool {
    entry.kind() == Kind::Placeholder && !matches!(entry.flags() & O_ACCMODE as u32, 0 | 2)
}

pub fn appends(entry: &Entry) -> bool {
    entry.flags() & sys::O_APPEND as u32 != 0
}

/// The answer to a write, cut or sync; the kernel's if it has to.
fn told((channel, descriptor, entry): (&Channel, usize, &Entry), result: Result<usize>) -> Answer {
    match result {
        Ok(done) => Answer::Done(done as isize),
        Err(Error::Errno(errno)) if entry.kind() == Kind::Placeholder => Answer::Done(-(errno as isize)),
        Err(error) => {
            if matches!(error, Error::Gone | Error::GoneAmid(_)) {
                LINK.give_up(channel);
            }
            if placeholders::upgrade(descriptor, entry) {
                Answer::Pass(Why::NotShared)
            } else {
                Answer::Done(placeholders::refusal())
            }
        }
    }
}

/// A write that the kernel does, while there is no channel; it counts for one where channels were asked for.
fn count_write(table: &Table, descriptor: usize) {
    if process::setting().is_patient() || LINK.get().is_some() || names::has_ended() {
        return;
    }
    let Some(entry) = table.entry(descriptor) else { return };
    // Where it is read, it is open for nothing else.
    if entry.kind() == Kind::Ours || entry.count_read() + 1 != worth::WRITES {
        return;
    }
    let setting = process::setting();
    let ours = |status: sys::Status| status.is_regular() && status.device == setting.device();
    if sys::status(descriptor).is_some_and(ours) && worth::count(Event::Written) {
        LINK.get_or_connect(|| setting.connect());
    }
}

fn write_at(
    channel: &Channel,
    entry: &Entry,
    file: File,
    from: (usize, usize),
    offset: u64,
) -> Result<usize> {
    if entry.count_read() == 0 {
        WASTED.store(0, Relaxed);
    }
    // SAFETY: the program's own bytes, as it would give them to the kernel.
    unsafe { channel.pwrite_raw(file, from.0 as *const u8, from.1.min(BYTES_MAX), offset) }
}

/// pwrite(2).
pub fn pwrite(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [descriptor, from, count, offset, ..] = *arguments;
    let Some((entry, file, channel)) = writable(table, descriptor) else {
        count_write(table, descriptor);
        return super::calls::about_descriptor(table, nr::PWRITE64, arguments);
    };
    if offset > isize::MAX as usize {
        return Answer::Done(EINVAL);
    }
    if count == 0 {
        return Answer::Done(0);
    }
    told((channel, descriptor, entry), write_at(channel, entry, file, (from, count), offset as u64))
}

/// write(2).
pub fn write(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [descriptor, from, count, ..] = *arguments;
    let Some((entry, file, channel)) = writable(table, descriptor) else {
        count_write(table, descriptor);
        return super::calls::about_descriptor(table, nr::WRITE, arguments);
    };
    if count == 0 {
        return Answer::Done(0);
    }
    let count = count.min(BYTES_MAX);
    if appends(entry) {
        let done = write_at(channel, entry, file, (from, count), 0);
        if done.is_ok()
            && let Some(held) = entry.held()
        {
            entry.advance(held, AT_END);
        }
        return told((channel, descriptor, entry), done);
    }
    let Some((held, offset)) = reserve(entry, count as u64) else {
        return if placeholders::upgrade(descriptor, entry) {
            entry.release(descriptor);
            Answer::Pass(Why::NotHeld)
        } else {
            Answer::Done(placeholders::refusal())
        };
    };
    let done = write_at(channel, entry, file, (from, count), offset);
    let written = *done.as_ref().unwrap_or(&0) as u64;
    if written < count as u64 {
        // If nobody has gone on from there yet.
        entry.advance(held, offset + written);
    }
    told((channel, descriptor, entry), done)
}

/// Moves the offset first, so that two threads write one after the other.
fn reserve(entry: &Entry, count: u64) -> Option<(Held, u64)> {
    for _ in 0..super::reading::ATTEMPTS_MAX {
        let held = entry.held()?;
        let offset = held.offset();
        if let Some(moved) = entry.advance(held, offset.checked_add(count)?) {
            return Some((moved, offset));
        }
        if offset + count >= AT_END {
            return None;
        }
    }
    None
}

/// writev(2) of little.
pub fn write_gathered(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [descriptor, list, count, ..] = *arguments;
    let pass = || super::calls::about_descriptor(table, nr::WRITEV, arguments);
    if writable(table, descriptor).is_none() || list == 0 || count > 64 {
        return pass();
    }
    let mut bytes = core::mem::MaybeUninit::<[u8; GATHERED_BYTES_MAX]>::uninit();
    let mut filled = 0;
    for at in 0..count {
        // SAFETY: the program's own list, of that many pairs.
        let [from, length] = unsafe { (list as *const [usize; 2]).add(at).read_unaligned() };
        if length > GATHERED_BYTES_MAX - filled {
            return pass();
        }
        // SAFETY: there is room, just checked; the bytes are the program's own.
        unsafe {
            core::ptr::copy_nonoverlapping(
                from as *const u8,
                bytes.as_mut_ptr().cast::<u8>().add(filled),
                length,
            );
        }
        filled += length;
    }
    // If it is passed on, then with the program's own arguments.
    write(table, &[descriptor, bytes.as_ptr() as usize, filled, 0, 0, 0])
}

/// ftruncate(2), fsync(2), fallocate(2), fchmod(2) and whatever else changes an open file, but for its bytes.
pub fn change(table: &Table, number: usize, arguments: &[usize; 6]) -> Answer {
    let [descriptor, size, ..] = *arguments;
    let pass = || super::calls::about_descriptor(table, number, arguments);
    let Some((entry, file, channel)) = writable(table, descriptor) else { return pass() };
    let it = At::File(file);
    let done = match number {
        nr::FTRUNCATE if size > isize::MAX as usize => return Answer::Done(EINVAL),
        nr::FTRUNCATE => channel.ftruncate(file, size as u64),
        nr::FALLOCATE if (arguments[2] as i64) < 0 || (arguments[3] as i64) <= 0 => {
            return Answer::Done(EINVAL);
        }
        nr::FALLOCATE => {
            channel.allocate(file, arguments[1] as u32, arguments[2] as u64, arguments[3] as u64)
        }
        nr::SYNC_FILE_RANGE => return sync_range(descriptor, entry, channel, file, arguments),
        // While it may still be opened by the kernel, should anything need that later.
        nr::FCHMOD if !may_open_again(entry.flags() as usize & O_ACCMODE, arguments[1]) => return pass(),
        nr::FCHMOD => channel.chmod(it, b"", arguments[1] as u32 & 0o7777, 0),
        nr::FCHOWN => channel.chown(it, b"", arguments[1] as u32, arguments[2] as u32, 0),
        // With a path, or with flags, it is about something else.
        nr::UTIMENSAT if arguments[1] == 0 && arguments[3] == 0 => {
            let [atime, mtime] = times(arguments[2]);
            channel.change_times(it, b"", atime, mtime, 0)
        }
        nr::FSYNC | nr::FDATASYNC => channel.fsync(file, number == nr::FDATASYNC),
        _ => return pass(),
    };
    told((channel, descriptor, entry), done.map(|()| 0))
}

/// sync_file_range(2), which promises little: what the kernel would begin to write is with the service already.
fn sync_range(
    descriptor: usize,
    entry: &Entry,
    channel: &Channel,
    file: File,
    arguments: &[usize; 6],
) -> Answer {
    const WRITE: usize = 2;
    const KNOWN: usize = 7;
    let [_, offset, bytes, flags, ..] = *arguments;
    let end = (offset as i64).checked_add(bytes as i64);
    if flags as u32 as usize & !KNOWN != 0 || (offset as i64) < 0 || end.is_none_or(|end| end < offset as i64)
    {
        return Answer::Done(EINVAL);
    }
    match flags & KNOWN & !WRITE {
        0 => Answer::Done(0),
        _ => told((channel, descriptor, entry), channel.fsync(file, true).map(|()| 0)),
    }
}

/// The program's two times; now without them.
fn times(address: usize) -> [Time; 2] {
    const NOW: Time = Time { seconds: 0, nanoseconds: 0x3fff_ffff };
    if address == 0 {
        return [NOW; 2];
    }
    // SAFETY: the program's own structure, of four words.
    let words = unsafe { (address as *const [i64; 4]).read_unaligned() };
    [[words[0], words[1]], [words[2], words[3]]].map(|[seconds, nanoseconds]| Time { seconds, nanoseconds })
}

/// A read of what is open for writing only.
pub const UNREADABLE: Answer = Answer::Done(EBADF);
