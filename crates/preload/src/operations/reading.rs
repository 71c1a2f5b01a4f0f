//! Reads from files of ours.

use polytropo_client::{At, Error, File};

use super::process::{self, LINK};
use super::table::{Entry, Kind, Table};
use crate::hooks::Answer;
use crate::sys;
use crate::trace::{self, Why};

/// Reads of one file before it is opened at the service, too: for fewer it does not pay.
const READS_MIN: u32 = 4;
/// Attempts to move an offset that other threads move as well.
const ATTEMPTS_MAX: u32 = 1000;
const LINK_BYTES_MAX: usize = 1024;

/// What a descriptor is; asked once.
fn kind(descriptor: usize, entry: &Entry) -> Kind {
    let known = entry.kind();
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

/// pread(2) at the service's side; `None` if the kernel has to do it.
fn read_shared(descriptor: usize, entry: &Entry, to: usize, count: usize, offset: u64) -> Option<usize> {
    let file = match entry.file() {
        Some(file) => file,
        None if entry.count_read() == READS_MIN => open_shared(descriptor, entry)?,
        None => return None,
    };
    let channel = LINK.get()?;
    // SAFETY: the program's own buffer, as it would give it to the kernel.
    let got = unsafe { channel.pread_raw(File::from_number(file), to as *mut u8, count, offset) };
    match got {
        Ok(got) => Some(got),
        Err(Error::Gone) => {
            LINK.give_up();
            None
        }
        Err(error) => {
            trace::note_refusal(if let Error::Errno(errno) = error { errno } else { 0 });
            // The kernel has it now, for instance since somebody writes it: not asked again for this descriptor.
            close_shared(entry.take_file());
            None
        }
    }
}

/// Opens at the service what the descriptor is, and makes sure that it is the same.
#[cold]
fn open_shared(descriptor: usize, entry: &Entry) -> Option<u64> {
    let setting = process::setting();
    let generation = entry.generation();
    let mut buffer = [0; LINK_BYTES_MAX];
    let path = sys::path_of(descriptor, &mut buffer)?;
    let path = setting.inside(path)?;
    let channel = LINK.get_or_connect(|| setting.connect())?;
    let opened = channel.open(At::Root, path, 0, 0, 0).ok()?;
    let file = opened.file;
    let same = sys::status(descriptor).is_some_and(|status| {
        let there = &opened.attributes;
        (status.inode, status.size_bytes, status.mtime_s, status.mtime_ns)
            == (there.ino, there.size_bytes, there.mtime_s, u64::from(there.mtime_ns))
    });
    if same && entry.keep_file(generation, file.to_number()) {
        return Some(file.to_number());
    }
    let _ = channel.close(file);
    None
}

pub fn close_shared(file: u64) {
    if file != 0
        && let Some(channel) = LINK.get()
    {
        let _ = channel.close(File::from_number(file));
    }
}

/// pread(2).
pub fn pread(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [descriptor, to, count, offset, ..] = *arguments;
    let Some(entry) = table.entry(descriptor) else { return Answer::Pass(Why::NotOurs) };
    if kind(descriptor, entry) != Kind::Ours || count == 0 || offset > isize::MAX as usize {
        return Answer::Pass(Why::NotOurs);
    }
    match read_shared(descriptor, entry, to, count, offset as u64) {
        Some(got) => Answer::Done(got as isize),
        None => Answer::Pass(Why::NotShared),
    }
}

/// read(2) of a file whose offset we hold.
pub fn read(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [descriptor, to, count, ..] = *arguments;
    let Some(entry) = table.entry(descriptor) else { return Answer::Pass(Why::NotOurs) };
    for _ in 0..ATTEMPTS_MAX {
        let Some(held) = entry.held() else { return Answer::Pass(Why::NotHeld) };
        if count == 0 || kind(descriptor, entry) != Kind::Ours {
            entry.release(descriptor);
            return Answer::Pass(Why::NotOurs);
        }
        let offset = held.offset();
        let (got, shared) = match read_shared(descriptor, entry, to, count, offset) {
            Some(got) => (got as isize, true),
            // SAFETY: the program's own buffer.
            None => (
                unsafe { sys::call(sys::nr::PREAD64, [descriptor, to, count, offset as usize, 0, 0]) },
                false,
            ),
        };
        if got <= 0 || entry.advance(held, offset + got as u64) {
            if shared {
                return Answer::Done(got);
            }
            return Answer::Asked(got);
        }
    }
    entry.release(descriptor);
    Answer::Pass(Why::NotHeld)
}

const SEEK_SET: usize = 0;
const SEEK_CUR: usize = 1;
/// Offsets above are the kernel's business.
const OFFSET_MAX: i64 = 1 << 47;

/// lseek(2) of a file whose offset we hold.
pub fn seek(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [descriptor, by, whence, ..] = *arguments;
    let Some(entry) = table.entry(descriptor) else { return Answer::Pass(Why::NotOurs) };
    for _ in 0..ATTEMPTS_MAX {
        let Some(held) = entry.held() else { return Answer::Pass(Why::NotHeld) };
        if entry.kind() != Kind::Ours {
            break;
        }
        let to = match whence {
            SEEK_SET => by as i64,
            SEEK_CUR => (held.offset() as i64).saturating_add(by as i64),
            // The end, data and holes do not depend on the offset; the kernel's own may move, nobody looks at it.
            // SAFETY: concerns no memory.
            _ => unsafe { sys::call(sys::nr::LSEEK, [descriptor, by, whence, 0, 0, 0]) as i64 },
        };
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
        if entry.advance(held, to as u64) {
            return Answer::Done(to as isize);
        }
    }
    entry.release(descriptor);
    Answer::Pass(Why::NotHeld)
}
