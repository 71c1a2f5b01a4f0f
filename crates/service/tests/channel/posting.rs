//! Writes that do not wait: what one process wrote is seen by all, in order, whoever looks and however the writer ends.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

use polytropo_client::{At, Channel, Error, File};
use serde_json::json;

use crate::Test;
use crate::support::{Site, fork_child, pattern};

pub const TESTS: &[Test] = &[
    ("posted_writes_are_seen_by_whoever_looks", posted_writes_are_seen_by_whoever_looks),
    ("posted_writes_survive_their_writer", posted_writes_survive_their_writer),
    ("posted_writes_are_in_order", posted_writes_are_in_order),
    ("threads_post_together", threads_post_together),
    ("posts_that_threads_reuse_are_not_lost", posts_that_threads_reuse_are_not_lost),
    ("appends_of_many_processes_are_whole", appends_of_many_processes_are_whole),
    ("a_full_disk_is_told_once", a_full_disk_is_told_once),
    ("a_cut_comes_after_what_was_posted", a_cut_comes_after_what_was_posted),
    ("a_file_without_a_name_is_written_on", a_file_without_a_name_is_written_on),
    ("what_lies_about_is_written_soon", what_lies_about_is_written_soon),
];

const CREATE: u32 = (libc::O_RDWR | libc::O_CREAT) as u32;
const APPEND: u32 = (libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND) as u32;

fn site() -> (Site, PathBuf) {
    let mut site = Site::start_with(&["--channel-writes"]);
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    (site, mnt)
}

fn posted(channel: &Channel) -> u64 {
    channel.counters.posted_writes.load(Relaxed)
}

/// A file that its only user writes without waiting.
fn granted(channel: &Channel, name: &[u8], flags: u32) -> File {
    let file = channel.open(At::Root, name, flags, 0o666, 0).unwrap().file;
    let before = posted(channel);
    // The first ones have to wait: most files are written once.
    for _ in 0..3 {
        assert_eq!(channel.pwrite(file, b"!", 0), Ok(1));
    }
    assert!(posted(channel) > before, "a sole user has to wait");
    file
}

fn posted_writes_are_seen_by_whoever_looks() {
    let (site, mnt) = site();
    let (channel, other) = (site.connect(&mnt), site.connect(&mnt));
    let path = mnt.join("f");
    let file = granted(&channel, b"f", CREATE);
    type Look<'a> = (&'static str, Box<dyn Fn(&[u8]) + 'a>);
    let looks: Vec<Look<'_>> = vec![
        ("stat", Box::new(|bytes| assert_eq!(fs::metadata(&path).unwrap().len(), bytes.len() as u64))),
        ("read", Box::new(|bytes| assert!(fs::read(&path).unwrap() == bytes))),
        (
            "list",
            Box::new(|bytes| {
                let entry = fs::read_dir(&mnt).unwrap().next().unwrap().unwrap();
                assert_eq!(entry.metadata().unwrap().len(), bytes.len() as u64);
            }),
        ),
        (
            "another channel's stat",
            Box::new(|bytes| {
                assert_eq!(other.stat(At::Root, b"f", 0).unwrap().size_bytes, bytes.len() as u64);
            }),
        ),
        (
            "another channel's read",
            Box::new(|bytes| {
                let opened = other.open(At::Root, b"f", libc::O_RDONLY as u32, 0, 0).unwrap();
                assert_eq!(opened.attributes.size_bytes, bytes.len() as u64);
                let mut seen = vec![0; bytes.len() + 1];
                assert_eq!(other.pread(opened.file, &mut seen, 0), Ok(bytes.len()));
                assert!(seen[..bytes.len()] == *bytes);
                other.close(opened.file).unwrap();
            }),
        ),
        (
            "own fstat",
            Box::new(|bytes| {
                assert_eq!(channel.fstat(file).unwrap().size_bytes, bytes.len() as u64);
            }),
        ),
        (
            "own read",
            Box::new(|bytes| {
                let mut seen = vec![0; bytes.len() + 1];
                assert_eq!(channel.pread(file, &mut seen, 0), Ok(bytes.len()));
                assert!(seen[..bytes.len()] == *bytes);
            }),
        ),
        (
            "own stat",
            Box::new(|bytes| {
                assert_eq!(channel.stat(At::Root, b"f", 0).unwrap().size_bytes, bytes.len() as u64);
            }),
        ),
        (
            "the host",
            Box::new(|bytes| {
                channel.fsync(file, true).unwrap();
                assert!(fs::read(site.scratch.join("data/f")).unwrap() == bytes);
            }),
        ),
    ];
    let before = posted(&channel);
    let mut bytes = vec![b'!'];
    for round in 0..2000 {
        let part = pattern(round, bytes.len() as u64, 1 + round as usize * 37 % 600);
        assert_eq!(channel.pwrite(file, &part, bytes.len() as u64), Ok(part.len()));
        bytes.extend(part);
        // Long silences between, so that the permission comes back each time.
        if round % 200 == 199 {
            let (name, look) = &looks[round as usize / 200 % looks.len()];
            eprintln!("{name}, {} bytes, {} posted", bytes.len(), posted(&channel) - before);
            look(&bytes);
            look(&bytes);
        }
    }
    assert!(posted(&channel) - before > 200, "only {} writes did not wait", posted(&channel) - before);
    channel.close(file).unwrap();
    assert!(fs::read(&path).unwrap() == bytes);
}

