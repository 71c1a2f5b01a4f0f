//! Answers that programs of the same rights share: who comes later asks nothing, who has other rights learns nothing.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

use polytropo_client::{At, Channel, Error, Listed};
use serde_json::json;

use crate::Test;
use crate::hostile::Raw;
use crate::lookups::{gid, uid};
use crate::support::{Site, as_child, fork_child, pattern};

pub const TESTS: &[Test] = &[
    ("the_second_program_asks_nothing", the_second_program_asks_nothing),
    ("what_changes_is_seen_by_all_at_once", what_changes_is_seen_by_all_at_once),
    ("programs_of_other_rights_learn_nothing", programs_of_other_rights_learn_nothing),
    ("small_files_are_opened_by_all", small_files_are_opened_by_all),
    ("a_directory_is_read_ahead", a_directory_is_read_ahead),
    ("nothing_is_read_ahead_of_who_may_not_list", nothing_is_read_ahead_of_who_may_not_list),
    ("names_that_move_take_no_bytes_along", names_that_move_take_no_bytes_along),
    ("the_log_comes_round_under_readers", the_log_comes_round_under_readers),
    ("nobody_writes_what_others_believe", nobody_writes_what_others_believe),
];

const NOENT: Error = Error::Errno(libc::ENOENT);

fn site(arguments: &[&str]) -> (Site, PathBuf) {
    let mut site = Site::start_with(&[&["--channel-writes"], arguments].concat());
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    fs::set_permissions(&mnt, PermissionsExt::from_mode(0o755)).unwrap();
    (site, mnt)
}

fn requests(channel: &Channel) -> u64 {
    channel.counters.requests.load(Relaxed)
}

fn root_ino(mnt: &Path) -> u64 {
    fs::metadata(mnt).unwrap().ino()
}

fn names(channel: &Channel, listed: &Listed) -> Vec<String> {
    let (mut at, mut names) = (0, Vec::new());
    while let Some((name, after)) = channel.name_in(listed, at).expect("a listing that is there") {
        names.push(String::from_utf8(name.bytes().to_vec()).unwrap());
        at = after;
    }
    names.sort();
    names
}

/// What a program knows of a directory without asking.
fn known(channel: &Channel, ino: u64) -> Option<Vec<String>> {
    let listed = channel.listed(ino).filter(|listed| channel.is_current(listed))?;
    Some(names(channel, &listed))
}

fn the_second_program_asks_nothing() {
    let (site, mnt) = site(&[]);
    fs::create_dir_all(mnt.join("a/b")).unwrap();
    fs::write(mnt.join("a/b/file"), b"some bytes").unwrap();
    let root = root_ino(&mnt);
    let first = site.connect(&mnt);
    for path in [&b""[..], b"a", b"a/b"] {
        first.list(path).unwrap();
    }
    let all = |channel: &Channel| {
        assert_eq!(known(channel, root).unwrap(), ["a"]);
        let found = channel.stat_below(root, b"a/b/file", 0).unwrap().unwrap();
        assert_eq!((found.size_bytes, found.ino), (10, fs::metadata(mnt.join("a/b/file")).unwrap().ino()));
        assert_eq!(channel.stat_below(root, b"a/b/none", 0), Some(Err(NOENT)));
    };
    let second = site.connect(&mnt);
    all(&second);
    assert_eq!(requests(&second), 0);
    // Also when the first is gone, and in another process.
    drop((first, second));
    let child = || {
        let third = site.connect(&mnt);
        all(&third);
        assert_eq!(requests(&third), 0);
    };
    assert!(as_child(child));
}

