//! Copying up: what must not change when a lower file is changed.

use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;

fn chmod(mode: u32) -> SetAttr {
    SetAttr { mode: Some(mode), ..SetAttr::default() }
}

#[test]
fn a_copy_is_the_same_file() {
    let rig = Rig::new(2);
    rig.put(1, "d/e/f", "base");
    rig.put(1, "d/e/g", "other");
    let view = rig.union();
    let before = view.attr("d/e/f").unwrap();
    let (parent, grand) = (view.attr("d/e").unwrap(), view.attr("d").unwrap());
    view.setattr("d/e/f", &chmod(0o600)).unwrap();
    let after = view.attr("d/e/f").unwrap();
    assert_eq!(
        Attr {
            mode: before.mode & !0o777 | 0o600,
            ctime: after.ctime,
            btime: after.btime,
            // The record may take a block of its own.
            blocks_512: after.blocks_512,
            ..before
        },
        after
    );
    assert_eq!((parent.mtime, parent.ino), {
        let now = view.attr("d/e").unwrap();
        (now.mtime, now.ino)
    });
    assert_eq!(grand.mtime, view.attr("d").unwrap().mtime);
    assert_eq!(view.list("d/e").unwrap(), ["f", "g"]);
    assert_eq!(host::read_to_string(rig.lower(1, "d/e/f")).unwrap(), "base");
    view.assert_nothing_held();
    drop(view);
    let again = rig.union();
    assert_eq!(again.attr("d/e/f").unwrap().ino, after.ino);
    assert_eq!(again.attr("d/e").unwrap().ino, parent.ino);
    assert_eq!(again.list("d/e").unwrap(), ["f", "g"]);
    assert_eq!(again.list("d").unwrap(), ["e"]);
}

#[test]
fn an_open_reader_sees_what_is_written_after_the_copy() {
    let rig = Rig::new(1);
    rig.put(0, "log", "one\n");
    let view = rig.union();
    let reader = view.open("log", OpenFlags::READ).unwrap();
    assert_eq!(view.read_handle(reader), "one\n");
    view.append("log", "two\n").unwrap();
    assert_eq!(view.read_handle(reader), "one\ntwo\n");
    view.unlink("log").unwrap();
    assert_eq!(view.read_handle(reader), "one\ntwo\n");
    assert_eq!(errno(view.attr("log")), Errno::NOENT);
    view.close(reader);
    view.assert_nothing_held();
}

#[test]
fn a_lower_file_unlinked_while_open_lives_on() {
    let rig = Rig::new(1);
    rig.put(0, "f", "base");
    let view = rig.union();
    let entry = view.union.lookup(&view.caller, NodeId::ROOT, name("f")).unwrap();
    let reader = view.union.open(&view.caller, entry.node, OpenFlags::READ).unwrap().handle;
    view.unlink("f").unwrap();
    assert_eq!(view.union.getattr(&view.caller, entry.node, None).unwrap().nlink, 0);
    // Changed by its open file, it needs a copy without a name.
    let changed = view.union.setattr(&view.caller, entry.node, Some(reader), &chmod(0o640)).unwrap();
    assert_eq!((changed.nlink, changed.mode & 0o777, changed.ino), (0, 0o640, entry.attr.ino));
    assert_eq!(view.read_handle(reader), "base");
    view.close(reader);
    view.union.forget(entry.node, 1);
    assert_eq!(view.list("").unwrap(), [""; 0]);
    view.assert_nothing_held();
}

#[test]
fn times_written_back_after_the_last_name_went_cost_no_copy() {
    let rig = Rig::new(1);
    rig.put(0, "f", "base");
    let (counted, view) = super::counting::Counted::of(&rig);
    let entry = view.union.lookup(&view.caller, NodeId::ROOT, name("f")).unwrap();
    view.unlink("f").unwrap();
    let at = Timestamp { seconds: 5, nanoseconds: 6 };
    let times = SetAttr { mtime: Some(SetTime::At(at)), ..SetAttr::default() };
    assert_eq!(view.union.setattr(&view.caller, entry.node, None, &times).unwrap().mtime, at);
    assert_eq!(counted.upper.creates.load(std::sync::atomic::Ordering::SeqCst), 0);
    let changed = view.union.setattr(&view.caller, entry.node, None, &chmod(0o600)).unwrap();
    assert_eq!((changed.mtime, changed.nlink), (at, 0));
    view.union.forget(entry.node, 1);
    counted.assert_nothing_held();
}

#[test]
fn truncation_does_not_copy_and_holes_stay_holes() {
    let rig = Rig::new(1);
    let file = host::File::create(rig.lower(0, "sparse")).unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(b"middle", 32 << 20).unwrap();
    rig.put(0, "cut", "0123456789");
    let view = rig.union();
    view.setattr("sparse", &chmod(0o600)).unwrap();
    let copy = host::metadata(rig.upper("sparse")).unwrap();
    assert_eq!((copy.len(), copy.mode() & 0o777), (64 << 20, 0o600));
    assert!(copy.blocks() < 1024, "{} blocks", copy.blocks());
    let cut = SetAttr { size_bytes: Some(4), ..SetAttr::default() };
    assert_eq!(view.setattr("cut", &cut).unwrap().size_bytes, 4);
    assert_eq!(view.read("cut").unwrap(), "0123");
    let grow = SetAttr { size_bytes: Some(6), ..SetAttr::default() };
    view.setattr("cut", &grow).unwrap();
    assert_eq!(view.read("cut").unwrap(), "0123\0\0");
    view.write("cut", "new").unwrap();
    assert_eq!(view.read("cut").unwrap(), "new");
}

