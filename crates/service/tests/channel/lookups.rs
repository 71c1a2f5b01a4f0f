//! Answers that programs keep: given without a request while they are true, and never afterwards.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use polytropo_client::{At, Attributes, Channel, Error, Time};
use serde_json::json;

use crate::Test;
use crate::support::Site;

pub const TESTS: &[Test] = &[
    ("known_paths_need_no_request", known_paths_need_no_request),
    ("what_the_kernel_changes_is_seen_at_once", what_the_kernel_changes_is_seen_at_once),
    ("permission_on_the_way_is_lost_at_once", permission_on_the_way_is_lost_at_once),
    ("what_others_change_is_never_kept", what_others_change_is_never_kept),
    ("a_directory_that_moves_takes_its_names_along", a_directory_that_moves_takes_its_names_along),
    ("random_changes_at_all_doors_agree_with_ext4", random_changes_at_all_doors_agree_with_ext4),
];

const NOFOLLOW: u32 = libc::AT_SYMLINK_NOFOLLOW as u32;
const NOENT: Error = Error::Errno(libc::ENOENT);

/// Stacks of which answers may be kept.
fn on_each(test: impl Fn(&Path, &Channel, &Site)) {
    for name in ["exclusive", "union"] {
        let mut site = Site::start_with(&["--channel-writes"]);
        let mnt = if name == "union" {
            let (lower, upper) = (site.directory("lower"), site.directory("upper"));
            fs::create_dir(lower.join("old")).unwrap();
            fs::write(lower.join("old/file"), b"lower").unwrap();
            let lower = json!({"kind": "dir", "path": lower, "read_only": true, "coherence": "immutable"});
            let upper = json!({"kind": "dir", "path": upper, "coherence": "exclusive"});
            site.mount_stack(name, &json!({"kind": "union", "lowers": [lower], "upper": upper}))
        } else {
            site.mount(name, json!({"coherence": "exclusive"}))
        };
        eprintln!("on {name}");
        test(&mnt, &site.connect(&mnt), &site);
    }
}

fn requests(channel: &Channel) -> u64 {
    channel.counters.requests.load(Relaxed)
}

/// Asks twice: the second time without a request, and with the same answer.
fn twice<T: PartialEq + std::fmt::Debug>(channel: &Channel, ask: impl Fn() -> T) -> T {
    let first = ask();
    let before = requests(channel);
    assert_eq!(ask(), first);
    assert_eq!(requests(channel), before, "asked again, though nothing changed: {first:?}");
    first
}

/// What FUSE says is what the channel says.
fn assert_same(channel: &Channel, mnt: &Path, path: &[u8]) {
    let through_kernel = fs::symlink_metadata(mnt.join(OsStr::from_bytes(path)));
    match (channel.stat(At::Root, path, NOFOLLOW), through_kernel) {
        (Ok(ours), Ok(theirs)) => {
            let seen = (ours.ino, ours.mode, u64::from(ours.nlink), ours.uid, ours.gid, ours.size_bytes);
            let expected =
                (theirs.ino(), theirs.mode(), theirs.nlink(), theirs.uid(), theirs.gid(), theirs.size());
            assert_eq!(seen, expected, "{}", path.escape_ascii());
            let seen = (ours.mtime_s, ours.mtime_ns as i64, ours.ctime_s, ours.ctime_ns as i64);
            let expected = (theirs.mtime(), theirs.mtime_nsec(), theirs.ctime(), theirs.ctime_nsec());
            assert_eq!(seen, expected, "times of {}", path.escape_ascii());
            assert_eq!((ours.blocks_512, ours.rdev), (theirs.blocks(), theirs.rdev()));
        }
        (Err(Error::Errno(ours)), Err(theirs)) => {
            assert_eq!(Some(ours), theirs.raw_os_error(), "{}", path.escape_ascii());
        }
        // The kernel has the file in its hands.
        (Err(Error::Kernel), Ok(theirs)) => assert!(theirs.is_file()),
        (ours, theirs) => panic!("{}: {ours:?}, through the kernel {theirs:?}", path.escape_ascii()),
    }
}

