//! What programs hold of a file, and what they see by it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use polytropo_client::{Channel, Error};
use rustix::mm::{MapFlags, ProtFlags};

use super::program::Running;

const PAGE_BYTES: usize = 4096;
/// More than any file of the walks has, and as aligned as direct reads want it.
const VIEW_BYTES: usize = 32 * PAGE_BYTES;

/// An open file of a program, a map, or a program that runs.
pub enum Holder<'a> {
    File(File, Access),
    Map(Map),
    /// As a preloaded program has it: what is asked of the kernel goes through a placeholder.
    Channel {
        channel: &'a Channel,
        file: polytropo_client::File,
        place: OwnedFd,
        access: Access,
    },
    Program(#[allow(dead_code, reason = "runs until it is dropped")] Running),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub read: bool,
    pub write: bool,
    pub append: bool,
}

/// What a holder shows: pages that can be read, and the size where there is a file to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub pages: Vec<Option<Vec<u8>>>,
    pub size_bytes: Option<u64>,
}

impl View {
    pub fn of(bytes: &[u8]) -> Self {
        Self { pages: bytes.chunks(PAGE_BYTES).map(|page| Some(page.to_vec())).collect(), size_bytes: None }
    }
}

impl Holder<'_> {
    pub fn writes(&self) -> bool {
        match self {
            Self::File(_, access) | Self::Channel { access, .. } => access.write,
            Self::Map(map) => map.writable,
            Self::Program(_) => false,
        }
    }

    pub fn is_written_map(&self) -> bool {
        matches!(self, Self::Map(map) if map.writable)
    }

    /// None where there is nothing to see.
    pub fn view(&self, buffer: &mut Aligned) -> io::Result<Option<View>> {
        let (bytes, size_bytes) = match self {
            Self::Program(_) => return Ok(None),
            Self::Map(map) => return Ok(Some(View { pages: map.pages(), size_bytes: None })),
            Self::File(file, access) => {
                let bytes = if access.read { read(file, buffer) } else { Vec::new() };
                (bytes, file.metadata().expect("look at an open file").len())
            }
            Self::Channel { channel, file, access, .. } => {
                let bytes = match access.read.then(|| channel.pread(*file, buffer.bytes(), 0)) {
                    None => Vec::new(),
                    Some(Err(Error::Kernel)) => read(&self.upgraded()?, buffer),
                    Some(count) => {
                        let count = count.expect("read through the channel");
                        buffer.bytes()[..count].to_vec()
                    }
                };
                let size_bytes = match channel.fstat(*file) {
                    Err(Error::Kernel) => self.upgraded()?.metadata().expect("look").len(),
                    told => told.expect("look through the channel").size_bytes,
                };
                (bytes, size_bytes)
            }
        };
        Ok(Some(View { size_bytes: Some(size_bytes), ..View::of(&bytes) }))
    }

    pub fn write(&self, byte: u8, offset: u64) -> io::Result<()> {
        let upgraded;
        let (file, access) = match self {
            Self::Program(_) => return Ok(()),
            Self::Map(map) => {
                map.write(byte, offset as usize);
                return Ok(());
            }
            Self::Channel { channel, file, access, .. } => match channel.pwrite(*file, &[byte], offset) {
                Err(Error::Kernel) => {
                    upgraded = self.upgraded()?;
                    (&upgraded, access)
                }
                done => return done.map(drop).map_err(as_io),
            },
            Self::File(file, access) => (file, access),
        };
        assert!(access.write);
        file.write_all_at(&[byte], offset)
    }

    pub fn cut(&self, size_bytes: u64) -> io::Result<()> {
        match self {
            Self::Program(_) | Self::Map(_) => Ok(()),
            Self::File(file, _) => file.set_len(size_bytes),
            Self::Channel { channel, file, .. } => match channel.ftruncate(*file, size_bytes) {
                Err(Error::Kernel) => self.upgraded()?.set_len(size_bytes),
                done => done.map_err(as_io),
            },
        }
    }

    /// The same file opened by the kernel.
    fn upgraded(&self) -> io::Result<File> {
        let Self::Channel { place, access, .. } = self else { unreachable!("only these have a placeholder") };
        reopen(place, *access)
    }
}

impl Drop for Holder<'_> {
    fn drop(&mut self) {
        if let Self::Channel { channel, file, .. } = self {
            let closed = channel.close(*file);
            assert!(closed.is_ok() || std::thread::panicking(), "close through the channel: {closed:?}");
        }
    }
}

pub fn as_io(error: Error) -> io::Error {
    match error {
        Error::Errno(errno) => io::Error::from_raw_os_error(errno),
        other => panic!("the channel answers {other:?}"),
    }
}

/// Opens what `place`, an `O_PATH` descriptor, names.
pub fn reopen(place: &OwnedFd, access: Access) -> io::Result<File> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
    access.options(0).open(path)
}

impl Access {
    pub const READ: Self = Self { read: true, write: false, append: false };
    pub const WRITE: Self = Self { read: false, write: true, append: false };
    pub const BOTH: Self = Self { read: true, write: true, append: false };
    pub const APPEND: Self = Self { read: false, write: true, append: true };

    pub fn options(self, flags: i32) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(self.read).write(self.write && !self.append).append(self.append).custom_flags(flags);
        options
    }

    pub fn flags(self) -> u32 {
        let flags = match (self.read, self.write) {
            (true, true) => libc::O_RDWR,
            (false, true) => libc::O_WRONLY,
            _ => libc::O_RDONLY,
        };
        (flags | if self.append { libc::O_APPEND } else { 0 }) as u32
    }
}

fn read(file: &File, buffer: &mut Aligned) -> Vec<u8> {
    let count = file.read_at(buffer.bytes(), 0).expect("read an open file");
    buffer.bytes()[..count].to_vec()
}

/// Room for a view, aligned to a page.
pub struct Aligned(Vec<u8>);

impl Aligned {
    pub fn new() -> Self {
        Self(vec![0; VIEW_BYTES + PAGE_BYTES])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(PAGE_BYTES);
        &mut self.0[start..start + VIEW_BYTES]
    }
}

pub struct Map {
    start: *mut u8,
    len: usize,
    writable: bool,
    memory: File,
}

impl Map {
    /// None of an empty file.
    pub fn of(file: &File, flags: MapFlags, writable: bool) -> io::Result<Option<Self>> {
        let len = file.metadata()?.len() as usize;
        if len == 0 {
            return Ok(None);
        }
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new map touches no memory that exists.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, 0) }?;
        Ok(Some(Self { start: start.cast(), len, writable, memory: File::open("/proc/self/mem")? }))
    }

    /// Read by the kernel, for which a page beyond the end is an error and not a signal.
    fn pages(&self) -> Vec<Option<Vec<u8>>> {
        let page = |at: usize| {
            let mut bytes = vec![0; PAGE_BYTES.min(self.len - at)];
            let read = self.memory.read_exact_at(&mut bytes, self.start as u64 + at as u64);
            read.is_ok().then_some(bytes)
        };
        (0..self.len).step_by(PAGE_BYTES).map(page).collect()
    }

    /// Nothing where the file has no page any more.
    fn write(&self, byte: u8, offset: usize) {
        let reachable = self.pages().get(offset / PAGE_BYTES).is_some_and(Option::is_some);
        if self.writable && offset < self.len && reachable {
            // SAFETY: within the map, at a page that was there just now; only this thread cuts the file.
            unsafe { self.start.add(offset).write_volatile(byte) };
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own map, to which no reference is left.
        unsafe { rustix::mm::munmap(self.start.cast(), self.len) }.expect("unmap");
    }
}
