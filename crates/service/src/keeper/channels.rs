//! The socket at which programs ask for a channel, and the check of who they are.
//!
//! Nothing that a program says of itself counts: its ids come from the socket, the rest from /proc, and that it can reach the mount
//! is shown by a descriptor of it.

use std::fs;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use log::{debug, info};
use polytropo_libservices::FsCapabilities;
use polytropo_wire::VERSION;
use polytropo_wire::hello::{HELLO_BYTES, Hello, Verdict, Welcome};
use rustix::fs::{AtFlags, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::{Errno, Result};

use super::child::Child;
use super::mounting;
use super::orders::Keeper;
use crate::control::Refusal;
use crate::link::Newcomer;

/// In the run directory; containers get the whole directory, in which a later keeper's socket shows as well.
pub const DIRECTORY: &str = "channel";
const SOCKET: &str = "channel.sock";
/// Programs that are looked at, at once.
const ARRIVALS_MAX: usize = 32;
const PATIENCE: Duration = Duration::from_secs(5);
/// How often somebody who waits for a worker looks.
const LOOK_EVERY: Duration = Duration::from_millis(5);
const MOUNT_TABLE_MAX_BYTES: u64 = 8 << 20;
/// Room for what is usual is there at once: the kernel's files do not tell their size, and reading them by and by takes many calls.
const MOUNT_TABLE_USUAL_BYTES: usize = 32 << 10;
const STATUS_USUAL_BYTES: usize = 4 << 10;
const MOUNTS_INSIDE_MAX: usize = 1024;
const GROUPS_MAX: usize = 1024;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Where programs connect.
pub struct Gate {
    listener: OwnedFd,
    arrivals: Arc<AtomicUsize>,
}

impl Gate {
    /// Listens in `run_dir`; the socket of a dead keeper is replaced.
    pub fn listen(run_dir: &Path) -> std::result::Result<Self, Refusal> {
        let listener = bind(run_dir).map_err(|errno| {
            Refusal::of(errno, format!("{}/{DIRECTORY}/{SOCKET} cannot be made", run_dir.display()))
        })?;
        Ok(Self { listener, arrivals: Arc::default() })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Takes one waiting program. Call it when the socket is readable.
    pub fn accept(&self, keeper: &Arc<Keeper>) {
        let socket = match rustix::net::accept_with(&self.listener, rustix::net::SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            Err(errno) => return debug!("a program went before it was heard: {errno}"),
        };
        if self.arrivals.fetch_add(1, Relaxed) >= ARRIVALS_MAX {
            self.arrivals.fetch_sub(1, Relaxed);
            return refuse(&socket, Verdict::TooMany);
        }
        let (keeper, arrivals, counted) = (keeper.clone(), self.arrivals.clone(), self.arrivals.clone());
        // A thread of its own: one that dawdles holds up nobody.
        let spawned = std::thread::Builder::new().name("arrival".into()).spawn(move || {
            if let Err(verdict) = admit(&keeper, &socket) {
                debug!("a program gets no channel: {}", verdict.sentence());
                refuse(&socket, verdict);
            }
            arrivals.fetch_sub(1, Relaxed);
        });
        if let Err(error) = spawned {
            counted.fetch_sub(1, Relaxed);
            info!("a program could not be heard: {error}");
        }
    }
}

fn bind(run_dir: &Path) -> Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match rustix::fs::mkdir(run_dir.join(DIRECTORY), Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    let directory = rustix::fs::open(run_dir.join(DIRECTORY), flags, Mode::empty())?;
    match rustix::fs::unlinkat(&directory, SOCKET, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // Through a descriptor, since a socket's address holds 107 bytes and state directories may lie deep.
    let place = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
    rustix::net::bind(&socket, &SocketAddrUnix::new(place)?)?;
    // Every user of a container may ask; what it gets is what it may do.
    rustix::fs::chmodat(&directory, SOCKET, Mode::from_raw_mode(0o666), AtFlags::empty())?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn refuse(socket: &OwnedFd, verdict: Verdict) {
    let bytes = Welcome::refusal(verdict).to_bytes();
    let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
    // Who is gone misses nothing.
    let _ = rustix::net::send(socket, &bytes, flags);
}

/// Looks at a program and hands it to the worker of the mount that it asks for.
fn admit(keeper: &Keeper, socket: &OwnedFd) -> std::result::Result<(), Verdict> {
    let root = receive_hello(socket)?;
    let peer = Credentials::of(socket)?;
    let asked = Mounted::of(&root)?;
    drop(root);
    let table = peer.mount_table()?;
    let seen = look_for(&asked, &table.text)?;
    let (door, worker) = serving(keeper, asked.device).ok_or(Verdict::NotOurs)?;
    // All that was read of the process was read of this one, which still is.
    peer.still_there()?;
    let newcomer = Newcomer {
        pid: peer.pid,
        uid: peer.uid,
        gid: peer.gid,
        groups: peer.groups,
        capabilities: peer.capabilities,
        read_only: seen.read_only,
        is_root: seen.is_root,
        device: u64::from(asked.device.0) << 32 | u64::from(asked.device.1),
        mount_id: asked.mount_id,
        covered_bytes: seen.covered.len(),
    };
    let descriptors = [socket.as_fd(), peer.process.as_fd(), table.file.as_fd()];
    worker.connect(door, newcomer, descriptors, &seen.covered).map_err(|refusal| {
        info!("a program gets no channel: {refusal}");
        Verdict::Failed
    })
}

/// The door of a mount and its worker; waits for the next one if that is dead.
fn serving(keeper: &Keeper, device: (u32, u32)) -> Option<(u64, Arc<Child>)> {
    let until = Instant::now() + PATIENCE;
    loop {
        let found = keeper.door_of(device)?;
        if found.1.is_alive() || Instant::now() >= until {
            return Some(found);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The hello, and the descriptor that came with it.
fn receive_hello(socket: &OwnedFd) -> std::result::Result<OwnedFd, Verdict> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, sockopt};
    sockopt::set_socket_timeout(socket, sockopt::Timeout::Recv, Some(PATIENCE))
        .map_err(|_| Verdict::Failed)?;
    let mut bytes = [0; HELLO_BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    })
    .map_err(|_| Verdict::Malformed)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let hello = bytes.get(..received.bytes).and_then(Hello::from_bytes).ok_or(Verdict::Malformed)?;
    if hello.version != VERSION {
        return Err(Verdict::OtherVersion);
    }
    let root = descriptors.pop().ok_or(Verdict::Malformed)?;
    // Closing any other kind may have somebody else's filesystem do something.
    let flags = rustix::fs::fcntl_getfl(&root).map_err(|_| Verdict::Malformed)?;
    if flags.contains(OFlags::PATH) { Ok(root) } else { Err(Verdict::Malformed) }
}

/// Who is at the other end.
struct Credentials {
    pid: u32,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    capabilities: u64,
    process: OwnedFd,
}

struct MountTable {
    file: OwnedFd,
    text: Vec<u8>,
}

impl Credentials {
    fn of(socket: &OwnedFd) -> std::result::Result<Self, Verdict> {
        // As they were when it connected: the process may have become a set-user-ID program since.
        let mut told = [0u32; 3];
        option(socket, libc::SO_PEERCRED, &mut told).map_err(|_| Verdict::Failed)?;
        let [pid, uid, gid] = told;
        let mut number = [u32::MAX; 1];
        option(socket, SO_PEERPIDFD, &mut number).map_err(|_| Verdict::Gone)?;
        // SAFETY: the kernel made this descriptor for us just now.
        let process = unsafe { OwnedFd::from_raw_fd(number[0] as i32) };
        let mut groups = [0u32; GROUPS_MAX];
        let count = option(socket, SO_PEERGROUPS, &mut groups).map_err(|_| Verdict::UnusualCredentials)?;
        let status = Status::of(pid).ok_or(Verdict::Gone)?;
        let found = Self {
            pid,
            uid,
            gid,
            groups: groups[..count].to_vec(),
            capabilities: status.capabilities & FsCapabilities::all().bits(),
            process,
        };
        found.check(&status)?;
        Ok(found)
    }

    fn check(&self, status: &Status) -> std::result::Result<(), Verdict> {
        let own = fs::metadata("/proc/self/ns/user").map_err(|_| Verdict::Failed)?.ino();
        let theirs = fs::metadata(format!("/proc/{}/ns/user", self.pid)).map_err(|_| Verdict::Gone)?.ino();
        if own != theirs {
            return Err(Verdict::OtherUserNamespace);
        }
        if status.no_new_privileges {
            return Err(Verdict::NoNewPrivileges);
        }
        // The kernel weighs the filesystem's ids, which may be set apart from the effective ones.
        let usual = status.uids[1] == self.uid
            && status.uids[3] == self.uid
            && status.gids[1] == self.gid
            && status.gids[3] == self.gid;
        // Only root's capabilities cannot have come from a program that it became since it connected.
        if !usual || (self.uid != 0 && self.capabilities != 0) {
            return Err(Verdict::UnusualCredentials);
        }
        Ok(())
    }

    fn mount_table(&self) -> std::result::Result<MountTable, Verdict> {
        let mut file = fs::File::open(format!("/proc/{}/mountinfo", self.pid)).map_err(|_| Verdict::Gone)?;
        let mut text = Vec::with_capacity(MOUNT_TABLE_USUAL_BYTES);
        let read = (&mut file).take(MOUNT_TABLE_MAX_BYTES).read_to_end(&mut text);
        match read {
            Ok(count) if (count as u64) < MOUNT_TABLE_MAX_BYTES => Ok(MountTable { file: file.into(), text }),
            _ => Err(Verdict::TooManyMounts),
        }
    }

    fn still_there(&self) -> std::result::Result<(), Verdict> {
        let mut polled = [rustix::event::PollFd::new(&self.process, rustix::event::PollFlags::IN)];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        match rustix::event::poll(&mut polled, Some(&now)) {
            Ok(0) => Ok(()),
            _ => Err(Verdict::Gone),
        }
    }
}

const SO_PEERGROUPS: libc::c_int = 59;
const SO_PEERPIDFD: libc::c_int = 77;

/// A socket option of numbers of 32 bits; tells how many there are.
fn option(socket: &OwnedFd, name: libc::c_int, values: &mut [u32]) -> Result<usize> {
    let mut bytes = size_of_val(values) as libc::socklen_t;
    // SAFETY: the kernel writes at most `bytes` bytes to `values`, which are that many, and plain numbers.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            values.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    if done != 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(bytes as usize / size_of::<u32>())
}

/// What is needed of /proc/PID/status.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    /// Real, effective, saved, of the filesystem.
    uids: [u32; 4],
    gids: [u32; 4],
    capabilities: u64,
    no_new_privileges: bool,
}

impl Status {
    fn of(pid: u32) -> Option<Self> {
        let mut text = String::with_capacity(STATUS_USUAL_BYTES);
        fs::File::open(format!("/proc/{pid}/status")).ok()?.read_to_string(&mut text).ok()?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let ids = |name: &str| -> Option<[u32; 4]> {
            let numbers: Option<Vec<u32>> =
                field(name)?.split_ascii_whitespace().map(|number| number.parse().ok()).collect();
            numbers?.try_into().ok()
        };
        Some(Self {
            uids: ids("Uid")?,
            gids: ids("Gid")?,
            capabilities: u64::from_str_radix(field("CapEff")?.trim(), 16).ok()?,
            no_new_privileges: field("NoNewPrivs")?.trim() != "0",
        })
    }
}

/// The mount whose root a descriptor is.
struct Mounted {
    device: (u32, u32),
    mount_id: u64,
}

impl Mounted {
    fn of(root: &OwnedFd) -> std::result::Result<Self, Verdict> {
        // Not synchronised: nobody is asked for this, whatever filesystem it is.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(root, "", flags, StatxFlags::MNT_ID | StatxFlags::TYPE)
            .map_err(|_| Verdict::NotOurs)?;
        if !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Err(Verdict::NotOurs);
        }
        Ok(Self { device: (stat.stx_dev_major, stat.stx_dev_minor), mount_id: stat.stx_mnt_id })
    }
}

/// How a process sees a mount.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    read_only: bool,
    is_root: bool,
    /// Where something else is mounted inside: paths from the mount's root, each ended by a NUL.
    covered: Vec<u8>,
}

fn look_for(asked: &Mounted, table: &[u8]) -> std::result::Result<Seen, Verdict> {
    let lines: Vec<_> = table.split(|&byte| byte == b'\n').filter_map(mounting::process_line).collect();
    let own = lines.iter().find(|line| line.mount_id == asked.mount_id && line.device == asked.device);
    let own = own.ok_or(Verdict::NotOurs)?;
    if own.root != b"/" {
        return Err(Verdict::NotTheRoot);
    }
    let prefix = own.mountpoint.strip_suffix(b"/").unwrap_or(&own.mountpoint);
    let mut covered = Vec::new();
    let mut count = 0;
    for line in lines.iter().filter(|line| line.parent == own.mount_id && line.mount_id != own.mount_id) {
        let inside = line.mountpoint.strip_prefix(prefix).and_then(|rest| rest.strip_prefix(b"/"));
        if let Some(inside) = inside.filter(|inside| !inside.is_empty()) {
            count += 1;
            covered.extend_from_slice(inside);
            covered.push(0);
        }
    }
    if count > MOUNTS_INSIDE_MAX {
        return Err(Verdict::TooManyMounts);
    }
    Ok(Seen { read_only: own.read_only, is_root: prefix.is_empty(), covered })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_who_a_process_is() {
        let own = fs::read_to_string("/proc/self/status").unwrap();
        assert_eq!(Status::parse(&own).unwrap().uids[1], rustix::process::geteuid().as_raw());
        let text =
            "Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nCapEff:\t0000000000000003\nNoNewPrivs:\t1\n";
        let status = Status::parse(text).unwrap();
        assert_eq!((status.uids, status.gids), ([1, 2, 3, 4], [5, 6, 7, 8]));
        assert!(status.capabilities == 3 && status.no_new_privileges);
        assert_eq!(Status::parse("Uid:\t1\n"), None);
    }

    #[test]
    fn sees_a_mount_as_the_process_does() {
        let table = b"30 1 0:5 / / rw - fuse.polytropo t rw\n31 30 0:9 / /proc rw - proc proc rw\n\
            32 31 0:9 / /proc/sys ro - proc proc rw\n40 30 0:6 / /vol ro,nodev - fuse.polytropo t rw\n\
            41 40 0:7 / /vol/a\\040b rw - tmpfs x rw\n42 30 0:5 /sub /part rw - fuse.polytropo t rw\n";
        let mounted = |mount_id, minor| Mounted { device: (0, minor), mount_id };
        let root = look_for(&mounted(30, 5), table).unwrap();
        assert_eq!(root, Seen { read_only: false, is_root: true, covered: b"proc\0vol\0part\0".to_vec() });
        let volume = look_for(&mounted(40, 6), table).unwrap();
        assert_eq!(volume, Seen { read_only: true, is_root: false, covered: b"a b\0".to_vec() });
        assert_eq!(look_for(&mounted(42, 5), table), Err(Verdict::NotTheRoot));
        assert_eq!(look_for(&mounted(40, 5), table), Err(Verdict::NotOurs));
    }
}
