//! Descriptors that calls name where the table does not say, and ends of descriptors that mean more than an end.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use super::table::{Entry, Kind, Table};
use super::{calls, directories, moving, placeholders, process, standins};
use crate::hooks::Answer;
use crate::sys::{self, nr};

const EBADF: isize = -9;
const FIOCLEX: usize = 0x5451;
const FIONCLEX: usize = 0x5450;
/// Requests of terminals and of all files, and of sockets: they name no other descriptor.
const TYPE_OF_TERMINALS: usize = 0x54;
const TYPE_OF_SOCKETS: usize = 0x89;
const FD_CLOEXEC: usize = 1;

/// ioctl(2): many name a second descriptor, as a number or somewhere in a structure.
pub fn control(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [descriptor, request, ..] = *arguments;
    let request = request as u32 as usize;
    if matches!(request, FIOCLEX | FIONCLEX) && is_placeholder(table, descriptor) {
        let flags = if request == FIOCLEX { FD_CLOEXEC } else { 0 };
        return placeholders::set_flags(table, descriptor, flags);
    }
    if request == moving::FICLONE
        && let Some(answer) = moving::clone(table, arguments)
    {
        return answer;
    }
    if !matches!(request >> 8 & 0xff, TYPE_OF_TERMINALS | TYPE_OF_SOCKETS) {
        make_all_real(table);
    }
    calls::about_descriptor(table, nr::IOCTL, arguments)
}

/// Descriptors of the library's own are none of the program's, which finds their numbers where it looks at all (/proc/self/fd).
#[inline]
pub fn refuse_own(table: &Table, number: usize, arguments: &[usize; 6]) -> Option<Answer> {
    let names_one = crate::table::DESCRIPTORS.get(number).is_some_and(|named| named & 1 != 0);
    let own = names_one && table.entry(arguments[0]).is_some_and(|entry| entry.kind() == Kind::Own);
    own.then_some(Answer::Done(EBADF))
}

/// A call may name any descriptor in a structure.
pub fn make_all_real(table: &Table) {
    placeholders::upgrade_all(table, false);
    directories::upgrade_all(false);
}

fn is_placeholder(table: &Table, descriptor: usize) -> bool {
    placeholders::any()
        && table.entry(descriptor).is_some_and(|entry| placeholders::settled(entry) == Kind::Placeholder)
}

/// Files of ours of which this process has, or had, record locks. They all end with any descriptor of the file, but the kernel knows nothing of
/// placeholders. A child has no locks; that it looks at these is no harm.
static LOCKED: [AtomicU64; LOCKED_MAX] = [const { AtomicU64::new(0) }; LOCKED_MAX];
const LOCKED_MAX: usize = 64;
/// In the last place: more than there is room for.
const MANY: u64 = u64::MAX;

/// fcntl(2): a record lock is about to be taken. Whatever else is open of its file is made real before: that ends a descriptor of the
/// file's, and with it all locks.
#[cold]
pub fn note_lock(table: &Table, descriptor: usize) {
    if !standins::name_one(table, descriptor) {
        return;
    }
    let ours = sys::status(descriptor).filter(|status| status.device == process::setting().device());
    let Some(inode) = ours.map(|status| status.inode) else { return };
    let (last, others) = LOCKED.split_last().expect("there are some");
    let mut noted = false;
    for place in others {
        match place.compare_exchange(0, inode, AcqRel, Acquire) {
            Ok(_) => {
                noted = true;
                break;
            }
            Err(there) if there == inode => return,
            Err(_) => {}
        }
    }
    if !noted {
        last.store(MANY, Release);
    }
    for (number, entry) in table.known() {
        if placeholders::settled(entry) == Kind::Placeholder && placeholders::inode(entry) == Some(inode) {
            placeholders::upgrade(number, entry);
        }
    }
}

/// Whether a file may have record locks of this process: then the kernel opens it at once.
#[inline]
pub fn is_locked(inode: impl FnOnce() -> Option<u64>) -> bool {
    LOCKED[0].load(Acquire) != 0 && inode().is_some_and(was_locked)
}

#[cold]
fn was_locked(inode: u64) -> bool {
    LOCKED.iter().map(|place| place.load(Acquire)).any(|place| place == inode || place == MANY)
}

/// A descriptor is about to end: a placeholder whose end takes record locks away is made real first.
#[inline]
pub fn before_end(descriptor: usize, entry: &Entry) {
    if LOCKED[0].load(Acquire) != 0 && entry.kind() == Kind::Placeholder {
        end_with_locks(descriptor, entry);
    }
}

#[cold]
fn end_with_locks(descriptor: usize, entry: &Entry) {
    if placeholders::inode(entry).is_some_and(was_locked) {
        placeholders::upgrade(descriptor, entry);
    }
}
