//! What programs do to a file: the alphabet of the walks.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use polytropo_client::{At, Channel, Error};
use rustix::mm::MapFlags;

use super::holders::{Access, Aligned, Holder, Map, View, as_io, reopen};
use super::program::Running;
use crate::support::open_path;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    Read,
    ReadDirect,
    Write,
    ReadWrite,
    Append,
    Truncate,
    /// By an `O_PATH` descriptor that is as old as the walk.
    ReopenRead,
    ReopenWrite,
    Execute,
    ChannelRead,
    /// What follows the first write need not wait.
    ChannelWrite,
    ChannelCut,
    MapPrivate,
    MapShared,
    MapWrite,
    CutByName,
    ChangeMode,
    RenameOver,
    Unlink,
    /// Opened, read, closed.
    ReadByName,
    /// By who can write and came last.
    WriteHeld,
    CutHeld,
    CloseOldest,
    CloseNewest,
}

use Event::*;

pub const EVENTS: [Event; 24] = [
    Read,
    ReadDirect,
    Write,
    ReadWrite,
    Append,
    Truncate,
    ReopenRead,
    ReopenWrite,
    Execute,
    ChannelRead,
    ChannelWrite,
    ChannelCut,
    MapPrivate,
    MapShared,
    MapWrite,
    CutByName,
    ChangeMode,
    RenameOver,
    Unlink,
    ReadByName,
    WriteHeld,
    CutHeld,
    CloseOldest,
    CloseNewest,
];

impl Event {
    /// Which means nothing unless somebody holds the file.
    pub fn wants_holder(self) -> bool {
        matches!(self, WriteHeld | CutHeld | CloseOldest | CloseNewest)
    }

    pub fn is_of_channel(self) -> bool {
        matches!(self, ChannelRead | ChannelWrite | ChannelCut)
    }
}

/// Where what is written goes, behind the program.
const WRITTEN_AT: u64 = 300;
const CUT_TO_BYTES: u64 = 350;
pub const SIZE_MIN_BYTES: usize = 400;

/// One of the two on which a walk goes: the mount, or a directory of the host.
pub struct Side<'a> {
    directory: PathBuf,
    path: PathBuf,
    name: Vec<u8>,
    channel: Option<&'a Channel>,
    place: OwnedFd,
    pub holders: Vec<Holder<'a>>,
    buffer: Aligned,
}

impl<'a> Side<'a> {
    pub fn new(directory: &Path, name: &str, channel: Option<&'a Channel>) -> Self {
        let path = directory.join(name);
        Self {
            directory: directory.to_owned(),
            name: name.as_bytes().to_vec(),
            place: open_path(&path),
            path,
            channel,
            holders: Vec::new(),
            buffer: Aligned::new(),
        }
    }

    pub fn views(&mut self) -> Vec<io::Result<Option<View>>> {
        self.holders.iter().map(|holder| holder.view(&mut self.buffer)).collect()
    }