fn posted_writes_survive_their_writer() {
    let (site, mnt) = site();
    for round in 0..10 {
        let name = format!("f{round}");
        let child = fork_child(|| {
            let channel = site.connect(&mnt);
            let file = granted(&channel, name.as_bytes(), CREATE);
            for at in 0..round + 1u64 {
                assert_eq!(channel.pwrite(file, &pattern(round, at * 1000, 1000), at * 1000), Ok(1000));
            }
            // SAFETY: ends this process at once, with what it posted.
            unsafe { libc::raise(libc::SIGKILL) };
        });
        assert!(!child.wait(), "killed");
        let seen = fs::read(mnt.join(&name)).unwrap();
        assert!(seen == pattern(round, 0, (round as usize + 1) * 1000), "round {round}: {}", seen.len());
    }
}

fn posted_writes_are_in_order() {
    let (site, mnt) = site();
    let channel = site.connect(&mnt);
    let file = granted(&channel, b"f", CREATE);
    for round in 0..3000u32 {
        let size = if round % 7 == 0 { 40_000 } else { 300 };
        let bytes = vec![round as u8; size];
        assert_eq!(channel.pwrite(file, &bytes, u64::from(round % 3) * 100), Ok(size));
    }
    channel.close(file).unwrap();
    let seen = fs::read(mnt.join("f")).unwrap();
    assert_eq!(&seen[200..500], [(2999 % 256) as u8; 300], "the last one wins");
    assert_eq!(&seen[100..200], [(2998 % 256) as u8; 100]);
    assert_eq!(&seen[..100], [(2997 % 256) as u8; 100]);
}

