//! Questions about paths: stat(2), access(2), readlink(2) and their kin.
//!
//! Asked for the first time they are the kernel's, which knows most programs' paths already; asked again, the service is asked, too, and its
//! answer kept; from then on nobody is asked while nothing changes. The service decides, component by component, whether a path is
//! ours at all: what meets a mount point, or leads out, it leaves to the kernel.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use polytropo_client::{At, Attributes, Channel, Error, Listed, Opened, Result};

use super::directories;
use super::link::label;
use super::process::{self, LINK};
use super::status;
use super::worth::{self, Event};
use crate::hooks::Answer;
use crate::sys::{self, AT_FDCWD, nr};
use crate::trace::{self, Counter, Why};

const PATH_BYTES_MAX: usize = 320;
const AT_SYMLINK_NOFOLLOW: u32 = 0x100;
const AT_NO_AUTOMOUNT: u32 = 0x800;
const AT_EMPTY_PATH: u32 = 0x1000;
const AT_STATX_DONT_SYNC: u32 = 0x4000;
const X_OK: usize = 1;
/// Directories on one path that are listed for its sake.
const LEVELS_MAX: usize = 8;
/// Tells marks of directories from those of paths.
const LISTING: usize = 1 << 24;
/// And those of files that were opened.
pub const OPENED: usize = 1 << 25;
/// Flags of open(2) with which a missing name is more, or something else, than a missing name: O_CREAT, O_NOFOLLOW, O_TMPFILE.
const NOT_ONLY_OPENED: usize = 0o100 | 0o400_000 | 0o20_000_000;
const ENOENT: i32 = 2;
const EBADF: i32 = 9;
const ENOTDIR: i32 = 20;
const EINVAL: i32 = 22;
/// EINVAL where it is the answer, told apart from a working directory that is gone.
const NO_LINK: i32 = EINVAL | 1 << 16;
const S_IFMT: u32 = 0o170_000;
const S_IFLNK: u32 = 0o120_000;

/// Nothing about paths is answered here any more.
static ENDED: AtomicBool = AtomicBool::new(false);

/// Paths that were asked for, by their hashes; which others they share a place with does not matter.
const ASKED_PLACES: usize = 4096;
static ASKED: [AtomicU32; ASKED_PLACES] = [const { AtomicU32::new(0) }; ASKED_PLACES];

/// The working directory, where relative paths begin: a file of the channel, or one of these.
const CWD_UNKNOWN: u64 = 0;
const CWD_ROOT: u64 = u64::MAX;
const CWD_FOREIGN: u64 = u64::MAX - 1;
static CWD: AtomicU64 = AtomicU64::new(CWD_UNKNOWN);
/// Its inode, once its listing is kept; 0 if not.
static CWD_INODE: AtomicU64 = AtomicU64::new(0);
/// Counts changes of the working directory, before and after each.
static CWD_CHANGES: AtomicU32 = AtomicU32::new(0);

/// From now on paths are the kernel's.
pub fn end() {
    ENDED.store(true, Release);
}

pub fn has_ended() -> bool {
    ENDED.load(Acquire)
}

/// In a forked child, which has another channel.
pub fn forget() {
    EXECUTES.store(MAYBE, Relaxed);
    CWD.store(CWD_UNKNOWN, Release);
    CWD_INODE.store(0, Release);
}

/// There is about to be another channel.
pub fn begin_with_channel() {
    close_directory(CWD.swap(CWD_UNKNOWN, AcqRel));
    CWD_INODE.store(0, Release);
}

/// A path of the program, without its zero byte. `None` for what is too long, or empty.
#[inline]
pub fn read_path(address: usize) -> Option<&'static [u8]> {
    let start = address as *const u8;
    if start.is_null() {
        return None;
    }
    // SAFETY: the program's own path, up to its zero byte.
    let length = (0..PATH_BYTES_MAX).find(|at| unsafe { start.add(*at).read_volatile() } == 0)?;
    // SAFETY: those bytes were just read; they are used during this call only, as bytes that may be any.
    (length > 0).then(|| unsafe { core::slice::from_raw_parts(start, length) })
}

