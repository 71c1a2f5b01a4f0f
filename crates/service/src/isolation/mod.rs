//! The walls around a worker, each in a module of its own. [`enter`] puts them up in order; after it the process is
//! confined for good.
//!
//! 1. namespaces: mounts, network, IPC, UTS, control groups (and PIDs, by the keeper): nothing of the host is there;
//! 2. an empty root directory, read-only;
//! 3. a user namespace: its ids belong to nobody else on the host; the capabilities left act only on files that are
//!    handed to it;
//! 4. limits, no core dumps, not traceable, no new privileges;
//! 5. Landlock: no TCP, no signals or abstract sockets to others; per stack, only that stack's directories ([`landlock`]);
//! 6. seccomp: only the system calls that serving files takes.

pub mod ids;
pub mod landlock;
pub mod limits;
mod privileges;
mod root;
pub mod seccomp;

use std::fmt::Display;

use rustix::thread::UnshareFlags;

/// Puts the worker behind its walls. `mapped` is called in the new user namespace and returns once the keeper has
/// written the id maps. The process must have one thread only.
pub fn enter(mapped: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let cannot = |what: &'static str| move |e: rustix::io::Errno| problem(what, &e);
    limits::raise_descriptors().map_err(cannot("raise the limit of descriptors"))?;
    privileges::become_io_flusher();
    separate(
        UnshareFlags::NEWNS
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS
            | UnshareFlags::NEWCGROUP,
    )
    .map_err(cannot("make namespaces"))?;
    root::make_empty().map_err(|(what, errno)| problem(what, &errno))?;
    separate(UnshareFlags::NEWUSER).map_err(cannot("make a user namespace"))?;
    mapped()?;
    privileges::become_inner_root().map_err(cannot("take its ids"))?;
    privileges::reduce().map_err(cannot("give up capabilities"))?;
    limits::lower().map_err(cannot("lower its limits"))?;
    privileges::lock().map_err(cannot("lock its privileges"))?;
    seccomp::install().map_err(|error| problem("set up its system call filter", &error))?;
    Ok(())
}

fn problem(what: &str, why: &dyn Display) -> String {
    format!("the worker cannot {what}: {why}")
}

fn separate(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: CLONE_FILES is not among the flags, so no descriptor changes hands; there is one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}
