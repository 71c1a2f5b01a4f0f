//! Open directories: their names come from the service's listing, and the descriptor is a placeholder.
//!
//! A placeholder is an `O_PATH` open of the same inode, which the kernel makes without asking anybody. As a place to begin paths from, for fchdir(2)
//! and for its number it is as good as the real one. Whatever else is done with it finds a real one in its stead: the directory is opened anew
//! and put in the place of all its descriptors, at the same position. Descriptors that were duplicated share an open directory with its
//! position, as in the kernel.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};

use polytropo_client::{Channel, Listed, Name};

use super::names;
use super::process::{self, LINK};
use super::table::DESCRIPTORS_MAX;
use crate::hooks::Answer;
use crate::sys::{self, nr};
use crate::trace::Why;

const OBJECTS_MAX: usize = 256;
/// Positions before the first name: nothing was told yet, `.` was, `..` was. All others are places in the listing, which begin behind its head.
const START: u64 = 0;
const AFTER_DOT: u64 = 1;
const AFTER_DOT_DOT: u64 = 2;
/// The same as offsets of lseek(2), as the kernel's own door has them.
const OFFSET_AFTER_DOT: u64 = i64::MAX as u64 - 16;
const OFFSET_AFTER_DOT_DOT: u64 = i64::MAX as u64 - 15;
/// The number of `..`, which nobody knows here.
const INO_UNKNOWN: u64 = 0xffff_ffff;
const S_IFDIR: u32 = 0o040_000;
const DIRENT_HEAD_BYTES: usize = 19;
const O_LARGEFILE: usize = 0o100_000;
const O_NOFOLLOW: usize = 0o400_000;
/// What may be asked for of a directory besides.
const FLAGS_KNOWN: usize = O_LARGEFILE | O_NOFOLLOW | sys::O_CLOEXEC | sys::O_DIRECTORY | 0o4000 | 0o400;
const F_DUPFD: usize = 0;
const F_GETFD: usize = 1;
const F_SETFD: usize = 2;
const F_GETFL: usize = 3;
const F_DUPFD_CLOEXEC: usize = 1030;
const FD_CLOEXEC: isize = 1;
const EINVAL: isize = -22;
const AT_EMPTY_PATH: usize = 0x1000;

/// An open directory.
struct Object {
    /// How many descriptors it has; 0 is free.
    users: AtomicU32,
    flags: AtomicU32,
    ino: AtomicU64,
    /// Label of the channel that listed it.
    label: AtomicU32,
    /// Its listing, by number.
    listing: AtomicU64,
    position: AtomicU64,
    /// Position as an offset for lseek(2).
    offset: AtomicU64,
}

static OBJECTS: [Object; OBJECTS_MAX] = [const {
    Object {
        users: AtomicU32::new(0),
        flags: AtomicU32::new(0),
        ino: AtomicU64::new(0),
        label: AtomicU32::new(0),
        listing: AtomicU64::new(0),
        position: AtomicU64::new(0),
        offset: AtomicU64::new(0),
    }
}; OBJECTS_MAX];
/// For each descriptor its object's number plus one, or 0.
static OF: [AtomicU32; DESCRIPTORS_MAX] = [const { AtomicU32::new(0) }; DESCRIPTORS_MAX];
/// In such a place: a thread is about to put the real one there.
const UPGRADING: u32 = 1 << 31;
/// Attempts, of 100 us each, to see that through. A handler that came in between it does without.
const WAITS_MAX: u32 = 10_000;
/// Descriptors that are placeholders, and one more than the highest that ever was.
static COUNT: AtomicU32 = AtomicU32::new(0);
static HIGHEST: AtomicUsize = AtomicUsize::new(0);

/// Inodes of descriptors that are directories of the kernel's own, or [`FOREIGN`], found when a path began there; 0 if that was not looked at.
static REAL: [AtomicU64; DESCRIPTORS_MAX] = [const { AtomicU64::new(0) }; DESCRIPTORS_MAX];
const FOREIGN: u64 = u64::MAX;

fn object_of(descriptor: usize) -> Option<&'static Object> {
    if COUNT.load(Acquire) == 0 {
        return None;
    }
    let number = (OF.get(descriptor as u32 as usize)?.load(Acquire) & !UPGRADING).checked_sub(1)?;
    OBJECTS.get(number as usize)
}

