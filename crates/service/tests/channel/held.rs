//! Writes that the service holds before the layers get them: they are seen by all who look, go down soon, and survive the service.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use polytropo_client::{At, Channel, Error, File};
use serde_json::{Value, json};

use crate::Test;
use crate::support::{Site, pattern};

pub const TESTS: &[Test] = &[
    ("held_writes_survive_the_service", held_writes_survive_the_service),
    ("held_writes_are_seen_by_whoever_looks", held_writes_are_seen_by_whoever_looks),
    ("held_writes_do_what_a_file_does", held_writes_do_what_a_file_does),
    ("held_writes_go_down_soon", held_writes_go_down_soon),
    ("held_writes_keep_to_their_room", held_writes_keep_to_their_room),
    ("what_cannot_be_written_is_told_at_close", what_cannot_be_written_is_told_at_close),
];

const RDWR: u32 = (libc::O_RDWR | libc::O_CREAT) as u32;
const APPEND: u32 = (libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND) as u32;
const PAGE: usize = 4096;

fn site() -> (Site, PathBuf) {
    let mut site = Site::start_with(&["--channel-writes"]);
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    (site, mnt)
}

fn held_bytes(site: &mut Site) -> u64 {
    let stats = site.order(&json!({"op": "stats"}));
    let found = stats["past"]
        .as_array()
        .and_then(|past| past.iter().find_map(|past| past["windows"].get("held_bytes").cloned()));
    found.as_ref().and_then(Value::as_u64).expect("bytes that are held")
}

/// So much is written that what follows is held.
fn begin(channel: &Channel, name: &[u8], flags: u32) -> File {
    let file = channel.open(At::Root, name, flags, 0o666, 0).unwrap().file;
    for page in 0..40u64 {
        let at = page * PAGE as u64;
        assert_eq!(channel.pwrite(file, &pattern(1, at, PAGE), at), Ok(PAGE));
    }
    file
}

pub fn worker_pid(site: &mut Site) -> i32 {
    let pid = site.order(&json!({"op": "status"}))["worker_pid"].as_i64().unwrap();
    i32::try_from(pid).unwrap()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: it never happens");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kill_worker(site: &mut Site) {
    let before = worker_pid(site);
    let pid = rustix::process::Pid::from_raw(before).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    // Before another one is started what was held is written.
    wait_until("another worker", || {
        let now = site.order(&json!({"op": "status"}))["worker_pid"].as_i64();
        now.is_some_and(|now| now != i64::from(before))
    });
}

fn held_writes_survive_the_service() {
    for (round, flags) in [RDWR, APPEND, RDWR, APPEND].into_iter().enumerate() {
        let (mut site, mnt) = site();
        let channel = site.connect(&mnt);
        let file = begin(&channel, b"f", flags);
        let mut expected = pattern(1, 0, 40 * PAGE);
        for n in 0..500usize {
            let at = if flags == APPEND { expected.len() } else { (n * 7919) % 60 * 1000 };
            let bytes = pattern(n as u64, at as u64, 1 + n % 3000);
            assert_eq!(channel.pwrite(file, &bytes, at as u64), Ok(bytes.len()));
            expected.resize(expected.len().max(at + bytes.len()), 0);
            expected[at..at + bytes.len()].copy_from_slice(&bytes);
            if round >= 2 && n % 100 == 49 {
                // Some of it is with the layers.
                channel.fsync(file, false).unwrap();
            }
        }
        // What the program was answered after its writes.
        channel.ping().unwrap();
        assert!(held_bytes(&mut site) > 0);
        let on_host = site.scratch.join("data/f");
        let before = fs::read(&on_host).unwrap();
        kill_worker(&mut site);
        let seen = fs::read(&on_host).unwrap();
        assert!(seen == expected, "round {round}: {} bytes of {}", seen.len(), expected.len());
        assert!(before != expected, "round {round}: nothing was held, so nothing was tested");
    }
}

