//! Reads from files of ours.

use polytropo_client::{At, Error};

use super::link::label;
use super::placeholders::{self, close_shared};
use super::process::{self, LINK};
use super::table::{AT_END, Entry, Held, Kind, Table};
use super::worth::{self, Event};
use super::writing;
use crate::hooks::Answer;
use crate::sys;
use crate::trace::{self, Why};

/// Reads of one file before it is opened at the service, too: for fewer it does not pay.
const READS_MIN: u32 = 4;
/// Attempts to move an offset that other threads move as well.
pub const ATTEMPTS_MAX: u32 = 1000;
const LINK_BYTES_MAX: usize = 1024;

/// What a descriptor is; asked once.
fn kind(descriptor: usize, entry: &Entry) -> Kind {
    let known = placeholders::settled(entry);
    if known != Kind::Unknown {
        return known;
    }
    let generation = entry.generation();
    let ours = sys::status(descriptor).is_some_and(|status| {
        status.is_regular()
            && status.device == process::setting().device()
            && sys::is_for_reading_only(descriptor)
    });
    let found = if ours { Kind::Ours } else { Kind::Foreign };
    entry.set_kind(generation, found);
    found
}

/// Whether reads are tried here.
fn is_readable(kind: Kind) -> bool {
    matches!(kind, Kind::Ours | Kind::Placeholder)
}

/// pread(2) at the service's side; `None` if the kernel has to do it.
fn read_shared(descriptor: usize, entry: &Entry, to: usize, count: usize, offset: u64) -> Option<usize> {
    let file = match entry.file() {
        Some(file) => file,
        None if pays(entry) => open_shared(descriptor, entry)?,
        None => return None,
    };
    let (channel, number) = LINK.of(file)?;
    // SAFETY: the program's own buffer, as it would give it to the kernel.
    let got = unsafe { channel.pread_raw(number, to as *mut u8, count, offset) };
    match got {
        Ok(got) => Some(got),
        Err(Error::Gone | Error::GoneAmid(_)) => {
            LINK.give_up(channel);
            leave_to_kernel(entry);
            // Until there is another channel.
            entry.begin_reads();
            None
        }
        Err(error) => {
            trace::note_refusal(if let Error::Errno(errno) = error { errno } else { 0 });
            // The kernel has it now, for instance since somebody writes it: not asked again for this descriptor.
            leave_to_kernel(entry);
            None
        }
    }
}

fn leave_to_kernel(entry: &Entry) {
    if entry.kind() == Kind::Ours {
        let _ = close_shared(entry.take_file());
    }
}

/// Whether a file that the kernel has open is to be read here from now on.
fn pays(entry: &Entry) -> bool {
    // Before its own reads are counted: until then its file stays the kernel's.
    (LINK.get().is_some() || worth::count(Event::Read)) && entry.count_read() == READS_MIN
}

/// Opens at the service what the descriptor is, and makes sure that it is the same.
#[cold]
fn open_shared(descriptor: usize, entry: &Entry) -> Option<u64> {
    let setting = process::setting();
    let generation = entry.generation();
    let Some(channel) = LINK.get_or_connect(|| setting.connect()) else {
        if LINK.may_return() {
            entry.begin_reads();
        }
        return None;
    };
    let mut buffer = [0; LINK_BYTES_MAX];
    let path = sys::path_of(descriptor, &mut buffer)?;
    let path = setting.inside(path)?;
    let opened = channel.open(At::Root, path, 0, 0, 0).ok()?;
    let file = opened.file;
    let same = sys::status(descriptor).is_some_and(|status| {
        let there = &opened.attributes;
        (status.inode, status.size_bytes, status.mtime_s, status.mtime_ns)
            == (there.ino, there.size_bytes, there.mtime_s, u64::from(there.mtime_ns))
    });
    let number = label(channel, file);
    if same && entry.keep_file(generation, number) {
        return Some(number);
    }
    let _ = channel.close(file);
    None
}

/// A read that the kernel has to do: of a file that it has open.
fn pass(descriptor: usize, entry: &Entry) -> core::result::Result<(), Answer> {
    if entry.kind() == Kind::Own {
        // None of the program's.
        return Err(writing::UNREADABLE);
    }
    if placeholders::upgrade(descriptor, entry) { Ok(()) } else { Err(Answer::Done(placeholders::refusal())) }
}

