//! Registering files with the kernel, by who may.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::abi::{DEV_IOC_BACKING_CLOSE, DEV_IOC_BACKING_OPEN};

/// Registers files with the kernel for one connection.
pub trait Registrar: Send + Sync {
    fn register(&self, file: BorrowedFd<'_>) -> io::Result<u32>;
    fn unregister(&self, id: u32);
}

/// Does so itself, which takes CAP_SYS_ADMIN over the host.
pub struct OwnRegistrar {
    device: OwnedFd,
}

/// `struct fuse_backing_map`
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

impl OwnRegistrar {
    /// `device` is one of the connection's.
    pub fn new(device: OwnedFd) -> Self {
        Self { device }
    }
}

impl Registrar for OwnRegistrar {
    fn register(&self, file: BorrowedFd<'_>) -> io::Result<u32> {
        let map = BackingMap { fd: file.as_raw_fd(), flags: 0, padding: 0 };
        // SAFETY: the kernel reads one structure of this layout from the pointer and keeps nothing of it.
        let id = unsafe { libc::ioctl(self.device.as_raw_fd(), DEV_IOC_BACKING_OPEN.into(), &raw const map) };
        u32::try_from(id).map_err(|_| io::Error::last_os_error())
    }

    fn unregister(&self, id: u32) {
        // SAFETY: the kernel reads one u32 from the pointer and keeps nothing of it.
        let done =
            unsafe { libc::ioctl(self.device.as_raw_fd(), DEV_IOC_BACKING_CLOSE.into(), &raw const id) };
        if done < 0 {
            log::error!("FUSE door: registered file {id} is not given up: {}", io::Error::last_os_error());
        }
    }
}
