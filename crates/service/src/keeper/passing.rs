//! Registers files with the kernel for doors, whose worker has no right to.
//!
//! What is registered the kernel reads for every program on the mount, with the keeper's rights. So only that is taken which the worker
//! could hand out anyhow: regular files, opened for reading, on one of the mounts of immutable layers that this worker was given. A thread a
//! door, which a hostile worker can keep busy with nothing but itself.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use log::{debug, error, warn};
use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};
use rustix::io::Errno;

use super::child::Child;
use super::mounting;
use crate::doors::fuse::{BACKINGS_MAX, OwnRegistrar, Registrar};
use crate::passing::{self, Request};

/// Mounts that one worker's files may lie on; layers beyond it are not passed through.
const MOUNTS_MAX: usize = 65_536;

/// The mounts of immutable layers that a worker was given, as the kernel numbers them and never again.
#[derive(Default)]
pub struct Mounts(HashSet<(u64, (u32, u32))>);

impl Mounts {
    /// Says whether files on `mount` may be registered from now on.
    pub fn add(&mut self, mount: &OwnedFd) -> bool {
        let Ok(mounting::Identity { unique_id: Some(id), device, .. }) = mounting::identity_of(mount) else {
            return false;
        };
        self.0.len() < MOUNTS_MAX && (self.0.insert((id, device)) || self.0.contains(&(id, device)))
    }

    /// EPERM for what is not to be registered.
    fn check(&self, file: &OwnedFd) -> Result<(), Errno> {
        let flags = rustix::fs::fcntl_getfl(file)?;
        let readable = flags & OFlags::ACCMODE == OFlags::RDONLY && !flags.contains(OFlags::PATH);
        // Not synchronised: whatever the file is of, nobody is waited for.
        let how = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(file, "", how, StatxFlags::TYPE)?;
        let regular = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile;
        let identity = mounting::identity_of(file)?;
        let given = identity.unique_id.is_some_and(|id| self.0.contains(&(id, identity.device)));
        if readable && regular && given { Ok(()) } else { Err(Errno::PERM) }
    }
}

/// Registering takes CAP_SYS_ADMIN over the host: not only in a user namespace.
pub fn may_register() -> bool {
    const WHOLE_RANGE: [&str; 3] = ["0", "0", "4294967295"];
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    rustix::process::geteuid().is_root() && map.split_whitespace().eq(WHOLE_RANGE)
}

/// Starts a thread that does so for the door of `device`; returns the door's end of the socket.
pub fn start(door: u64, device: OwnedFd, worker: Arc<Child>) -> std::io::Result<OwnedFd> {
    let (ours, theirs) = passing::pair()?;
    let desk =
        Desk { door, registrar: OwnRegistrar::new(device), worker, ids: HashSet::new(), refused: false };
    std::thread::Builder::new().name(format!("passing-{door}")).spawn(move || desk.run(&ours))?;
    Ok(theirs)
}

struct Desk {
    door: u64,
    registrar: OwnRegistrar,
    worker: Arc<Child>,
    ids: HashSet<u32>,
    refused: bool,
}

impl Desk {
    /// Until the door closes its end. The device goes with it, so that nothing keeps a connection that nobody serves.
    fn run(mut self, socket: &OwnedFd) {
        loop {
            let done = match passing::receive(socket) {
                Ok(Some(Request::Register(file))) => passing::answer(socket, self.register(&file)),
                Ok(Some(Request::Unregister(id))) => self.unregister(id),
                Ok(None) | Err(Errno::CONNRESET) => return,
                Err(errno) => Err(errno),
            };
            match done {
                Ok(()) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return,
                Err(errno) => {
                    let pid = self.worker.pid();
                    error!("worker {pid} broke the protocol of files passed through ({errno}) and is ended");
                    return self.worker.kill();
                }
            }
        }
    }

    fn register(&mut self, file: &OwnedFd) -> Result<u32, Errno> {
        if self.ids.len() >= BACKINGS_MAX {
            return Err(Errno::NOSPC);
        }
        self.worker.may_pass(|mounts| mounts.check(file)).inspect_err(|errno| {
            if !self.refused {
                let pid = self.worker.pid();
                warn!("a file of worker {pid} is not passed through ({errno}), nor are later ones logged");
                self.refused = true;
            }
        })?;
        let registered = self.registrar.register(file.as_fd());
        let id = registered.map_err(|error| {
            debug!("door {}: the kernel does not pass a file through: {error}", self.door);
            Errno::from_io_error(&error).unwrap_or(Errno::IO)
        })?;
        self.ids.insert(id);
        Ok(id)
    }

    fn unregister(&mut self, id: u32) -> Result<(), Errno> {
        if !self.ids.remove(&id) {
            return Err(Errno::PROTO);
        }
        self.registrar.unregister(id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, openat};

    /// A directory with a file, as a worker gets it.
    fn given(temp: &tempfile::TempDir) -> OwnedFd {
        std::fs::write(temp.path().join("f"), "x").unwrap();
        std::fs::File::open(temp.path()).unwrap().into()
    }

    #[test]
    fn only_regular_files_opened_for_reading_on_given_mounts_are_taken() {
        let temp = tempfile::tempdir().unwrap();
        let root = given(&temp);
        let mut mounts = Mounts::default();
        let open = |name: &str, flags| openat(&root, name, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let file = open("f", OFlags::RDONLY);
        assert_eq!(mounts.check(&file), Err(Errno::PERM));
        if !mounts.add(&root) {
            eprintln!("skipped: this kernel does not number mounts for good (Linux 6.8 does)");
            return;
        }
        assert_eq!(mounts.check(&file), Ok(()));
        let elsewhere: OwnedFd = std::fs::File::open("/proc/self/status").unwrap().into();
        let (socket, _) = passing::pair().unwrap();
        let refused = [
            open("f", OFlags::WRONLY),
            open("f", OFlags::RDWR),
            open("f", OFlags::PATH),
            open(".", OFlags::RDONLY),
            elsewhere,
            socket,
        ];
        for file in refused {
            assert_eq!(mounts.check(&file), Err(Errno::PERM), "{file:?}");
        }
    }
}