/// The inode of a placeholder's directory.
#[inline]
pub fn placeholder(descriptor: usize) -> Option<u64> {
    object_of(descriptor).map(|object| object.ino.load(Relaxed))
}

/// The inode of an open directory, if what lies in it is known.
#[inline]
pub fn inode(channel: &Channel, descriptor: usize) -> Option<u64> {
    if let Some(inode) = placeholder(descriptor) {
        return Some(inode);
    }
    match REAL.get(descriptor as u32 as usize)?.load(Acquire) {
        0 => find_real(channel, descriptor as u32 as usize),
        FOREIGN => None,
        inode => Some(inode),
    }
}

/// Lists a directory that the kernel has open, by the path that it has now.
#[cold]
fn find_real(channel: &Channel, descriptor: usize) -> Option<u64> {
    let place = REAL.get(descriptor)?;
    let setting = process::setting();
    let status = sys::status(descriptor)?;
    let mut found = FOREIGN;
    if status.device == setting.device() && status.is_directory() {
        let mut buffer = [0; 1024];
        let path = sys::path_of(descriptor, &mut buffer)?;
        let path = if status.inode == setting.root_inode() { Some(&b""[..]) } else { setting.inside(path) };
        if path.is_some_and(|path| channel.list(path).is_ok_and(|listed| listed.ino == status.inode)) {
            found = status.inode;
        }
    }
    place.store(found, Release);
    // It may have been closed meanwhile, and the number be another's.
    if sys::status(descriptor).is_none_or(|now| (now.device, now.inode) != (status.device, status.inode)) {
        place.store(0, Release);
    }
    (found != FOREIGN).then_some(found)
}

/// There is about to be another channel, which has listed nothing.
pub fn begin_with_channel() {
    REAL.iter().filter(|place| place.load(Relaxed) != 0).for_each(|place| place.store(0, Relaxed));
}

/// In a forked child, which has real ones.
pub fn forget() {
    begin_with_channel();
    OF.iter().for_each(|place| place.store(0, Relaxed));
    OBJECTS.iter().for_each(|object| object.users.store(0, Relaxed));
    COUNT.store(0, Release);
}

/// The descriptor is about to end, or has.
pub fn closed(descriptor: usize) {
    if let Some(place) = REAL.get(descriptor as u32 as usize)
        && place.load(Relaxed) != 0
    {
        place.store(0, Release);
    }
    if COUNT.load(Acquire) == 0 {
        return;
    }
    let Some(place) = OF.get(descriptor as u32 as usize) else { return };
    wait_for_upgrade(place);
    end(place);
}

/// Whoever upgrades it is to be done before the number is another's.
fn wait_for_upgrade(place: &AtomicU32) {
    for _ in 0..WAITS_MAX {
        if place.load(Acquire) & UPGRADING == 0 {
            return;
        }
        sys::nap(100_000);
    }
}

fn end(place: &AtomicU32) {
    if let Some(number) = (place.swap(0, AcqRel) & !UPGRADING).checked_sub(1)
        && let Some(object) = OBJECTS.get(number as usize)
    {
        object.users.fetch_sub(1, AcqRel);
        COUNT.fetch_sub(1, AcqRel);
    }
}

/// The descriptor is about to become another's by dup2(2): it is the kernel's first, who may yet refuse that.
pub fn make_real(descriptor: usize) {
    if let Some(object) = object_of(descriptor) {
        upgrade(object);
    }
}

/// `to` is a duplicate of `from`, made just now.
pub fn duplicated(from: usize, to: isize) {
    let (Some(object), Ok(to)) = (object_of(from), usize::try_from(to)) else { return };
    let number = OF[from as u32 as usize].load(Acquire) & !UPGRADING;
    closed(to);
    let Some(place) = OF.get(to).filter(|_| number != 0) else {
        // Too high to be kept: both become real.
        upgrade(object);
        return;
    };
    object.users.fetch_add(1, AcqRel);
    COUNT.fetch_add(1, AcqRel);
    HIGHEST.fetch_max(to + 1, AcqRel);
    place.store(number, Release);
}

