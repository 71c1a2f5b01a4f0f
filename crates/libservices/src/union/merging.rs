//! Operations on open files whose bytes lie in two layers: each goes to the layer that holds the bytes, piece by piece.

use std::sync::Arc;

use super::Union;
use super::copy_bytes::write_all;
use super::files::File;
use super::layers::OpenFile;
use super::partial::Partial;
use crate::error::{Errno, Error, Result};
use crate::types::*;

/// What is copied before it is recorded, when all of a file is brought up.
const STEP_BYTES: u64 = 8 << 20;

impl Union {
    pub(super) fn read_merged(
        &self,
        caller: &Caller,
        (file, open, partial): (&File, &OpenFile, &Partial),
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        let end = offset.saturating_add(buffer.len() as u64);
        let mut at = offset;
        while at < end {
            let (own, stop) = partial.run(at, end);
            let piece = &mut buffer[(at - offset) as usize..(stop - offset) as usize];
            let count = if own {
                open.service().read(caller, open.held.node, open.handle, at, piece)?
            } else {
                let lower = file.lower(&self.own, partial)?;
                lower.service().read(&self.own, lower.held.node, lower.handle, at, piece)?
            };
            at += count as u64;
            if at < stop {
                if own || partial.run(at, stop).0 {
                    // The end; or it was cut meanwhile.
                    break;
                }
                return Err(Error::new(Errno::IO, "read a lower file that became shorter"));
            }
        }
        Ok((at - offset) as usize)
    }

    /// Not for files opened to append: what they write is the upper's own.
    pub(super) fn write_merged(
        &self,
        caller: &Caller,
        (file, open, partial): (&File, &OpenFile, &Partial),
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        let end = offset.checked_add(data.len() as u64);
        let end = end.ok_or_else(|| Error::new(Errno::INVAL, "write beyond the largest file"))?;
        let mut at = offset;
        while at < end {
            let rest = &data[(at - offset) as usize..];
            let written = match self.write_run(caller, (file, open, partial), at, rest) {
                Ok(written) => written,
                Err(_) if at > offset => break,
                Err(e) => return Err(e),
            };
            if written == 0 {
                break;
            }
            at += written;
        }
        Ok((at - offset) as usize)
    }

    /// Writes as much of `data` as lies in blocks of one kind.
    fn write_run(
        &self,
        caller: &Caller,
        (file, open, partial): (&File, &OpenFile, &Partial),
        at: u64,
        data: &[u8],
    ) -> Result<u64> {
        let end = at + data.len() as u64;
        {
            let _blocks = self.keep_blocks(&file.node, partial)?;
            let (own, stop) = partial.run(at, end);
            if own && !partial.has_loose_in(at, stop) {
                let piece = &data[..(stop - at) as usize];
                return Ok(open.service().write(caller, open.held.node, open.handle, at, piece)? as u64);
            }
        }
        let _alone = partial.filling.write();
        let (own, stop) = partial.run(at, end);
        if own {
            self.settle_blocks(&file.node, partial)?;
            // Somebody else brought them up meanwhile; from the beginning.
            return Ok(open.service().write(
                caller,
                open.held.node,
                open.handle,
                at,
                &data[..(stop - at) as usize],
            )? as u64);
        }
        let cluster_bytes = partial.next_cluster_bytes(&self.sizes);
        let mut blocks = partial.blocks();
        let (first, last) = blocks.around(at, stop, cluster_bytes);
        if (first, last) != (at, stop) {
            let lower = file.lower(&self.own, partial)?;
            self.bring_up(partial, (&lower, open), (first, last), (at, stop))?;
        }
        write_all(caller, open, at, &data[..(stop - at) as usize])?;
        if !self.save_loosely((file, open, partial), &blocks, (first, last))? {
            open.service().order(&self.own, open.held.node, open.handle)?;
            blocks.settle();
            blocks.take(first, last);
            self.save(&file.node, partial, blocks)?;
        }
        if file.flags.intersects(OpenFlags::SYNC | OpenFlags::DSYNC) {
            open.service().fsync(&self.own, open.held.node, open.handle, false)?;
        }
        Ok(stop - at)
    }

