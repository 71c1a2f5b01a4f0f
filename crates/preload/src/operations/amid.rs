//! What becomes of names that a service was making when it died.
//!
//! Names are locks to many programs, so a name is taken for one's own only if nobody else can have made it: the service said that it did, or what is
//! there is as it would have made it and was made when it began to. The next worker, through which others make names, begins later than that. What is there
//! without its owner and mode was made by halves then, and is made anew.

use polytropo_client::Amid;

use super::names;
use super::placeholders::{Asked, O_NOFOLLOW};
use super::writing::{O_EXCL, O_TRUNC};
use crate::sys::{self, Status, nr};

const EEXIST: isize = -17;
const AT_REMOVEDIR: usize = 0x200;
const TYPE: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
/// From a beginning to what it made. The next worker makes names 5 ms later at the earliest, of which clocks of filesystems, which lag behind,
/// may hide 4.
const AFTER_NS: u64 = 1_000_000;
const LAG_NS: u64 = 20_000_000;

/// What was to be made, by modes from which the umask is taken.
#[derive(Clone, Copy)]
pub enum Made {
    Directory { mode: u32 },
    File { mode: u32 },
    Symlink { text: usize },
    Link { from: (usize, usize) },
}

/// What has the name by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// This inode, which the service made.
    Ours(u64),
    /// It made it, and died before it had its owner and mode.
    Half,
    /// Nothing, or perhaps what somebody else made.
    Others,
}

pub fn found((directory, path): (usize, usize), made: Made, amid: Amid) -> Found {
    let Some(there) = sys::status_of_name(directory, path) else { return Found::Others };
    let at_ns = match amid {
        Amid::Done { inode } if inode == there.inode => return Found::Ours(inode),
        Amid::Done { .. } => return Found::Others,
        Amid::Begun { at_ns } => at_ns,
    };
    if let Made::Link { from } = made {
        let same = sys::status_of_name(from.0, from.1)
            .is_some_and(|from| (from.device, from.inode) == (there.device, there.inode));
        return if same { Found::Ours(there.inode) } else { Found::Others };
    }
    weigh(&there, at_ns, wanted(made), || match made {
        Made::Symlink { text } => leads_to(directory, path, text),
        _ => true,
    })
}

/// Type, permissions and owner of what was to be made.
fn wanted(made: Made) -> (u32, u32, [u32; 2]) {
    let (kind, mode) = match made {
        Made::Directory { mode } => (DIRECTORY, mode & 0o1777),
        Made::File { mode } => (REGULAR, mode),
        Made::Symlink { .. } | Made::Link { .. } => (SYMLINK, 0o777),
    };
    // SAFETY: concerns no memory.
    let owner = [nr::GETEUID, nr::GETEGID].map(|number| unsafe { sys::call(number, [0; 6]) } as u32);
    (kind, mode, owner)
}

fn weigh(
    there: &Status,
    at_ns: u64,
    (kind, mode, owner): (u32, u32, [u32; 2]),
    is_same: impl FnOnce() -> bool,
) -> Found {
    let changed_ns = there.ctime_s.saturating_mul(1_000_000_000).saturating_add(there.ctime_ns);
    let links_max = if kind == DIRECTORY { 2 } else { 1 };
    let is_new = there.mode & TYPE == kind
        && there.links <= links_max
        && (at_ns.saturating_sub(LAG_NS)..=at_ns.saturating_add(AFTER_NS)).contains(&changed_ns)
        && (kind != REGULAR || there.size_bytes == 0);
    if !is_new || !is_same() {
        return Found::Others;
    }
    // Directories take the setgid bit from theirs.
    let bits = if kind == DIRECTORY { 0o1777 } else { 0o7777 };
    if [there.uid, there.gid] == owner && there.mode & bits == mode {
        Found::Ours(there.inode)
    } else {
        Found::Half
    }
}

fn leads_to(directory: usize, path: usize, text: usize) -> bool {
    let Some(text) = names::read_path(text) else { return false };
    let mut there = [0; polytropo_client::PATH_BYTES_MAX];
    let arguments = [directory, path, there.as_mut_ptr() as usize, there.len(), 0, 0];
    // SAFETY: the program's own path; the kernel writes into the buffer, within its length.
    let got = unsafe { sys::call(nr::READLINKAT, arguments) };
    usize::try_from(got).is_ok_and(|length| there.get(..length) == Some(text))
}

/// Takes what was made by halves away, through the kernel.
pub fn remove((directory, path): (usize, usize), made: Made) -> bool {
    let flags = if matches!(made, Made::Directory { .. }) { AT_REMOVEDIR } else { 0 };
    // SAFETY: the program's own path.
    unsafe { sys::call(nr::UNLINKAT, [directory, path, flags, 0, 0, 0]) == 0 }
}

/// open(2) that was to make a file.
#[cold]
pub fn open(asked: &Asked, mode: u32, umask: u32, amid: Amid) -> isize {
    let call = |flags: usize| {
        let arguments = [asked.directory, asked.path, flags, mode as usize, 0, 0];
        // SAFETY: the program's own path.
        unsafe { sys::call(nr::OPENAT, arguments) }
    };
    // So that the kernel hears of what is there.
    let made = call(asked.flags | sys::O_CREAT | O_EXCL);
    if made != EEXIST {
        return made;
    }
    let (name, file) = ((asked.directory, asked.path), Made::File { mode: mode & !umask });
    match found(name, file, amid) {
        Found::Half if remove(name, file) => call(asked.flags),
        Found::Ours(inode) if asked.flags & O_EXCL != 0 => {
            let opened = call(asked.flags & !(sys::O_CREAT | O_EXCL | O_TRUNC) | O_NOFOLLOW);
            let Ok(descriptor) = usize::try_from(opened) else { return opened };
            if sys::status(descriptor).is_some_and(|status| status.inode == inode) {
                return opened;
            }
            sys::close(descriptor as i32);
            EEXIST
        }
        _ if asked.flags & O_EXCL != 0 => EEXIST,
        _ => call(asked.flags),
    }
}