fn held_writes_are_seen_by_whoever_looks() {
    let (site, mnt) = site();
    let (channel, other) = (site.connect(&mnt), site.connect(&mnt));
    let path = mnt.join("f");
    let file = begin(&channel, b"f", RDWR);
    let mut expected = pattern(1, 0, 40 * PAGE);
    let mut first = [0; 1];
    for round in 0..60usize {
        // Enough for the next permit, and for what is written to be held.
        for n in 0..80usize {
            let at = (round * 31 + n * 7) % 200 * 1024;
            let bytes = pattern((round + n) as u64, 0, 1024 + n * 13 % 4000);
            assert_eq!(channel.pwrite(file, &bytes, at as u64), Ok(bytes.len()));
            expected.resize(expected.len().max(at + bytes.len()), 0);
            expected[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        match round % 6 {
            0 => assert_eq!(fs::metadata(&path).unwrap().len(), expected.len() as u64),
            1 => assert!(fs::read(&path).unwrap() == expected),
            2 => {
                assert_eq!(other.stat(At::Root, b"f", 0).unwrap().size_bytes, expected.len() as u64);
            }
            3 => {
                let opened = other.open(At::Root, b"f", libc::O_RDONLY as u32, 0, 0).unwrap();
                let mut seen = vec![0; expected.len() + 1];
                assert_eq!(other.pread(opened.file, &mut seen, 0), Ok(expected.len()));
                assert!(seen[..expected.len()] == expected);
                other.close(opened.file).unwrap();
            }
            4 => {
                let size = (round * 1777 % expected.len()) as u64;
                fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size).unwrap();
                expected.truncate(size as usize);
            }
            _ => {
                fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"?", 5).unwrap();
                expected[5] = b'?';
            }
        }
        assert_eq!(channel.pread(file, &mut first, 5), Ok(1));
        assert_eq!(first[0], expected[5], "round {round}");
    }
    channel.close(file).unwrap();
    assert!(fs::read(&path).unwrap() == expected);
}

/// Random calls by one program, beside the same on a plain file.
fn held_writes_do_what_a_file_does() {
    for seed in 1..=6u64 {
        let (site, mnt) = site();
        let channel = site.connect(&mnt);
        let appends = seed % 3 == 0;
        let file =
            begin(&channel, b"f", if appends { APPEND & !(libc::O_WRONLY as u32) | RDWR } else { RDWR });
        let mut model = pattern(1, 0, 40 * PAGE);
        let mut state = seed;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let mut seen = vec![0; 300_000];
        for step in 0..3000u64 {
            match random(20) {
                0..=11 => {
                    let count = [1, 100, PAGE, PAGE, 5000, 16_384, 40_000][random(7)];
                    let at = if appends {
                        model.len()
                    } else {
                        random(70) * PAGE + [0, 0, 0, 100, 4000][random(5)]
                    };
                    if at + count > 300_000 {
                        channel.ftruncate(file, 1000).unwrap();
                        model.truncate(1000);
                        continue;
                    }
                    let bytes = pattern(step, 0, count);
                    assert_eq!(channel.pwrite(file, &bytes, at as u64), Ok(count));
                    model.resize(model.len().max(at + count), 0);
                    model[at..at + count].copy_from_slice(&bytes);
                }
                12..=16 => {
                    let (at, count) = (random(300_000), random(20_000));
                    let expected = &model[at.min(model.len())..(at + count).min(model.len())];
                    assert_eq!(channel.pread(file, &mut seen[..count], at as u64), Ok(expected.len()));
                    assert!(
                        seen[..expected.len()] == *expected,
                        "seed {seed}, step {step}: {count} bytes at {at}"
                    );
                }
                17 => {
                    let size = random(model.len() + 5000);
                    channel.ftruncate(file, size as u64).unwrap();
                    model.resize(size, 0);
                }
                18 => assert_eq!(channel.fstat(file).unwrap().size_bytes, model.len() as u64),
                _ => channel.fsync(file, true).unwrap(),
            }
        }
        channel.close(file).unwrap();
        assert!(fs::read(site.scratch.join("data/f")).unwrap() == model, "seed {seed}");
    }
}

