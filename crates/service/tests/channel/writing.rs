//! Changes through channels, seen by the kernel, and the other way round.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use polytropo_client::{At, Channel, Error, Time};
use serde_json::{Value, json};

use crate::Test;
use crate::support::{Site, as_child, pattern};

pub const TESTS: &[Test] = &[
    ("what_is_written_is_seen_at_all_doors", what_is_written_is_seen_at_all_doors),
    ("names_change_at_all_doors", names_change_at_all_doors),
    ("a_writer_through_the_kernel_takes_the_file", a_writer_through_the_kernel_takes_the_file),
    ("listings_are_whole", listings_are_whole),
    ("changes_take_what_the_kernel_asks_for", changes_take_what_the_kernel_asks_for),
    ("read_only_mounts_are_read_only", read_only_mounts_are_read_only),
    ("random_changes_agree_with_the_kernel", random_changes_agree_with_the_kernel),
    ("a_file_that_many_make_is_one", a_file_that_many_make_is_one),
];

const RDWR: u32 = libc::O_RDWR as u32;
const CREATE: u32 = (libc::O_RDWR | libc::O_CREAT) as u32;

/// Stacks that channels may change: one that others change too, one that is ours alone, and a union.
fn stacks() -> Vec<(&'static str, Value)> {
    vec![
        ("shared", json!({"coherence": "shared"})),
        ("exclusive", json!({"coherence": "exclusive"})),
        ("union", Value::Null),
    ]
}

fn on_each(test: impl Fn(&Path, &Channel, &Site)) {
    for (name, options) in stacks() {
        let mut site = Site::start_with(&["--channel-writes"]);
        let mnt = if options.is_null() {
            let (lower, upper) = (site.directory("lower"), site.directory("upper"));
            let lower = json!({"kind": "dir", "path": lower, "read_only": true, "coherence": "immutable"});
            let upper = json!({"kind": "dir", "path": upper, "coherence": "exclusive"});
            site.mount_stack(name, &json!({"kind": "union", "lowers": [lower], "upper": upper}))
        } else {
            site.mount(name, options)
        };
        eprintln!("on {name}");
        test(&mnt, &site.connect(&mnt), &site);
    }
}

/// The kernel says that a file is closed a moment after it was, and until then keeps it.
fn when_free<T>(mut operation: impl FnMut() -> Result<T, Error>) -> T {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        match operation() {
            Err(Error::Kernel) => {
                assert!(std::time::Instant::now() < deadline, "the file is never given back")
            }
            done => return done.unwrap(),
        }
    }
}