/// pread(2).
pub fn pread(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [descriptor, to, count, offset, ..] = *arguments;
    let Some(entry) = table.entry(descriptor) else { return Answer::Pass(Why::NotOurs) };
    let shared = is_readable(kind(descriptor, entry));
    if writing::is_write_only(entry) {
        return writing::UNREADABLE;
    }
    let plain = count != 0 && offset <= isize::MAX as usize;
    let got = (shared && plain).then(|| read_shared(descriptor, entry, to, count, offset as u64)).flatten();
    let why = if shared { Why::NotShared } else { Why::NotOurs };
    match got {
        Some(got) => Answer::Done(got as isize),
        None => pass(descriptor, entry).map_or_else(|answer| answer, |()| Answer::Pass(why)),
    }
}

/// read(2) of a file whose offset we hold.
pub fn read(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [descriptor, to, count, ..] = *arguments;
    let Some(entry) = table.entry(descriptor) else { return Answer::Pass(Why::NotOurs) };
    for _ in 0..ATTEMPTS_MAX {
        let Some(held) = entry.held() else { break };
        if writing::is_write_only(entry) {
            return writing::UNREADABLE;
        }
        if count == 0 || !is_readable(kind(descriptor, entry)) {
            if let Err(answer) = pass(descriptor, entry) {
                return answer;
            }
            entry.release(descriptor);
            return Answer::Pass(Why::NotOurs);
        }
        let Some(offset) = offset_of(entry, held) else { break };
        let (got, shared) = match read_shared(descriptor, entry, to, count, offset) {
            Some(got) => (got as isize, true),
            None => {
                if let Err(answer) = pass(descriptor, entry) {
                    return answer;
                }
                // SAFETY: the program's own buffer.
                let got =
                    unsafe { sys::call(sys::nr::PREAD64, [descriptor, to, count, offset as usize, 0, 0]) };
                (got, false)
            }
        };
        if got <= 0 || entry.advance(held, offset + got as u64).is_some() {
            if shared {
                return Answer::Done(got);
            }
            return Answer::Asked(got);
        }
    }
    if let Err(answer) = pass(descriptor, entry) {
        return answer;
    }
    entry.release(descriptor);
    Answer::Pass(Why::NotHeld)
}

const SEEK_SET: usize = 0;
const SEEK_CUR: usize = 1;
const SEEK_END: usize = 2;
const EINVAL: isize = -22;
/// Offsets above are the kernel's business.
const OFFSET_MAX: i64 = 1 << 47;

/// Where a placeholder's file ends, if that is known.
fn end_of(entry: &Entry) -> Option<i64> {
    let found = (entry.kind() == Kind::Placeholder).then(|| placeholders::attributes(entry)).flatten()?;
    i64::try_from(found.size_bytes).ok()
}

/// A held offset as a number; None if only the kernel can tell.
fn offset_of(entry: &Entry, held: Held) -> Option<u64> {
    if held.offset() == AT_END { end_of(entry).map(|end| end as u64) } else { Some(held.offset()) }
}

/// lseek(2) of a file whose offset we hold.
pub fn seek(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [descriptor, by, whence, ..] = *arguments;
    let Some(entry) = table.entry(descriptor) else { return Answer::Pass(Why::NotOurs) };
    for _ in 0..ATTEMPTS_MAX {
        let Some(held) = entry.held() else { break };
        if !is_readable(placeholders::settled(entry)) {
            break;
        }
        let to = match whence {
            SEEK_SET => by as i64,
            SEEK_CUR => match offset_of(entry, held) {
                Some(offset) => (offset as i64).saturating_add(by as i64),
                None => break,
            },
            SEEK_END if let Some(end) = end_of(entry) => end.saturating_add(by as i64),
            _ if !placeholders::upgrade(descriptor, entry) => return Answer::Done(placeholders::refusal()),
            // The end, data and holes do not depend on the offset; the kernel's own may move, nobody looks at it.
            // SAFETY: concerns no memory.
            _ => unsafe { sys::call(sys::nr::LSEEK, [descriptor, by, whence, 0, 0, 0]) as i64 },
        };
        if to < 0 && whence == SEEK_END {
            return Answer::Done(EINVAL);
        }
        if to < 0 {
            // EINVAL and the like; of SEEK_SET and SEEK_CUR the kernel says which.
            if whence > SEEK_CUR {
                return Answer::Asked(to as isize);
            }
            break;
        }
        if to >= OFFSET_MAX {
            break;
        }
        if entry.advance(held, to as u64).is_some() {
            return Answer::Done(to as isize);
        }
    }
    if let Err(answer) = pass(descriptor, entry) {
        return answer;
    }
    entry.release(descriptor);
    Answer::Pass(Why::NotHeld)
}