fn known_paths_need_no_request() {
    on_each(|mnt, channel, _| {
        let long = [&[b'n'; 254][..], &[0xff]].concat();
        fs::create_dir_all(mnt.join("a/b")).unwrap();
        fs::write(mnt.join("a/b/f"), b"bytes").unwrap();
        fs::write(mnt.join(OsStr::from_bytes(&long)), b"").unwrap();
        symlink("b/f", mnt.join("a/link")).unwrap();
        symlink("nowhere", mnt.join("a/dangling")).unwrap();
        let stat = |path: &[u8], flags| twice(channel, || channel.stat(At::Root, path, flags));
        let file = stat(b"a/b/f", 0).unwrap();
        assert_eq!(file.size_bytes, 5);
        assert_eq!(stat(b"a/link", 0).unwrap().ino, file.ino);
        assert_eq!(stat(b"a/link", NOFOLLOW).unwrap().mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(stat(&long, 0).unwrap().size_bytes, 0);
        assert_eq!(stat(b"a/dangling", 0), Err(NOENT));
        assert_eq!(stat(b"a/none", 0), Err(NOENT));
        assert_eq!(stat(b"a/b/f/none", 0), Err(Error::Errno(libc::ENOTDIR)));
        assert_eq!(stat(&[b'x'; 256], 0), Err(Error::Errno(libc::ENAMETOOLONG)));
        assert_eq!(stat(b"a/b/../b/./f", 0).unwrap().ino, file.ino);
        // Deeper than an answer may depend on: asked each time, and right.
        let deep = "d/".repeat(20);
        fs::create_dir_all(mnt.join(&deep)).unwrap();
        assert!(channel.stat(At::Root, deep.as_bytes(), 0).is_ok());
        for (mode, good) in [(libc::R_OK, true), (libc::X_OK, false), (libc::F_OK, true)] {
            let done = twice(channel, || channel.access(At::Root, b"a/b/f", mode as u32, 0));
            assert_eq!(done.is_ok(), good);
        }
        let link = |path: &[u8], room: usize| {
            twice(channel, || {
                let mut target = vec![0; room];
                channel.read_link(At::Root, path, &mut target).map(|count| target[..count].to_vec())
            })
        };
        assert_eq!(link(b"a/link", 100).unwrap(), b"b/f");
        assert_eq!(link(b"a/link", 2).unwrap(), b"b/");
        assert_eq!(link(b"a/b/f", 100), Err(Error::Errno(libc::EINVAL)));
        assert_eq!(link(b"a/none", 100), Err(NOENT));
        let open = |path: &[u8]| channel.open(At::Root, path, 0, 0, 0).map(drop);
        assert_eq!(twice(channel, || open(b"a/none")), Err(NOENT));
        // Below an open directory, until it is closed.
        let directory = channel.open(At::Root, b"a", libc::O_DIRECTORY as u32, 0, 0).unwrap().file;
        let below = twice(channel, || channel.stat(At::File(directory), b"b/f", 0));
        assert_eq!(below.unwrap().ino, file.ino);
        channel.close(directory).unwrap();
        let closed = channel.stat(At::File(directory), b"b/f", 0);
        assert_eq!(closed, Err(Error::Errno(libc::EBADF)));
    });
}

fn what_the_kernel_changes_is_seen_at_once() {
    on_each(|mnt, channel, site| {
        let other = site.connect(mnt);
        fs::create_dir_all(mnt.join("d/e")).unwrap();
        fs::write(mnt.join("d/e/f"), b"1").unwrap();
        fs::write(mnt.join("d/g"), b"other").unwrap();
        symlink("e/f", mnt.join("d/l")).unwrap();
        let paths: [&[u8]; 10] =
            [b"", b"d", b"d/e", b"d/e/f", b"d/g", b"d/l", b"d/new", b"d/hard", b"d/e/f/x", b"d/e2/f"];
        let place = |path: &str| mnt.join(path);
        type Step<'a> = (&'static str, Box<dyn Fn() + 'a>);
        let steps: Vec<Step<'_>> = vec![
            ("write", Box::new(|| fs::write(place("d/e/f"), b"longer").unwrap())),
            (
                "append",
                Box::new(|| {
                    let mut file = fs::OpenOptions::new().append(true).open(place("d/e/f")).unwrap();
                    file.write_all(b"more").unwrap();
                }),
            ),
            (
                "chmod",
                Box::new(|| fs::set_permissions(place("d/e/f"), PermissionsExt::from_mode(0o600)).unwrap()),
            ),
            ("chown", Box::new(|| std::os::unix::fs::chown(place("d/e/f"), Some(5), Some(6)).unwrap())),
            ("make", Box::new(|| fs::write(place("d/new"), b"").unwrap())),
            ("link", Box::new(|| fs::hard_link(place("d/e/f"), place("d/hard")).unwrap())),
            ("write through the other name", Box::new(|| fs::write(place("d/hard"), b"x").unwrap())),
            ("unlink the other name", Box::new(|| fs::remove_file(place("d/hard")).unwrap())),
            ("unlink", Box::new(|| fs::remove_file(place("d/new")).unwrap())),
            (
                "unlink and make",
                Box::new(|| {
                    fs::remove_file(place("d/g")).unwrap();
                    fs::write(place("d/g"), b"second life").unwrap();
                }),
            ),
            (
                "replace a link",
                Box::new(|| {
                    fs::remove_file(place("d/l")).unwrap();
                    symlink("g", place("d/l")).unwrap();
                }),
            ),
            ("rename over", Box::new(|| fs::rename(place("d/g"), place("d/e/f")).unwrap())),
            ("move a directory", Box::new(|| fs::rename(place("d/e"), place("d/e2")).unwrap())),
            (
                "truncate",
                Box::new(|| {
                    fs::OpenOptions::new().write(true).open(place("d/e2/f")).unwrap().set_len(100).unwrap();
                }),
            ),
            (
                "write in the middle",
                Box::new(|| {
                    let file = fs::OpenOptions::new().write(true).open(place("d/e2/f")).unwrap();
                    file.write_all_at(b"end", 200).unwrap();
                }),
            ),
            (
                "a channel's change",
                Box::new(|| {
                    other.mkdir(At::Root, b"d/new", 0o755, 0).unwrap();
                    other.chmod(At::Root, b"d", 0o700, 0).unwrap();
                    let time = Time { seconds: 1_000, nanoseconds: 5 };
                    other.change_times(At::Root, b"d/new", time, time, 0).unwrap();
                }),
            ),
        ];
        for (what, step) in steps {
            for path in paths {
                // What is kept now is of before the change.
                let _ = channel.stat(At::Root, path, 0);
                assert_same(channel, mnt, path);
            }
            step();
            eprintln!("  {what}");
            for path in paths {
                assert_same(channel, mnt, path);
            }
            let followed = fs::metadata(place("d/l")).map(|seen| seen.ino()).ok();
            let ours = channel.stat(At::Root, b"d/l", 0);
            if !matches!(ours, Err(Error::Kernel)) {
                assert_eq!(ours.ok().map(|seen| seen.ino), followed, "behind the link");
            }
        }
        if place("old").exists() {
            assert_same(channel, mnt, b"old/file");
            fs::set_permissions(place("old/file"), PermissionsExt::from_mode(0o640)).unwrap();
            assert_same(channel, mnt, b"old/file");
            fs::write(place("old/file"), b"copied up").unwrap();
            assert_same(channel, mnt, b"old/file");
        }
    });
}

