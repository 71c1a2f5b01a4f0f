//! Bytes that the kernel would move between files: copy_file_range(2), sendfile(2), FICLONE. For files of ours that it has not opened, opening both costs more than
//! copying what small files have.

use super::placeholders;
use super::process;
use super::reading;
use super::table::{Entry, Kind, Table};
use super::{calls, writing};
use crate::hooks::Answer;
use crate::sys::{self, nr};

/// Of a file with more left the kernel and the service copy faster.
const COPIED_BYTES_MAX: u64 = 256 << 10;
const PIECE_BYTES: usize = 4096;
const O_ACCMODE: usize = 3;
const O_WRONLY: usize = 1;
const F_GETFL: usize = 3;
const SEEK_CUR: usize = 1;
const EXDEV: isize = -18;
const EOPNOTSUPP: isize = -95;
pub const FICLONE: usize = 0x4004_9409;

/// An end of a copy: a descriptor, and where its offset is if it is not the open file's own.
#[derive(Clone, Copy)]
struct End {
    descriptor: usize,
    offset: Option<*mut i64>,
}

impl End {
    /// A null pointer means the open file's own offset.
    fn new(descriptor: usize, offset: usize) -> Self {
        Self { descriptor, offset: (offset != 0).then_some(offset as *mut i64) }
    }

    fn position(self) -> Option<i64> {
        // SAFETY: the program's own word, which the kernel would read.
        self.offset.map(|at| unsafe { at.read_unaligned() })
    }

    /// With an offset, whether it is one that needs no error told.
    fn is_plain(self) -> bool {
        self.position().is_none_or(|at| (0..=1 << 46).contains(&at))
    }

    fn advance(self, by: usize) {
        if let Some(at) = self.offset {
            // SAFETY: as above; the kernel would write it.
            unsafe { at.write_unaligned(at.read_unaligned() + by as i64) };
        }
    }

    fn read(self, table: &Table, to: usize, count: usize) -> isize {
        let (number, arguments, answer) = match self.position() {
            None => {
                let arguments = [self.descriptor, to, count, 0, 0, 0];
                (nr::READ, arguments, reading::read(table, &arguments))
            }
            Some(at) => {
                let arguments = [self.descriptor, to, count, at as usize, 0, 0];
                (nr::PREAD64, arguments, reading::pread(table, &arguments))
            }
        };
        done(number, &arguments, answer)
    }

    fn write(self, table: &Table, from: usize, count: usize) -> isize {
        let (number, arguments, answer) = match self.position() {
            None => {
                let arguments = [self.descriptor, from, count, 0, 0, 0];
                (nr::WRITE, arguments, writing::write(table, &arguments))
            }
            Some(at) => {
                let arguments = [self.descriptor, from, count, at as usize, 0, 0];
                (nr::PWRITE64, arguments, writing::pwrite(table, &arguments))
            }
        };
        done(number, &arguments, answer)
    }

    /// Of what was read, `by` bytes were not written.
    fn go_back(self, table: &Table, by: usize) {
        if self.offset.is_none() && by > 0 {
            let arguments = [self.descriptor, by.wrapping_neg(), SEEK_CUR, 0, 0, 0];
            done(nr::LSEEK, &arguments, reading::seek(table, &arguments));
        }
    }
}

/// What became of a call of ours, whoever does it.
fn done(number: usize, arguments: &[usize; 6], answer: Answer) -> isize {
    match answer {
        Answer::Done(result) | Answer::Asked(result) => result,
        // SAFETY: about bytes of this frame, and descriptors of the program, as it asked for.
        Answer::Pass(_) => unsafe { sys::call(number, *arguments) },
    }
}

/// copy_file_range(2).
pub fn copy_range(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [from, from_at, to, to_at, count, flags] = *arguments;
    let (from, to) = (End::new(from, from_at), End::new(to, to_at));
    let copied = (flags == 0).then(|| copy(table, from, to, count)).flatten();
    copied.unwrap_or_else(|| calls::about_descriptor(table, nr::COPY_FILE_RANGE, arguments))
}

