//! The keeper's side: writes what a worker held when it died. It believes the memory nothing: a worker could have written those
//! bytes to those files itself, and nothing else can come of it.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};
use rustix::io::{Errno, Result};

use super::layout::{BYTES_AT, ENTRIES_AT, ENTRY_BYTES, PAGE_BYTES, PAGES};

/// What became of held bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    pub bytes: u64,
    pub lost_bytes: u64,
    /// Why the first of those were lost.
    pub problem: Option<Errno>,
    /// Entries that made no sense.
    pub damaged: u64,
}

/// Whether a file may be kept for a worker: a regular one, opened for writing.
pub fn fits(file: &OwnedFd) -> Result<bool> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    let writable = matches!(flags & OFlags::ACCMODE, OFlags::WRONLY | OFlags::RDWR);
    // From what the kernel knows: a worker may send a file of a mount that nobody answers for.
    let flags_of_look = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(file, "", flags_of_look, StatxFlags::TYPE)?;
    let regular = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile;
    Ok(writable && regular && !flags.contains(OFlags::PATH))
}

/// Writes all that is held to the files that were kept, by key. The worker must have ended.
pub fn recover(memory: &OwnedFd, files: &HashMap<u64, OwnedFd>) -> Result<Recovered> {
    let mut recovered = Recovered::default();
    if files.is_empty() {
        return Ok(recovered);
    }
    let mut refused = HashMap::new();
    for (key, file) in files {
        // The open file is the dead worker's; where its bytes go the entries say. A file that may only be appended to refuses this.
        let flags = rustix::fs::fcntl_getfl(file);
        let set = flags.and_then(|flags| rustix::fs::fcntl_setfl(file, flags & !OFlags::APPEND));
        if let Err(errno) = set {
            refused.insert(*key, errno);
        }
    }
    let mut entries = vec![0; PAGES * ENTRY_BYTES];
    read_all(memory, &mut entries, ENTRIES_AT as u64)?;
    let mut bytes = [0; PAGE_BYTES];
    for (page, entry) in entries.chunks_exact(ENTRY_BYTES).enumerate() {
        let word =
            |at: usize| entry[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let (key, offset, range) = (word(0), word(8), word(16));
        if key == 0 {
            continue;
        }
        let (from, end) = ((range & 0xffff_ffff) as usize, (range >> 32) as usize);
        let last = offset.checked_add(PAGE_BYTES as u64).filter(|last| i64::try_from(*last).is_ok());
        let sound = from < end && end <= PAGE_BYTES && offset % PAGE_BYTES as u64 == 0 && last.is_some();
        let Some(file) = files.get(&key).filter(|_| sound) else {
            recovered.damaged += 1;
            continue;
        };
        let at = (BYTES_AT + page * PAGE_BYTES + from) as u64;
        let bytes = &mut bytes[..end - from];
        let written = match refused.get(&key) {
            None => read_all(memory, bytes, at).and_then(|()| write_all(file, bytes, offset + from as u64)),
            Some(errno) => Err(*errno),
        };
        match written {
            Ok(()) => recovered.bytes += bytes.len() as u64,
            Err(errno) => {
                recovered.lost_bytes += bytes.len() as u64;
                recovered.problem = recovered.problem.or(Some(errno));
            }
        }
    }
    Ok(recovered)
}

pub(crate) fn read_all(from: impl AsFd, bytes: &mut [u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        match rustix::io::retry_on_intr(|| rustix::io::pread(&from, &mut *rest, offset + done as u64))? {
            0 => return Err(Errno::IO),
            count => done += count,
        }
    }
    Ok(())
}

pub(crate) fn write_all(to: impl AsFd, bytes: &[u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::retry_on_intr(|| rustix::io::pwrite(&to, &bytes[done..], offset + done as u64))? {
            0 => return Err(Errno::IO),
            count => done += count,
        }
    }
    Ok(())
}