/// Whether a path was asked for before.
#[cold]
pub fn is_known(path: &[u8], kind: usize) -> bool {
    let hash =
        path.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    let mark = (hash ^ kind as u32).wrapping_mul(0x9e37_79b1) | 1;
    ASKED[mark as usize >> 8 & (ASKED_PLACES - 1)].swap(mark, Relaxed) == mark
}

/// Whether a path may lead to the mount: where the working directory is is not known before there is a channel.
pub fn maybe_ours(path: &[u8]) -> bool {
    path.first() != Some(&b'/') || process::setting().inside(path).is_some()
}

/// Where a path begins for the service, and what is left of it. `None`: it is not ours.
#[inline]
pub fn place<'a>(channel: &Channel, directory: usize, path: &'a [u8]) -> Option<(At, &'a [u8])> {
    if path.first() == Some(&b'/') {
        return Some((At::Root, process::setting().inside(path)?));
    }
    if directory as u32 != AT_FDCWD as u32 {
        return None;
    }
    let known = match CWD.load(Acquire) {
        CWD_UNKNOWN => find_working_directory(channel)?,
        known => known,
    };
    match known {
        CWD_FOREIGN => None,
        CWD_ROOT => Some((At::Root, path)),
        number => match LINK.of(number).filter(|(its, _)| its.label() == channel.label()) {
            Some((_, file)) => Some((At::File(file), path)),
            None => {
                // Of a channel that has ended.
                let _ = CWD.compare_exchange(number, CWD_UNKNOWN, AcqRel, Relaxed);
                None
            }
        },
    }
}

/// Opens the working directory at the service, and makes sure that it is the same.
#[cold]
fn find_working_directory(channel: &Channel) -> Option<u64> {
    let changes = CWD_CHANGES.load(Acquire);
    let mut buffer = [0; 1024];
    // SAFETY: the kernel writes into the buffer, within its length.
    let got = unsafe { sys::call(nr::GETCWD, [buffer.as_mut_ptr() as usize, buffer.len(), 0, 0, 0, 0]) };
    let path = buffer.get(..usize::try_from(got).ok()?.checked_sub(1)?)?;
    let seen = sys::status_at(b".\0")?;
    let setting = process::setting();
    let found = if seen.device != setting.device() {
        CWD_FOREIGN
    } else if let Some(inside) = setting.inside(path) {
        let flags = (sys::O_PATH | sys::O_DIRECTORY) as u32;
        match channel.open(At::Root, inside, flags, 0, 0) {
            Ok(opened) if opened.attributes.ino == seen.inode => label(channel, opened.file),
            Ok(opened) => {
                let _ = channel.close(opened.file);
                CWD_FOREIGN
            }
            Err(_) => CWD_FOREIGN,
        }
    } else {
        let root = channel.stat(At::Root, b"", 0).is_ok_and(|root| root.ino == seen.inode);
        if root { CWD_ROOT } else { CWD_FOREIGN }
    };
    let kept = CWD.compare_exchange(CWD_UNKNOWN, found, AcqRel, Relaxed).is_ok();
    if kept && CWD_CHANGES.load(Acquire) == changes && changes & 1 == 0 {
        find_inode(channel, found, setting.inside(path), seen.inode, changes);
        return Some(found);
    }
    if kept {
        // It changed meanwhile; whoever swaps it out closes it.
        if CWD.compare_exchange(found, CWD_UNKNOWN, AcqRel, Relaxed).is_ok() {
            close_directory(found);
        }
    } else {
        close_directory(found);
    }
    None
}

/// Has the working directory listed, so that what lies in it is known.
fn find_inode(channel: &Channel, found: u64, inside: Option<&[u8]>, inode: u64, changes: u32) {
    if found == CWD_FOREIGN || !channel.list(inside.unwrap_or(b"")).is_ok_and(|listed| listed.ino == inode) {
        return;
    }
    CWD_INODE.store(inode, Release);
    if CWD_CHANGES.load(Acquire) != changes {
        let _ = CWD_INODE.compare_exchange(inode, 0, AcqRel, Relaxed);
    }
}