/// The host sees it though nobody asks the service.
fn held_writes_go_down_soon() {
    let (mut site, mnt) = site();
    let channel = site.connect(&mnt);
    let file = begin(&channel, b"f", RDWR);
    channel.pwrite(file, b"held", 3).unwrap();
    let mut seen = [0; 4];
    wait_until("going down", || {
        let host = fs::File::open(site.scratch.join("data/f")).unwrap();
        host.read_exact_at(&mut seen, 3).is_ok() && seen == *b"held"
    });
    // So does the memory, back to where it came from.
    wait_until("giving memory back", || held_bytes(&mut site) == 0);
    channel.pwrite(file, b"dleh", 3).unwrap();
    channel.close(file).unwrap();
    assert_eq!(&fs::read(mnt.join("f")).unwrap()[3..7], b"dleh");
}

fn held_writes_keep_to_their_room() {
    let mut site = Site::start_with(&["--channel-writes", "--cache-bytes", "16777216"]);
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    let channel = site.connect(&mnt);
    let files: Vec<File> = (0..3).map(|n| begin(&channel, format!("f{n}").as_bytes(), RDWR)).collect();
    // Four times what may be held, from file to file.
    for page in 0..4096u64 {
        let (file, at) = (files[page as usize % 3], page / 3 * PAGE as u64);
        assert_eq!(channel.pwrite(file, &pattern(page % 3, at, PAGE), at), Ok(PAGE));
        if page % 512 == 0 {
            let held = held_bytes(&mut site);
            assert!(held <= 4 << 20, "{held}");
        }
    }
    files.into_iter().for_each(|file| channel.close(file).unwrap());
    for n in 0..3u64 {
        let seen = fs::read(mnt.join(format!("f{n}"))).unwrap();
        assert!(seen == pattern(n, 0, seen.len()) && seen.len() >= 1365 * PAGE, "file {n}");
    }
}

/// A disk that is full although there was room when the program was told that it need not wait.
fn what_cannot_be_written_is_told_at_close() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let data = site.directory("data");
    let options = c"size=100m";
    rustix::mount::mount("none", &data, "tmpfs", rustix::mount::MountFlags::empty(), options).unwrap();
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    for asks in ["close", "fsync", "write"] {
        let channel = site.connect(&mnt);
        let file = begin(&channel, b"f", RDWR);
        fill(&data);
        let mut told = None;
        for page in 40..60u64 {
            // Not before they are to be written.
            if let Err(error) = channel.pwrite(file, &[7; PAGE], page * PAGE as u64) {
                told = Some(error);
            }
        }
        let full = Some(Error::Errno(libc::ENOSPC));
        match asks {
            "fsync" => told = told.or(channel.fsync(file, true).err()),
            "write" => {
                let _ = channel.fstat(file);
                told = told.or(channel.pwrite(file, &[7; PAGE], 0).err());
                told = told.or(channel.pread(file, &mut [0; 10], 0).err());
            }
            _ => {}
        }
        match asks {
            "close" => assert_eq!(told.or(channel.close(file).err()), full),
            _ => {
                assert_eq!(told, full, "{asks}");
                fs::remove_file(data.join("ballast")).unwrap();
                assert_eq!(channel.pwrite(file, &[7; PAGE], 50 * PAGE as u64), Ok(PAGE), "told twice");
                channel.close(file).unwrap();
            }
        }
        let _ = fs::remove_file(data.join("ballast"));
        fs::remove_file(mnt.join("f")).unwrap();
    }
}

/// Takes all the room there is.
fn fill(data: &Path) {
    let ballast = fs::File::create(data.join("ballast")).unwrap();
    let (mut at, block) = (0, vec![1; 1 << 20]);
    while let Ok(count) = ballast.write_at(&block, at) {
        at += count as u64;
    }
}
