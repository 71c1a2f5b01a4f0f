//! Programs that write without waiting while their worker is killed: what was acknowledged is there, and they go on.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use polytropo_client::{At, Channel, Error, File};
use serde_json::json;

use crate::Test;
use crate::held::worker_pid;
use crate::support::{Site, fork_child, pattern};

pub const TESTS: &[Test] = &[
    ("posted_writes_survive_the_service", posted_writes_survive_the_service),
    ("what_programs_keep_ends_with_the_service", what_programs_keep_ends_with_the_service),
];

const RDWR: u32 = (libc::O_RDWR | libc::O_CREAT) as u32;
const APPEND: u32 = (libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND) as u32;
const ROUNDS: u64 = 12;

struct Written {
    name: String,
    file: File,
    appends: bool,
    bytes: Vec<u8>,
}

impl Written {
    fn open(channel: &Channel, name: String, appends: bool) -> Self {
        let flags = if appends { APPEND } else { RDWR };
        let opened = channel.open(At::Root, name.as_bytes(), flags, 0o644, 0).expect("make a file");
        Self { name, file: opened.file, appends, bytes: Vec::new() }
    }

    /// False once the service is gone; then the write is done by the kernel.
    fn write(&mut self, channel: &Channel, mnt: &Path, n: u64) -> bool {
        let count = [1, 100, 4096, 5000, 16 << 10][n as usize % 5];
        let at = if self.appends { self.bytes.len() } else { (n as usize * 7919) % 200 * 1000 };
        let bytes = pattern(n, at as u64, count);
        self.bytes.resize(self.bytes.len().max(at + count), 0);
        self.bytes[at..at + count].copy_from_slice(&bytes);
        match channel.pwrite(self.file, &bytes, at as u64) {
            Ok(written) => {
                assert_eq!(written, count);
                true
            }
            Err(Error::Gone) => {
                let path = mnt.join(&self.name);
                let opened = OpenOptions::new().write(true).append(self.appends).open(path);
                let mut kernels = opened.expect("open it by the kernel");
                if self.appends {
                    kernels.write_all(&bytes).expect("append by the kernel");
                } else {
                    kernels.write_all_at(&bytes, at as u64).expect("write by the kernel");
                }
                false
            }
            Err(error) => panic!("{}: {error:?}", self.name),
        }
    }
}

fn posted_writes_survive_the_service() {
    let mut site = Site::start_with(&["--channel-writes", "--restarts=1000"]);
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    for round in 0..ROUNDS {
        let channel = site.connect(&mnt);
        let mut files: Vec<_> =
            (0..4).map(|k| Written::open(&channel, format!("f{round}-{k}"), k % 2 == 1)).collect();
        // The first writes of a file are requests, and of those an append may be done twice.
        for file in &mut files {
            assert!((0..3).all(|n| file.write(&channel, &mnt, n)));
        }
        let victim = rustix::process::Pid::from_raw(worker_pid(&mut site)).unwrap();
        let killer = fork_child(|| {
            std::thread::sleep(Duration::from_micros(500 + round * 3700 % 40_000));
            rustix::process::kill_process(victim, rustix::process::Signal::KILL).expect("kill the worker");
        });
        let mut n = 0u64;
        // Now in haste, now with pauses in which what was posted lies about.
        while files[(n / 7 % 4) as usize].write(&channel, &mnt, n) {
            n += 1;
            if n % 50 == 49 && round % 2 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        assert!(killer.wait());
        for file in &files {
            let seen = fs::read(mnt.join(&file.name)).expect("read it by the kernel");
            let differs = seen.iter().zip(&file.bytes).position(|(a, b)| a != b);
            let (size, wanted) = (seen.len(), file.bytes.len());
            assert!(
                seen == file.bytes,
                "round {round}, {}: {size} bytes of {wanted}, other from {differs:?} on",
                file.name
            );
            assert!(fs::read(site.scratch.join("data").join(&file.name)).unwrap() == file.bytes);
        }
        assert!(channel.has_ended(), "the program is told");
    }
}

fn what_programs_keep_ends_with_the_service() {
    let mut site = Site::start_with(&["--channel-writes", "--restarts=1000"]);
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    fs::write(mnt.join("f"), b"before").unwrap();
    let channel = site.connect(&mnt);
    let size = |channel: &Channel| channel.stat(At::Root, b"f", 0).map(|found| found.size_bytes);
    assert_eq!((size(&channel), size(&channel)), (Ok(6), Ok(6)));
    let victim = rustix::process::Pid::from_raw(worker_pid(&mut site)).unwrap();
    rustix::process::kill_process(victim, rustix::process::Signal::KILL).unwrap();
    // Waits for the next worker, which knows nothing of this channel and what is kept there.
    fs::write(mnt.join("f"), b"longer than before").unwrap();
    assert_eq!(size(&channel), Err(Error::Gone));
    let again = site.connect(&mnt);
    assert_eq!(size(&again), Ok(18));
}
