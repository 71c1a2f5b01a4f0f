//! What tells a process from all others of its machine, in one word: its number, when it started, its PID namespace.
//!
//! A number alone would be taken for alive when the kernel gives it out again. Of processes in other PID namespaces nothing can be
//! told from here, so they count as alive: whoever shares a queue across namespaces has to judge them by other means, and to
//! say so with its own [`Identity::is_dead`].

use crate::bytes::Identity;
use std::fs;
use std::string::String;

const PID_BITS: u32 = 22;
const START_BITS: u32 = 26;

/// This process, and how it tells that others are dead.
pub fn of_this_process() -> std::io::Result<Identity> {
    let pid = std::process::id();
    let stat = fs::read_to_string("/proc/self/stat")?;
    let (_, start) = state_and_start(&stat).ok_or(std::io::ErrorKind::InvalidData)?;
    Ok(Identity { own: word(pid, start, namespace()?), is_dead })
}

fn word(pid: u32, start: u64, namespace: u64) -> u64 {
    let start = start & ((1 << START_BITS) - 1);
    u64::from(pid) & ((1 << PID_BITS) - 1) | start << PID_BITS | namespace << (PID_BITS + START_BITS)
}

/// Sixteen bits of the number of this PID namespace; never 0.
fn namespace() -> std::io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata("/proc/self/ns/pid")?.ino() % 0xffff + 1)
}

/// The state, and the time of start in ticks since boot: the 3rd and the 22nd field; the 2nd is in parentheses and may hold anything.
fn state_and_start(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Whether the process is surely gone.
pub fn is_dead(identity: u64) -> bool {
    let Ok(namespace) = namespace() else { return false };
    if identity >> (PID_BITS + START_BITS) != namespace {
        return false;
    }
    let pid = identity & ((1 << PID_BITS) - 1);
    let stat: String = match fs::read_to_string(std::format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error) => return error.kind() == std::io::ErrorKind::NotFound || error.raw_os_error() == Some(3),
    };
    let Some((state, start)) = state_and_start(&stat) else { return false };
    word(pid as u32, start, namespace) != identity || matches!(state, 'Z' | 'X') && !has_other_threads(pid)
}

/// A first thread that has ended looks like a zombie while others of its process live on.
fn has_other_threads(pid: u64) -> bool {
    fs::read_dir(std::format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1)
}
