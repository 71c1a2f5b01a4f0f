//! Descriptors of ours that the kernel has not opened: made by open(2) of what is known, made real by whatever the kernel has to do.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicI32, AtomicU32};

use polytropo_client::{At, Attributes, Channel, Error, Opened};

use super::link::label;
use super::process::{self, LINK};
use super::table::{DESCRIPTORS_MAX, Entry, Kind, NO_PLACE, Table};
use super::worth::{self, Event};
use super::{elsewhere, kept, names, standins, status, writing};
use crate::hooks::Answer;
use crate::sys::{self, nr};
use crate::text::Text;
use crate::trace::{self, Counter};

const O_LARGEFILE: usize = 0o100_000;
const O_NOCTTY: usize = 0o400;
/// Means nothing for regular files.
pub const O_NONBLOCK: usize = 0o4000;
pub const O_NOFOLLOW: usize = 0o400_000;
/// Flags with which a placeholder is an open file like any other.
pub const FLAGS: usize = sys::O_CLOEXEC | O_LARGEFILE | O_NOCTTY | O_NONBLOCK;
/// The same, opened for reading.
const FLAGS_TO_READ: usize = FLAGS | O_NOFOLLOW;
const ENOENT: isize = -2;
const EACCES: isize = -13;
const ENOTDIR: isize = -20;
const ELOOP: isize = -40;
const ENOTTY: isize = -25;
const EMFILE: isize = -24;
const EINVAL: isize = -22;
const F_SET_RW_HINT: usize = 1036;
const F_GETFL: usize = 3;
pub const TCGETS: usize = 0x5401;
const AT_EMPTY_PATH: usize = 0x1000;
const AT_NO_AUTOMOUNT: usize = 0x800;
const F_GETFD: usize = 1;
const F_SETFD: usize = 2;
const FD_CLOEXEC: isize = 1;

/// Opens in a row that the service left to the kernel; it is not asked any more after so many.
const REFUSED_MAX: u32 = 64;
static REFUSED: AtomicU32 = AtomicU32::new(0);

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Whether there is any placeholder.
#[inline]
pub fn any() -> bool {
    COUNT.load(Acquire) != 0
}

/// In a forked child, which has none: they were made real before.
pub fn forget_in_child() {
    COUNT.store(0, Release);
    standins::forget_in_child();
    kept::forget_in_child();
}

/// What a placeholder stands for, and how.
pub struct Stood {
    pub file: u64,
    pub place: u32,
    pub flags: usize,
    pub stand_in: Option<u32>,
}

/// A descriptor was made just now, to stand for a file of the service.
pub fn set(table: &Table, descriptor: usize, entry: &Entry, stood: &Stood) {
    let _ = end(entry);
    // First: as soon as it is one another thread may upgrade it.
    COUNT.fetch_add(1, AcqRel);
    table.hold(descriptor);
    entry.set_placeholder(stood.file, stood.place, stood.flags as u32, stood.stand_in);
}

/// What is known of a descriptor that is about to end, or just has, counts no more. Tells what failed of writes to it.
pub fn end(entry: &Entry) -> Result<(), isize> {
    if !entry.try_clear() {
        // The number would be open again when the upgrade is done.
        wait(entry);
        entry.clear();
    }
    leave(entry)
}

/// Keeps others from upgrading a placeholder while the kernel puts something else in its place; `unlock` if it did not.
pub fn lock(entry: &Entry) -> bool {
    let generation = entry.generation();
    settled(entry) == Kind::Placeholder && entry.exchange_kind(generation, Kind::Placeholder, Kind::Upgrading)
}

/// The same, for where it is better to do without: a handler may have come in between whoever is at it.
pub fn lock_soon(entry: &Entry) -> bool {
    for _ in 0..WAITS_SHORT {
        if entry.kind() != Kind::Upgrading {
            break;
        }
        sys::nap(100_000);
    }
    let generation = entry.generation();
    entry.kind() == Kind::Placeholder && entry.exchange_kind(generation, Kind::Placeholder, Kind::Upgrading)
}

