//! A mount for one test: in a mount namespace that only the test's thread and its children see.

use std::ffi::{CStr, CString};
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// After this a test's server is killed, which ends whatever waits for it.
const TEST_TIME_MAX: Duration = Duration::from_secs(60);

/// A directory of the host (`source`) and the mounts that show it.
pub struct Site {
    pub source: PathBuf,
    pub mount: PathBuf,
    /// A second superblock of the same stack.
    pub other: PathBuf,
    /// What `prepare` has filled.
    pub lower: PathBuf,
    server: Child,
    done: Arc<AtomicBool>,
    _scratch: tempfile::TempDir,
}

/// Runs `test` on a mount of an empty directory; with `flags` for `mount_dir`.
pub fn on_mount(flags: &[&str], test: impl FnOnce(&Site)) {
    on_prepared_mount(flags, |_| {}, test);
}

/// Runs `test` on a union of an empty upper over a lower that `prepare` has filled.
pub fn on_union(prepare: impl FnOnce(&Path), test: impl FnOnce(&Site)) {
    on_prepared_mount(&["--coherence", "exclusive", "--lower"], prepare, test);
}

/// The same where the kernel uses the lower's files itself. A kernel that cannot is told of; `test` then runs all the same.
pub fn on_union_passing_through(prepare: impl FnOnce(&Path), test: impl FnOnce(&Site)) {
    on_prepared_mount(PASSTHROUGH, prepare, test);
}

/// Runs `test` on a mount of a filesystem that holds `size_bytes`.
pub fn on_small_disk(flags: &[&str], size_bytes: u64, test: impl FnOnce(&Site)) {
    let prepare = |lower: &Path| {
        let source = lower.with_file_name("source");
        let data = CString::new(format!("size={size_bytes}")).expect("no NUL");
        mount_filesystem(c"tmpfs", &source, &data);
    };
    on_prepared_mount(flags, prepare, test);
}

fn on_prepared_mount(flags: &[&str], prepare: impl FnOnce(&Path), test: impl FnOnce(&Site)) {
    if let Some(reason) = why_not() {
        eprintln!("skipped: {reason}");
        return;
    }
    if wants_rings() {
        if let Err(reason) = RingSwitch::set(true) {
            eprintln!("skipped: {reason}");
            return;
        }
    }
    own_mount_namespace();
    let mut site = Site::new(flags, prepare);
    test(&site);
    site.end();
}

/// Every way that a stack over a directory is cached, and a union with an empty lower.
pub const CACHINGS: [&[&str]; 7] = [
    &["--coherence", "exclusive"],
    &["--coherence", "exclusive", "--ask-for-opens"],
    TWO_DOORS,
    &["--coherence", "shared"],
    &["--coherence", "exclusive", "--lower"],
    &["--coherence", "exclusive", "--no-writeback", "--lower"],
    PASSTHROUGH,
];

/// A second superblock shows the same stack.
pub const TWO_DOORS: &[&str] = &["--coherence", "exclusive", "--no-writeback", "--ask-for-opens"];

const PASSTHROUGH: &[&str] = &["--coherence", "exclusive", "--passthrough", "0", "--lower"];

/// Runs `test` once for each way of caching.
pub fn on_each_mount(test: impl Fn(&Site)) {
    for flags in CACHINGS {
        eprintln!("with {flags:?}");
        on_mount(flags, &test);
    }
}

/// Whether all mounts of this run are to be served over io_uring.
pub fn wants_rings() -> bool {
    std::env::var_os("POLYTROPO_TEST_FUSE_TRANSPORT").is_some_and(|wanted| wanted == "uring")
}

/// The kernel's switch for FUSE over io_uring, held in one position; put back when dropped. Others have to wait.
pub struct RingSwitch {
    before: Vec<u8>,
    _lock: std::fs::File,
}

impl RingSwitch {
    const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

    pub fn set(on: bool) -> Result<Self, String> {
        let lock = std::fs::File::create("/tmp/polytropo-enable-uring.lock")
            .map_err(|error| format!("the lock of {} cannot be had: {error}", Self::SWITCH))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).expect("lock a file");
        let before = std::fs::read(Self::SWITCH).map_err(|_| "this kernel has no FUSE over io_uring")?;
        std::fs::write(Self::SWITCH, if on { "Y" } else { "N" })
            .map_err(|error| format!("{} cannot be set: {error}", Self::SWITCH))?;
        Ok(Self { before, _lock: lock })
    }
}

impl Drop for RingSwitch {
    fn drop(&mut self) {
        std::fs::write(Self::SWITCH, &self.before).expect("put the switch back");
    }
}

pub fn why_not() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        Some("mounting needs root")
    } else if !Path::new("/dev/fuse").exists() {
        Some("there is no /dev/fuse")
    } else {
        None
    }
}