fn what_is_written_is_seen_at_all_doors() {
    on_each(|mnt, channel, site| {
        let file = channel.open(At::Root, b"f", CREATE, 0o666, 0o027).unwrap().file;
        assert_eq!(fs::metadata(mnt.join("f")).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(channel.pwrite(file, b"hello", 0).unwrap(), 5);
        assert_eq!(fs::read(mnt.join("f")).unwrap(), b"hello");
        when_free(|| channel.fstat(file));
        // Open at both doors while it changes.
        let reader = fs::File::open(mnt.join("f")).unwrap();
        let other = site.connect(mnt);
        let theirs = other.open(At::Root, b"f", libc::O_RDONLY as u32, 0, 0).unwrap().file;
        for round in 0..50usize {
            let bytes = pattern(round as u64, 0, 1000 + round * 3001);
            assert_eq!(channel.pwrite(file, &bytes, 0).unwrap(), bytes.len());
            let mut seen = vec![0; bytes.len() + 10];
            assert_eq!(channel.pread(file, &mut seen, 0).unwrap(), bytes.len());
            assert!(seen[..bytes.len()] == bytes, "own bytes in round {round}");
            assert_eq!(other.pread(theirs, &mut seen, 0).unwrap(), bytes.len());
            assert!(seen[..bytes.len()] == bytes, "bytes at another channel in round {round}");
            assert_eq!(other.fstat(theirs).unwrap().size_bytes, bytes.len() as u64);
            let mut seen = vec![0; bytes.len()];
            reader.read_exact_at(&mut seen, 0).unwrap();
            assert!(seen == bytes, "bytes through the kernel in round {round}");
            assert_eq!(reader.metadata().unwrap().len(), bytes.len() as u64);
        }
        channel.ftruncate(file, 7).unwrap();
        assert_eq!(reader.metadata().unwrap().len(), 7);
        assert_eq!(other.fstat(theirs).unwrap().size_bytes, 7);
        let append =
            channel.open(At::Root, b"f", (libc::O_WRONLY | libc::O_APPEND) as u32, 0, 0).unwrap().file;
        assert_eq!(channel.pwrite(append, b"end", 0).unwrap(), 3);
        assert_eq!(fs::read(mnt.join("f")).unwrap()[7..], *b"end");
        assert_eq!(channel.pread(append, &mut [0; 4], 0), Err(Error::Errno(libc::EBADF)));
        channel.fsync(append, true).unwrap();
        let emptied = channel.open(At::Root, b"f", (libc::O_RDWR | libc::O_TRUNC) as u32, 0, 0).unwrap();
        assert_eq!(emptied.attributes.size_bytes, 0);
        assert_eq!(fs::metadata(mnt.join("f")).unwrap().len(), 0);
        let large = pattern(9, 0, 1 << 20);
        assert_eq!(channel.pwrite(file, &large, 0).unwrap(), large.len());
        assert!(fs::read(mnt.join("f")).unwrap() == large);
    });
}

fn names_change_at_all_doors() {
    on_each(|mnt, channel, _| {
        let root = At::Root;
        assert!(fs::metadata(mnt.join("d")).is_err());
        channel.mkdir(root, b"d", 0o777, 0o022).unwrap();
        assert_eq!(fs::metadata(mnt.join("d")).unwrap().mode() & 0o7777, 0o755);
        assert_eq!(channel.mkdir(root, b"d", 0o777, 0), Err(Error::Errno(libc::EEXIST)));
        fs::write(mnt.join("d/a"), "a").unwrap();
        assert_eq!(
            channel.open(root, b"d/a", CREATE | libc::O_EXCL as u32, 0o600, 0).map(|_| ()),
            Err(Error::Errno(libc::EEXIST))
        );
        channel.rename(root, b"d/a", root, b"d/b", 0).unwrap();
        assert!(fs::metadata(mnt.join("d/a")).is_err() && fs::read(mnt.join("d/b")).unwrap() == b"a");
        channel.link(root, b"d/b", root, b"d/c", 0).unwrap();
        assert_eq!(fs::metadata(mnt.join("d/c")).unwrap().nlink(), 2);
        channel.symlink(b"c", root, b"d/l").unwrap();
        assert_eq!(fs::read_link(mnt.join("d/l")).unwrap(), Path::new("c"));
        let mut text = [0; 10];
        assert_eq!(channel.read_link(root, b"d/l", &mut text).unwrap(), 1);
        assert_eq!(channel.unlink(root, b"d", libc::AT_REMOVEDIR as u32), Err(Error::Errno(libc::ENOTEMPTY)));
        assert_eq!(channel.unlink(root, b"d", 0), Err(Error::Errno(libc::EISDIR)));
        assert_eq!(channel.unlink(root, b"d/b", libc::AT_REMOVEDIR as u32), Err(Error::Errno(libc::ENOTDIR)));
        assert_eq!(channel.unlink(root, b"d/.", libc::AT_REMOVEDIR as u32), Err(Error::Errno(libc::EINVAL)));
        for name in ["d/b", "d/c", "d/l"] {
            channel.unlink(root, name.as_bytes(), 0).unwrap();
            assert!(fs::symlink_metadata(mnt.join(name)).is_err());
        }
        channel.unlink(root, b"d", libc::AT_REMOVEDIR as u32).unwrap();
        assert!(fs::metadata(mnt.join("d")).is_err());
        fs::write(mnt.join("f"), "x").unwrap();
        channel.chmod(root, b"f", 0o4711, 0).unwrap();
        channel.chown(root, b"f", 5, 6, 0).unwrap();
        let (atime, mtime) = (Time { seconds: 1, nanoseconds: 2 }, Time { seconds: 3, nanoseconds: 4 });
        when_free(|| channel.change_times(root, b"f", atime, mtime, 0));
        when_free(|| channel.truncate(root, b"f", 100));
        let seen = fs::metadata(mnt.join("f")).unwrap();
        assert_eq!((seen.mode() & 0o7777, seen.uid(), seen.gid(), seen.size()), (0o711, 5, 6, 100));
        assert_eq!((seen.atime(), seen.atime_nsec()), (1, 2));
        // Unlinked while open.
        let file = when_free(|| channel.open(root, b"f", RDWR, 0, 0)).file;
        channel.unlink(root, b"f", 0).unwrap();
        assert_eq!(channel.pwrite(file, b"still", 0).unwrap(), 5);
        assert_eq!(channel.fstat(file).unwrap().nlink, 0);
        let mut bytes = [0; 5];
        assert_eq!(channel.pread(file, &mut bytes, 0).unwrap(), 5);
        assert_eq!(&bytes, b"still");
    });
}

fn a_writer_through_the_kernel_takes_the_file() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    let size = 300_000;
    fs::write(mnt.join("f"), pattern(1, 0, size)).unwrap();
    let channel = site.connect(&mnt);
    let file = when_free(|| channel.open(At::Root, b"f", libc::O_RDONLY as u32, 0, 0)).file;
    let mut bytes = vec![0; size];
    assert_eq!(channel.pread(file, &mut bytes, 0).unwrap(), size);
    assert!(bytes == pattern(1, 0, size));
    {
        let mut writer = fs::OpenOptions::new().read(true).write(true).open(mnt.join("f")).unwrap();
        // From now on the truth may lie in the kernel.
        assert_eq!(channel.pread(file, &mut bytes, 0), Err(Error::Kernel));
        assert_eq!(channel.fstat(file), Err(Error::Kernel));
        assert_eq!(channel.open(At::Root, b"f", RDWR, 0, 0).map(|_| ()), Err(Error::Kernel));
        writer.seek(SeekFrom::Start(1000)).unwrap();
        writer.write_all(b"changed").unwrap();
    }
    assert_eq!(when_free(|| channel.pread(file, &mut bytes[..7], 1000)), 7);
    assert_eq!(&bytes[..7], b"changed");
    // Who cannot map it writes by requests, while channels have it.
    let mut appender = fs::OpenOptions::new().append(true).open(mnt.join("f")).unwrap();
    appender.write_all(b"more").unwrap();
    assert_eq!(channel.pread(file, &mut bytes[..4], size as u64).unwrap(), 4);
    assert_eq!(&bytes[..4], b"more");
    let mut whole = Vec::new();
    fs::File::open(mnt.join("f")).unwrap().read_to_end(&mut whole).unwrap();
    assert_eq!(whole.len(), size + 4);
}