pub fn unlock(entry: &Entry) {
    entry.exchange_kind(entry.generation(), Kind::Upgrading, Kind::Placeholder);
}

/// fcntl(2) with F_SETFD. Whoever has the kernel open what a placeholder stands for takes these flags along.
pub fn set_flags(table: &Table, descriptor: usize, flags: usize) -> Answer {
    let arguments = [descriptor, F_SETFD, flags, 0, 0, 0];
    let Some(entry) = table.entry(descriptor).filter(|entry| any() && entry.kind() != Kind::Own) else {
        return super::calls::about_descriptor(table, nr::FCNTL, &arguments);
    };
    let locked = lock(entry);
    // SAFETY: concerns no memory.
    let done = unsafe { sys::call(nr::FCNTL, arguments) };
    if locked {
        unlock(entry);
    }
    Answer::Asked(done)
}

/// Something else is in the place of what was locked.
pub fn end_locked(entry: &Entry) -> Result<(), isize> {
    entry.clear();
    leave(entry)
}

/// Gives back what the service has open for a descriptor.
fn leave(entry: &Entry) -> Result<(), isize> {
    if let Some(index) = entry.take_stand_in() {
        standins::release(index);
    }
    // In this order: who finds a file and no place closes it.
    let file = entry.take_file();
    match entry.take_place() {
        Some(NO_PLACE) => {
            COUNT.fetch_sub(1, AcqRel);
            close_shared(file)
        }
        Some(index) => {
            COUNT.fetch_sub(1, AcqRel);
            kept::release(index);
            Ok(())
        }
        None => close_shared(file),
    }
}

pub fn close_shared(file: u64) -> Result<(), isize> {
    if file == 0 {
        return Ok(());
    }
    match LINK.of(file).map(|(channel, file)| channel.close(file)) {
        Some(Err(Error::Errno(errno))) => Err(-(errno as isize)),
        _ => Ok(()),
    }
}

/// A name that is opened.
#[derive(Clone, Copy)]
pub struct Asked {
    pub directory: usize,
    /// The program's own path.
    pub path: usize,
    pub flags: usize,
}

/// open(2) for reading; None if the kernel has to do it.
#[inline]
pub fn open(table: &Table, asked: Asked) -> Option<Answer> {
    if asked.flags & !FLAGS_TO_READ != 0 || names::has_ended() {
        return None;
    }
    let path = names::read_path(asked.path)?;
    let Some(channel) = LINK.get() else {
        count_open(path, false);
        return None;
    };
    let (at, rest) = names::place_open(channel, asked.directory, path)?;
    let flags = (asked.flags & O_NOFOLLOW) as u32;
    let word = match channel.open_known(at, rest, flags) {
        Some(known) => known.ok()?,
        None => 0,
    };
    if word != 0
        && let Some(used) = kept::enter(word)
    {
        let close_on_exec = asked.flags & sys::O_CLOEXEC != 0;
        let copied = kept::copy(&used, close_on_exec).unwrap_or_else(|| {
            let named = name(asked, used.file);
            named.inspect(|named| kept::keep_descriptor(&used, *named))
        });
        return place(table, used, copied, asked.flags);
    }
    let (used, named) = open_and_keep(channel, asked, at, rest)?;
    place(table, used, Ok(named), asked.flags)
}