/// open(2) of a directory that can be listed here. None: the kernel opens it.
pub fn open(number: usize, arguments: &[usize; 6]) -> Option<isize> {
    let (directory, path, flags) = match number {
        nr::OPEN => (sys::AT_FDCWD, arguments[0], arguments[1]),
        _ => (arguments[0], arguments[1], arguments[2]),
    };
    if flags & sys::O_DIRECTORY == 0 || flags & !FLAGS_KNOWN != 0 {
        return None;
    }
    let (channel, listed) = names::list(directory, path, flags & O_NOFOLLOW != 0)?;
    let way = sys::O_PATH | flags & (sys::O_DIRECTORY | sys::O_CLOEXEC | O_NOFOLLOW);
    // SAFETY: the program's own path.
    let opened = unsafe { sys::call(nr::OPENAT, [directory, path, way, 0, 0, 0]) };
    if opened < 0 {
        return Some(opened);
    }
    let same = sys::status(opened as usize)
        .is_some_and(|status| (status.inode, status.device) == (listed.ino, process::setting().device()));
    if same && keep(opened as usize, (channel, &listed), flags) {
        return Some(opened);
    }
    sys::close(opened as i32);
    None
}

fn keep(descriptor: usize, (channel, listed): (&Channel, &Listed), flags: usize) -> bool {
    let Some(place) = OF.get(descriptor) else { return false };
    let free = OBJECTS.iter().position(|object| object.users.compare_exchange(0, 1, AcqRel, Relaxed).is_ok());
    let Some(number) = free else { return false };
    let object = &OBJECTS[number];
    object.flags.store(flags as u32, Relaxed);
    object.ino.store(listed.ino, Relaxed);
    object.label.store(channel.label(), Relaxed);
    object.listing.store(Channel::number_of(listed), Relaxed);
    object.position.store(START, Relaxed);
    object.offset.store(0, Relaxed);
    closed(descriptor);
    COUNT.fetch_add(1, AcqRel);
    HIGHEST.fetch_max(descriptor + 1, AcqRel);
    place.store(number as u32 + 1, Release);
    true
}

/// Puts the kernel's own open directory in the place of all descriptors of an object; a negated errno if it cannot be opened.
fn upgrade(object: &Object) -> isize {
    let number = (object as *const Object as usize - OBJECTS.as_ptr() as usize) / size_of::<Object>() + 1;
    let mine = |place: &AtomicU32| place.load(Acquire) as usize == number;
    let highest = HIGHEST.load(Acquire).min(DESCRIPTORS_MAX);
    let Some(first) = OF[..highest].iter().position(mine) else { return 0 };
    let flags = object.flags.load(Relaxed) as usize & !O_NOFOLLOW | sys::O_DIRECTORY | sys::O_CLOEXEC;
    // SAFETY: the kernel reads that path.
    let opened = unsafe { sys::call(nr::OPENAT, [first, c".".as_ptr() as usize, flags, 0, 0, 0]) };
    if opened < 0 {
        return opened;
    }
    let offset = object.offset.load(Relaxed) as usize;
    if offset != 0 {
        // SAFETY: concerns no memory.
        unsafe { sys::call(nr::LSEEK, [opened as usize, offset, 0, 0, 0, 0]) };
    }
    for (descriptor, place) in OF[..highest].iter().enumerate().filter(|(_, place)| mine(place)) {
        // SAFETY: concerns no memory.
        let kept = unsafe { sys::call(nr::FCNTL, [descriptor, F_GETFD, 0, 0, 0, 0]) };
        let flags = if kept & FD_CLOEXEC != 0 { sys::O_CLOEXEC } else { 0 };
        let mark = number as u32 | UPGRADING;
        if place.compare_exchange(number as u32, mark, AcqRel, Relaxed).is_ok() {
            if kept >= 0 {
                // SAFETY: concerns no memory; the descriptor is the placeholder, and stays it while it is marked.
                unsafe { sys::call(nr::DUP3, [opened as usize, descriptor, flags, 0, 0, 0]) };
            }
            end(place);
        }
    }
    sys::close(opened as i32);
    0
}

/// All become real, since others are to share them. Only those that outlive exec(2), if that is what comes.
pub fn upgrade_all(before_exec: bool) {
    if COUNT.load(Acquire) == 0 {
        return;
    }
    let highest = HIGHEST.load(Acquire).min(DESCRIPTORS_MAX);
    for descriptor in 0..highest {
        let Some(object) = object_of(descriptor) else { continue };
        // SAFETY: concerns no memory.
        let ends = || unsafe { sys::call(nr::FCNTL, [descriptor, F_GETFD, 0, 0, 0, 0]) } & FD_CLOEXEC != 0;
        if !before_exec || !ends() {
            upgrade(object);
        }
    }
}

