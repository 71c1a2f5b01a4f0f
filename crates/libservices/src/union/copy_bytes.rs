//! Copying the bytes of one open file to another, holes left out.

use std::cell::Cell;

use rustix::fs::copy_file_range;

use super::layers::OpenFile;
use crate::error::{Errno, Error, Result};
use crate::types::*;

const BUFFER_SIZE_BYTES: usize = 256 * 1024;

/// Copies the first `size_bytes` of `from` into the empty file `to`; holes stay holes. Says where the copied bytes end.
pub fn copy_bytes(caller: &Caller, from: &OpenFile, to: &OpenFile, size_bytes: u64) -> Result<u64> {
    let hole_at_end = Cell::new(None);
    copy_range(caller, from, to, (0, size_bytes), |hole| {
        hole_at_end.set(Some(hole));
        Ok(())
    })?;
    Ok(hole_at_end.get().filter(|(_, end)| *end == size_bytes).map_or(size_bytes, |(start, _)| start))
}

/// `copy_bytes` of a file without holes.
pub fn copy_dense(caller: &Caller, from: &OpenFile, to: &OpenFile, size_bytes: u64) -> Result<u64> {
    copy_extent(caller, from, to, (0, size_bytes), &mut Vec::new())
}

/// Copies a range to the same place in `to`, whatever is there. EIO when `from` ends earlier.
pub fn replace_bytes(caller: &Caller, from: &OpenFile, to: &OpenFile, range: (u64, u64)) -> Result<()> {
    match copy_range(caller, from, to, range, |hole| fill_with_zeros(caller, to, hole))? {
        true => Ok(()),
        false => Err(Error::new(Errno::IO, "copy from a lower file that became shorter")),
    }
}

/// Says whether `from` had that many bytes.
fn copy_range(
    caller: &Caller,
    from: &OpenFile,
    to: &OpenFile,
    (mut at, end): (u64, u64),
    skip: impl Fn((u64, u64)) -> Result<()>,
) -> Result<bool> {
    let mut buffer = Vec::new();
    while at < end {
        let next = next_data(caller, from, at, end)?;
        let start = next.map_or(end, |(start, _)| start);
        if start > at {
            skip((at, start))?;
        }
        let Some((start, stop)) = next else { return Ok(true) };
        if copy_extent(caller, from, to, (start, stop), &mut buffer)? < stop {
            return Ok(false);
        }
        at = stop;
    }
    Ok(true)
}

/// What a file has in a range becomes zeros; where it has nothing, nothing is written.
fn fill_with_zeros(caller: &Caller, to: &OpenFile, (mut at, end): (u64, u64)) -> Result<()> {
    while at < end {
        let Some((start, stop)) = next_data(caller, to, at, end)? else { return Ok(()) };
        let zeros = vec![0; BUFFER_SIZE_BYTES.min(usize::try_from(stop - start).unwrap_or(usize::MAX))];
        at = start;
        while at < stop {
            let length = zeros.len().min(usize::try_from(stop - at).unwrap_or(usize::MAX));
            write_all(caller, to, at, &zeros[..length])?;
            at += length as u64;
        }
    }
    Ok(())
}

/// The next extent of data at or after `at`. `None` when only a hole is left.
fn next_data(caller: &Caller, from: &OpenFile, at: u64, size_bytes: u64) -> Result<Option<(u64, u64)>> {
    let (service, node) = (from.service(), from.held.node);
    let start = match service.seek(caller, node, from.handle, at, SeekTo::Data) {
        Ok(start) => start,
        Err(e) if e.is(Errno::NXIO) => return Ok(None),
        Err(e) if e.is(Errno::OPNOTSUPP) || e.is(Errno::INVAL) => return Ok(Some((at, size_bytes))),
        Err(e) => return Err(e),
    };
    if start >= size_bytes {
        return Ok(None);
    }
    let end = service.seek(caller, node, from.handle, start, SeekTo::Hole)?.min(size_bytes);
    // A file that shrinks meanwhile must not hold us for ever.
    Ok((end > start && start >= at).then_some((start, end)))
}

/// Says how far it came.
fn copy_extent(
    caller: &Caller,
    from: &OpenFile,
    to: &OpenFile,
    (mut at, end): (u64, u64),
    buffer: &mut Vec<u8>,
) -> Result<u64> {
    let hosts = from.service().host_file(from.handle).zip(to.service().host_file(to.handle));
    if let Some((source, target)) = hosts {
        while at < end {
            let (mut read_at, mut write_at) = (at, at);
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(1 << 30);
            match copy_file_range(&*source, Some(&mut read_at), &*target, Some(&mut write_at), length) {
                Ok(0) => break,
                Ok(copied) => at += copied as u64,
                Err(Errno::INTR) => {}
                // The host will not; by hand then. What really fails (no space) fails there too.
                Err(_) => break,
            }
        }
    }
    buffer.resize(BUFFER_SIZE_BYTES.min(usize::try_from(end - at).unwrap_or(BUFFER_SIZE_BYTES)), 0);
    while at < end {
        let length = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
        let count = from.service().read(caller, from.held.node, from.handle, at, &mut buffer[..length])?;
        if count == 0 {
            break;
        }
        write_all(caller, to, at, &buffer[..count])?;
        at += count as u64;
    }
    Ok(at)
}

pub fn write_all(caller: &Caller, to: &OpenFile, offset: u64, data: &[u8]) -> Result<()> {
    let mut done = 0;
    while done < data.len() {
        let at = offset + done as u64;
        match to.service().write(caller, to.held.node, to.handle, at, &data[done..])? {
            0 => return Err(Error::new(Errno::IO, "write a copy")),
            count => done += count,
        }
    }
    Ok(())
}