fn listings_are_whole() {
    on_each(|mnt, channel, _| {
        fs::create_dir(mnt.join("d")).unwrap();
        let mut expected: Vec<String> = (0..500).map(|number| format!("a-name-{number:04}")).collect();
        expected.iter().for_each(|name| fs::write(mnt.join("d").join(name), "").unwrap());
        expected.extend([".".into(), "..".into()]);
        expected.sort();
        let flags = (libc::O_RDONLY | libc::O_DIRECTORY) as u32;
        let directory = channel.open(At::Root, b"d", flags, 0, 0).unwrap().file;
        for room in [300, 4096, 1 << 20] {
            let (mut found, mut position) = (Vec::new(), 0);
            let mut buffer = vec![0; room];
            loop {
                let (count, next) = channel.read_directory(directory, &mut buffer, position).unwrap();
                if count == 0 {
                    break;
                }
                let mut at = 0;
                while at < count {
                    let bytes = usize::from(u16::from_ne_bytes([buffer[at + 16], buffer[at + 17]]));
                    let name = &buffer[at + 19..at + bytes];
                    let end = name.iter().position(|byte| *byte == 0).unwrap();
                    found.push(String::from_utf8(name[..end].to_vec()).unwrap());
                    at += bytes;
                }
                position = next;
            }
            found.sort();
            assert_eq!(found, expected);
        }
        assert_eq!(channel.read_directory(directory, &mut [0; 8], 0), Err(Error::Errno(libc::EINVAL)));
    });
}

