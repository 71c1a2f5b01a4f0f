//! Opening, reading, looking.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::Ordering::Relaxed;

use polytropo_client::{At, Attributes, Error};
use serde_json::json;

use crate::Test;
use crate::support::{Site, pattern};

pub const TESTS: &[Test] = &[
    ("opens_reads_and_closes", opens_reads_and_closes),
    ("large_files_are_read_from_windows", large_files_are_read_from_windows),
    ("windows_are_right_while_they_are_evicted", windows_are_right_while_they_are_evicted),
    ("paths_lead_where_the_kernel_leads", paths_lead_where_the_kernel_leads),
    ("what_the_kernel_may_hold_back_is_left_to_it", what_the_kernel_may_hold_back_is_left_to_it),
];

const RDONLY: u32 = libc::O_RDONLY as u32;

fn immutable() -> serde_json::Value {
    json!({"read_only": true, "coherence": "immutable"})
}

fn same(attributes: &Attributes, kernel: &fs::Metadata) {
    let ours = (attributes.ino, attributes.mode, attributes.nlink, attributes.uid, attributes.gid);
    assert_eq!(ours, (kernel.ino(), kernel.mode(), kernel.nlink() as u32, kernel.uid(), kernel.gid()));
    assert_eq!((attributes.size_bytes, attributes.blocks_512), (kernel.size(), kernel.blocks()));
    assert_eq!((attributes.mtime_s, i64::from(attributes.mtime_ns)), (kernel.mtime(), kernel.mtime_nsec()));
    assert_eq!((attributes.ctime_s, i64::from(attributes.ctime_ns)), (kernel.ctime(), kernel.ctime_nsec()));
}

fn opens_reads_and_closes() {
    let mut site = Site::start();
    let source = site.directory("data");
    fs::write(source.join("small"), "content").unwrap();
    fs::write(source.join("empty"), "").unwrap();
    let mnt = site.mount("data", immutable());
    let channel = site.connect(&mnt);
    channel.ping().unwrap();
    let opened = channel.open(At::Root, b"small", RDONLY, 0, 0).unwrap();
    same(&opened.attributes, &fs::metadata(mnt.join("small")).unwrap());
    let mut bytes = [0; 16];
    assert_eq!(channel.pread(opened.file, &mut bytes, 0).unwrap(), 7);
    assert_eq!(&bytes[..7], b"content");
    assert_eq!(channel.pread(opened.file, &mut bytes, 5).unwrap(), 2);
    assert_eq!(channel.pread(opened.file, &mut bytes, 7).unwrap(), 0);
    assert_eq!(channel.pread(opened.file, &mut bytes, u64::MAX >> 1).unwrap(), 0);
    assert_eq!(channel.pread(opened.file, &mut bytes, u64::MAX), Err(Error::Errno(libc::EINVAL)));
    same(&channel.fstat(opened.file).unwrap(), &fs::metadata(mnt.join("small")).unwrap());
    channel.close(opened.file).unwrap();
    assert_eq!(channel.pread(opened.file, &mut bytes, 0), Err(Error::Errno(libc::EBADF)));
    assert_eq!(channel.close(opened.file), Err(Error::Errno(libc::EBADF)));
    let empty = channel.open(At::Root, b"empty", RDONLY, 0, 0).unwrap();
    assert_eq!(channel.pread(empty.file, &mut bytes, 0).unwrap(), 0);
    // More than there are slots and chunks.
    for _ in 0..1000 {
        let again = channel.open(At::Root, b"small", RDONLY, 0, 0).unwrap();
        assert_eq!(channel.pread(again.file, &mut bytes, 0).unwrap(), 7);
        channel.close(again.file).unwrap();
    }
    let many: Vec<_> = (0..300).map(|_| channel.open(At::Root, b"small", RDONLY, 0, 0).unwrap()).collect();
    for one in &many {
        assert_eq!(channel.pread(one.file, &mut bytes, 0).unwrap(), 7);
    }
    drop(channel);
    // A channel that ended leaves nothing behind that keeps the mount from ending.
    site.order(&json!({"op": "unmount", "mountpoint": mnt}));
}

fn large_files_are_read_from_windows() {
    let mut site = Site::start();
    let source = site.directory("data");
    let size = (3 << 20) + 1234;
    fs::write(source.join("large"), pattern(1, 0, size)).unwrap();
    let mnt = site.mount("data", immutable());
    let channel = site.connect(&mnt);
    let file = channel.open(At::Root, b"large", RDONLY, 0, 0).unwrap().file;
    let mut bytes = vec![0; size + 100];
    assert_eq!(channel.pread(file, &mut bytes, 0).unwrap(), size);
    assert_eq!(bytes[..size], pattern(1, 0, size));
    assert!(channel.counters.local_reads.load(Relaxed) > 0, "not read from a window");
    let asked = channel.counters.requests.load(Relaxed);
    for at in [0, 1, 65_535, 65_536, 1_000_000, size as u64 - 10, size as u64, size as u64 + 1] {
        let mut part = [0; 70_000];
        let count = channel.pread(file, &mut part, at).unwrap();
        let expected = (size as u64).saturating_sub(at).min(70_000) as usize;
        assert_eq!(count, expected);
        assert_eq!(part[..count], pattern(1, at, count));
    }
    assert_eq!(channel.counters.requests.load(Relaxed), asked, "what is cached is read without asking");
    // Again, from a window that is there.
    channel.close(file).unwrap();
    let file = channel.open(At::Root, b"large", RDONLY, 0, 0).unwrap().file;
    assert_eq!(channel.pread(file, &mut bytes, 0).unwrap(), size);
    assert_eq!(bytes[..size], pattern(1, 0, size));
}