    /// All bytes by name; None where it is gone.
    pub fn content(&self) -> Option<Vec<u8>> {
        match fs::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            bytes => Some(bytes.unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))),
        }
    }

    pub fn metadata(&self) -> Option<fs::Metadata> {
        fs::metadata(&self.path).ok()
    }

    /// Does it; `step` is written where the event writes.
    pub fn act(&mut self, event: Event, step: u8) -> io::Result<()> {
        match event {
            Read => self.open(Access::READ, 0),
            ReadDirect => self.open(Access::READ, if self.channel.is_some() { libc::O_DIRECT } else { 0 }),
            Write => self.open_and_write(Access::WRITE, step),
            ReadWrite => self.open_and_write(Access::BOTH, step),
            Append => self.open_and_write(Access::APPEND, step),
            Truncate => self.open(Access::WRITE, libc::O_TRUNC),
            ReopenRead => self.reopen(Access::READ, step),
            ReopenWrite => self.reopen(Access::BOTH, step),
            Execute => Running::start(&self.path).map(|program| self.holders.push(Holder::Program(program))),
            ChannelRead => self.open_by_channel(Access::READ, step),
            ChannelWrite => self.open_by_channel(Access::BOTH, step),
            ChannelCut => self.cut_by_channel(),
            MapPrivate => self.map(MapFlags::PRIVATE, Access::READ, step),
            MapShared => self.map(MapFlags::SHARED, Access::READ, step),
            MapWrite => self.map(MapFlags::SHARED, Access::BOTH, step),
            CutByName => self.cut_by_name(),
            ChangeMode => fs::set_permissions(&self.path, fs::Permissions::from_mode(0o705)),
            RenameOver => self.rename_over(step),
            Unlink => fs::remove_file(&self.path),
            ReadByName => fs::read(&self.path).map(drop),
            WriteHeld => self.newest_writer().map_or(Ok(()), |holder| holder.write(step, WRITTEN_AT + 3)),
            CutHeld => self.newest_writer().map_or(Ok(()), |holder| holder.cut(CUT_TO_BYTES - 30)),
            CloseOldest => {
                drop(self.holders.remove(0));
                Ok(())
            }
            CloseNewest => {
                drop(self.holders.pop());
                Ok(())
            }
        }
    }

    fn newest_writer(&self) -> Option<&Holder<'a>> {
        self.holders.iter().rev().find(|holder| holder.writes())
    }

    fn open(&mut self, access: Access, flags: i32) -> io::Result<()> {
        let file = access.options(flags).open(&self.path)?;
        self.holders.push(Holder::File(file, access));
        Ok(())
    }

    fn open_and_write(&mut self, access: Access, step: u8) -> io::Result<()> {
        self.open(access, 0)?;
        self.holders[self.holders.len() - 1].write(step, WRITTEN_AT)
    }

    fn reopen(&mut self, access: Access, step: u8) -> io::Result<()> {
        let holder = Holder::File(reopen(&self.place, access)?, access);
        if access.write {
            holder.write(step, WRITTEN_AT + 1)?;
        }
        self.holders.push(holder);
        Ok(())
    }

    fn open_by_channel(&mut self, access: Access, step: u8) -> io::Result<()> {
        let opened = self.channel.map(|channel| channel.open(At::Root, &self.name, access.flags(), 0, 0));
        match opened {
            None | Some(Err(Error::Kernel)) => self.open(access, 0)?,
            Some(Err(error)) => return Err(as_io(error)),
            Some(Ok(opened)) => {
                let channel = self.channel.expect("it has opened the file");
                let place = open_path(&self.path);
                self.holders.push(Holder::Channel { channel, file: opened.file, place, access });
            }
        }
        if access.write {
            for at in 4..6 {
                self.holders[self.holders.len() - 1].write(step, WRITTEN_AT + at)?;
            }
        }
        Ok(())
    }

    fn map(&mut self, flags: MapFlags, access: Access, step: u8) -> io::Result<()> {
        let file = access.options(0).open(&self.path)?;
        let Some(map) = Map::of(&file, flags, access.write)? else { return Ok(()) };
        let holder = Holder::Map(map);
        if access.write {
            holder.write(step, WRITTEN_AT + 2)?;
        }
        self.holders.push(holder);
        Ok(())
    }

    fn cut_by_name(&self) -> io::Result<()> {
        let path = CString::new(self.path.as_os_str().as_bytes())?;
        // SAFETY: a NUL-terminated path.
        let done = unsafe { libc::truncate(path.as_ptr(), CUT_TO_BYTES as i64) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn cut_by_channel(&self) -> io::Result<()> {
        match self.channel.map(|channel| channel.truncate(At::Root, &self.name, CUT_TO_BYTES - 10)) {
            Some(Ok(())) => Ok(()),
            None | Some(Err(Error::Kernel)) => {
                let path = CString::new(self.path.as_os_str().as_bytes())?;
                // SAFETY: a NUL-terminated path.
                let done = unsafe { libc::truncate(path.as_ptr(), CUT_TO_BYTES as i64 - 10) };
                if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
            }
            Some(Err(error)) => Err(as_io(error)),
        }
    }

    fn rename_over(&self, step: u8) -> io::Result<()> {
        let other = self.directory.join("other");
        fs::write(&other, [step; SIZE_MIN_BYTES])?;
        fs::rename(&other, &self.path)
    }
}
