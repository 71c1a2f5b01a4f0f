//! Owners, modes, times, privileges.

use polytropo_libservices::*;

use crate::suite::{Check, READ_WRITE, ROOT, Stack, check, errno, name, user};

pub const CHECKS: &[Check] = &[
    check!(modes_are_set),
    check!(umask_is_applied),
    check!(owners_are_those_of_callers, OWNERS),
    check!(owners_are_changed, OWNERS),
    check!(setgid_directories_give_their_group, OWNERS),
    check!(new_owners_drop_setuid, OWNERS),
    check!(writes_of_users_drop_setuid),
    check!(writes_of_the_trusted_keep_setuid),
    check!(times_are_set),
    check!(writes_change_times),
    check!(special_files_are_shown, SPECIAL_FILES),
    check!(birth_time_is_told, BIRTH_TIME),
    check!(inode_numbers_stay),
    check!(unknown_nodes_are_estale),
];

const MODE: fn(u32) -> SetAttr = |mode| SetAttr { mode: Some(mode), ..SetAttr::default() };

fn modes_are_set(s: &Stack) {
    s.seed_file("f", b"");
    s.seed_dir("d");
    for text in ["f", "d"] {
        let node = s.node(text);
        assert_eq!(s.set(node, MODE(0o4711)).mode & 0o7777, 0o4711);
        assert_eq!(s.look(ROOT, text).unwrap().attr.mode & 0o7777, 0o4711);
    }
    let dir = s.node("d");
    assert_eq!(s.set(dir, MODE(0o1777)).mode, libc::S_IFDIR | 0o1777);
}

fn umask_is_applied(s: &Stack) {
    let caller = Caller { umask: 0o027, ..s.caller() };
    let made = s.service.mkdir(&caller, ROOT, name("d"), 0o777).unwrap();
    assert_eq!(made.attr.mode & 0o7777, 0o750);
    let (made, _) = s.service.create(&caller, ROOT, name("f"), 0o666, READ_WRITE).unwrap();
    assert_eq!(made.attr.mode & 0o7777, 0o640);
    let made = s.service.mknod(&caller, ROOT, name("n"), libc::S_IFREG | 0o666, 0).unwrap();
    assert_eq!(made.attr.mode, libc::S_IFREG | 0o640);
}

fn owners_are_those_of_callers(s: &Stack) {
    let caller = user(1234, 2345);
    let ids = |entry: &Entry| (entry.attr.uid, entry.attr.gid);
    let made = s.service.mkdir(&caller, ROOT, name("d"), 0o3755).unwrap();
    assert_eq!((ids(&made), made.attr.mode & 0o7777), ((1234, 2345), 0o3755));
    let (made, _) = s.service.create(&caller, ROOT, name("f"), 0o4755, READ_WRITE).unwrap();
    assert_eq!((ids(&made), made.attr.mode & 0o7777), ((1234, 2345), 0o4755));
    let made = s.service.mknod(&caller, ROOT, name("n"), libc::S_IFREG | 0o6755, 0).unwrap();
    assert_eq!((ids(&made), made.attr.mode & 0o7777), ((1234, 2345), 0o6755));
    if s.service.capabilities().contains(Capabilities::SYMLINKS | Capabilities::XATTRS) {
        s.service.symlink(&caller, ROOT, name("l"), b"f").unwrap();
    }
    // And the service is itself again afterwards.
    let made = s.service.mkdir(&s.caller(), ROOT, name("e"), 0o755).unwrap();
    assert_eq!(ids(&made), (0, 0));
}

fn owners_are_changed(s: &Stack) {
    s.seed_file("f", b"");
    let node = s.node("f");
    let uid = SetAttr { uid: Some(7), ..SetAttr::default() };
    let before = s.attr(node);
    assert_eq!((s.set(node, uid).uid, s.attr(node).gid), (7, before.gid));
    let gid = SetAttr { gid: Some(8), ..SetAttr::default() };
    let after = s.set(node, gid);
    assert_eq!((after.uid, after.gid), (7, 8));
}

fn setgid_directories_give_their_group(s: &Stack) {
    let dir = s.mkdir(ROOT, "d");
    s.set(dir, SetAttr { gid: Some(77), mode: Some(0o2775), ..SetAttr::default() });
    let caller = user(1234, 2345);
    let (made, _) = s.service.create(&caller, dir, name("f"), 0o644, READ_WRITE).unwrap();
    assert_eq!((made.attr.uid, made.attr.gid), (1234, 77));
    let made = s.service.mkdir(&caller, dir, name("d"), 0o755).unwrap();
    assert_eq!((made.attr.gid, made.attr.mode & 0o7777), (77, 0o2755));
}

fn new_owners_drop_setuid(s: &Stack) {
    s.seed_file("f", b"");
    let node = s.node("f");
    s.set(node, MODE(0o6755));
    let changes = SetAttr { uid: Some(7), kill_privileges: true, ..SetAttr::default() };
    assert_eq!(s.set(node, changes).mode & 0o7777, 0o755);
}