/// Makes a descriptor that names the file the placeholder of its use; an errno of which is no answer yet.
fn place(table: &Table, used: kept::Use, descriptor: Result<usize, isize>, flags: usize) -> Option<Answer> {
    let descriptor = match descriptor {
        Ok(descriptor) => descriptor,
        Err(errno) => {
            kept::release(used.index);
            if errno == EMFILE {
                // Some of the numbers that are taken are ours.
                kept::give_up_all();
            }
            return None;
        }
    };
    let locked = elsewhere::is_locked(|| inode_of(used.file));
    let Some(entry) = table.entry(descriptor).filter(|_| descriptor < DESCRIPTORS_MAX && !locked) else {
        sys::close(descriptor as i32);
        kept::release(used.index);
        return None;
    };
    let flags = flags & (O_NONBLOCK | O_NOFOLLOW);
    set(table, descriptor, entry, &Stood { file: used.file, place: used.index, flags, stand_in: None });
    Some(Answer::Asked(descriptor as isize))
}

/// Programs that open but few files do without a channel.
#[cold]
pub fn count_open(path: &[u8], filled: bool) {
    if !names::maybe_ours(path) {
        return;
    }
    let again = names::is_known(path, names::OPENED);
    let pays = worth::count(Event::Open { again }) | (filled && worth::count(Event::Filled));
    if pays {
        LINK.get_or_connect(|| process::setting().connect());
    }
}

/// Opens a file at the service, names it to the kernel as well, and keeps the first, since most are opened once. The use of it and the
/// name are the caller's.
#[cold]
fn open_and_keep(channel: &Channel, asked: Asked, key: At, rest: &[u8]) -> Option<(kept::Use, usize)> {
    if !channel.keeps_answers() || REFUSED.load(Relaxed) >= REFUSED_MAX {
        return None;
    }
    let flags = (asked.flags & O_NOFOLLOW) as u32;
    let shared = names::open_shared(channel, asked.directory, asked.path, flags);
    let opened = match shared {
        Some(opened) => opened,
        None => ask_to_open(channel, (key, rest), flags)?,
    };
    let (file, found) = (opened.file, &opened.attributes);
    let word = if found.mode & 0o170_000 == 0o100_000 {
        kept::keep(label(channel, file), found.size_bytes)
    } else {
        channel.keep_open(key, rest, flags, file, None);
        None
    };
    let Some(word) = word else {
        let _ = channel.close(file);
        return None;
    };
    let named = name(asked, label(channel, file)).ok();
    // If it has changed meanwhile, or answers cannot be kept, perhaps the kernel's walk came to something else.
    if let Some(named) = named
        && channel.keep_open(key, rest, flags, file, Some(word))
    {
        REFUSED.store(0, Relaxed);
        return Some((kept::Use { index: kept::index_of(word), file: label(channel, file) }, named));
    }
    REFUSED.fetch_add(1, Relaxed);
    named.inspect(|named| sys::close(*named as i32));
    kept::discard(word);
    None
}

#[cold]
fn ask_to_open(channel: &Channel, place: (At, &[u8]), flags: u32) -> Option<Opened> {
    let mut buffer = [0; polytropo_client::PATH_BYTES_MAX];
    let (at, path) = names::place_asked(channel, place, &mut buffer)?;
    trace::count(Counter::Request);
    match channel.open_to_read(at, path, flags) {
        Ok(opened) => return Some(opened),
        Err(Error::Kernel) => _ = REFUSED.fetch_add(1, Relaxed),
        Err(Error::Gone | Error::GoneAmid(_)) => LINK.give_up(channel),
        Err(Error::Errno(_)) => {}
    }
    None
}

/// Has the kernel name a file that the service knows, and makes sure that it is the same; 0 in place of an errno if it is not.
#[cold]
fn name(asked: Asked, file: u64) -> Result<usize, isize> {
    let flags = sys::O_PATH | asked.flags & (sys::O_CLOEXEC | O_NOFOLLOW);
    // SAFETY: the program's own path.
    let named = unsafe { sys::call(nr::OPENAT, [asked.directory, asked.path, flags, 0, 0, 0]) };
    let named = usize::try_from(named).map_err(|_| named)?;
    let inode = inode_of(file);
    let same = sys::status(named)
        .is_some_and(|seen| seen.device == process::setting().device() && Some(seen.inode) == inode);
    if same {
        return Ok(named);
    }
    sys::close(named as i32);
    Err(0)
}