/// What becomes of a call that names descriptors. None: none of them is a placeholder, or the kernel does it with one as well.
pub fn answer(number: usize, arguments: &[usize; 6]) -> Option<Answer> {
    // These do with a place what they would do with the directory.
    const AS_GOOD: [usize; 6] = [nr::CLOSE, nr::FCHDIR, nr::FSTATFS, nr::STATX, nr::DUP2, nr::DUP3];
    if COUNT.load(Acquire) == 0 || AS_GOOD.contains(&number) {
        return None;
    }
    match number {
        nr::NEWFSTATAT if arguments[3] & AT_EMPTY_PATH == 0 => return None,
        nr::NEWFSTATAT => {
            let [directory, path, to, ..] = *arguments;
            return placeholder(directory).map(|_| names::stat_directory(directory, Some(path), to));
        }
        nr::FSTAT => {
            let [directory, to, ..] = *arguments;
            return placeholder(directory).map(|_| names::stat_directory(directory, None, to));
        }
        nr::GETDENTS64 => return object_of(arguments[0]).map(|object| list(object, arguments)),
        nr::LSEEK => return object_of(arguments[0]).map(|object| seek(object, arguments)),
        nr::FCNTL | nr::DUP => {
            let object = object_of(arguments[0])?;
            match arguments[1] {
                F_DUPFD | F_DUPFD_CLOEXEC if number == nr::FCNTL => {}
                F_GETFD | F_SETFD if number == nr::FCNTL => return None,
                F_GETFL if number == nr::FCNTL => {
                    let kept = !(sys::O_CLOEXEC as u32);
                    let flags = object.flags.load(Relaxed) & kept | O_LARGEFILE as u32;
                    return Some(Answer::Done(flags as isize));
                }
                _ if number == nr::DUP => {}
                _ => return Some(pass_upgraded(object)),
            }
            // SAFETY: the program's own call.
            let made = unsafe { sys::call(number, *arguments) };
            duplicated(arguments[0], made);
            return Some(Answer::Asked(made));
        }
        _ => {}
    }
    // Calls that take a place to begin a path from get by with one.
    if is_beginning(number) {
        return None;
    }
    let named = crate::table::DESCRIPTORS.get(number).copied().unwrap_or(0);
    let mut any = None;
    for (at, descriptor) in arguments.iter().enumerate() {
        if named >> at & 1 == 1
            && let Some(object) = object_of(*descriptor)
        {
            any = Some(pass_upgraded(object));
        }
    }
    any
}

fn is_beginning(number: usize) -> bool {
    const BEGINNINGS: [usize; 5] = [nr::OPENAT, nr::READLINKAT, nr::FACCESSAT, nr::FACCESSAT2, nr::EXECVEAT];
    BEGINNINGS.contains(&number)
}

fn pass_upgraded(object: &Object) -> Answer {
    match upgrade(object) {
        0 => Answer::Pass(Why::Shares),
        errno => Answer::Asked(errno),
    }
}

/// The listing that a call goes on with; a new one at the beginning, where the directory has changed.
fn listing_of(channel: &Channel, object: &Object, position: u64) -> Option<Listed> {
    if object.label.load(Relaxed) != channel.label() {
        // What it was listed by is gone.
        return None;
    }
    let (ino, number) = (object.ino.load(Relaxed), object.listing.load(Acquire));
    let known = channel.listed_before(ino, number);
    if position != START {
        return known;
    }
    let listed = match known {
        Some(known) if channel.is_current(&known) => known,
        known => {
            let other = channel.listed(ino).filter(|listed| channel.is_current(listed));
            other.or_else(|| channel.list_again(&known.or_else(|| channel.listed(ino))?).ok())?
        }
    };
    object.listing.store(Channel::number_of(&listed), Release);
    Some(listed)
}