#[test]
fn hard_links_stay_linked() {
    let rig = Rig::new(1);
    rig.put(0, "d/a", "base");
    host::hard_link(rig.lower(0, "d/a"), rig.lower(0, "d/b")).unwrap();
    host::hard_link(rig.lower(0, "d/a"), rig.lower(0, "c")).unwrap();
    let view = rig.union();
    let ino = view.attr("c").unwrap().ino;
    assert_eq!(view.attr("d/a").unwrap().nlink, 3);
    view.append("d/a", "+").unwrap();
    let check = |view: &View, text: &str, nlink: u32, names: &[&str]| {
        for path in names {
            assert_eq!(view.read(path).unwrap(), text, "{path}");
            let attr = view.attr(path).unwrap();
            assert_eq!((attr.ino, attr.nlink), (ino, nlink), "{path}");
        }
        view.list("d").unwrap();
        view.list("").unwrap();
    };
    check(&view, "base+", 3, &["d/a", "d/b", "c"]);
    drop(view);
    let view = rig.union();
    check(&view, "base+", 3, &["c", "d/b", "d/a"]);
    view.append("d/b", "+").unwrap();
    view.link("c", "e").unwrap();
    check(&view, "base++", 4, &["e", "c", "d/b", "d/a"]);
    view.unlink("d/a").unwrap();
    check(&view, "base++", 3, &["e", "c", "d/b"]);
    view.rename("d/b", "d/moved").unwrap();
    assert_eq!(errno(view.attr("d/b")), Errno::NOENT);
    check(&view, "base++", 3, &["e", "c", "d/moved"]);
    view.rename("c", "e").unwrap();
    check(&view, "base++", 3, &["e", "c", "d/moved"]);
    drop(view);
    let view = rig.union();
    check(&view, "base++", 3, &["e", "c", "d/moved"]);
    for path in ["e", "c", "d/moved"] {
        view.unlink(path).unwrap();
    }
    assert_eq!(view.tree().len(), 1);
    assert_eq!(host::read_dir(rig.upper(".wh..wh.polytropo/links")).unwrap().count(), 0);
    view.assert_nothing_held();
}

#[test]
fn symbolic_links_keep_their_number() {
    let rig = Rig::new(1);
    std::os::unix::fs::symlink("target", rig.lower(0, "l")).unwrap();
    let view = rig.union();
    let before = view.attr("l").unwrap();
    view.rename("l", "m").unwrap();
    assert_eq!(errno(view.attr("l")), Errno::NOENT);
    let after = view.attr("m").unwrap();
    assert_eq!((after.ino, after.nlink, after.size_bytes), (before.ino, 1, 6));
    drop(view);
    let view = rig.union();
    assert_eq!(view.attr("m").unwrap().ino, before.ino);
    assert_eq!(view.list("").unwrap(), ["m"]);
    view.unlink("m").unwrap();
    assert_eq!(host::read_dir(rig.upper(".wh..wh.polytropo/links")).unwrap().count(), 0);
}

#[test]
fn symbolic_links_of_several_names_are_counted() {
    let rig = Rig::new(1);
    std::os::unix::fs::symlink("target", rig.lower(0, "a")).unwrap();
    host::hard_link(rig.lower(0, "a"), rig.lower(0, "b")).unwrap();
    let view = rig.union();
    let ino = view.attr("a").unwrap().ino;
    // It is copied up before the name is found to be there.
    assert_eq!(errno(view.link("a", "b")), Errno::EXIST);
    let check = |view: &View, names: &[&str]| {
        for path in names {
            let attr = view.attr(path).unwrap();
            assert_eq!((attr.ino, attr.nlink as usize), (ino, names.len()), "{path}");
        }
    };
    check(&view, &["a", "b"]);
    view.link("b", "c").unwrap();
    check(&view, &["a", "b", "c"]);
    drop(view);
    let view = rig.union();
    check(&view, &["c", "b", "a"]);
    view.unlink("a").unwrap();
    view.rename("b", "d").unwrap();
    check(&view, &["c", "d"]);
    drop(view);
    let view = rig.union();
    check(&view, &["d", "c"]);
    view.unlink("c").unwrap();
    view.unlink("d").unwrap();
    assert_eq!(host::read_dir(rig.upper(".wh..wh.polytropo/links")).unwrap().count(), 0);
    view.assert_nothing_held();
}

#[test]
fn only_what_lies_in_a_lower_that_never_changes_is_given_out() {
    let rig = Rig::new(1);
    rig.put(0, "f", "base");
    let view = rig.union();
    view.write("new", "x").unwrap();
    let reader = view.open("f", OpenFlags::READ).unwrap();
    let file = view.union.immutable_file(reader).expect("it is the lower's file");
    let mut bytes = [0; 4];
    rustix::io::pread(&*file, &mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"base");
    let content = view.union.content(reader).expect("the host tells times of birth");
    let again = view.open("f", OpenFlags::READ).unwrap();
    assert_eq!(view.union.content(again), Some(content));
    view.close(again);
    view.append("f", "more").unwrap();
    assert!(view.union.immutable_file(reader).is_none() && view.union.content(reader).is_none());
    let own = view.open("new", OpenFlags::READ).unwrap();
    assert!(view.union.immutable_file(own).is_none());
    view.close(reader);
    view.close(own);

    let changing = Rig { coherence: DirCoherence::Exclusive, ..Rig::new(1) };
    changing.put(0, "f", "base");
    let view = changing.read_only();
    let reader = view.open("f", OpenFlags::READ).unwrap();
    assert!(view.union.immutable_file(reader).is_none());
    view.close(reader);
}