fn threads_post_together() {
    let (site, mnt) = site();
    let channel = site.connect(&mnt);
    let files: Vec<File> = (0..3).map(|n| granted(&channel, format!("f{n}").as_bytes(), CREATE)).collect();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (channel, files, mnt) = (&channel, &files, &mnt);
            scope.spawn(move || {
                for round in 0..500 {
                    let file = (round + thread as usize) % 3;
                    let at = (round as u64 * 4 + thread) * 100;
                    let bytes = pattern(file as u64, at, 100);
                    assert_eq!(channel.pwrite(files[file], &bytes, at), Ok(100));
                    let mut seen = [0; 100];
                    assert_eq!(channel.pread(files[file], &mut seen, at), Ok(100));
                    assert!(seen == bytes[..], "a thread does not see its own bytes");
                    if round % 50 == 0 {
                        let size = fs::metadata(mnt.join(format!("f{file}"))).unwrap().size();
                        assert!(size >= at + 100, "{size} {at}");
                    }
                }
            });
        }
    });
    for (n, file) in files.into_iter().enumerate() {
        channel.close(file).unwrap();
        let seen = fs::read(mnt.join(format!("f{n}"))).unwrap();
        let theirs = (0..500usize).flat_map(|round| (0..4usize).map(move |thread| (round, thread)));
        for (round, thread) in theirs.filter(|(round, thread)| (round + thread) % 3 == n) {
            let at = (round * 4 + thread) * 100;
            assert!(seen[at..at + 100] == pattern(n as u64, at as u64, 100), "{n} {round} {thread}");
        }
    }
}

/// Threads that take each other's finished posts back while they write on and on.
fn posts_that_threads_reuse_are_not_lost() {
    const EACH: u64 = 6000;
    let (site, mnt) = site();
    let channel = site.connect(&mnt);
    let file = granted(&channel, b"f", CREATE);
    let write = |thread: u64, round: u64| {
        let at = (round * 4 + thread) * 16;
        assert_eq!(channel.pwrite(file, &pattern(1, at, 16), at), Ok(16));
    };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let write = &write;
            scope.spawn(move || (0..EACH).for_each(|round| write(thread, round)));
        }
    });
    // Whoever comes later must not wait for a post that is free.
    (EACH..EACH + 200).for_each(|round| (0..4).for_each(|thread| write(thread, round)));
    channel.close(file).unwrap();
    let seen = fs::read(mnt.join("f")).unwrap();
    assert_eq!(seen.len() as u64, (EACH + 200) * 64);
    let wrong = (0..seen.len()).step_by(16).find(|at| seen[*at..at + 16] != pattern(1, *at as u64, 16));
    assert_eq!(wrong, None, "a write was lost");
}

fn appends_of_many_processes_are_whole() {
    let (site, mnt) = site();
    let line = |who: u32, number: u32| format!("{who} {number:06} {}\n", "x".repeat(number as usize % 90));
    let mut children = Vec::new();
    for who in 0..4u32 {
        let (site, mnt) = (&site, &mnt);
        children.push(fork_child(move || {
            if who % 2 == 0 {
                let channel = site.connect(mnt);
                let file = loop {
                    // While the kernel has it open for writing it is the kernel's.
                    match channel.open(At::Root, b"log", APPEND, 0o666, 0) {
                        Err(Error::Kernel) => std::thread::yield_now(),
                        opened => break opened.unwrap().file,
                    }
                };
                for number in 0..300 {
                    let text = line(who, number);
                    assert_eq!(channel.pwrite(file, text.as_bytes(), 0), Ok(text.len()));
                }
                channel.close(file).unwrap();
            } else {
                for number in 0..300 {
                    let file = fs::OpenOptions::new().append(true).create(true).open(mnt.join("log"));
                    let text = line(who, number);
                    assert_eq!(file.unwrap().write(text.as_bytes()).unwrap(), text.len());
                }
            }
        }));
    }
    assert!(children.into_iter().all(crate::support::Forked::wait));
    let text = fs::read_to_string(mnt.join("log")).unwrap();
    for who in 0..4u32 {
        let own: Vec<&str> = text.lines().filter(|line| line.starts_with(&format!("{who} "))).collect();
        let expected: Vec<String> = (0..300).map(|number| line(who, number)).collect();
        assert!(own.iter().map(|line| format!("{line}\n")).eq(expected), "lines of {who}: {}", own.len());
    }
    assert_eq!(text.lines().count(), 1200);
}