/// `place` for a file that is opened, also where the path begins at an open directory: then only what is kept knows the beginning.
#[inline]
pub fn place_open<'a>(channel: &Channel, directory: usize, path: &'a [u8]) -> Option<(At, &'a [u8])> {
    if path.first() == Some(&b'/') || directory as u32 == AT_FDCWD as u32 {
        return place(channel, directory, path);
    }
    Some((At::Inode(directories::inode(channel, directory)?), path))
}

/// How the service is to be asked for what `place_open` placed. `buffer` takes the path where it begins at an open directory.
#[cold]
pub fn place_asked<'a>(
    channel: &Channel,
    (at, path): (At, &'a [u8]),
    buffer: &'a mut [u8; polytropo_client::PATH_BYTES_MAX],
) -> Option<(At, &'a [u8])> {
    let At::Inode(inode) = at else { return Some((at, path)) };
    let bytes = channel.path_below(inode, path, buffer)?;
    Some((At::Root, &buffer[..bytes]))
}

/// A small file that is opened to read, if its bytes are known. `flags`: O_NOFOLLOW or nothing.
#[cold]
pub fn open_shared(channel: &Channel, directory: usize, path: usize, flags: u32) -> Option<Opened> {
    let (inode, rest) = beginning(channel, directory, read_path(path)?)?;
    channel.open_shared(inode, rest, flags)
}

/// The directory where a path begins, as listings know it, and what is left of the path.
#[inline]
fn beginning<'a>(channel: &Channel, directory: usize, path: &'a [u8]) -> Option<(u64, &'a [u8])> {
    if path.first() == Some(&b'/') {
        let setting = process::setting();
        return Some((setting.root_inode(), setting.inside(path)?));
    }
    if directory as u32 != AT_FDCWD as u32 {
        return Some((directories::inode(channel, directory)?, path));
    }
    if CWD.load(Acquire) == CWD_UNKNOWN {
        find_working_directory(channel)?;
    }
    let inode = CWD_INODE.load(Acquire);
    (inode != 0).then_some((inode, path))
}

/// `stat` by what was listed. A directory in which a second name is asked for is listed.
#[inline]
fn stat_listed(channel: &Channel, directory: usize, path: &[u8], flags: u32) -> Option<Result<Attributes>> {
    let (inode, rest) = beginning(channel, directory, path)?;
    for _ in 0..LEVELS_MAX {
        if let Some(answer) = channel.stat_below(inode, rest, flags) {
            return Some(answer);
        }
        if !is_known(parent_of(rest), LISTING ^ inode as usize) || !learn(channel, inode, rest, flags) {
            return None;
        }
    }
    None
}

#[cold]
fn learn(channel: &Channel, inode: u64, rest: &[u8], flags: u32) -> bool {
    // The root, at first, is known to nobody.
    if channel.listed(inode).is_none() {
        return inode == process::setting().root_inode()
            && channel.list(b"").is_ok_and(|listed| listed.ino == inode);
    }
    channel.learn_below(inode, rest, flags)
}

fn parent_of(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    path.get(..end).unwrap_or(&[])
}

/// A name is changed before there is a channel.
#[cold]
pub fn count_change(path: usize) {
    if read_path(path).is_some_and(maybe_ours) && worth::count(Event::Change) {
        let setting = process::setting();
        LINK.get_or_connect(|| setting.connect());
    }
}