/// sendfile(2).
pub fn send_file(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [to, from, from_at, count, ..] = *arguments;
    let (from, to) = (End::new(from, from_at), End::new(to, 0));
    let copied = is_written(table, to.descriptor).then(|| copy(table, from, to, count)).flatten();
    copied.unwrap_or_else(|| calls::about_descriptor(table, nr::SENDFILE, arguments))
}

/// A placeholder that can be read.
fn readable(table: &Table, descriptor: usize) -> Option<&Entry> {
    let entry = table.entry(descriptor).filter(|_| placeholders::any())?;
    let ours = placeholders::settled(entry) == Kind::Placeholder;
    (ours && entry.flags() as usize & O_ACCMODE != O_WRONLY).then_some(entry)
}

/// A placeholder that can be written anywhere.
fn is_written(table: &Table, descriptor: usize) -> bool {
    let Some(entry) = table.entry(descriptor).filter(|_| placeholders::any()) else { return false };
    let ours = placeholders::settled(entry) == Kind::Placeholder;
    ours && entry.flags() as usize & O_ACCMODE != 0 && !writing::appends(entry)
}

/// Copies what little there is; None: it is the kernel's.
fn copy(table: &Table, from: End, to: End, count: usize) -> Option<Answer> {
    let source = readable(table, from.descriptor)?;
    if !is_written(table, to.descriptor) {
        return is_elsewhere(table, to.descriptor).then_some(Answer::Done(EXDEV));
    }
    let target = table.entry(to.descriptor)?;
    let (read, written) = (placeholders::attributes(source)?, placeholders::inode(target)?);
    // Within one file the kernel looks whether both ranges meet.
    (read.ino != written && from.is_plain() && to.is_plain()).then_some(())?;
    (read.size_bytes <= COPIED_BYTES_MAX).then_some(())?;
    let count = count.min(COPIED_BYTES_MAX as usize);
    let mut bytes = core::mem::MaybeUninit::<[u8; PIECE_BYTES]>::uninit();
    let place = bytes.as_mut_ptr() as usize;
    let mut copied = 0;
    while copied < count {
        let got = from.read(table, place, (count - copied).min(PIECE_BYTES));
        let Some(got) = usize::try_from(got).ok().filter(|got| *got > 0) else {
            return Some(Answer::Done(if copied == 0 { got } else { copied as isize }));
        };
        let put = to.write(table, place, got);
        let moved = usize::try_from(put).unwrap_or(0);
        from.go_back(table, got - moved);
        from.advance(moved);
        to.advance(moved);
        copied += moved;
        if moved < got {
            return Some(Answer::Done(if copied == 0 { put } else { copied as isize }));
        }
    }
    Some(Answer::Done(copied as isize))
}

/// Whether the kernel would refuse to copy there, since it is a file of another filesystem, which is none of FUSE's.
fn is_elsewhere(table: &Table, descriptor: usize) -> bool {
    const FUSE: i64 = 0x6573_5546;
    let is_ours = table.entry(descriptor).is_some_and(|entry| {
        matches!(placeholders::settled(entry), Kind::Placeholder | Kind::Own | Kind::Ours)
    });
    let Some(status) = sys::status(descriptor).filter(|_| !is_ours) else { return false };
    let mut words = [0_i64; 15];
    // SAFETY: the kernel writes its `struct statfs`, 120 bytes.
    let told = unsafe { sys::call(nr::FSTATFS, [descriptor, words.as_mut_ptr() as usize, 0, 0, 0, 0]) };
    let others = told == 0 && words[0] != FUSE && status.device != process::setting().device();
    // SAFETY: concerns no memory.
    let flags = unsafe { sys::call(nr::FCNTL, [descriptor, F_GETFL, 0, 0, 0, 0]) };
    let written = flags >= 0 && flags as usize & (sys::O_PATH | sys::O_APPEND) == 0;
    others && status.is_regular() && written && flags as usize & O_ACCMODE != 0
}

/// FICLONE of ioctl(2): FUSE has no files that share bytes. None: the kernel is asked.
pub fn clone(table: &Table, arguments: &[usize; 6]) -> Option<Answer> {
    let [to, _, from, ..] = *arguments;
    readable(table, from)?;
    if is_written(table, to) {
        return Some(Answer::Done(EOPNOTSUPP));
    }
    is_elsewhere(table, to).then_some(Answer::Done(EXDEV))
}