/// getdents64(2).
fn list(object: &Object, arguments: &[usize; 6]) -> Answer {
    let [_, to, count, ..] = *arguments;
    let count = (count as u32 as usize).min(i32::MAX as usize);
    if to == 0 {
        return pass_upgraded(object);
    }
    loop {
        let position = object.position.load(Acquire);
        let Some(channel) = LINK.get() else { return pass_upgraded(object) };
        let Some(listed) = listing_of(channel, object, position) else { return pass_upgraded(object) };
        // SAFETY: the program's own buffer; nothing else of this call refers to it.
        let buffer = unsafe { core::slice::from_raw_parts_mut(to as *mut u8, count) };
        let mut filling = Filling { buffer, filled: 0, refused: false, position, offset: None };
        if filling.fill(channel, &listed).is_none() {
            return pass_upgraded(object);
        }
        if filling.filled == 0 && filling.refused {
            return Answer::Done(EINVAL);
        }
        if object.position.compare_exchange(position, filling.position, AcqRel, Relaxed).is_ok() {
            if let Some(offset) = filling.offset {
                object.offset.store(offset, Release);
            }
            return Answer::Done(filling.filled as isize);
        }
    }
}

/// A buffer of getdents64(2).
struct Filling<'a> {
    buffer: &'a mut [u8],
    filled: usize,
    refused: bool,
    position: u64,
    offset: Option<u64>,
}

impl Filling<'_> {
    /// None: the listing is gone.
    fn fill(&mut self, channel: &Channel, listed: &Listed) -> Option<()> {
        if self.position == START && self.add(listed.ino, OFFSET_AFTER_DOT, S_IFDIR, b".") {
            self.position = AFTER_DOT;
        }
        if self.position == AFTER_DOT && self.add(INO_UNKNOWN, OFFSET_AFTER_DOT_DOT, S_IFDIR, b"..") {
            self.position = AFTER_DOT_DOT;
        }
        if self.position < AFTER_DOT_DOT {
            return Some(());
        }
        while let Some((name, after)) = channel.name_in(listed, self.position as usize)? {
            let Name { ino, mode, next_offset, .. } = name;
            if !self.add(ino, next_offset, mode, name.bytes()) {
                return Some(());
            }
            self.position = after as u64;
        }
        Some(())
    }

    /// False when it does not fit.
    fn add(&mut self, ino: u64, next: u64, mode: u32, name: &[u8]) -> bool {
        let bytes = (DIRENT_HEAD_BYTES + name.len() + 1).next_multiple_of(8);
        let Some(record) = self.buffer.get_mut(self.filled..self.filled + bytes) else {
            self.refused = true;
            return false;
        };
        let (head, rest) = record.split_at_mut(DIRENT_HEAD_BYTES);
        head[..8].copy_from_slice(&ino.to_ne_bytes());
        head[8..16].copy_from_slice(&next.to_ne_bytes());
        head[16..18].copy_from_slice(&(bytes as u16).to_ne_bytes());
        head[18] = (mode >> 12 & 15) as u8;
        let (text, end) = rest.split_at_mut(name.len());
        text.copy_from_slice(name);
        end.fill(0);
        self.filled += bytes;
        self.offset = Some(next);
        true
    }
}

/// lseek(2).
fn seek(object: &Object, arguments: &[usize; 6]) -> Answer {
    const SEEK_SET: usize = 0;
    const SEEK_CUR: usize = 1;
    let [_, offset, whence, ..] = *arguments;
    let offset = offset as u64;
    let position = match (whence, offset) {
        (SEEK_CUR, 0) => return Answer::Done(object.offset.load(Acquire) as isize),
        (SEEK_SET, 0) => START,
        (SEEK_SET, OFFSET_AFTER_DOT) => AFTER_DOT,
        (SEEK_SET, OFFSET_AFTER_DOT_DOT) => AFTER_DOT_DOT,
        (SEEK_SET, _) => {
            let channel = LINK.get().filter(|channel| channel.label() == object.label.load(Relaxed));
            let place = channel.and_then(|channel| {
                let ino = object.ino.load(Relaxed);
                let listed = channel.listed_before(ino, object.listing.load(Acquire))?;
                channel.place_of(&listed, offset)
            });
            match place {
                Some(place) => place as u64,
                None => return pass_upgraded(object),
            }
        }
        _ => return pass_upgraded(object),
    };
    object.offset.store(offset, Release);
    object.position.store(position, Release);
    Answer::Done(offset as isize)
}