/// The listing of a directory that is to be opened; None if there is none.
pub fn list(directory: usize, path: usize, stays: bool) -> Option<(&'static Channel, Listed)> {
    if ENDED.load(Acquire) {
        return None;
    }
    let path = read_path(path)?;
    let Some(channel) = LINK.get() else {
        if maybe_ours(path) && worth::count(Event::Directory) {
            let setting = process::setting();
            LINK.get_or_connect(|| setting.connect());
        }
        return None;
    };
    if !channel.keeps_answers() {
        return None;
    }
    let whole = path;
    let (inode, rest) = match beginning(channel, directory, path) {
        Some(known) => known,
        // The root itself.
        None if whole.first() == Some(&b'/') => return None,
        None => return None,
    };
    let flags = if stays { AT_SYMLINK_NOFOLLOW } else { 0 };
    if rest == b"." {
        let listed = channel.listed(inode).filter(|listed| channel.is_current(listed))?;
        return Some((channel, listed));
    }
    for _ in 0..LEVELS_MAX {
        if let Some(answer) = channel.stat_below(inode, rest, flags) {
            let found = answer.ok()?;
            if let Some(listed) = channel.listed(found.ino).filter(|listed| channel.is_current(listed)) {
                return Some((channel, listed));
            }
            break;
        }
        if !learn(channel, inode, rest, flags) {
            break;
        }
    }
    let mut buffer = [0; polytropo_client::PATH_BYTES_MAX];
    let bytes = channel.path_below(inode, rest, &mut buffer)?;
    Some((channel, channel.list(&buffer[..bytes]).ok()?))
}

fn close_directory(file: u64) {
    if !matches!(file, CWD_UNKNOWN | CWD_ROOT | CWD_FOREIGN)
        && let Some((channel, file)) = LINK.of(file)
    {
        let _ = channel.close(file);
    }
}

/// chdir(2), fchdir(2).
pub fn change_directory(number: usize, arguments: &[usize; 6]) -> Answer {
    // Odd while it changes: nothing is learnt then.
    CWD_CHANGES.fetch_add(1, AcqRel);
    close_directory(CWD.swap(CWD_UNKNOWN, AcqRel));
    CWD_INODE.store(0, Release);
    // SAFETY: the program's own call.
    let done = unsafe { sys::call(number, *arguments) };
    close_directory(CWD.swap(CWD_UNKNOWN, AcqRel));
    CWD_INODE.store(0, Release);
    CWD_CHANGES.fetch_add(1, AcqRel);
    Answer::Asked(done)
}

/// Answers from what is kept; asks the service for what was asked for before.
#[inline(always)]
fn answer<T>(
    kind: usize,
    directory: usize,
    path: usize,
    listed: impl Fn(&Channel, &[u8]) -> Option<Result<T>>,
    known: impl Fn(&Channel, At, &[u8]) -> Option<Result<T>>,
    ask: impl Fn(&Channel, At, &[u8]) -> Result<T>,
    done: impl FnOnce(&Channel, T) -> isize,
) -> Answer {
    if ENDED.load(Acquire) {
        return Answer::Pass(Why::Reach);
    }
    let Some(path) = read_path(path) else { return Answer::Pass(Why::NotOurs) };
    let (channel, result) = match LINK.get() {
        Some(channel) if !channel.keeps_answers() => return Answer::Pass(Why::Unknown),
        Some(channel) => 'found: {
            if let Some(answer) = listed(channel, path) {
                break 'found (channel, answer);
            }
            let Some((at, rest)) = place(channel, directory, path) else {
                return Answer::Pass(Why::NotOurs);
            };
            match known(channel, at, rest) {
                Some(result) => (channel, result),
                None if is_known(path, kind) => {
                    trace::count(Counter::Request);
                    (channel, ask(channel, at, rest))
                }
                None => return Answer::Pass(Why::Unknown),
            }
        }
        None => {
            if maybe_ours(path) && is_known(path, kind) && worth::count(Event::Question) {
                let setting = process::setting();
                LINK.get_or_connect(|| setting.connect());
            }
            return Answer::Pass(Why::Unknown);
        }
    };
    match result {
        Ok(value) => Answer::Done(done(channel, value)),
        // Of the working directory that was there a moment ago.
        Err(Error::Errno(EBADF | EINVAL) | Error::Kernel) => Answer::Pass(Why::Unknown),
        Err(Error::Errno(errno)) => Answer::Done(-((errno & 0xffff) as isize)),
        Err(Error::Gone | Error::GoneAmid(_)) => {
            LINK.give_up(channel);
            Answer::Pass(Why::Unknown)
        }
    }
}

