//! Merging, hiding, making and removing.

use super::*;

#[test]
fn layers_merge_and_whiteouts_hide() {
    let rig = Rig::new(3);
    rig.put(2, "etc/passwd", "base");
    rig.put(2, "etc/group", "base");
    rig.put(2, "etc/deep/a", "base");
    rig.put(2, "gone/x", "base");
    rig.put(2, "opaque/x", "base");
    rig.put(2, "file-over-dir/x", "base");
    rig.put(1, "etc/passwd", "middle");
    rig.put(1, "etc/.wh.group", "");
    rig.put(1, ".wh.gone", "");
    rig.put(1, "opaque/.wh..wh..opq", "");
    rig.put(1, "opaque/y", "middle");
    rig.put(1, "file-over-dir", "middle");
    rig.put(0, "etc/deep/b", "top");
    rig.put(0, "gone/y", "top");
    for view in [rig.read_only(), rig.union()] {
        assert_eq!(view.list("").unwrap(), ["etc", "file-over-dir", "gone", "opaque"]);
        // Often enough for the names to be gathered.
        for _ in 0..6 {
            assert_eq!(view.list("etc").unwrap(), ["deep", "passwd"]);
            assert_eq!(view.read("etc/passwd").unwrap(), "middle");
            assert_eq!(errno(view.attr("etc/group")), Errno::NOENT);
            assert_eq!(errno(view.attr("etc/none")), Errno::NOENT);
            assert_eq!(view.list("etc/deep").unwrap(), ["a", "b"]);
            assert_eq!(view.list("gone").unwrap(), ["y"]);
            assert_eq!(errno(view.attr("gone/x")), Errno::NOENT);
            assert_eq!(view.list("opaque").unwrap(), ["y"]);
            assert_eq!(view.read("file-over-dir").unwrap(), "middle");
            assert_eq!(errno(view.attr("opaque/.wh..wh..opq")), Errno::NOENT);
        }
        view.assert_nothing_held();
    }
}

#[test]
fn without_an_upper_nothing_changes() {
    let rig = Rig::new(1);
    rig.put(0, "f", "base");
    let view = rig.read_only();
    assert_eq!(errno(view.write("f", "new")), Errno::ROFS);
    assert_eq!(errno(view.write("new", "new")), Errno::ROFS);
    assert_eq!(errno(view.mkdir("d")), Errno::ROFS);
    assert_eq!(errno(view.unlink("f")), Errno::ROFS);
    assert_eq!(errno(view.unlink("none")), Errno::NOENT);
    assert_eq!(errno(view.rename("f", "g")), Errno::ROFS);
    assert_eq!(errno(view.setattr("f", &SetAttr { mode: Some(0), ..Default::default() })), Errno::ROFS);
    assert_eq!(view.read("f").unwrap(), "base");
    assert_eq!(view.union.coherence(), Coherence::Immutable);
    assert!(!view.union.capabilities().contains(Capabilities::WRITE));
}

#[test]
fn reserved_names_are_neither_shown_nor_made() {
    let rig = Rig::new(1);
    rig.put(0, "f", "base");
    let view = rig.union();
    assert_eq!(errno(view.write(".wh.f", "")), Errno::INVAL);
    assert_eq!(errno(view.mkdir(".wh..wh..opq")), Errno::INVAL);
    assert_eq!(errno(view.symlink(".wh.x", "y")), Errno::INVAL);
    assert_eq!(errno(view.link("f", ".wh.x")), Errno::INVAL);
    assert_eq!(errno(view.rename("f", ".wh.x")), Errno::INVAL);
    assert_eq!(errno(view.unlink(".wh..wh.polytropo")), Errno::NOENT);
    assert_eq!(view.list("").unwrap(), ["f"]);
}

#[test]
fn what_is_removed_stays_removed_after_a_restart() {
    let rig = Rig::new(2);
    rig.put(1, "d/a", "base");
    rig.put(1, "d/b", "base");
    rig.put(0, "d/b", "top");
    rig.put(1, "e/x", "base");
    let view = rig.union();
    view.unlink("d/a").unwrap();
    assert_eq!(errno(view.rmdir("d")), Errno::NOTEMPTY);
    view.unlink("d/b").unwrap();
    assert_eq!(errno(view.unlink("d/b")), Errno::NOENT);
    assert_eq!(errno(view.rmdir("e")), Errno::NOTEMPTY);
    view.rmdir("d").unwrap();
    view.unlink("e/x").unwrap();
    view.rmdir("e").unwrap();
    view.mkdir("e").unwrap();
    assert_eq!(view.tree().len(), 1, "{:?}", view.tree());
    assert!(rig.upper("e/.wh..wh..opq").exists() && !rig.upper(".wh.e").exists());
    assert!(rig.upper(".wh.d").exists() && !rig.upper("d").exists());
    view.assert_nothing_held();
    let before = view.tree();
    drop(view);
    assert_eq!(rig.union().tree(), before);
}