/// Attempts, of 100 us each, to see another thread's upgrade through. A handler that came in between it does without.
const WAITS_MAX: u32 = 10_000;
const WAITS_SHORT: u32 = 20;

/// What a descriptor is, once nobody is at it.
#[inline]
pub fn settled(entry: &Entry) -> Kind {
    let kind = entry.kind();
    if kind == Kind::Upgrading { wait(entry) } else { kind }
}

#[cold]
fn wait(entry: &Entry) -> Kind {
    for _ in 0..WAITS_MAX {
        let kind = entry.kind();
        if kind != Kind::Upgrading {
            return kind;
        }
        sys::nap(100_000);
    }
    entry.kind()
}

/// Has the kernel open what a placeholder stands for, in its place. True if it is an open file of the kernel's afterwards.
pub fn upgrade(descriptor: usize, entry: &Entry) -> bool {
    if settled(entry) != Kind::Placeholder {
        return true;
    }
    let generation = entry.generation();
    if !entry.exchange_kind(generation, Kind::Placeholder, Kind::Upgrading) {
        return settled(entry) != Kind::Placeholder;
    }
    if let Err(errno) = standins::replace(descriptor, entry) {
        refuse(errno);
        entry.exchange_kind(generation, Kind::Upgrading, Kind::Placeholder);
        return false;
    }
    let writes = entry.flags() & O_ACCMODE != 0;
    if writes && !may_open_for_real(descriptor, entry.flags() as usize) {
        // Before the service's file is given up, which goes on being written.
        entry.exchange_kind(generation, Kind::Upgrading, Kind::Placeholder);
        return false;
    }
    // What was written without waiting comes first, and whoever writes through the kernel is to be the only one.
    let settled = if writes { settle(entry) } else { true };
    let opened = open_for_real(descriptor, entry.flags() as usize & !O_NOFOLLOW);
    let now = match (opened, writes) {
        (false, _) => Kind::Placeholder,
        // The offset is held as before; the kernel's is the file's beginning.
        (true, false) => Kind::Ours,
        (true, true) => Kind::Foreign,
    };
    if opened {
        let _ = leave(entry);
    }
    if now == Kind::Foreign {
        entry.release_opened(descriptor);
    }
    entry.exchange_kind(generation, Kind::Upgrading, now);
    opened && settled
}

/// Closes what the service has open for writing. False if something that was written before could not be.
fn settle(entry: &Entry) -> bool {
    if !entry.was_read() {
        writing::was_wasted();
    }
    let closed = close_shared(entry.take_file());
    if let Some(channel) = LINK.get() {
        // Closing does not wait.
        let _ = channel.ping();
    }
    closed.is_ok()
}

const O_ACCMODE: u32 = 3;
/// The errno with which the kernel refused last to open what a placeholder stands for, or 0.
static REFUSAL: AtomicI32 = AtomicI32::new(0);

/// Why the kernel cannot be shown what a placeholder stands for.
pub fn refuse(errno: isize) {
    REFUSAL.store(errno as i32, Relaxed);
}

/// The answer to a call that needs an upgrade that failed: EACCES after rights were lost, as a network filesystem says, or EMFILE.
pub fn refusal() -> isize {
    match REFUSAL.load(Relaxed) as isize {
        0 => EIO,
        errno => errno,
    }
}

/// Whether this process still has the rights to open what a placeholder stands for.
fn may_open_for_real(descriptor: usize, flags: usize) -> bool {
    const AT_EACCESS: usize = 0x200;
    let wanted = match flags as u32 & O_ACCMODE {
        0 => 4,
        1 => 2,
        _ => 6,
    };
    let arguments = [descriptor, c"".as_ptr() as usize, wanted, AT_EMPTY_PATH | AT_EACCESS, 0, 0];
    // SAFETY: the kernel reads an empty path.
    let refused = unsafe { sys::call(nr::FACCESSAT2, arguments) };
    if refused == EACCES {
        REFUSAL.store(EACCES as i32, Relaxed);
    }
    // Before Linux 5.8 there is no such call.
    refused != EACCES
}