fn changes_take_what_the_kernel_asks_for() {
    on_each(|mnt, _, site| {
        let privileged = mnt.join("privileged");
        fs::write(&privileged, "x").unwrap();
        fs::set_permissions(&privileged, fs::Permissions::from_mode(0o4755)).unwrap();
        let root = site.connect(mnt);
        when_free(|| root.stat(At::Root, b"privileged", 0));
        // Only the kernel's door gives the bit back after a death in the middle of a write.
        let opened = root.open(At::Root, b"privileged", libc::O_WRONLY as u32, 0, 0);
        assert!(matches!(opened, Err(Error::Kernel)), "{:?}", opened.map(drop));
        drop(root);
        fs::set_permissions(mnt, fs::Permissions::from_mode(0o755)).unwrap();
        for (name, mode) in [("tmp", 0o1777), ("closed", 0o755), ("open", 0o777)] {
            fs::create_dir(mnt.join(name)).unwrap();
            fs::set_permissions(mnt.join(name), fs::Permissions::from_mode(mode)).unwrap();
            fs::write(mnt.join(name).join("root"), "x").unwrap();
            fs::write(mnt.join(name).join("writable"), "x").unwrap();
            fs::set_permissions(mnt.join(name).join("writable"), fs::Permissions::from_mode(0o666)).unwrap();
        }
        let root = site.connect(mnt);
        for name in
            ["tmp", "closed", "open"].iter().flat_map(|at| [format!("{at}/root"), format!("{at}/writable")])
        {
            when_free(|| root.stat(At::Root, name.as_bytes(), 0));
        }
        drop(root);
        assert!(as_child(|| {
            let id = rustix::thread::Uid::from_raw(4321);
            rustix::thread::set_thread_groups(&[]).unwrap();
            rustix::thread::set_thread_res_gid(
                rustix::thread::Gid::from_raw(4321),
                rustix::thread::Gid::from_raw(4321),
                rustix::thread::Gid::from_raw(4321),
            )
            .unwrap();
            rustix::thread::set_thread_res_uid(id, id, id).unwrap();
            let channel = site.connect(mnt);
            let root = At::Root;
            let errno = |done: Result<(), Error>| {
                done.err().map_or(0, |e| if let Error::Errno(errno) = e { errno } else { -1 })
            };
            let made = |path: &str| {
                errno(
                    channel.open(root, path.as_bytes(), CREATE, 0o644, 0).and_then(|o| channel.close(o.file)),
                )
            };
            assert_eq!([made("closed/new"), made("open/new"), made("tmp/new")], [libc::EACCES, 0, 0]);
            assert_eq!(fs::metadata(mnt.join("open/new")).unwrap().uid(), 4321);
            let removed = |path: &str| errno(channel.unlink(root, path.as_bytes(), 0));
            assert_eq!([removed("closed/root"), removed("tmp/root")], [libc::EACCES, libc::EPERM]);
            assert_eq!([removed("open/root"), removed("tmp/new")], [0, 0]);
            let moved =
                |from: &str, to: &str| errno(channel.rename(root, from.as_bytes(), root, to.as_bytes(), 0));
            assert_eq!(
                [moved("tmp/root", "open/r"), moved("open/new", "tmp/root"), moved("open/new", "closed/x")],
                [libc::EPERM, libc::EPERM, libc::EACCES]
            );
            assert_eq!(errno(channel.chmod(root, b"closed/root", 0o777, 0)), libc::EPERM);
            assert_eq!(errno(channel.chown(root, b"open/new", 0, 0, 0)), libc::EPERM);
            // Nobody's, and yet it would take setuid bits away.
            let same = u32::MAX;
            assert_eq!(channel.chown(root, b"closed/root", same, same, 0), Err(Error::Kernel));
            assert_eq!(errno(channel.truncate(root, b"closed/root", 0)), libc::EACCES);
            assert_eq!(errno(channel.truncate(root, b"closed/writable", 0)), 0);
            let now = Time { seconds: 0, nanoseconds: libc::UTIME_NOW };
            let then = Time { seconds: 1, nanoseconds: 0 };
            assert_eq!(errno(channel.change_times(root, b"closed/writable", now, now, 0)), 0);
            assert_eq!(errno(channel.change_times(root, b"closed/writable", then, now, 0)), libc::EPERM);
            assert_eq!(errno(channel.change_times(root, b"closed/root", now, now, 0)), libc::EACCES);
            let refused =
                |flags: i32| errno(channel.open(root, b"closed/root", flags as u32, 0, 0).map(drop));
            assert_eq!(
                [refused(libc::O_WRONLY), refused(libc::O_RDWR), refused(libc::O_RDONLY | libc::O_TRUNC)],
                [libc::EACCES; 3]
            );
            assert_eq!(refused(libc::O_RDONLY | libc::O_NOATIME), libc::EPERM);
        }));
    });
}

