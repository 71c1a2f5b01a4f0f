//! Symbolic and hard links.

use polytropo_libservices::*;

use crate::suite::{Check, READ_WRITE, ROOT, Stack, check, errno, name};

pub const CHECKS: &[Check] = &[
    check!(symlinks_keep_any_target, SYMLINKS),
    check!(symlinks_are_not_followed, SYMLINKS),
    check!(hard_links_are_one_inode, HARD_LINKS),
    check!(hard_links_outlive_each_other, HARD_LINKS),
    check!(directories_have_one_name, HARD_LINKS),
    check!(renaming_a_link_over_its_twin_does_nothing, HARD_LINKS),
];

fn symlinks_keep_any_target(s: &Stack) {
    let long = vec![b'x'; 4000];
    for (text, target) in [("a", &b"../../etc/passwd"[..]), ("b", b"\xff"), ("c", &long)] {
        let made = s.service.symlink(&s.caller(), ROOT, name(text), target).unwrap();
        assert_eq!(made.attr.file_type(), libc::S_IFLNK);
        assert_eq!(s.service.readlink(&s.caller(), made.node).unwrap(), target);
    }
    let file = s.file(ROOT, "f", b"");
    assert_eq!(errno(s.service.readlink(&s.caller(), file)), Errno::INVAL);
}

fn symlinks_are_not_followed(s: &Stack) {
    std::os::unix::fs::symlink("/", s.seed.join("l")).unwrap();
    let link = s.node("l");
    assert_eq!(s.attr(link).file_type(), libc::S_IFLNK);
    assert_eq!(errno(s.look(link, "etc")), Errno::NOTDIR);
    assert_eq!(errno(s.service.open(&s.caller(), link, OpenFlags::READ)), Errno::LOOP);
    assert_eq!(errno(s.service.create(&s.caller(), ROOT, name("l"), 0o644, READ_WRITE)), Errno::LOOP);
    s.unlink(ROOT, "l").unwrap();
}

fn hard_links_are_one_inode(s: &Stack) {
    s.seed_file("a", b"bytes");
    let node = s.node("a");
    let dir = s.mkdir(ROOT, "d");
    let linked = s.service.link(&s.caller(), node, dir, name("b")).unwrap();
    assert_eq!(linked.attr.nlink, 2);
    assert_eq!(linked.attr.ino, s.look(ROOT, "a").unwrap().attr.ino);
    assert_eq!(s.look(dir, "b").unwrap().node, s.node("a"));
    let handle = s.open(linked.node, READ_WRITE);
    s.write(linked.node, handle, 0, b"BYTES");
    s.service.release(linked.node, handle);
    assert_eq!(s.content(s.node("a")), b"BYTES");
    assert_eq!(errno(s.service.link(&s.caller(), node, ROOT, name("a"))), Errno::EXIST);
}

fn hard_links_outlive_each_other(s: &Stack) {
    s.seed_file("a", b"bytes");
    let node = s.node("a");
    s.service.link(&s.caller(), node, ROOT, name("b")).unwrap();
    s.unlink(ROOT, "a").unwrap();
    assert_eq!(s.content(s.node("b")), b"bytes");
    assert_eq!(s.attr(s.node("b")).nlink, 1);
    s.service.link(&s.caller(), s.node("b"), ROOT, name("c")).unwrap();
    s.unlink(ROOT, "c").unwrap();
    assert_eq!(s.content(s.node("b")), b"bytes");
}

fn directories_have_one_name(s: &Stack) {
    let dir = s.mkdir(ROOT, "d");
    assert_eq!(errno(s.service.link(&s.caller(), dir, ROOT, name("e"))), Errno::PERM);
}

fn renaming_a_link_over_its_twin_does_nothing(s: &Stack) {
    let node = s.file(ROOT, "a", b"bytes");
    s.service.link(&s.caller(), node, ROOT, name("b")).unwrap();
    s.rename((ROOT, "a"), (ROOT, "b"), RenameFlags::empty()).unwrap();
    assert_eq!(s.names(ROOT), ["a", "b"]);
    assert_eq!(s.content(s.node("a")), b"bytes");
}