/// stat(2), lstat(2), fstatat(2).
pub fn stat(number: usize, arguments: &[usize; 6]) -> Answer {
    let (directory, path, to, flags) = match number {
        nr::STAT => (AT_FDCWD, arguments[0], arguments[1], 0),
        nr::LSTAT => (AT_FDCWD, arguments[0], arguments[1], AT_SYMLINK_NOFOLLOW),
        _ => (arguments[0], arguments[1], arguments[2], arguments[3] as u32 & !AT_NO_AUTOMOUNT),
    };
    if to == 0 || flags & !AT_SYMLINK_NOFOLLOW != 0 {
        return Answer::Pass(Why::NotOurs);
    }
    attributes(directory, path, flags, |found| status::put(found, to))
}

/// Tells the attributes of what a path leads to. `flags` as of fstatat(2): nothing, or not to follow.
fn attributes(directory: usize, path: usize, flags: u32, tell: impl FnOnce(&Attributes)) -> Answer {
    answer(
        nr::STAT + flags as usize,
        directory,
        path,
        |channel, path| stat_listed(channel, directory, path, flags),
        |channel, at, path| channel.stat_known(at, path, flags),
        |channel, at, path| channel.stat(at, path, flags),
        |_, found| {
            tell(&found);
            0
        },
    )
}

/// fstat(2), or with a path fstatat(2), of an open directory itself.
pub fn stat_directory(descriptor: usize, path: Option<usize>, to: usize) -> Answer {
    if to == 0 {
        return Answer::Pass(Why::NotOurs);
    }
    stat_open(descriptor, path, |found| status::put(found, to))
}

/// Of an open directory itself. Null for an empty path is known to newer kernels only.
fn stat_open(descriptor: usize, path: Option<usize>, done: impl FnOnce(&Attributes)) -> Answer {
    // SAFETY: the program's own path; it is empty if its first byte is zero.
    let empty = path.is_none_or(|path| path != 0 && unsafe { (path as *const u8).read_volatile() } == 0);
    let found = LINK
        .get()
        .filter(|_| empty && !ENDED.load(Acquire))
        .and_then(|channel| channel.stat_listed(directories::placeholder(descriptor)?));
    let Some(found) = found else { return Answer::Pass(Why::NotOurs) };
    done(&found);
    Answer::Done(0)
}

/// statx(2).
pub fn statx(arguments: &[usize; 6]) -> Answer {
    /// AT_STATX_FORCE_SYNC, and whatever else is not known.
    const AT_KNOWN: u32 = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_EMPTY_PATH | AT_STATX_DONT_SYNC;
    /// All that there was when attributes were first told so.
    const MASK_KNOWN: usize = 0xfff;
    let [directory, path, flags, mask, to, ..] = *arguments;
    let flags = flags as u32;
    if to == 0 || flags & !AT_KNOWN != 0 || mask & !MASK_KNOWN != 0 {
        return Answer::Pass(Why::NotOurs);
    }
    let tell = |found: &Attributes| {
        status::put_statx(found, to);
    };
    if flags & AT_EMPTY_PATH != 0 {
        return stat_open(directory, Some(path), tell);
    }
    attributes(directory, path, flags & AT_SYMLINK_NOFOLLOW, tell)
}

/// Whether files of the mount can be executed at all, or have to be asked of the kernel. Whoever changes that ends the channel.
static EXECUTES: AtomicU32 = AtomicU32::new(MAYBE);
const MAYBE: u32 = 0;
const NEVER: u32 = 1;
const ALWAYS: u32 = 2;

fn executes() -> bool {
    if EXECUTES.load(Relaxed) == MAYBE {
        let plain = process::setting().mount_flags().is_some_and(|flags| flags & sys::ST_NOEXEC == 0);
        EXECUTES.store(if plain { ALWAYS } else { NEVER }, Relaxed);
    }
    EXECUTES.load(Relaxed) == ALWAYS
}

