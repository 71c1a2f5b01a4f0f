//! Runs a program where a keeper's mounts are: in its user and mount namespaces.

use std::ffi::OsString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::ThreadNameSpaceType;

/// Enters the namespaces of the keeper at `run_dir` and becomes `command`. Returns only to say what went wrong, with the
/// status to end with (as env(1): 125 for what is ours, 126 and 127 for the command's).
pub fn enter(run_dir: &Path, command: &[OsString]) -> (u8, String) {
    if let Err(problem) = join(run_dir) {
        return (125, problem);
    }
    let Some((program, arguments)) = command.split_first() else {
        return (125, "no command was given".into());
    };
    let error = Command::new(program).args(arguments).exec();
    let status = if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 };
    (status, format!("{} cannot be run: {error}", program.to_string_lossy()))
}

fn join(run_dir: &Path) -> Result<(), String> {
    let pid = keeper_pid(run_dir)?;
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .map_err(|errno| format!("the service's process cannot be opened: {errno}"))?;
    let pid = pid.as_raw_nonzero();
    let differs = |name: &str| -> Result<bool, String> {
        let inode = |of: &dyn std::fmt::Display| {
            fs::metadata(format!("/proc/{of}/ns/{name}"))
                .map(|found| found.ino())
                .map_err(|error| format!("the service's namespaces cannot be seen: {error}"))
        };
        Ok(inode(&pid)? != inode(&"self")?)
    };
    let mut wanted = ThreadNameSpaceType::empty();
    wanted.set(ThreadNameSpaceType::USER, differs("user")?);
    wanted.set(ThreadNameSpaceType::MOUNT, differs("mnt")?);
    if wanted.is_empty() {
        return Ok(());
    }
    // The working directory is kept where the same path leads somewhere in there.
    let here = std::env::current_dir();
    rustix::thread::move_into_thread_name_spaces(std::os::fd::AsFd::as_fd(&process), wanted)
        .map_err(|errno| format!("the service's namespaces cannot be entered: {errno}"))?;
    if let Ok(here) = here
        && let Err(error) = std::env::set_current_dir(&here)
    {
        log::debug!("{} is not there inside: {error}", here.display());
    }
    Ok(())
}

fn keeper_pid(run_dir: &Path) -> Result<Pid, String> {
    let gone = |why: &dyn std::fmt::Display| format!("no service answers at {}: {why}", run_dir.display());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(run_dir, flags, Mode::empty()).map_err(|errno| gone(&errno))?;
    // Through a descriptor, since a socket's address holds 107 bytes.
    let place = format!("/proc/self/fd/{}/control.sock", directory.as_raw_fd());
    let stream = UnixStream::connect(place).map_err(|error| gone(&error))?;
    let peer = crate::control::peer_of(&stream).map_err(|errno| gone(&errno))?;
    Pid::from_raw(peer.pid).ok_or_else(|| gone(&"it runs in another PID namespace"))
}