fn permission_on_the_way_is_lost_at_once() {
    on_each(|mnt, _, site| {
        fs::create_dir_all(mnt.join("a/b")).unwrap();
        fs::write(mnt.join("a/b/f"), b"").unwrap();
        for path in ["", "a", "a/b"] {
            fs::set_permissions(mnt.join(path), PermissionsExt::from_mode(0o755)).unwrap();
        }
        let (go, going) = crate::support::pipe();
        let (gone, mut went) = crate::support::pipe();
        let child = crate::support::fork_child(|| {
            rustix::thread::set_thread_res_gid(gid(4711), gid(4711), gid(4711)).unwrap();
            rustix::thread::set_thread_groups(&[]).unwrap();
            rustix::thread::set_thread_res_uid(uid(4711), uid(4711), uid(4711)).unwrap();
            let channel = site.connect(mnt);
            let ask = || channel.stat(At::Root, b"a/b/f", 0).map(drop);
            let access = || channel.access(At::Root, b"a/b/f", libc::R_OK as u32, 0);
            let mut byte = [0];
            for expected in [Ok(()), Err(Error::Errno(libc::EACCES)), Ok(())] {
                assert_eq!(twice(&channel, ask), expected);
                assert_eq!(twice(&channel, access), expected);
                went.write_all(b".").unwrap();
                std::io::Read::read_exact(&mut &go, &mut byte).unwrap();
            }
        });
        let mut byte = [0];
        for mode in [0o700, 0o711, 0o755] {
            std::io::Read::read_exact(&mut &gone, &mut byte).unwrap();
            fs::set_permissions(mnt.join("a"), PermissionsExt::from_mode(mode)).unwrap();
            (&going).write_all(b".").unwrap();
        }
        assert!(child.wait());
    });
}

