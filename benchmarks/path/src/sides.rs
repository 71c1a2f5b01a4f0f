//! The same operations through the kernel and through a channel.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use polytropo_client::{At, Channel, Error, File};
use rustix::fs::{Mode, OFlags};

pub type Outcome<T> = Result<T, String>;

pub trait Side: Sync {
    type Handle: Sync;
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
    fn access(&self, name: &str) -> Outcome<()>;
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

/// By the C library, as programs do it, so that a preloaded library sees it. Names are relative to the working directory.
pub struct Kernel;

impl Kernel {
    pub fn at(directory: &Path) -> Outcome<Self> {
        std::env::set_current_dir(directory).map_err(told).map(|()| Self)
    }
}

pub struct Descriptor(i32);

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: opened by `open`, and closed here alone.
        unsafe { libc::close(self.0) };
    }
}

fn c_string(name: &str) -> Outcome<CString> {
    CString::new(name).map_err(told)
}

fn done(result: i32) -> Outcome<()> {
    if result < 0 { Err(told(std::io::Error::last_os_error())) } else { Ok(()) }
}

fn status(name: &str) -> Outcome<i32> {
    let name = c_string(name)?;
    let mut found = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: reads the name, writes one structure.
    Ok(unsafe { libc::stat(name.as_ptr(), found.as_mut_ptr()) })
}

impl Side for Kernel {
    type Handle = Descriptor;

    fn open(&self, name: &str, flags: i32) -> Outcome<Descriptor> {
        let name = c_string(name)?;
        // SAFETY: reads the name.
        let opened = unsafe { libc::open(name.as_ptr(), flags | libc::O_CLOEXEC, 0o644) };
        done(opened).map(|()| Descriptor(opened))
    }

    fn close(&self, file: Descriptor) -> Outcome<()> {
        drop(file);
        Ok(())
    }

    fn pread(&self, file: &Descriptor, buffer: &mut [u8], at: u64) -> Outcome<()> {
        // SAFETY: writes into the buffer, no more than fits.
        let got = unsafe { libc::pread(file.0, buffer.as_mut_ptr().cast(), buffer.len(), at as i64) };
        whole(usize::try_from(got).unwrap_or(0), buffer.len())
    }

    fn pwrite(&self, file: &Descriptor, bytes: &[u8], at: u64) -> Outcome<()> {
        // SAFETY: reads the bytes.
        let put = unsafe { libc::pwrite(file.0, bytes.as_ptr().cast(), bytes.len(), at as i64) };
        whole(usize::try_from(put).unwrap_or(0), bytes.len())
    }

    fn fstat(&self, file: &Descriptor) -> Outcome<()> {
        let mut found = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: writes one structure.
        done(unsafe { libc::fstat(file.0, found.as_mut_ptr()) })
    }

    fn stat(&self, name: &str) -> Outcome<()> {
        status(name).and_then(done)
    }

    fn stat_missing(&self, name: &str) -> Outcome<()> {
        if status(name)? < 0 { Ok(()) } else { Err(format!("{name} is there")) }
    }

    fn access(&self, name: &str) -> Outcome<()> {
        let name = c_string(name)?;
        // SAFETY: reads the name.
        done(unsafe { libc::access(name.as_ptr(), libc::R_OK) })
    }

    fn list(&self, name: &str) -> Outcome<()> {
        let name = c_string(name)?;
        // SAFETY: a directory stream that is closed below, used here alone; entries are only counted.
        let count = unsafe {
            let directory = libc::opendir(name.as_ptr());
            if directory.is_null() {
                return done(-1);
            }
            let mut count = 0;
            while !libc::readdir(directory).is_null() {
                count += 1;
            }
            libc::closedir(directory);
            count
        };
        whole(count, 1002)
    }

    fn unlink(&self, name: &str) -> Outcome<()> {
        let name = c_string(name)?;
        // SAFETY: reads the name.
        done(unsafe { libc::unlink(name.as_ptr()) })
    }

    fn rename(&self, name: &str, new_name: &str) -> Outcome<()> {
        let (name, new_name) = (c_string(name)?, c_string(new_name)?);
        // SAFETY: reads the names.
        done(unsafe { libc::rename(name.as_ptr(), new_name.as_ptr()) })
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

    fn access(&self, name: &str) -> Outcome<()> {
        self.0.access(At::Root, name.as_bytes(), libc::R_OK as u32, 0).map_err(told)
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