/// On a disk of 100 MiB, so that permission is given at first and taken back when it fills.
fn a_full_disk_is_told_once() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let data = site.directory("data");
    let options = c"size=100m";
    rustix::mount::mount("none", &data, "tmpfs", rustix::mount::MountFlags::empty(), options).unwrap();
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    let channel = site.connect(&mnt);
    let file = granted(&channel, b"f", CREATE);
    let block = pattern(1, 0, 16 << 10);
    let mut written = 0u64;
    let told = loop {
        match channel.pwrite(file, &block, written) {
            Ok(count) => written += count as u64,
            Err(error) => break error,
        }
        assert!(written < 200 << 20, "the disk never fills");
    };
    assert_eq!(told, Error::Errno(libc::ENOSPC));
    assert!(posted(&channel) > 500, "nothing was posted while there was room");
    assert!(written > 90 << 20, "{written}");
    // Nothing that was acknowledged is missing.
    let mut seen = vec![0; block.len()];
    let reader = fs::File::open(data.join("f")).unwrap();
    for at in (0..written / block.len() as u64 * block.len() as u64).step_by(block.len()) {
        reader.read_exact_at(&mut seen, at).unwrap();
        assert!(seen == block, "at {at}");
    }
    channel.fsync(file, false).unwrap();
    channel.close(file).unwrap();
}

fn a_cut_comes_after_what_was_posted() {
    let (site, mnt) = site();
    let channel = site.connect(&mnt);
    type Cut<'a> = (&'a str, &'a dyn Fn(&Path));
    let cuts: [Cut<'_>; 3] =
        [("truncate", &truncate), ("open", &|path| drop(fs::File::create(path).unwrap())), ("own", &|_| {})];
    for (name, cut) in cuts {
        for round in 0..20 {
            let file_name = format!("{name}{round}");
            let file = granted(&channel, file_name.as_bytes(), CREATE);
            for at in 0..round {
                channel.pwrite(file, &[7; 100], at * 100).unwrap();
            }
            match name {
                "own" => channel.ftruncate(file, 0).unwrap(),
                _ => cut(&mnt.join(&file_name)),
            }
            assert_eq!(fs::metadata(mnt.join(&file_name)).unwrap().len(), 0, "{file_name}");
            channel.close(file).unwrap();
            assert_eq!(fs::metadata(mnt.join(&file_name)).unwrap().len(), 0, "{file_name}");
        }
    }
}

/// truncate(2), which opens nothing.
fn truncate(path: &Path) {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path ends with a NUL.
    assert_eq!(unsafe { libc::truncate(path.as_ptr(), 0) }, 0);
}

fn a_file_without_a_name_is_written_on() {
    let (site, mnt) = site();
    let channel = site.connect(&mnt);
    let file = granted(&channel, b"f", CREATE);
    fs::write(mnt.join("g"), "other").unwrap();
    for round in 0..100u64 {
        channel.pwrite(file, &[round as u8; 10], round * 10).unwrap();
        match round {
            30 => fs::remove_file(mnt.join("f")).unwrap(),
            60 => fs::rename(mnt.join("g"), mnt.join("f")).unwrap(),
            _ => {}
        }
    }
    assert_eq!(channel.fstat(file).unwrap().size_bytes, 1000);
    assert_eq!(channel.fstat(file).unwrap().nlink, 0);
    let mut seen = [0; 10];
    assert_eq!(channel.pread(file, &mut seen, 990), Ok(10));
    assert_eq!(seen, [99; 10]);
    channel.close(file).unwrap();
    assert_eq!(fs::read(mnt.join("f")).unwrap(), b"other");
}

/// The host sees it though nobody asks the service: as after a power cut.
fn what_lies_about_is_written_soon() {
    let (site, mnt) = site();
    let channel = site.connect(&mnt);
    let file = granted(&channel, b"f", CREATE);
    channel.pwrite(file, b"lies about", 0).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while fs::read(site.scratch.join("data/f")).unwrap() != b"lies about" {
        assert!(std::time::Instant::now() < deadline, "never written");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    channel.close(file).unwrap();
}