fn read_only_mounts_are_read_only() {
    let mut site = Site::start_with(&["--channel-writes"]);
    fs::write(site.directory("data").join("f"), "x").unwrap();
    // The same superblock twice: once writable, once not.
    site.mount("data", json!({"coherence": "exclusive"}));
    let read_only = site.directory("mnt-read-only");
    let stack = json!({"version": 1, "root": {"kind": "dir", "path": site.scratch.join("data"), "coherence": "exclusive", "read_only": true}});
    site.order(&json!({"op": "mount", "stack": stack, "mountpoint": read_only}));
    let channel = site.connect(&read_only);
    let refused = Error::Errno(libc::EROFS);
    assert_eq!(channel.open(At::Root, b"f", RDWR, 0, 0).map(|_| ()), Err(refused));
    assert_eq!(channel.open(At::Root, b"g", CREATE, 0o600, 0).map(|_| ()), Err(refused));
    assert_eq!(channel.mkdir(At::Root, b"d", 0o700, 0), Err(refused));
    assert_eq!(channel.unlink(At::Root, b"f", 0), Err(refused));
    assert_eq!(channel.rename(At::Root, b"f", At::Root, b"g", 0), Err(refused));
    assert_eq!(channel.chmod(At::Root, b"f", 0o777, 0), Err(refused));
    assert_eq!(channel.truncate(At::Root, b"f", 0), Err(refused));
    assert_eq!(channel.access(At::Root, b"f", 2, 0), Err(refused));
    assert!(channel.open(At::Root, b"f", libc::O_RDONLY as u32, 0, 0).is_ok());
}