fn windows_are_right_while_they_are_evicted() {
    // Room for 16 blocks of 64 KiB, and files of 24.
    let mut site = Site::start_with(&["--cache-bytes", "1048576"]);
    let source = site.directory("data");
    let size = 24 << 16;
    for file in 0..3 {
        fs::write(source.join(format!("f{file}")), pattern(file, 0, size)).unwrap();
    }
    let mnt = site.mount("data", immutable());
    std::thread::scope(|scope| {
        for reader in 0..3 {
            let channel = site.connect(&mnt);
            scope.spawn(move || {
                let names = [0u64, 1, 2].map(|file| (file, format!("f{file}")));
                let files = names.map(|(seed, name)| {
                    (seed, channel.open(At::Root, name.as_bytes(), RDONLY, 0, 0).unwrap().file)
                });
                let mut state = reader + 1u64;
                for _ in 0..400 {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let (seed, file) = files[(state >> 33) as usize % 3];
                    let at = (state >> 20) % size as u64;
                    let mut bytes = vec![0; (state >> 40) as usize % 200_000];
                    let count = channel.pread(file, &mut bytes, at).unwrap();
                    assert_eq!(count, bytes.len().min(size - at as usize));
                    assert!(bytes[..count] == pattern(seed, at, count), "wrong bytes at {at}");
                }
            });
        }
    });
}

fn paths_lead_where_the_kernel_leads() {
    let mut site = Site::start();
    let source = site.directory("data");
    fs::create_dir_all(source.join("a/b/c")).unwrap();
    fs::write(source.join("a/b/file"), "x").unwrap();
    for (target, link) in [
        ("b/file", "a/link"),
        ("link", "a/link2"),
        ("loop", "a/loop"),
        ("../..", "a/b/out"),
        ("b/", "a/slash"),
    ] {
        std::os::unix::fs::symlink(target, source.join(link)).unwrap();
    }
    std::os::unix::fs::symlink("/etc", source.join("absolute")).unwrap();
    fs::create_dir(source.join("covered")).unwrap();
    fs::set_permissions(source.join("a"), fs::Permissions::from_mode(0o755)).unwrap();
    let mnt = site.mount("data", immutable());
    rustix::mount::mount("none", mnt.join("covered"), "tmpfs", rustix::mount::MountFlags::empty(), None)
        .unwrap();
    let channel = site.connect(&mnt);
    let stat = |path: &str| channel.stat(At::Root, path.as_bytes(), 0).map(|found| found.ino);
    let kernel = |path: &str| {
        fs::metadata(mnt.join(path))
            .map(|found| found.ino())
            .map_err(|e| Error::Errno(e.raw_os_error().unwrap()))
    };
    for path in [
        "a",
        "a/",
        "a/.",
        "a/b/..",
        "a/b/../b/file",
        "a//b///c",
        "a/link",
        "a/link2",
        "a/loop",
        "a/file",
        "a/b/file/",
        "a/b/file/x",
        "a/slash",
        "a/slash/file",
        "a/b/out",
        "a/b/c/../../link",
        "./a/b",
        "none",
        "none/x",
        ".",
    ] {
        // The last of these climbs out of the mount through the kernel's own root, which is the same directory here.
        assert_eq!(stat(path), kernel(path), "{path}");
    }
    let long = "x".repeat(256);
    assert_eq!(stat(&long), Err(Error::Errno(libc::ENAMETOOLONG)));
    for path in ["..", "a/../..", "absolute", "covered", "covered/x", "a/b/out/.."] {
        assert_eq!(stat(path), Err(Error::Kernel), "{path}");
    }
    let nofollow = channel.stat(At::Root, b"a/link", libc::AT_SYMLINK_NOFOLLOW as u32).unwrap();
    assert_eq!(nofollow.mode & libc::S_IFMT, libc::S_IFLNK);
    let directory =
        channel.open(At::Root, b"a/b", (libc::O_PATH | libc::O_DIRECTORY) as u32, 0, 0).unwrap().file;
    assert!(channel.stat(At::File(directory), b"file", 0).is_ok());
    assert_eq!(channel.stat(At::File(directory), b"..", 0), Err(Error::Kernel));
    let refused = |path: &[u8], flags: i32| channel.open(At::Root, path, flags as u32, 0, 0).map(|_| ());
    assert_eq!(refused(b"a/link", libc::O_NOFOLLOW), Err(Error::Errno(libc::ELOOP)));
    assert_eq!(refused(b"a/b/file", libc::O_DIRECTORY), Err(Error::Errno(libc::ENOTDIR)));
    assert_eq!(refused(b"a", libc::O_WRONLY), Err(Error::Errno(libc::EISDIR)));
    // Another mount appears: the channel ends rather than miss it.
    rustix::mount::mount("none", mnt.join("a/b/c"), "tmpfs", rustix::mount::MountFlags::empty(), None)
        .unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !channel.has_ended() {
        assert!(std::time::Instant::now() < deadline, "the channel outlives a change of mounts");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(channel.stat(At::Root, b"a/b/c", 0), Err(Error::Gone));
    assert_eq!(site.connect(&mnt).stat(At::Root, b"a/b/c", 0), Err(Error::Kernel));
}

fn what_the_kernel_may_hold_back_is_left_to_it() {
    let mut site = Site::start();
    fs::write(site.directory("data").join("file"), "x").unwrap();
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    let channel = site.connect(&mnt);
    assert_eq!(channel.open(At::Root, b"file", RDONLY, 0, 0).map(|_| ()), Err(Error::Kernel));
    assert_eq!(channel.stat(At::Root, b"file", 0), Err(Error::Kernel));
    assert!(channel.stat(At::Root, b"", 0).is_ok());
}