pub fn uid(number: u32) -> rustix::process::Uid {
    rustix::process::Uid::from_raw(number)
}

pub fn gid(number: u32) -> rustix::process::Gid {
    rustix::process::Gid::from_raw(number)
}

fn what_others_change_is_never_kept() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let mnt = site.mount("shared", json!({"coherence": "shared"}));
    let source = site.directory("shared");
    let channel = site.connect(&mnt);
    for round in 0..20 {
        assert_eq!(channel.stat(At::Root, b"f", 0).err(), Some(NOENT), "round {round}");
        fs::write(source.join("f"), vec![0; round]).unwrap();
        assert_eq!(channel.stat(At::Root, b"f", 0).unwrap().size_bytes, round as u64);
        fs::remove_file(source.join("f")).unwrap();
    }
}

/// Another process moves a directory to and fro while this one asks: every answer is of one moment.
fn a_directory_that_moves_takes_its_names_along() {
    on_each(|mnt, channel, _| {
        // A directory: the kernel has none of it in its hands.
        fs::create_dir_all(mnt.join("x/one/f")).unwrap();
        let ino = channel.stat(At::Root, b"x/one/f", 0).unwrap().ino;
        let mover = crate::support::fork_child(|| {
            for round in 0..400 {
                let (from, to) = if round % 2 == 0 { ("x/one", "x/two") } else { ("x/two", "x/one") };
                fs::rename(mnt.join(from), mnt.join(to)).unwrap();
            }
        });
        let mut seen = [0; 2];
        for _ in 0..20_000 {
            for (at, path) in [&b"x/one/f"[..], b"x/two/f"].iter().enumerate() {
                match channel.stat(At::Root, path, 0) {
                    Ok(found) => {
                        assert_eq!(found.ino, ino);
                        seen[at] += 1;
                    }
                    Err(error) => assert_eq!(error, NOENT),
                }
            }
        }
        assert!(mover.wait());
        assert!(channel.stat(At::Root, b"x/one/f", 0).is_ok());
        assert_eq!(channel.stat(At::Root, b"x/two/f", 0).err(), Some(NOENT));
        eprintln!("  seen at {seen:?}");
    });
}