pub fn own_mount_namespace() {
    // SAFETY: a new mount namespace for this thread; descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
        .expect("make a mount namespace");
    // SAFETY: the strings are NUL-terminated; the other pointers may be null here.
    let done = unsafe {
        libc::mount(
            std::ptr::null(),
            c"/".as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            std::ptr::null(),
        )
    };
    assert_eq!(done, 0, "keep mounts private: {}", std::io::Error::last_os_error());
}

fn server_program() -> PathBuf {
    let test = std::env::current_exe().expect("find this program");
    let profile = test.parent().and_then(Path::parent).expect("find the build directory");
    let program = profile.join("examples/mount_dir");
    assert!(
        program.exists(),
        "{} is missing; build it with cargo build -p polytropo-service --example mount_dir",
        program.display()
    );
    program
}

impl Site {
    fn new(flags: &[&str], prepare: impl FnOnce(&Path)) -> Self {
        let scratch = tempfile::tempdir().expect("make a scratch directory");
        let [source, mount, other, lower] = ["source", "mount", "other", "lower"].map(|name| {
            let path = scratch.path().join(name);
            std::fs::create_dir(&path).expect("make a directory");
            path
        });
        prepare(&lower);
        let over_rings = wants_rings();
        // The kernel looks at the switch when a connection begins.
        let switch = over_rings.then(|| RingSwitch::set(true).expect("on_prepared_mount has looked"));
        let mut command = Command::new(server_program());
        let transport = ["--fuse-transport", if over_rings { "uring" } else { "device" }];
        command.arg(&source).arg(&mount).args(transport).args(flags).stdout(Stdio::piped());
        if flags.last() == Some(&"--lower") {
            command.arg(&lower);
        }
        let two_doors = flags == TWO_DOORS || flags.contains(&"shared");
        if two_doors {
            command.arg("--also").arg(&other);
        }
        // SAFETY: prctl is safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let mut server = command.spawn().expect("start the server");
        let mut line = String::new();
        BufReader::new(server.stdout.take().expect("a pipe")).read_line(&mut line).expect("hear the server");
        assert_eq!(line, "ready\n", "the server did not start");
        if switch.is_some() {
            // Answered once the connection has begun.
            for path in [&mount, &other] {
                rustix::fs::statfs(path).expect("ask the mount");
            }
        }
        drop(switch);
        let done = Arc::new(AtomicBool::new(false));
        watch(server.id(), done.clone());
        Self { source, mount, other, lower, server, done, _scratch: scratch }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.mount.join(name)
    }

    /// Names of the server's threads.
    pub fn server_threads(&self) -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.server.id())).expect("list threads");
        let name = |task: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
        };
        tasks.filter_map(name).collect()
    }

    /// Aborts the connection as an administrator does.
    pub fn abort(&self) {
        let device = std::fs::metadata(&self.mount).expect("look at the mount").dev();
        let minor = libc::minor(device);
        // The control files are a filesystem of their own; a private mount of it does.
        let control = self.source.parent().expect("a parent").join("control");
        std::fs::create_dir(&control).expect("make a directory");
        mount_filesystem(c"fusectl", &control, c"");
        std::fs::write(control.join(minor.to_string()).join("abort"), "1").expect("abort the connection");
        unmount(&control);
    }

    /// Whether the server ends by itself in time.
    pub fn server_ends(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if self.server.try_wait().expect("look at the server").is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }

    fn end(&mut self) {
        unmount(&self.mount);
        unmount(&self.other);
        unmount(&self.source);
        assert!(self.server_ends(), "the server does not end after its mounts are gone");
        self.done.store(true, Ordering::Relaxed);
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // After a failure: nothing may stay, not even a hung mount.
        self.done.store(true, Ordering::Relaxed);
        let _ = self.server.kill();
        let _ = self.server.wait();
        unmount(&self.mount);
        unmount(&self.other);
        unmount(&self.source);
    }
}

fn watch(pid: u32, done: Arc<AtomicBool>) {
    std::thread::spawn(move || {
        let deadline = Instant::now() + TEST_TIME_MAX;
        while Instant::now() < deadline {
            if done.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        eprintln!("the test took longer than {TEST_TIME_MAX:?}: its server is killed");
        // SAFETY: the server is a child that was not waited for, since `done` is not set: the pid is its own.
        unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
    });
}

pub fn mount_filesystem(kind: &CStr, on: &Path, data: &CStr) {
    let target = c_path(on);
    // SAFETY: every pointer is a NUL-terminated string.
    let done = unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, data.as_ptr().cast()) };
    assert_eq!(done, 0, "mount {kind:?}: {}", std::io::Error::last_os_error());
}

pub fn unmount(path: &Path) {
    let path = c_path(path);
    // SAFETY: a NUL-terminated string. What is not mounted is an error that means nothing here.
    unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
}

pub fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path without NUL")
}

/// Waits until `condition` holds, at most ten seconds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The last error of a system call made through libc.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}
