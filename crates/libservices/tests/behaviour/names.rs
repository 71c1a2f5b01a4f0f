//! Names: looking up, making, removing, renaming.

use polytropo_libservices::*;

use crate::suite::{Check, ROOT, Stack, check, errno, name};

pub const CHECKS: &[Check] = &[
    check!(missing_names_are_enoent),
    check!(names_in_files_are_enotdir),
    check!(what_was_seeded_is_found),
    check!(made_names_must_be_new),
    check!(names_are_bytes),
    check!(directories_are_removed_by_rmdir_only_and_empty),
    check!(rename_moves),
    check!(rename_replaces),
    check!(rename_replaces_alike_only),
    check!(rename_into_itself_is_einval),
    check!(rename_noreplace, RENAME_NOREPLACE),
    check!(rename_exchange, RENAME_EXCHANGE),
    check!(renamed_directories_keep_what_is_in_them),
    check!(names_are_free_again),
    check!(same_inode_same_node),
];

fn missing_names_are_enoent(s: &Stack) {
    let c = s.caller();
    assert_eq!(errno(s.look(ROOT, "no")), Errno::NOENT);
    assert_eq!(errno(s.unlink(ROOT, "no")), Errno::NOENT);
    assert_eq!(errno(s.service.rmdir(&c, ROOT, name("no"))), Errno::NOENT);
    assert_eq!(errno(s.rename((ROOT, "no"), (ROOT, "other"), RenameFlags::empty())), Errno::NOENT);
}

fn names_in_files_are_enotdir(s: &Stack) {
    let file = s.file(ROOT, "file", b"");
    assert_eq!(errno(s.look(file, "below")), Errno::NOTDIR);
    assert_eq!(errno(s.service.mkdir(&s.caller(), file, name("below"), 0o755)), Errno::NOTDIR);
    assert_eq!(errno(s.service.opendir(&s.caller(), file)), Errno::NOTDIR);
}

fn what_was_seeded_is_found(s: &Stack) {
    s.seed_dir("d");
    s.seed_file("d/f", b"seed");
    let node = s.node("d/f");
    assert_eq!(s.content(node), b"seed");
    let attr = s.attr(node);
    assert_eq!((attr.size_bytes, attr.mode, attr.nlink), (4, libc::S_IFREG | 0o644, 1));
    assert!(s.attr(s.node("d")).is_dir());
}

fn made_names_must_be_new(s: &Stack) {
    s.seed_file("seeded", b"");
    s.file(ROOT, "made", b"");
    let c = s.caller();
    for present in ["seeded", "made"] {
        assert_eq!(errno(s.service.mkdir(&c, ROOT, name(present), 0o755)), Errno::EXIST);
        let exclusive = OpenFlags::WRITE | OpenFlags::EXCLUSIVE;
        assert_eq!(errno(s.service.create(&c, ROOT, name(present), 0o644, exclusive)), Errno::EXIST);
        assert_eq!(errno(s.service.mknod(&c, ROOT, name(present), libc::S_IFREG | 0o644, 0)), Errno::EXIST);
        if s.service.capabilities().contains(Capabilities::SYMLINKS) {
            assert_eq!(errno(s.service.symlink(&c, ROOT, name(present), b"x")), Errno::EXIST);
        }
    }
}

fn names_are_bytes(s: &Stack) {
    let longest = vec![0xff; 255];
    for bytes in [&b"\xff\xfe"[..], b"a\nb", b" ", b"...", &longest] {
        let odd = Name::new(bytes).unwrap();
        let made = s.service.mkdir(&s.caller(), ROOT, odd, 0o755).unwrap();
        assert_eq!(s.service.lookup(&s.caller(), ROOT, odd).unwrap().node, made.node);
    }
    assert_eq!(s.names(ROOT).len(), 5);
}

fn directories_are_removed_by_rmdir_only_and_empty(s: &Stack) {
    s.seed_dir("seeded");
    s.seed_file("seeded/f", b"");
    s.mkdir(ROOT, "made");
    let c = s.caller();
    s.file(ROOT, "file", b"");
    assert_eq!(errno(s.unlink(ROOT, "made")), Errno::ISDIR);
    assert_eq!(errno(s.service.rmdir(&c, ROOT, name("file"))), Errno::NOTDIR);
    assert_eq!(errno(s.service.rmdir(&c, ROOT, name("seeded"))), Errno::NOTEMPTY);
    s.unlink(s.node("seeded"), "f").unwrap();
    for gone in ["seeded", "made"] {
        s.service.rmdir(&c, ROOT, name(gone)).unwrap();
        assert_eq!(errno(s.look(ROOT, gone)), Errno::NOENT);
    }
}