/// Two channels and the kernel change the same few names; after each change all three say of all names what ext4 would.
fn random_changes_at_all_doors_agree_with_ext4() {
    on_each(|mnt, first, site| {
        let second = site.connect(mnt);
        let model = site.directory("model");
        let seed = std::env::var("POLYTROPO_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x5eed);
        eprintln!("  POLYTROPO_SEED={seed}");
        let mut random = Random(seed);
        let names = ["a", "b", "a/x", "a/y", "b/x", "b/y", "a/x/deep", "b/x/deep", "a/y/deep"];
        let mut done = 0;
        for step in 0..600 {
            let (one, two) = (random.pick(&names), random.pick(&names));
            let kind = random.below(8);
            let door = random.below(3);
            let expected = change_through_kernel(&model, kind, one, two);
            let real = match door {
                0 => change_through_kernel(mnt, kind, one, two),
                1 => change_through_channel(first, mnt, kind, one, two),
                _ => change_through_channel(&second, mnt, kind, one, two),
            };
            assert_eq!(real, expected, "step {step}: change {kind} of {one}, {two} through door {door}");
            done += u32::from(expected.is_ok());
            for name in names {
                let expected = summary_of(&model, name);
                assert_eq!(summary_of(mnt, name), expected, "step {step}: {name} through the kernel");
                for channel in [first, &second] {
                    let seen = match channel.stat(At::Root, name.as_bytes(), 0) {
                        Ok(seen) => Ok(summary(&seen)),
                        Err(Error::Errno(errno)) => Err(errno),
                        Err(Error::Kernel) => continue,
                        Err(Error::Gone | Error::GoneAmid(_)) => panic!("the channel has ended"),
                    };
                    assert_eq!(seen, expected, "step {step}, after change {kind} of {one}, {two}: {name}");
                }
            }
        }
        assert!(done > 100, "only {done} changes were possible");
        let kept = first.counters.local_answers.load(Relaxed);
        assert!(kept > 1000, "only {kept} answers were kept");
    });
}

type Summary = Result<(u32, u64, u64), i32>;

/// Kind and mode, names, and the size of what is no directory.
fn summary(seen: &Attributes) -> (u32, u64, u64) {
    let directory = seen.mode & libc::S_IFMT == libc::S_IFDIR;
    let links = if directory { 0 } else { u64::from(seen.nlink) };
    (seen.mode, links, if directory { 0 } else { seen.size_bytes })
}

fn summary_of(root: &Path, name: &str) -> Summary {
    let seen = fs::metadata(root.join(name)).map_err(errno)?;
    let links = if seen.is_dir() { 0 } else { seen.nlink() };
    Ok((seen.mode(), links, if seen.is_dir() { 0 } else { seen.len() }))
}

fn errno(error: std::io::Error) -> i32 {
    error.raw_os_error().expect("an error of the kernel")
}

fn change_through_kernel(root: &Path, kind: u64, one: &str, two: &str) -> Result<(), i32> {
    let (from, to) = (root.join(one), root.join(two));
    let done = match kind {
        0 | 1 => fs::create_dir(&from),
        2 => fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&from)
            .and_then(|file| file.write_all_at(two.as_bytes(), 0)),
        3 => fs::remove_file(&from),
        4 => fs::remove_dir(&from),
        5 => fs::rename(&from, &to),
        6 => fs::hard_link(&from, &to),
        _ => fs::set_permissions(&from, PermissionsExt::from_mode(0o700 | two.len() as u32)),
    };
    done.map_err(errno)
}

fn change_through_channel(channel: &Channel, mnt: &Path, kind: u64, one: &str, two: &str) -> Result<(), i32> {
    let (root, from, to) = (At::Root, one.as_bytes(), two.as_bytes());
    let create = (libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL) as u32;
    let done = match kind {
        0 | 1 => channel.mkdir(root, from, 0o777, 0o022),
        2 => channel.open(root, from, create, 0o666, 0o022).and_then(|opened| {
            channel.pwrite(opened.file, to, 0)?;
            channel.close(opened.file)
        }),
        3 => channel.unlink(root, from, 0),
        4 => channel.unlink(root, from, libc::AT_REMOVEDIR as u32),
        5 => channel.rename(root, from, root, to, 0),
        6 => channel.link(root, from, root, to, 0),
        _ => channel.chmod(root, from, 0o700 | to.len() as u32, 0),
    };
    match done {
        Ok(()) => Ok(()),
        Err(Error::Errno(errno)) => Err(errno),
        Err(Error::Kernel) => change_through_kernel(mnt, kind, one, two),
        Err(Error::Gone | Error::GoneAmid(_)) => panic!("the channel has ended"),
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    fn pick<'a>(&mut self, names: &[&'a str]) -> &'a str {
        names[self.below(names.len() as u64) as usize]
    }
}
