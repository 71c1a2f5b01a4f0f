//! A keeper for one test, and programs that connect to it.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use polytropo_client::{Channel, Refused};
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

pub fn why_not() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        Some("mounting needs root")
    } else if !Path::new("/dev/fuse").exists() {
        Some("there is no /dev/fuse")
    } else {
        None
    }
}

/// The process must have one thread only.
pub fn own_mount_namespace() {
    // SAFETY: a new mount namespace; descriptors stay as they are.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
        .expect("make a mount namespace");
    let flags = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).expect("keep mounts private");
}

/// A keeper with its run directory, and directories to serve.
pub struct Site {
    pub scratch: PathBuf,
    keeper: Child,
    orders: BufReader<UnixStream>,
    _removed: tempfile::TempDir,
}

impl Site {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn start_with(arguments: &[&str]) -> Self {
        let removed = tempfile::tempdir().expect("make a directory");
        let scratch = removed.path().to_owned();
        // Others are to reach what lies below.
        std::fs::set_permissions(&scratch, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("open it up");
        let run_dir = scratch.join("run");
        std::fs::create_dir(&run_dir).expect("make a directory");
        let mut command = Command::new(env!("CARGO_BIN_EXE_polytropo-service"));
        command.arg("keeper").arg("--run-dir").arg(&run_dir);
        command.args(["--uid-base", "3000000", "--idle-timeout-s", "600"]).args(arguments);
        command.stdout(Stdio::null());
        // SAFETY: one system call. The keeper dies with this test, and its worker with it.
        unsafe {
            command.pre_exec(|| {
                let kill = Some(rustix::process::Signal::KILL);
                Ok(rustix::process::set_parent_process_death_signal(kill)?)
            });
        }
        let keeper = command.spawn().expect("start a keeper");
        let deadline = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            match UnixStream::connect(run_dir.join("control.sock")) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "the keeper does not listen: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Self { scratch, keeper, orders: BufReader::new(stream), _removed: removed }
    }

    pub fn order(&mut self, order: &Value) -> Value {
        let line = format!("{order}\n");
        self.orders.get_mut().write_all(line.as_bytes()).expect("give an order");
        let mut answer = String::new();
        self.orders.read_line(&mut answer).expect("hear the answer");
        let mut answer: Value = serde_json::from_str(&answer).expect("an answer in JSON");
        assert!(answer.get("error").is_none(), "{order}: {answer}");
        answer["ok"].take()
    }

    /// Serves the directory `name` (made if need be) at the mount point `mnt-NAME`.
    pub fn mount(&mut self, name: &str, options: Value) -> PathBuf {
        let source = self.directory(name);
        let mut root = json!({"kind": "dir", "path": source});
        root.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        self.mount_stack(name, &root)
    }

    pub fn mount_stack(&mut self, name: &str, root: &Value) -> PathBuf {
        self.mount_document(name, &json!({"version": 1, "root": root}))
    }

    pub fn mount_document(&mut self, name: &str, stack: &Value) -> PathBuf {
        let mountpoint = self.directory(&format!("mnt-{name}"));
        self.order(&json!({"op": "mount", "stack": stack, "mountpoint": mountpoint}));
        mountpoint
    }

    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.scratch.join(name);
        if !path.exists() {
            std::fs::create_dir(&path).expect("make a directory");
        }
        path
    }

    pub fn socket(&self) -> PathBuf {
        self.scratch.join("run/channel/channel.sock")
    }

    pub fn connect(&self, mountpoint: &Path) -> Channel {
        self.try_connect(mountpoint).expect("connect to the service")
    }

    pub fn try_connect(&self, mountpoint: &Path) -> Result<Channel, Refused> {
        let root = open_path(mountpoint);
        Channel::connect(self.socket().as_os_str().as_bytes(), root.as_raw_fd())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        // What is mounted, and inside of what, goes before the directory can.
        for entry in std::fs::read_dir(&self.scratch).into_iter().flatten().flatten() {
            while rustix::mount::unmount(entry.path(), rustix::mount::UnmountFlags::DETACH).is_ok() {}
        }
    }
}

pub fn open_path(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).expect("open the mount")
}

/// Bytes that tell apart every place of every file.
pub fn pattern(seed: u64, from: u64, count: usize) -> Vec<u8> {
    (from..from + count as u64)
        .map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 ^ seed as u8)
        .collect()
}

/// A forked child of this process, which has one thread.
pub struct Forked(rustix::process::Pid);

impl Forked {
    pub fn pid(&self) -> i32 {
        self.0.as_raw_pid()
    }

    /// Whether it ended well.
    pub fn wait(self) -> bool {
        let status = rustix::process::waitpid(Some(self.0), rustix::process::WaitOptions::empty());
        status.expect("wait for a child").is_some_and(|(_, status)| status.exit_status() == Some(0))
    }

    pub fn kill(&self) {
        rustix::process::kill_process(self.0, rustix::process::Signal::KILL).expect("kill a child");
    }
}

/// Runs `work` in a child; one that panics ends badly.
pub fn fork_child(work: impl FnOnce()) -> Forked {
    // SAFETY: this process has one thread, so the child finds no lock held.
    match unsafe { libc::fork() } {
        0 => {
            let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_ok();
            // SAFETY: ends the child at once: what it inherited (a keeper, a directory) is the parent's to take down.
            unsafe { libc::_exit(i32::from(!good)) }
        }
        pid => Forked(rustix::process::Pid::from_raw(pid).expect("fork")),
    }
}

/// Whether `work` ends well in a child.
pub fn as_child(work: impl FnOnce()) -> bool {
    fork_child(work).wait()
}

/// What is to be read, and what is to be written.
pub fn pipe() -> (std::fs::File, std::fs::File) {
    let (read, write) = rustix::pipe::pipe().expect("make a pipe");
    (read.into(), write.into())
}