#[cold]
fn open_for_real(descriptor: usize, flags: usize) -> bool {
    let mut path = Text::<64>::default();
    path.push(b"/proc/self/fd/").number(descriptor as u64).push(b"\0");
    let mut opened = sys::open(path.bytes(), flags, 0);
    if opened == EMFILE {
        kept::give_up_all();
        opened = sys::open(path.bytes(), flags, 0);
    }
    if opened < 0 {
        REFUSAL.store(opened as i32, Relaxed);
        return false;
    }
    // SAFETY: concerns no memory.
    let flags = unsafe { sys::call(nr::FCNTL, [descriptor, F_GETFD, 0, 0, 0, 0]) };
    let how = if flags & FD_CLOEXEC != 0 { sys::O_CLOEXEC } else { 0 };
    // SAFETY: as above.
    let replaced = unsafe { sys::call(nr::DUP3, [opened as usize, descriptor, how, 0, 0, 0]) };
    sys::close(opened as i32);
    replaced >= 0
}

/// Has the kernel open all of them; with `inherited_only` those that outlive exec.
pub fn upgrade_all(table: &Table, inherited_only: bool) {
    if !any() {
        return;
    }
    for (descriptor, entry) in table.known() {
        if settled(entry) != Kind::Placeholder {
            continue;
        }
        // SAFETY: concerns no memory.
        let inherited = !inherited_only
            || unsafe { sys::call(nr::FCNTL, [descriptor, F_GETFD, 0, 0, 0, 0]) } & FD_CLOEXEC == 0;
        if inherited && !upgrade(descriptor, entry) && inherited_only && entry.stand_in().is_some() {
            // Better none than one that is something else.
            // SAFETY: concerns no memory.
            unsafe { sys::call(nr::FCNTL, [descriptor, F_SETFD, FD_CLOEXEC as usize, 0, 0, 0]) };
        }
    }
}

/// What can be answered about a placeholder as it is; `None`: the kernel can, or it is none.
#[inline]
pub fn answer(table: &Table, number: usize, arguments: &[usize; 6]) -> Option<Answer> {
    if !any() {
        return None;
    }
    let entry = table.entry(arguments[0])?;
    if settled(entry) != Kind::Placeholder {
        return None;
    }
    match number {
        nr::FSTAT => status(entry, arguments[1]),
        nr::NEWFSTATAT if arguments[3] & !AT_NO_AUTOMOUNT == AT_EMPTY_PATH && is_empty(arguments[1]) => {
            status(entry, arguments[2])
        }
        nr::FCNTL if arguments[1] == F_GETFL => {
            Some(Answer::Done(O_LARGEFILE as isize | entry.flags() as isize))
        }
        // A hint that many kernels do not know.
        nr::FCNTL if arguments[1] == F_SET_RW_HINT => Some(Answer::Done(EINVAL)),
        nr::IOCTL if arguments[1] == TCGETS => Some(Answer::Done(ENOTTY)),
        nr::FADVISE64 => Some(Answer::Done(0)),
        nr::FGETXATTR => by_path(table, nr::GETXATTR, arguments),
        nr::FSETXATTR => by_path(table, nr::SETXATTR, arguments),
        nr::FLISTXATTR => by_path(table, nr::LISTXATTR, arguments),
        nr::FREMOVEXATTR => by_path(table, nr::REMOVEXATTR, arguments),
        _ => None,
    }
}