/// The same steps on two directories, one changed through a channel and one through the kernel: both answer the same and end the same.
fn random_changes_agree_with_the_kernel() {
    on_each(|mnt, channel, _| {
        fs::create_dir(mnt.join("ours")).unwrap();
        fs::create_dir(mnt.join("theirs")).unwrap();
        let mut state = 88_172_645_463_325_252u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 20) as usize % below
        };
        let names = ["a", "b", "c", "a/x", "b/y", "c/z", "a/x/q"];
        let code = |done: rustix::io::Result<()>| done.err().map_or(0, |errno| errno.raw_os_error());
        let own = |done: Result<(), Error>| match done {
            Ok(()) => 0,
            Err(Error::Errno(errno)) => errno,
            Err(other) => panic!("{other:?}"),
        };
        use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
        for step in 0..600 {
            let (one, two) = (names[random(names.len())], names[random(names.len())]);
            let (ours, ours2) = (format!("ours/{one}"), format!("ours/{two}"));
            let (theirs, theirs2) = (mnt.join("theirs").join(one), mnt.join("theirs").join(two));
            let (ours, ours2) = (ours.as_bytes(), ours2.as_bytes());
            let root = At::Root;
            let kind = random(7);
            let (mine, kernel) = match kind {
                0 => (
                    own(channel.mkdir(root, ours, 0o755, 0)),
                    code(rustix::fs::mkdir(&theirs, Mode::from_raw_mode(0o755))),
                ),
                1 => {
                    let mine = channel.open(root, ours, CREATE, 0o644, 0).and_then(|opened| {
                        channel.pwrite(opened.file, one.as_bytes(), step)?;
                        channel.close(opened.file)
                    });
                    let kernel =
                        rustix::fs::open(&theirs, OFlags::RDWR | OFlags::CREATE, Mode::from_raw_mode(0o644));
                    (
                        own(mine),
                        code(
                            kernel.and_then(|file| rustix::io::pwrite(file, one.as_bytes(), step).map(drop)),
                        ),
                    )
                }
                2 => (own(channel.unlink(root, ours, 0)), code(rustix::fs::unlink(&theirs))),
                3 => (
                    own(channel.unlink(root, ours, libc::AT_REMOVEDIR as u32)),
                    code(rustix::fs::rmdir(&theirs)),
                ),
                4 => {
                    let flags = [RenameFlags::empty(), RenameFlags::NOREPLACE][random(2)];
                    let mine = channel.rename(root, ours, root, ours2, flags.bits());
                    (own(mine), code(rustix::fs::renameat_with(CWD, &theirs, CWD, &theirs2, flags)))
                }
                5 => (
                    own(channel.link(root, ours, root, ours2, 0)),
                    code(rustix::fs::linkat(CWD, &theirs, CWD, &theirs2, AtFlags::empty())),
                ),
                _ => (
                    own(channel.symlink(two.as_bytes(), root, ours)),
                    code(rustix::fs::symlink(two, &theirs)),
                ),
            };
            assert_eq!(mine, kernel, "step {step}: {kind} {one} {two}");
        }
        let told = |which: &str| {
            let done = std::process::Command::new("sh")
                .args([
                    "-c",
                    "find . -printf '%p %y %m %n %s %l\\n' | sort; find . -type f | sort | xargs -r cat",
                ])
                .current_dir(mnt.join(which))
                .output();
            let text = String::from_utf8_lossy(&done.unwrap().stdout).into_owned();
            // Sizes of directories are the host's affair.
            text.lines().filter(|line| !line.contains(" d ")).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(told("ours"), told("theirs"));
    });
}

fn a_file_that_many_make_is_one() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    let channel = site.connect(&mnt);
    for round in 0..400 {
        let name = format!("f{round}");
        let together = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let kernel = scope.spawn(|| {
                together.wait();
                fs::OpenOptions::new().append(true).create(true).open(mnt.join(&name)).map(drop)
            });
            together.wait();
            match channel.open(At::Root, name.as_bytes(), CREATE, 0o666, 0) {
                Ok(opened) => channel.close(opened.file).unwrap(),
                Err(error) => assert!(matches!(error, Error::Kernel), "{error:?}"),
            }
            kernel.join().unwrap().unwrap();
        });
    }
}