/// access(2), faccessat(2), faccessat2(2). Whether something may be executed depends on the mount, too.
pub fn access(number: usize, arguments: &[usize; 6]) -> Answer {
    let (directory, path, mode, flags) = match number {
        nr::ACCESS => (AT_FDCWD, arguments[0], arguments[1], 0),
        nr::FACCESSAT => (arguments[0], arguments[1], arguments[2], 0),
        _ => (arguments[0], arguments[1], arguments[2], arguments[3]),
    };
    // Of a program that is loaded here the real and the effective ids are the same.
    if flags != 0 || mode > 7 || (mode & X_OK != 0 && !executes()) {
        return Answer::Pass(Why::NotOurs);
    }
    let mode = mode as u32;
    answer(
        nr::ACCESS + ((mode as usize) << 16),
        directory,
        path,
        // That something is not there needs no permissions to be weighed.
        |channel, path| match stat_listed(channel, directory, path, 0)? {
            Ok(_) if mode != 0 => None,
            answer => Some(answer.map(drop)),
        },
        |channel, at, path| channel.access_known(at, path, mode, 0),
        |channel, at, path| channel.access(at, path, mode, 0),
        |_, ()| 0,
    )
}

/// readlink(2), readlinkat(2).
pub fn read_link(number: usize, arguments: &[usize; 6]) -> Answer {
    let (directory, path, to, count) = match number {
        nr::READLINK => (AT_FDCWD, arguments[0], arguments[1], arguments[2]),
        _ => (arguments[0], arguments[1], arguments[2], arguments[3]),
    };
    let count = count as u32 as usize;
    if to == 0 || count == 0 || count > i32::MAX as usize {
        return Answer::Pass(Why::NotOurs);
    }
    // SAFETY: the program's own buffer, made while nothing else of this call refers to it.
    let buffer = || unsafe { core::slice::from_raw_parts_mut(to as *mut u8, count) };
    answer(
        nr::READLINK,
        directory,
        path,
        |channel, path| match stat_listed(channel, directory, path, AT_SYMLINK_NOFOLLOW)? {
            Ok(found) if found.mode & S_IFMT == S_IFLNK => None,
            Ok(_) => Some(Err(Error::Errno(NO_LINK))),
            Err(error) => Some(Err(error)),
        },
        |channel, at, path| channel.read_link_known(at, path, buffer()),
        |channel, at, path| channel.read_link(at, path, buffer()),
        |_, got| got as isize,
    )
}

/// open(2) of what is not there, if that is known: its negated errno.
#[inline]
pub fn missing(directory: usize, path: usize, flags: usize) -> Option<isize> {
    if flags & NOT_ONLY_OPENED != 0 || ENDED.load(Acquire) {
        return None;
    }
    let channel = LINK.get()?;
    let path = read_path(path)?;
    if let Some(Err(Error::Errno(errno @ (ENOENT | ENOTDIR)))) = stat_listed(channel, directory, path, 0) {
        return Some(-(errno as isize));
    }
    let (at, rest) = place(channel, directory, path)?;
    match channel.stat_known(at, rest, 0)? {
        Err(Error::Errno(errno @ (ENOENT | ENOTDIR))) => Some(-(errno as isize)),
        _ => None,
    }
}

/// The kernel says that it is not there.
#[cold]
pub fn was_missing(directory: usize, path: usize, flags: usize) {
    if flags & NOT_ONLY_OPENED != 0 || ENDED.load(Acquire) {
        return;
    }
    let Some((channel, path)) = LINK.get().zip(read_path(path)) else { return };
    if channel.keeps_answers()
        && is_known(path, nr::OPEN)
        && let Some((at, rest)) = place(channel, directory, path)
    {
        trace::count(Counter::Request);
        // What the service says of it is kept, whatever it is.
        let _ = channel.stat(at, rest, 0);
    }
}