fn writes_of_the_trusted_keep_setuid(s: &Stack) {
    let (node, handle) = s.create(ROOT, "f");
    let mode = || s.attr(node).mode & 0o7777;
    s.set(node, MODE(0o4755));
    s.write(node, handle, 0, b"abcdef");
    assert_eq!(mode(), 0o4755, "after a write");
    s.set(node, SetAttr { size_bytes: Some(3), ..SetAttr::default() });
    assert_eq!(mode(), 0o4755, "after a truncation");
    s.service.release(node, handle);
    let handle = s.open(node, OpenFlags::WRITE | OpenFlags::TRUNCATE);
    assert_eq!(mode(), 0o4755, "after an open that truncates");
    s.service.release(node, handle);
}

fn writes_of_users_drop_setuid(s: &Stack) {
    s.seed_file("f", b"");
    let node = s.node("f");
    s.set(node, MODE(0o6755));
    let handle = s.open(node, READ_WRITE);
    s.service.write(&user(1000, 1000), node, handle, 0, b"x").unwrap();
    assert_eq!(s.attr(node).mode & 0o7777, 0o755);
    s.set(node, MODE(0o6755));
    s.set(node, SetAttr { size_bytes: Some(0), kill_privileges: true, ..SetAttr::default() });
    assert_eq!(s.attr(node).mode & 0o7777, 0o755);
}

fn times_are_set(s: &Stack) {
    s.seed_file("f", b"");
    let node = s.node("f");
    let at = Timestamp { seconds: 1_000_000, nanoseconds: 123_456_789 };
    let changes = SetAttr { atime: Some(SetTime::At(at)), ..SetAttr::default() };
    let before = s.attr(node);
    let after = s.set(node, changes);
    assert_eq!((after.atime, after.mtime), (at, before.mtime));
    let changes = SetAttr { mtime: Some(SetTime::At(at)), atime: Some(SetTime::Now), ..SetAttr::default() };
    let after = s.set(node, changes);
    assert_eq!(after.mtime, at);
    assert!(after.atime > before.atime);
    assert_eq!(s.attr(node).mtime, at);
    // Before 1970.
    let early = Timestamp { seconds: -5, nanoseconds: 0 };
    let changes = SetAttr { mtime: Some(SetTime::At(early)), ..SetAttr::default() };
    assert_eq!(s.set(node, changes).mtime, early);
}

fn writes_change_times(s: &Stack) {
    s.seed_file("f", b"x");
    let node = s.node("f");
    let old = Timestamp { seconds: 1000, nanoseconds: 0 };
    s.set(node, SetAttr { mtime: Some(SetTime::At(old)), ..SetAttr::default() });
    let handle = s.open(node, READ_WRITE);
    s.write(node, handle, 0, b"y");
    s.service.release(node, handle);
    assert!(s.attr(node).mtime > old);
}

fn special_files_are_shown(s: &Stack) {
    let make = |text, mode, rdev| s.service.mknod(&s.caller(), ROOT, name(text), mode, rdev);
    for (text, mode) in [("fifo", libc::S_IFIFO | 0o640), ("socket", libc::S_IFSOCK | 0o755)] {
        let made = make(text, mode, 0).unwrap();
        assert_eq!(made.attr.mode, mode);
        assert_eq!(s.look(ROOT, text).unwrap().attr.mode, mode);
        assert!(s.service.open(&s.caller(), made.node, OpenFlags::READ).is_err(), "devices are never opened");
    }
    match make("null", libc::S_IFCHR | 0o666, libc::makedev(1, 3)) {
        Ok(made) => {
            assert_eq!((made.attr.mode, made.attr.rdev), (libc::S_IFCHR | 0o666, libc::makedev(1, 3)))
        }
        Err(e) => assert!(e.is(Errno::PERM), "{e}"),
    }
}

fn birth_time_is_told(s: &Stack) {
    let node = s.file(ROOT, "f", b"");
    let born = s.attr(node).btime.unwrap();
    assert!(born.seconds > 1_500_000_000);
    s.set(node, MODE(0o600));
    assert_eq!(s.attr(node).btime, Some(born));
}

fn inode_numbers_stay(s: &Stack) {
    s.seed_file("f", b"1");
    let node = s.node("f");
    let before = s.attr(node).ino;
    let handle = s.open(node, READ_WRITE);
    s.write(node, handle, 0, b"2");
    s.service.release(node, handle);
    s.set(node, MODE(0o600));
    s.rename((ROOT, "f"), (ROOT, "g"), RenameFlags::empty()).unwrap();
    assert_eq!(s.attr(s.node("g")).ino, before);
}

fn unknown_nodes_are_estale(s: &Stack) {
    let node = s.file(ROOT, "f", b"");
    s.service.forget(node, 1);
    assert_eq!(errno(s.service.getattr(&s.caller(), node, None)), Errno::STALE);
    assert_eq!(errno(s.service.open(&s.caller(), NodeId(u64::MAX), OpenFlags::READ)), Errno::STALE);
    s.service.forget(NodeId(u64::MAX), 3);
}
