//! A keeper of an ordinary user: in a user and mount namespace of its own, where it may mount.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use log::{info, warn};
use rustix::thread::{CapabilitySet, UnshareFlags};

use crate::control::Refusal;

/// Ids in a container; more of the user's subordinate ids are not needed.
const IDS_MAX: u64 = 65_536;

/// Enters namespaces in which this process may mount. With `CAP_SYS_ADMIN` (inside a user namespace that was made
/// for it) only the mounts are parted. The process must have one thread only.
pub fn enter() -> Result<(), Refusal> {
    let may_mount = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    if may_mount {
        return separate(UnshareFlags::NEWNS);
    }
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let mapper = Mapper::start();
    separate(UnshareFlags::NEWUSER | UnshareFlags::NEWNS)?;
    let problem = match mapper.and_then(Mapper::map) {
        Ok(()) => return Ok(()),
        Err(problem) => problem,
    };
    warn!("{problem}; files can belong to this user alone");
    map_one(uid, gid).map_err(|error| Refusal::new(format!("the user namespace cannot be set up: {error}")))
}

fn separate(flags: UnshareFlags) -> Result<(), Refusal> {
    // SAFETY: CLONE_FILES is not among the flags, so no descriptor changes hands; there is one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(|errno| {
        let why = crate::control::describe(errno);
        let sentence = format!(
            "this user may not make a user namespace: {why}; allow it (sysctl user.max_user_namespaces, \
             kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns) or run as root"
        );
        Refusal::with_errno(errno, sentence)
    })
}

/// Maps this user's own id to 0 and nothing else. Parts that are mapped already stay.
fn map_one(uid: u32, gid: u32) -> std::io::Result<()> {
    if fs::read_to_string("/proc/self/uid_map")?.trim().is_empty() {
        fs::write("/proc/self/uid_map", format!("0 {uid} 1\n"))?;
    }
    if fs::read_to_string("/proc/self/gid_map")?.trim().is_empty() {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/gid_map", format!("0 {gid} 1\n"))?;
    }
    Ok(())
}

/// A process outside of the new user namespace that has newuidmap(1) and newgidmap(1) write its maps: those programs
/// gain their rights outside only.
struct Mapper {
    process: std::process::Child,
}

impl Mapper {
    fn start() -> Result<Self, String> {
        let process = Command::new("/proc/self/exe")
            .args(["map-ids", &std::process::id().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("no helper for id maps could be started: {error}"))?;
        Ok(Self { process })
    }

    fn map(mut self) -> Result<(), String> {
        let told = self.process.stdin.take().map(|mut stdin| stdin.write_all(b"\n"));
        if !matches!(told, Some(Ok(()))) {
            // Its own words below say why it is not there.
            info!("the helper for id maps does not listen");
        }
        let done = self.process.wait_with_output().map_err(|error| format!("no id maps: {error}"))?;
        if done.status.success() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&done.stderr).trim().to_owned())
    }
}

/// What the helper does: waits for a byte on standard input, then maps the ids of the process `pid`. The sentence says what
/// stands in the way.
pub fn map_ids_of(pid: u32) -> Result<(), String> {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let name = user_name(uid).unwrap_or_default();
    let ranges = [("/etc/subuid", "newuidmap", uid), ("/etc/subgid", "newgidmap", gid)].map(
        |(file, program, own)| -> Result<_, String> {
            let (first, count) = subordinate_ids(Path::new(file), &name, uid)?;
            Ok((program, own, first, count))
        },
    );
    std::io::stdin().read_exact(&mut [0]).map_err(|_| "the keeper went away".to_owned())?;
    for range in ranges {
        let (program, own, first, count) = range?;
        let numbers = [u64::from(pid), 0, own.into(), 1, 1, first, count].map(|number| number.to_string());
        let done = Command::new(program).args(numbers).output();
        let done = done.map_err(|error| format!("{program} cannot be run ({error}); install uidmap"))?;
        if !done.status.success() {
            return Err(format!("{program} failed: {}", String::from_utf8_lossy(&done.stderr).trim()));
        }
    }
    Ok(())
}

fn user_name(uid: u32) -> Option<String> {
    let users = fs::read_to_string("/etc/passwd").ok()?;
    let mut lines = users.lines().map(|line| line.split(':'));
    lines.find_map(|mut fields| {
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// The first range of subordinate ids of a user, by name or number, in a file like /etc/subuid.
fn subordinate_ids(file: &Path, name: &str, uid: u32) -> Result<(u64, u64), String> {
    let shown = file.display();
    let text = fs::read_to_string(file).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    find_range(&text, name, uid).ok_or_else(|| {
        format!("{shown} gives this user no ids; add some with `usermod --add-subuids 100000-165535 --add-subgids \
                 100000-165535 USER`")
    })
}

fn find_range(text: &str, name: &str, uid: u32) -> Option<(u64, u64)> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let owner = fields.next()?;
        let ours = (!name.is_empty() && owner == name) || owner == uid.to_string();
        let (first, count): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.trim().parse().ok()?);
        (ours && count > 0).then_some((first, count.min(IDS_MAX - 1)))
    })
}

#[cfg(test)]
mod tests {
    use super::find_range;

    #[test]
    fn finds_subordinate_ids() {
        let text = "root:1:5\nana:100000:65536\n1001:300000:10\nbad:x:1\nempty:7:0\n";
        assert_eq!(find_range(text, "ana", 1000), Some((100_000, 65_535)));
        assert_eq!(find_range(text, "", 1001), Some((300_000, 10)));
        assert_eq!(find_range(text, "bad", 1), None);
        assert_eq!(find_range(text, "empty", 2), None);
        assert_eq!(find_range(text, "nobody", 65_534), None);
    }
}