fn rename_moves(s: &Stack) {
    s.seed_file("seeded", b"one");
    let made = s.file(ROOT, "made", b"two");
    let target = s.mkdir(ROOT, "target");
    for (from, bytes) in [("seeded", b"one"), ("made", b"two")] {
        let before = s.attr(s.node(from)).ino;
        s.rename((ROOT, from), (target, from), RenameFlags::empty()).unwrap();
        assert_eq!(errno(s.look(ROOT, from)), Errno::NOENT);
        let after = s.look(target, from).unwrap();
        assert_eq!(after.attr.ino, before);
        assert_eq!(s.content(after.node), bytes);
    }
    assert_eq!(s.look(target, "made").unwrap().node, made);
}

fn rename_replaces(s: &Stack) {
    s.seed_file("old", b"old");
    let old = s.node("old");
    let open = s.open(old, OpenFlags::READ);
    s.file(ROOT, "new", b"new");
    s.rename((ROOT, "new"), (ROOT, "old"), RenameFlags::empty()).unwrap();
    assert_eq!(s.content(s.node("old")), b"new");
    assert_eq!(s.names(ROOT), ["old"]);
    assert_eq!(s.read(old, open, 0, 10), b"old", "an open file outlives its name");
    s.service.release(old, open);
}

fn rename_replaces_alike_only(s: &Stack) {
    s.file(ROOT, "file", b"");
    let full = s.mkdir(ROOT, "full");
    s.file(full, "f", b"");
    s.mkdir(ROOT, "empty");
    let none = RenameFlags::empty();
    assert_eq!(errno(s.rename((ROOT, "file"), (ROOT, "empty"), none)), Errno::ISDIR);
    assert_eq!(errno(s.rename((ROOT, "empty"), (ROOT, "file"), none)), Errno::NOTDIR);
    assert_eq!(errno(s.rename((ROOT, "empty"), (ROOT, "full"), none)), Errno::NOTEMPTY);
    s.rename((ROOT, "full"), (ROOT, "empty"), none).unwrap();
    assert_eq!(s.names(s.node("empty")), ["f"]);
}

fn rename_into_itself_is_einval(s: &Stack) {
    let outer = s.mkdir(ROOT, "outer");
    let inner = s.mkdir(outer, "inner");
    assert_eq!(errno(s.rename((ROOT, "outer"), (inner, "x"), RenameFlags::empty())), Errno::INVAL);
}

fn rename_noreplace(s: &Stack) {
    s.seed_file("seeded", b"seeded");
    s.file(ROOT, "made", b"made");
    let flags = RenameFlags::NOREPLACE;
    assert_eq!(errno(s.rename((ROOT, "made"), (ROOT, "seeded"), flags)), Errno::EXIST);
    s.rename((ROOT, "made"), (ROOT, "free"), flags).unwrap();
    assert_eq!(s.names(ROOT), ["free", "seeded"]);
}

fn rename_exchange(s: &Stack) {
    s.seed_file("seeded", b"seeded");
    let dir = s.mkdir(ROOT, "dir");
    s.file(dir, "f", b"");
    let flags = RenameFlags::EXCHANGE;
    assert_eq!(errno(s.rename((ROOT, "seeded"), (ROOT, "no"), flags)), Errno::NOENT);
    s.rename((ROOT, "seeded"), (ROOT, "dir"), flags).unwrap();
    assert_eq!(s.content(s.node("dir")), b"seeded");
    assert_eq!(s.names(s.node("seeded")), ["f"]);
}

fn renamed_directories_keep_what_is_in_them(s: &Stack) {
    s.seed_dir("a");
    s.seed_dir("a/b");
    s.seed_file("a/b/f", b"deep");
    let inner = s.node("a/b");
    s.rename((ROOT, "a"), (ROOT, "z"), RenameFlags::empty()).unwrap();
    assert_eq!(s.content(s.node("z/b/f")), b"deep");
    assert_eq!(errno(s.look(ROOT, "a")), Errno::NOENT);
    s.file(inner, "g", b"made through the old node");
    assert_eq!(s.names(s.node("z/b")), ["f", "g"]);
    // A new directory under the old name does not show the old one's content.
    s.mkdir(ROOT, "a");
    assert!(s.names(s.node("a")).is_empty());
}

fn names_are_free_again(s: &Stack) {
    s.seed_dir("d");
    s.seed_file("d/f", b"seed");
    s.seed_file("f", b"seed");
    s.unlink(s.node("d"), "f").unwrap();
    s.unlink(ROOT, "f").unwrap();
    s.service.rmdir(&s.caller(), ROOT, name("d")).unwrap();
    s.mkdir(ROOT, "f");
    s.file(ROOT, "d", b"now a file");
    assert_eq!(s.content(s.node("d")), b"now a file");
    assert!(s.names(s.node("f")).is_empty());
}

fn same_inode_same_node(s: &Stack) {
    s.seed_file("f", b"");
    let first = s.node("f");
    assert_eq!(s.node("f"), first);
    s.service.forget(first, 1);
    assert_eq!(s.attr(first).size_bytes, 0, "one look-up is still held");
    s.service.forget(first, 1);
    assert_eq!(s.content(s.node("f")), b"");
}