fn what_changes_is_seen_by_all_at_once() {
    let (site, mnt) = site(&[]);
    fs::create_dir(mnt.join("d")).unwrap();
    fs::write(mnt.join("d/kept"), b"").unwrap();
    let root = root_ino(&mnt);
    let [one, other] = [site.connect(&mnt), site.connect(&mnt)];
    let learn = || {
        one.list(b"").unwrap();
        one.list(b"d").unwrap().ino
    };
    let directory = learn();
    assert_eq!(known(&other, directory).unwrap(), ["kept"]);
    // Through the kernel, and through a channel.
    fs::write(mnt.join("d/new"), b"12345").unwrap();
    assert_eq!(known(&other, directory), None);
    assert!(matches!(other.stat_below(root, b"d/kept", 0), Some(Ok(_))), "other names stay");
    learn();
    assert_eq!(known(&other, directory).unwrap(), ["kept", "new"]);
    one.unlink(At::Root, b"d/kept", 0).unwrap();
    assert_eq!(known(&other, directory), None);
    assert_eq!(other.stat_below(root, b"d/kept", 0), None);
    learn();
    assert_eq!(other.stat_below(root, b"d/kept", 0), Some(Err(NOENT)));
    let mode = |channel: &Channel| channel.stat_below(root, b"d/new", 0).map(|found| found.unwrap().mode);
    assert!(mode(&other).is_some());
    fs::set_permissions(mnt.join("d/new"), PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(mode(&other), None);
    // Who may search a directory concerns all that is known.
    fs::set_permissions(mnt.join("d"), PermissionsExt::from_mode(0o711)).unwrap();
    assert_eq!((known(&other, root), known(&other, directory)), (None, None));
    assert_eq!(requests(&other), 0);
}

fn become_user(number: u32, groups: &[u32]) {
    let groups: Vec<_> = groups.iter().map(|number| gid(*number)).collect();
    rustix::thread::set_thread_groups(&groups).unwrap();
    rustix::thread::set_thread_res_gid(gid(number), gid(number), gid(number)).unwrap();
    rustix::thread::set_thread_res_uid(uid(number), uid(number), uid(number)).unwrap();
}

fn programs_of_other_rights_learn_nothing() {
    let (site, mnt) = site(&[]);
    fs::create_dir_all(mnt.join("open/below")).unwrap();
    fs::create_dir_all(mnt.join("closed/secret")).unwrap();
    fs::set_permissions(mnt.join("closed"), PermissionsExt::from_mode(0o700)).unwrap();
    let root = root_ino(&mnt);
    let first = site.connect(&mnt);
    let closed = [&b""[..], b"open", b"closed"].map(|path| first.list(path).unwrap().ino)[2];
    let learns_nothing = |channel: &Channel| {
        assert_eq!((known(channel, root), known(channel, closed)), (None, None));
        assert_eq!(channel.stat_below(root, b"closed/secret", 0), None);
    };
    let ask = |channel: &Channel| {
        let listed = channel.list(b"").unwrap();
        assert_eq!(names(channel, &listed), ["closed", "open"]);
        assert_eq!(channel.list(b"closed").unwrap_err(), Error::Errno(libc::EACCES));
        assert_eq!(channel.stat_below(root, b"closed/secret", 0), None);
    };
    let as_user = |number: u32, groups: &[u32], work: &dyn Fn(&Channel)| {
        assert!(as_child(|| {
            become_user(number, groups);
            work(&site.connect(&mnt));
        }));
    };
    as_user(4711, &[], &|channel| {
        learns_nothing(channel);
        ask(channel);
    });
    // Another group is enough, and another order of groups is not.
    as_user(4711, &[17, 4], &|channel| {
        learns_nothing(channel);
        ask(channel);
    });
    as_user(4711, &[4, 17], &|channel| {
        assert_eq!(known(channel, root).unwrap(), ["closed", "open"]);
        assert_eq!(channel.stat_below(root, b"closed/secret", 0), None);
        assert_eq!(requests(channel), 0);
    });
    // What is mounted inside, as the process sees it.
    assert!(as_child(|| {
        crate::support::own_mount_namespace();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", mnt.join("open/below"), "tmpfs", flags, None).unwrap();
        let channel = site.connect(&mnt);
        learns_nothing(&channel);
        assert!([&b""[..], b"open"].iter().all(|path| channel.list(path).is_ok()));
        assert_eq!(channel.stat_below(root, b"open/below", 0), None, "it is another's");
    }));
    assert!(first.stat_below(root, b"open/below", 0).unwrap().is_ok());
}

/// What a program that asks nothing reads there.
fn read_shared(channel: &Channel, ino: u64, path: &str) -> Option<Vec<u8>> {
    let opened = channel.open_shared(ino, path.as_bytes(), 0)?;
    let mut bytes = vec![0; 32 << 10];
    let count = channel.pread(opened.file, &mut bytes, 0).unwrap();
    bytes.truncate(count);
    assert_eq!(channel.fstat_known(opened.file).unwrap().size_bytes, count as u64);
    channel.close(opened.file).unwrap();
    Some(bytes)
}

/// Has a program ask for all on a path of directories, and for the file.
fn learn(channel: &Channel, path: &str) {
    channel.list(b"").unwrap();
    for (at, _) in path.match_indices('/') {
        channel.list(&path.as_bytes()[..at]).unwrap();
    }
    // The kernel tells late that a file which was written is closed; until then it is the kernel's.
    let opened =
        until("the kernel closes the file", || channel.open_to_read(At::Root, path.as_bytes(), 0).ok());
    channel.close(opened.file).unwrap();
}

/// Has one program ask until the other one finds the bytes: a change that is just told of spoils the first answers.
fn learn_and_read(one: &Channel, other: &Channel, root: u64, path: &str) -> Vec<u8> {
    until("the bytes are shared", || {
        learn(one, path);
        read_shared(other, root, path)
    })
}

fn until<T>(what: &str, mut tried: impl FnMut() -> Option<T>) -> T {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        if let Some(found) = tried() {
            return found;
        }
        assert!(std::time::Instant::now() < end, "not within 10 s: {what}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn small_files_are_opened_by_all() {
    let (site, mnt) = site(&[]);
    fs::create_dir_all(mnt.join("a/b")).unwrap();
    let root = root_ino(&mnt);
    let [one, other] = [site.connect(&mnt), site.connect(&mnt)];
    for size in [0, 1, 4095, 16 << 10] {
        let path = format!("a/b/f{size}");
        fs::write(mnt.join(&path), pattern(1, 0, size)).unwrap();
        assert_eq!(learn_and_read(&one, &other, root, &path), pattern(1, 0, size));
    }
    fs::write(mnt.join("large"), pattern(1, 0, (16 << 10) + 1)).unwrap();
    std::os::unix::fs::symlink("a/b/f1", mnt.join("link")).unwrap();
    for path in ["large", "link"] {
        learn(&one, path);
        assert_eq!(read_shared(&other, root, path), None, "{path}");
    }
    // Who has it open hears of a change as well.
    let opened = other.open_shared(root, b"a/b/f1", 0).unwrap();
    fs::write(mnt.join("a/b/f1"), b"2").unwrap();
    assert_eq!(read_shared(&other, root, "a/b/f1"), None);
    assert_eq!(other.pread(opened.file, &mut [0; 8], 0), Err(Error::Kernel));
    assert_eq!(learn_and_read(&one, &other, root, "a/b/f1"), b"2");
    // By a program that may list it, and not read it.
    fs::set_permissions(mnt.join("a/b/f1"), PermissionsExt::from_mode(0o600)).unwrap();
    learn_and_read(&one, &other, root, "a/b/f1");
    assert_eq!(requests(&other), 0);
    assert!(as_child(|| {
        become_user(4711, &[]);
        let channel = site.connect(&mnt);
        assert!([&b""[..], b"a", b"a/b"].iter().all(|path| channel.list(path).is_ok()));
        assert!(channel.stat_below(root, b"a/b/f1", 0).unwrap().is_ok());
        assert_eq!(read_shared(&channel, root, "a/b/f1"), None);
        let refused = channel.open_to_read(At::Root, b"a/b/f1", 0).map(drop);
        assert_eq!(refused, Err(Error::Errno(libc::EACCES)));
        assert_eq!(read_shared(&channel, root, "a/b/f1"), None);
    }));
}

/// Opens every file of a directory in the order in which it is listed; says what each has, and how many were asked for.
fn read_in_order(channel: &Channel, root: u64, directory: &str) -> (Vec<(String, Vec<u8>)>, usize) {
    let listed = channel.list(directory.as_bytes()).unwrap();
    let (mut at, mut read, mut asked) = (0, Vec::new(), 0);
    while let Some((name, after)) = channel.name_in(&listed, at).expect("a listing that is there") {
        let name = String::from_utf8(name.bytes().to_vec()).unwrap();
        at = after;
        let path = format!("{directory}/{name}");
        let bytes = read_shared(channel, root, &path).unwrap_or_else(|| {
            asked += 1;
            let opened = channel.open_to_read(At::Root, path.as_bytes(), 0).unwrap();
            let mut bytes = vec![0; 20_000];
            let count = channel.pread(opened.file, &mut bytes, 0).unwrap();
            bytes.truncate(count);
            channel.close(opened.file).unwrap();
            bytes
        });
        read.push((name, bytes));
    }
    (read, asked)
}

fn a_directory_is_read_ahead() {
    let (site, mnt) = site(&[]);
    let root = root_ino(&mnt);
    for (directory, count) in [("first", 200), ("second", 60)] {
        fs::create_dir(mnt.join(directory)).unwrap();
        for file in 0..count {
            fs::write(mnt.join(format!("{directory}/{file}")), pattern(file, 0, file as usize * 20)).unwrap();
        }
    }
    let channel = site.connect(&mnt);
    channel.list(b"").unwrap();
    let right = |read: &[(String, Vec<u8>)]| {
        read.iter().all(|(name, bytes)| {
            *bytes == pattern(name.parse().unwrap(), 0, bytes.len())
                && bytes.len() == name.parse::<usize>().unwrap() * 20
        })
    };
    let (read, asked) = read_in_order(&channel, root, "first");
    assert!(right(&read) && read.len() == 200);
    // Two to begin with, and for each part one, or two where the program was faster than the service.
    // Idle, some 20 and 7. Reading ahead takes 300 us at most at a time, in which a busy machine comes less far.
    assert!(asked <= 200 / 2, "{asked} questions");
    let (read, asked) = read_in_order(&channel, root, "second");
    assert!(right(&read) && read.len() == 60);
    assert!(asked <= 60 / 2, "{asked} questions");
    // Others of these rights ask for nothing, and hear of what changes.
    let other = site.connect(&mnt);
    assert_eq!(read_in_order(&other, root, "first").1, 0);
    fs::write(mnt.join("first/7"), pattern(7, 0, 140)).unwrap();
    assert_eq!(read_shared(&other, root, "first/7"), None);
    fs::rename(mnt.join("first/8"), mnt.join("first/9")).unwrap();
    assert_eq!(read_shared(&other, root, "first/9"), None);
    // Of files that a program may not read nothing is brought, nor anything for who might lose a right.
    assert!(as_child(|| {
        become_user(4711, &[]);
        let channel = site.connect(&mnt);
        channel.list(b"").unwrap();
        let (read, asked) = read_in_order(&channel, root, "second");
        assert!(right(&read));
        assert_eq!(asked, 60);
    }));
}

/// Who may go through a directory, but not list it, is given what it asks for alone.
fn nothing_is_read_ahead_of_who_may_not_list() {
    let mut site = Site::start();
    let data = site.directory("data");
    fs::create_dir(data.join("d")).unwrap();
    for file in 0..40 {
        fs::write(data.join(format!("d/{file:02}")), pattern(file, 0, 100)).unwrap();
    }
    fs::set_permissions(&data, PermissionsExt::from_mode(0o755)).unwrap();
    fs::set_permissions(data.join("d"), PermissionsExt::from_mode(0o711)).unwrap();
    let mnt = site.mount("data", json!({"coherence": "immutable", "read_only": true}));
    let root = root_ino(&mnt);
    // Somebody who may list it has the service keep its listing.
    let first = site.connect(&mnt);
    let listed = first.list(b"d").unwrap();
    let (mut at, mut names) = (0, Vec::new());
    while let Some((name, after)) = first.name_in(&listed, at).unwrap() {
        names.push(String::from_utf8(name.bytes().to_vec()).unwrap());
        at = after;
    }
    let all = || {
        become_user(4711, &[]);
        let channel = site.connect(&mnt);
        for (at, name) in names.iter().enumerate() {
            let opened = channel.open_to_read(At::Root, format!("d/{name}").as_bytes(), 0).unwrap();
            channel.close(opened.file).unwrap();
            // Time enough to read ahead.
            std::thread::sleep(std::time::Duration::from_millis(1));
            let mut later = names[at + 1..].iter().map(|name| format!("d/{name}"));
            assert!(later.all(|path| read_shared(&channel, root, &path).is_none()));
        }
    };
    assert!(as_child(all));
}

/// What a path led to is known only as long as all names on it stay.
fn names_that_move_take_no_bytes_along() {
    let (site, mnt) = site(&[]);
    let root = root_ino(&mnt);
    for (directory, bytes) in [("old", b"old"), ("new", b"new")] {
        fs::create_dir(mnt.join(directory)).unwrap();
        fs::write(mnt.join(directory).join("file"), bytes).unwrap();
    }
    let [one, other] = [site.connect(&mnt), site.connect(&mnt)];
    ["old/file", "new/file"].iter().for_each(|path| learn(&one, path));
    let opened = other.open_shared(root, b"old/file", 0).unwrap();
    // As preloaded programs keep what they opened, to find it again by its path.
    assert!(other.keep_open(At::Root, b"old/file", 0, opened.file, Some(7)));
    assert_eq!(other.open_known(At::Root, b"old/file", 0), Some(Ok(7)));
    fs::rename(mnt.join("old"), mnt.join("away")).unwrap();
    fs::rename(mnt.join("new"), mnt.join("old")).unwrap();
    assert_eq!(other.open_known(At::Root, b"old/file", 0), None);
    assert_eq!(read_shared(&other, root, "old/file"), None);
    learn(&one, "old/file");
    assert_eq!(read_shared(&other, root, "old/file").as_deref(), Some(&b"new"[..]));
}

const DIRECTORIES: usize = 300;
const FILES: usize = 40;

/// A cache so small that its log has not even room for the half of all directories.
fn the_log_comes_round_under_readers() {
    let (site, mnt) = site(&["--cache-bytes", "8388608"]);
    for directory in 0..DIRECTORIES {
        fs::create_dir(mnt.join(format!("d{directory}"))).unwrap();
        for file in 0..FILES {
            fs::File::create(mnt.join(format!("d{directory}/f{file}"))).unwrap();
            let size = (directory * FILES + file) as u64;
            fs::OpenOptions::new()
                .write(true)
                .open(mnt.join(format!("d{directory}/f{file}")))
                .and_then(|opened| opened.set_len(size))
                .unwrap();
        }
    }
    let root = root_ino(&mnt);
    let readers: Vec<_> = (0..3usize)
        .map(|reader| {
            let (site, mnt) = (&site, &mnt);
            fork_child(move || {
                let channel = site.connect(mnt);
                let mut told = 0;
                for turn in 0..4 * DIRECTORIES {
                    let directory = (turn * (7 + reader) + reader) % DIRECTORIES;
                    if turn % 3 == 0 {
                        channel.list(b"").unwrap();
                        channel.list(format!("d{directory}").as_bytes()).unwrap();
                    }
                    for near in 0..8 {
                        let directory = (directory + near) % DIRECTORIES;
                        for file in 0..FILES {
                            let path = format!("d{directory}/f{file}");
                            let Some(found) = channel.stat_below(root, path.as_bytes(), 0) else { continue };
                            assert_eq!(
                                found.unwrap().size_bytes,
                                (directory * FILES + file) as u64,
                                "{path}"
                            );
                            told += 1;
                        }
                    }
                }
                assert!(told > 1000, "only {told} were told");
            })
        })
        .collect();
    assert!(readers.into_iter().all(|reader| reader.wait()));
}

/// Also as root, which may open anything again for writing.
fn nobody_writes_what_others_believe() {
    use rustix::fs::{FallocateFlags, Mode, OFlags};
    use rustix::io::Errno;
    let (site, mnt) = site(&[]);
    let raw = Raw::connect(&site, &mnt);
    let again = format!("/proc/self/fd/{}", raw.answers.as_raw_fd());
    let opened = rustix::fs::open(&again, OFlags::RDWR, Mode::empty()).unwrap();
    for descriptor in [&raw.answers, &opened] {
        assert_eq!(rustix::io::pwrite(descriptor, b"x", 4096), Err(Errno::PERM));
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(rustix::fs::fallocate(descriptor, hole, 4096, 4096), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(descriptor, 0), Err(Errno::PERM));
    }
}
