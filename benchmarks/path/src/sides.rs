//! The same operations through the kernel and through a channel.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use polytropo_client::{At, Channel, Error, File};
use rustix::fs::{AtFlags, Mode, OFlags, RawDir};

pub type Outcome<T> = Result<T, String>;

pub trait Side {
    type Handle;
    /// A request that does nothing; None where there is none.
    fn ask(&self) -> Option<Outcome<()>> {
        None
    }
    fn open(&self, name: &str, flags: i32) -> Outcome<Self::Handle>;
    fn close(&self, file: Self::Handle) -> Outcome<()>;
    fn pread(&self, file: &Self::Handle, buffer: &mut [u8], at: u64) -> Outcome<()>;
    fn pwrite(&self, file: &Self::Handle, bytes: &[u8], at: u64) -> Outcome<()>;
    fn fstat(&self, file: &Self::Handle) -> Outcome<()>;
    fn stat(&self, name: &str) -> Outcome<()>;
    fn stat_missing(&self, name: &str) -> Outcome<()>;
    fn list(&self, name: &str) -> Outcome<()>;
    fn unlink(&self, name: &str) -> Outcome<()>;
    fn rename(&self, name: &str, new_name: &str) -> Outcome<()>;
}

fn told(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}

fn whole(done: usize, wanted: usize) -> Outcome<()> {
    if done == wanted { Ok(()) } else { Err(format!("{done} bytes of {wanted}")) }
}

pub struct Kernel {
    directory: OwnedFd,
}

impl Kernel {
    pub fn at(directory: &Path) -> Outcome<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        Ok(Self { directory: rustix::fs::open(directory, flags, Mode::empty()).map_err(told)? })
    }
}

impl Side for Kernel {
    type Handle = OwnedFd;

    fn open(&self, name: &str, flags: i32) -> Outcome<OwnedFd> {
        let flags = OFlags::from_bits_retain(flags as u32);
        rustix::fs::openat(&self.directory, name, flags, Mode::from_raw_mode(0o644)).map_err(told)
    }

    fn close(&self, file: OwnedFd) -> Outcome<()> {
        drop(file);
        Ok(())
    }

    fn pread(&self, file: &OwnedFd, buffer: &mut [u8], at: u64) -> Outcome<()> {
        let wanted = buffer.len();
        whole(rustix::io::pread(file, buffer, at).map_err(told)?, wanted)
    }

    fn pwrite(&self, file: &OwnedFd, bytes: &[u8], at: u64) -> Outcome<()> {
        whole(rustix::io::pwrite(file, bytes, at).map_err(told)?, bytes.len())
    }

    fn fstat(&self, file: &OwnedFd) -> Outcome<()> {
        rustix::fs::fstat(file).map(drop).map_err(told)
    }

    fn stat(&self, name: &str) -> Outcome<()> {
        rustix::fs::statat(&self.directory, name, AtFlags::empty()).map(drop).map_err(told)
    }

    fn stat_missing(&self, name: &str) -> Outcome<()> {
        match rustix::fs::statat(&self.directory, name, AtFlags::empty()) {
            Err(rustix::io::Errno::NOENT) => Ok(()),
            other => Err(told(other)),
        }
    }

    fn list(&self, name: &str) -> Outcome<()> {
        let directory = self.open(name, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let mut space = [const { std::mem::MaybeUninit::uninit() }; 32 << 10];
        let mut entries = RawDir::new(&directory, &mut space);
        let mut count = 0;
        while let Some(entry) = entries.next() {
            entry.map_err(told)?;
            count += 1;
        }
        whole(count, 1002)
    }

    fn unlink(&self, name: &str) -> Outcome<()> {
        rustix::fs::unlinkat(&self.directory, name, AtFlags::empty()).map_err(told)
    }

    fn rename(&self, name: &str, new_name: &str) -> Outcome<()> {
        rustix::fs::renameat(&self.directory, name, &self.directory, new_name).map_err(told)
    }
}

pub struct Channelled(Channel);

impl Channelled {
    pub fn connect(socket: &Path, mount: &Path) -> Outcome<Self> {
        let root = rustix::fs::open(mount, OFlags::PATH, Mode::empty()).map_err(told)?;
        let channel = Channel::connect(socket.as_os_str().as_bytes(), root.as_raw_fd());
        channel.map(Self).map_err(told)
    }
}

impl Side for Channelled {
    type Handle = File;

    fn ask(&self) -> Option<Outcome<()>> {
        Some(self.0.ping().map_err(told))
    }

    fn open(&self, name: &str, flags: i32) -> Outcome<File> {
        let opened = self.0.open(At::Root, name.as_bytes(), flags as u32, 0o644, 0o022);
        opened.map(|opened| opened.file).map_err(told)
    }

    fn close(&self, file: File) -> Outcome<()> {
        self.0.close(file).map_err(told)
    }

    fn pread(&self, file: &File, buffer: &mut [u8], at: u64) -> Outcome<()> {
        let wanted = buffer.len();
        whole(self.0.pread(*file, buffer, at).map_err(told)?, wanted)
    }

    fn pwrite(&self, file: &File, bytes: &[u8], at: u64) -> Outcome<()> {
        whole(self.0.pwrite(*file, bytes, at).map_err(told)?, bytes.len())
    }

    fn fstat(&self, file: &File) -> Outcome<()> {
        self.0.fstat(*file).map(drop).map_err(told)
    }

    fn stat(&self, name: &str) -> Outcome<()> {
        self.0.stat(At::Root, name.as_bytes(), 0).map(drop).map_err(told)
    }

    fn stat_missing(&self, name: &str) -> Outcome<()> {
        match self.0.stat(At::Root, name.as_bytes(), 0) {
            Err(Error::Errno(libc::ENOENT)) => Ok(()),
            other => Err(told(other)),
        }
    }

    fn list(&self, name: &str) -> Outcome<()> {
        let directory = self.open(name, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let mut buffer = [0; 32 << 10];
        let (mut count, mut position) = (0, 0);
        loop {
            let (bytes, next) = self.0.read_directory(directory, &mut buffer, position).map_err(told)?;
            if bytes == 0 {
                break;
            }
            let mut at = 0;
            while at < bytes {
                at += usize::from(u16::from_ne_bytes([buffer[at + 16], buffer[at + 17]]));
                count += 1;
            }
            position = next;
        }
        self.close(directory)?;
        whole(count, 1002)
    }

    fn unlink(&self, name: &str) -> Outcome<()> {
        self.0.unlink(At::Root, name.as_bytes(), 0).map_err(told)
    }

    fn rename(&self, name: &str, new_name: &str) -> Outcome<()> {
        self.0.rename(At::Root, name.as_bytes(), At::Root, new_name.as_bytes(), 0).map_err(told)
    }
}
