//! Locks, which the kernel keeps for the superblock.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};

use crate::support::{errno, on_each_mount};

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// An open file description lock on the first ten bytes.
fn lock(file: &File, kind: i32) -> Result<(), i32> {
    // SAFETY: all zero is a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_len = 10;
    // SAFETY: the kernel reads the struct during the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(errno()),
    }
}

#[test]
fn posix_locks_exclude_each_other() {
    on_each_mount(|site| {
        let (one, two) = (open(&site.path("f")), open(&site.path("f")));
        lock(&one, libc::F_WRLCK).unwrap();
        assert_eq!(lock(&two, libc::F_RDLCK), Err(libc::EAGAIN));
        lock(&one, libc::F_UNLCK).unwrap();
        lock(&two, libc::F_RDLCK).unwrap();
        lock(&one, libc::F_RDLCK).unwrap();
    });
}

#[test]
fn bsd_locks_exclude_each_other_across_processes() {
    on_each_mount(|site| {
        let file = open(&site.path("f"));
        let try_in_child = || {
            let mut command = Command::new("flock");
            command.arg("-n").arg(site.path("f")).arg("true").stderr(Stdio::null());
            command.status().unwrap().success()
        };
        flock(&file, FlockOperation::LockExclusive).unwrap();
        assert!(!try_in_child());
        flock(&file, FlockOperation::Unlock).unwrap();
        assert!(try_in_child());
    });
}