#[test]
fn a_removed_directory_that_is_still_open_shows_nothing() {
    let rig = Rig::new(1);
    rig.put(0, "d/x", "base");
    let view = rig.union();
    view.unlink("d/x").unwrap();
    let entry = view.union.lookup(&view.caller, NodeId::ROOT, name("d")).unwrap();
    view.rmdir("d").unwrap();
    assert_eq!(errno(view.union.lookup(&view.caller, entry.node, name("x"))), Errno::NOENT);
    assert_eq!(errno(view.union.mkdir(&view.caller, entry.node, name("y"), 0o755)), Errno::NOENT);
    let handle = view.union.opendir(&view.caller, entry.node).unwrap();
    view.union.readdir(&view.caller, entry.node, handle, 0, &mut |_| panic!("an entry")).unwrap();
    view.union.releasedir(entry.node, handle);
    view.union.forget(entry.node, 1);
    view.assert_nothing_held();
}

#[test]
fn a_listing_stays_what_it_was_while_names_go() {
    let rig = Rig::new(2);
    for i in 0..50 {
        rig.put(i % 2, &format!("d/{i}"), "x");
    }
    let view = rig.union();
    view.at("d", |entry| {
        let handle = view.union.opendir(&view.caller, entry.node)?;
        let (mut offset, mut seen) = (0, 0);
        loop {
            let mut taken = None;
            view.union.readdir(&view.caller, entry.node, handle, offset, &mut |line| {
                if taken.is_some() {
                    return false;
                }
                offset = line.next_offset;
                taken = Some(line.name.to_boxed());
                true
            })?;
            let Some(taken) = taken else { break };
            view.union.unlink(&view.caller, entry.node, &taken)?;
            seen += 1;
        }
        assert_eq!(seen, 50);
        view.union.releasedir(entry.node, handle);
        Ok(())
    })
    .unwrap();
    view.rmdir("d").unwrap();
    view.assert_nothing_held();
}

#[test]
fn plus_listings_count_what_they_hand_out() {
    let rig = Rig::new(2);
    for i in 0..300 {
        rig.put(i % 2, &format!("merged/{i}"), "x");
        rig.put(1, &format!("single/{i}"), "x");
    }
    let view = rig.union();
    for path in ["merged", "single"] {
        view.at(path, |entry| {
            let handle = view.union.opendir(&view.caller, entry.node)?;
            let (mut offset, mut nodes) = (0, Vec::new());
            loop {
                let before = offset;
                let mut room = 7;
                view.union.readdir_plus(&view.caller, entry.node, handle, offset, &mut |line, found| {
                    if room == 0 {
                        return false;
                    }
                    room -= 1;
                    offset = line.next_offset;
                    assert_eq!(found.unwrap().attr.ino, line.ino);
                    nodes.push(found.unwrap().node);
                    true
                })?;
                if offset == before {
                    break;
                }
            }
            assert_eq!(nodes.len(), 300);
            nodes.into_iter().for_each(|node| view.union.forget(node, 1));
            view.union.releasedir(entry.node, handle);
            Ok(())
        })
        .unwrap();
    }
    view.assert_nothing_held();
}

/// As the kernel does that has kept the first part of a listing and lost the rest.
#[test]
fn another_handle_goes_on_where_one_stopped() {
    let rig = Rig::quick(2);
    let expected: Vec<String> = (0..100).map(|i| format!("f{i:02}")).collect();
    for file in &expected {
        rig.put(0, &format!("d/{file}"), "bytes");
    }
    let view = rig.union();
    let part = |offset: u64, count: usize| {
        view.at("d", |entry| {
            let handle = view.union.opendir(&view.caller, entry.node)?;
            let mut found = Vec::new();
            view.union.readdir(&view.caller, entry.node, handle, offset, &mut |line| {
                let taken = found.len() < count;
                if taken {
                    found
                        .push((String::from_utf8_lossy(line.name.as_bytes()).into_owned(), line.next_offset));
                }
                taken
            })?;
            view.union.releasedir(entry.node, handle);
            Ok(found)
        })
        .unwrap()
    };
    let mut listed = part(0, 40);
    // The directory gets an entry on the upper, and loses one that was told of.
    view.append("d/f07", "more").unwrap();
    view.unlink(&format!("d/{}", listed[3].0)).unwrap();
    listed.extend(part(listed[39].1, usize::MAX));
    let mut names: Vec<String> = listed.into_iter().map(|(name, _)| name).collect();
    names.sort();
    assert_eq!(names, expected);
}