    pub(super) fn allocate_merged(
        &self,
        caller: &Caller,
        (file, open, partial): (&File, &OpenFile, &Partial),
        mode: FallocateMode,
        (offset, length): (u64, u64),
    ) -> Result<()> {
        let moves =
            FallocateMode::COLLAPSE_RANGE | FallocateMode::INSERT_RANGE | FallocateMode::UNSHARE_RANGE;
        let service = open.service();
        let allocate = || service.fallocate(caller, open.held.node, open.handle, mode, offset, length);
        if !file.flags.contains(OpenFlags::WRITE) || length == 0 || offset.checked_add(length).is_none() {
            // The upper says what is wrong.
            return allocate();
        }
        if mode.intersects(moves) {
            self.bring_all_up(file, open, partial)?;
            return allocate();
        }
        if !mode.intersects(FallocateMode::PUNCH_HOLE | FallocateMode::ZERO_RANGE) {
            let _blocks = self.keep_blocks(&file.node, partial)?;
            return allocate();
        }
        let _alone = partial.filling.write();
        self.settle_blocks(&file.node, partial)?;
        let mut blocks = partial.blocks();
        let end = offset.saturating_add(length).min(blocks.limit_bytes);
        if offset >= end {
            return allocate();
        }
        // What is left of the blocks at the edges comes up first.
        let first = offset / blocks.block_bytes * blocks.block_bytes;
        let last = end.next_multiple_of(blocks.block_bytes).min(blocks.limit_bytes);
        if (first, last) != (offset, end) {
            let lower = file.lower(&self.own, partial)?;
            self.bring_up(partial, (&lower, open), (first, last), (offset, end))?;
            service.order(&self.own, open.held.node, open.handle)?;
        }
        allocate()?;
        blocks.take(first, last);
        self.save(&file.node, partial, blocks)
    }

    /// All that is missing.
    fn bring_all_up(&self, file: &File, open: &OpenFile, partial: &Partial) -> Result<()> {
        let _alone = partial.filling.write();
        self.settle_blocks(&file.node, partial)?;
        let lower = file.lower(&self.own, partial)?;
        let mut blocks = partial.blocks();
        let step_bytes = STEP_BYTES.max(blocks.block_bytes);
        let mut at = 0;
        while at < blocks.limit_bytes {
            let end = (at + step_bytes).min(blocks.limit_bytes);
            if blocks.run(at, end) != (true, end) {
                self.bring_up(partial, (&lower, open), (at, end), (end, end))?;
                open.service().order(&self.own, open.held.node, open.handle)?;
                blocks.take(at, end);
                self.save(&file.node, partial, blocks.clone())?;
            }
            at = end;
        }
        Ok(())
    }

    pub(super) fn seek_merged(
        &self,
        caller: &Caller,
        (file, open, partial): (&File, &OpenFile, &Partial),
        offset: u64,
        to: SeekTo,
    ) -> Result<u64> {
        let size_bytes = open.service().getattr(caller, open.held.node, Some(open.handle))?.size_bytes;
        let mut at = offset;
        while at < size_bytes {
            let (own, stop) = partial.run(at, size_bytes);
            let found = if own {
                open.service().seek(caller, open.held.node, open.handle, at, to)
            } else {
                let lower = file.lower(&self.own, partial)?;
                lower.service().seek(&self.own, lower.held.node, lower.handle, at, to)
            };
            match found {
                Ok(found) if found < stop => return Ok(found),
                Ok(_) => {}
                Err(e) if e.is(Errno::NXIO) => {}
                Err(e) => return Err(e),
            }
            at = stop;
        }
        match to {
            SeekTo::Hole if offset < size_bytes => Ok(size_bytes),
            _ => Err(Error::new(Errno::NXIO, "look for data or a hole behind the last")),
        }
    }

    /// A bounded piece, by reading and writing.
    pub(super) fn copy_piece(
        &self,
        caller: &Caller,
        (source, from): ((&File, &OpenFile), u64),
        (target, to): ((&File, &OpenFile), u64),
        length: u64,
    ) -> Result<u64> {
        let mut buffer = vec![0; length as usize];
        let read = self.read_open(caller, source, from, &mut buffer)?;
        if read == 0 {
            return Ok(0);
        }
        self.write_open(caller, target, to, &buffer[..read]).map(|written| written as u64)
    }

    pub(super) fn read_open(
        &self,
        caller: &Caller,
        (file, open): (&File, &OpenFile),
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        match self.partial_of(file, open)? {
            Some(partial) if file.flags.contains(OpenFlags::READ) => {
                self.read_merged(caller, (file, open, &partial), offset, buffer)
            }
            _ => open.service().read(caller, open.held.node, open.handle, offset, buffer),
        }
    }

    pub(super) fn write_open(
        &self,
        caller: &Caller,
        (file, open): (&File, &OpenFile),
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        let write = || open.service().write(caller, open.held.node, open.handle, offset, data);
        match self.partial_of(file, open)? {
            Some(partial) if file.flags.contains(OpenFlags::APPEND) => {
                let _blocks = self.keep_blocks(&file.node, &partial)?;
                write()
            }
            // The upper says what is wrong with writing through a file that was opened to read.
            Some(partial) if file.flags.contains(OpenFlags::WRITE) && !data.is_empty() => {
                self.write_merged(caller, (file, open, &partial), offset, data)
            }
            _ => write(),
        }
    }

    /// What the upper's file behind `open` lacks.
    pub(super) fn partial_of(&self, file: &File, open: &OpenFile) -> Result<Option<Arc<Partial>>> {
        if open.held.is_upper() { self.partial(&file.node) } else { Ok(None) }
    }
}