/// Asks the kernel about a placeholder's extended attributes by the path that leads through the descriptor, as `number` does, which takes no open file. `None`: that way
/// may be closed (no /proc, a process that may not be looked into).
fn by_path(table: &Table, number: usize, arguments: &[usize; 6]) -> Option<Answer> {
    const NO_WAY: [isize; 4] = [ENOENT, EACCES, ENOTDIR, ELOOP];
    let [descriptor, others @ ..] = *arguments;
    if !standins::name_one(table, descriptor) {
        return Some(Answer::Done(refusal()));
    }
    let mut path = Text::<64>::default();
    path.push(b"/proc/self/fd/").number(descriptor as u32 as u64).push(b"\0");
    let [a, b, c, d, e] = others;
    // SAFETY: the program's own pointers, and a path that outlives the call.
    let done = unsafe { sys::call(number, [path.bytes().as_ptr() as usize, a, b, c, d, e]) };
    (!NO_WAY.contains(&done)).then_some(Answer::Asked(done))
}

fn is_empty(path: usize) -> bool {
    // SAFETY: the program's own path; null is the kernel's business.
    path != 0 && unsafe { (path as *const u8).read_volatile() } == 0
}

/// The inode of a placeholder's file.
pub fn inode(entry: &Entry) -> Option<u64> {
    inode_of(entry.file()?)
}

/// The inode of a file that is open at the service.
fn inode_of(number: u64) -> Option<u64> {
    let (channel, file) = LINK.of(number)?;
    channel.inode_of(file)
}

/// What a placeholder's file is like, if the service or what is kept tells.
pub fn attributes(entry: &Entry) -> Option<Attributes> {
    let (channel, file) = LINK.of(entry.file()?)?;
    if entry.flags() & O_ACCMODE != 0 {
        // The kernel does not know yet what was written.
        return channel.fstat(file).ok();
    }
    channel.fstat_known(file)
}

/// fstat(2). What may have changed the kernel tells, of a placeholder, too.
fn status(entry: &Entry, to: usize) -> Option<Answer> {
    if to == 0 {
        return None;
    }
    let found = attributes(entry)?;
    status::put(&found, to);
    Some(Answer::Done(0))
}

/// Makes real what a call names that the kernel has to do. The answer if that cannot be.
pub fn make_real(table: &Table, number: usize, arguments: &[usize; 6]) -> Option<Answer> {
    /// Served by a descriptor that only names a file.
    const CONTENT: [usize; 6] =
        [nr::FSTAT, nr::NEWFSTATAT, nr::STATX, nr::FSTATFS, nr::READLINKAT, nr::FACCESSAT];
    if !any() {
        return None;
    }
    if CONTENT.contains(&number) {
        return (!standins::name_one(table, arguments[0])).then(|| Answer::Done(refusal()));
    }
    match number {
        nr::POLL | nr::PPOLL => return polled(table, arguments),
        nr::SELECT | nr::PSELECT6 => {
            upgrade_all(table, false);
            return None;
        }
        nr::FCNTL if matches!(arguments[1], 1 | 2) => return None,
        _ => {}
    }
    let named = crate::table::DESCRIPTORS.get(number).copied().unwrap_or(0);
    for (at, descriptor) in arguments.iter().enumerate() {
        if named >> at & 1 == 1
            && let Some(entry) = table.entry(*descriptor)
            && !upgrade(*descriptor, entry)
        {
            return Some(Answer::Done(refusal()));
        }
    }
    None
}

const EIO: isize = -5;

/// poll(2): readiness is the kernel's.
fn polled(table: &Table, arguments: &[usize; 6]) -> Option<Answer> {
    let [list, count, ..] = *arguments;
    if list == 0 {
        return None;
    }
    for at in 0..count.min(DESCRIPTORS_MAX) {
        // SAFETY: the program's own list, of that many pairs of words.
        let descriptor = unsafe { (list as *const u64).add(at).read_unaligned() } as u32 as usize;
        if let Some(entry) = table.entry(descriptor) {
            upgrade(descriptor, entry);
        }
    }
    None
}
