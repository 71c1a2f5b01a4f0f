//! Stand-ins: placeholders of files that this process has just made, whose look-up by the kernel is put off.
//!
//! Naming a new file to the kernel costs it a look-up, and most are written and closed without the kernel's ever seeing them. So the number is
//! that of a copy of one of the library's own descriptors (O_PATH, so that raw use fails), and before the kernel could see what it is, it is
//! replaced by one that names the file: before anything is done with the descriptor that is not answered here, before the kernel gets any path, which may
//! lead through /proc/self/fd, and before whatever shares descriptors. The file is found by the path with which it was made; if that leads to another one by then, by
//! a name that the service gives out for this.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU8, AtomicU32};

use polytropo_client::{Channel, File};

use super::kept;
use super::placeholders;
use super::process::{self, LINK};
use super::table::{Entry, Table};
use crate::sys::{self, nr};
use crate::text::Text;

const RECORDS: usize = 64;
const PATH_BYTES_MAX: usize = 256;
const O_NOFOLLOW: usize = 0o400_000;
const F_DUPFD: usize = 0;
const F_DUPFD_CLOEXEC: usize = 1030;
const F_GETFD: usize = 1;
const FD_CLOEXEC: isize = 1;
const EMFILE: isize = -24;
const EIO: isize = -5;

/// The path of one, as the program gave it, with a zero byte at its end.
struct Record {
    taken: AtomicU32,
    path: [AtomicU8; PATH_BYTES_MAX],
}

static RECORD: [Record; RECORDS] =
    [const { Record { taken: AtomicU32::new(0), path: [const { AtomicU8::new(0) }; PATH_BYTES_MAX] } };
        RECORDS];
static COUNT: AtomicU32 = AtomicU32::new(0);

/// Whether there are any.
#[inline]
pub fn any() -> bool {
    COUNT.load(Acquire) != 0
}

/// In a forked child, which has none: they were replaced before.
pub fn forget_in_child() {
    COUNT.store(0, Release);
    RECORD.iter().for_each(|record| record.taken.store(0, Relaxed));
}

/// A number for a file that is about to be made, or the errno of the kernel.
pub fn take_number(channel: &Channel, close_on_exec: bool) -> Result<usize, isize> {
    let [.., own] = channel.descriptors();
    let how = if close_on_exec { F_DUPFD_CLOEXEC } else { F_DUPFD };
    // SAFETY: concerns no memory.
    let copy = || unsafe { sys::call(nr::FCNTL, [own as usize, how, 0, 0, 0, 0]) };
    let mut number = copy();
    if number == EMFILE {
        kept::give_up_all();
        number = copy();
    }
    usize::try_from(number).map_err(|_| number)
}

/// Keeps the path with which a file was made, in parts. None: there is no room for it, so that the kernel has to name the file now.
pub fn keep_path(parts: [&[u8]; 3]) -> Option<u32> {
    if parts.iter().map(|part| part.len()).sum::<usize>() >= PATH_BYTES_MAX {
        return None;
    }
    let free = |record: &Record| record.taken.compare_exchange(0, 1, AcqRel, Relaxed).is_ok();
    let index = RECORD.iter().position(free)?;
    for (place, byte) in RECORD[index].path.iter().zip(parts.into_iter().flatten().chain(&[0])) {
        place.store(*byte, Relaxed);
    }
    // First: as soon as it is one, another thread may replace it.
    COUNT.fetch_add(1, AcqRel);
    Some(index as u32)
}

/// The stand-in is none any more.
pub fn release(index: u32) {
    if let Some(record) = RECORD.get(index as usize) {
        record.taken.store(0, Release);
        COUNT.fetch_sub(1, AcqRel);
    }
}

/// Puts a descriptor that names the file in the place of a stand-in that is locked for it; nothing to do if it is none, or none any more.
pub fn replace(descriptor: usize, entry: &Entry) -> Result<(), isize> {
    let Some(index) = entry.stand_in() else { return Ok(()) };
    // Of a channel that has ended the inode is known still.
    let (channel, file) = entry.file().and_then(|number| LINK.of(number)).ok_or(EIO)?;
    let named = match by_path(channel, index, file) {
        Err(errno) if errno != EMFILE => by_hand(channel, file)?,
        named => named?,
    };
    // SAFETY: concerns no memory.
    let flags = unsafe { sys::call(nr::FCNTL, [descriptor, F_GETFD, 0, 0, 0, 0]) };
    let how = if flags & FD_CLOEXEC != 0 { sys::O_CLOEXEC } else { 0 };
    // SAFETY: as above.
    let replaced = unsafe { sys::call(nr::DUP3, [named, descriptor, how, 0, 0, 0]) };
    sys::close(named as i32);
    if replaced < 0 {
        return Err(replaced);
    }
    if let Some(index) = entry.take_stand_in() {
        release(index);
    }
    Ok(())
}

fn by_path(channel: &Channel, index: u32, file: File) -> Result<usize, isize> {
    let record = RECORD.get(index as usize).ok_or(EIO)?;
    let mut path = [0; PATH_BYTES_MAX];
    for (byte, place) in path.iter_mut().zip(&record.path) {
        *byte = place.load(Relaxed);
    }
    let length = path.iter().position(|byte| *byte == 0).ok_or(EIO)?;
    verified(channel, &path[..=length], file)
}

/// The file has lost its name, or was moved.
#[cold]
fn by_hand(channel: &Channel, file: File) -> Result<usize, isize> {
    let name = channel.hand(file).map_err(|_| EIO)?;
    let mut path = Text::<{ process::PATH_BYTES_MAX + 64 }>::default();
    path.push(process::setting().mount()).push(b"/").push(&name).push(b"\0");
    verified(channel, path.bytes(), file)
}

/// A descriptor that only names what a path leads to, if that is the file.
fn verified(channel: &Channel, path: &[u8], file: File) -> Result<usize, isize> {
    let mut named = sys::open(path, sys::O_PATH | O_NOFOLLOW, 0);
    if named == EMFILE {
        kept::give_up_all();
        named = sys::open(path, sys::O_PATH | O_NOFOLLOW, 0);
    }
    let named = usize::try_from(named).map_err(|_| if named == EMFILE { EMFILE } else { EIO })?;
    let inode = channel.inode_of(file);
    let same = sys::status(named)
        .is_some_and(|seen| seen.device == process::setting().device() && Some(seen.inode) == inode);
    if same {
        return Ok(named);
    }
    sys::close(named as i32);
    Err(EIO)
}

/// Before the kernel looks at the descriptor. False if it would see something else.
#[inline]
#[must_use]
pub fn name_one(table: &Table, descriptor: usize) -> bool {
    !any() || table.entry(descriptor).is_none_or(|entry| name(descriptor, entry, placeholders::lock))
}

/// Before the kernel looks at any. Those that cannot be named stay: few paths lead to them.
#[inline]
pub fn name_all(table: &Table) {
    if any() {
        table.known().for_each(|(descriptor, entry)| {
            name(descriptor, entry, placeholders::lock_soon);
        });
    }
}

#[cold]
fn name(descriptor: usize, entry: &Entry, lock: impl FnOnce(&Entry) -> bool) -> bool {
    if entry.stand_in().is_none() || !lock(entry) {
        return entry.stand_in().is_none();
    }
    let replaced = replace(descriptor, entry);
    placeholders::unlock(entry);
    replaced.inspect_err(|errno| placeholders::refuse(*errno)).is_ok()
}
