//! Reading directories.

use std::collections::BTreeSet;

use polytropo_libservices::*;

use crate::suite::{Check, ROOT, Stack, check, name};

pub const CHECKS: &[Check] = &[
    check!(every_name_once),
    check!(reading_goes_on_where_it_stopped),
    check!(names_that_stay_are_listed_in_spite_of_changes),
    check!(offset_0_reads_anew),
    check!(listing_with_look_ups),
    check!(removed_directories_are_empty),
];

fn fill(s: &Stack, count: usize) -> Vec<String> {
    let mut names: Vec<_> = (0..count).map(|i| format!("file{i:04}")).collect();
    for (i, text) in names.iter().enumerate() {
        if i % 2 == 0 {
            s.seed_file(text, b"");
        } else {
            s.file(ROOT, text, b"");
        }
    }
    names.sort();
    names
}

fn every_name_once(s: &Stack) {
    assert!(s.names(ROOT).is_empty());
    let expected = fill(s, 500);
    assert_eq!(s.names(ROOT), expected);
}

fn reading_goes_on_where_it_stopped(s: &Stack) {
    let expected = fill(s, 100);
    for step in [1, 7] {
        assert_eq!(s.names_by(ROOT, step), expected);
    }
}

fn names_that_stay_are_listed_in_spite_of_changes(s: &Stack) {
    let stays: BTreeSet<_> = fill(s, 200).into_iter().collect();
    for i in 0..100 {
        s.file(ROOT, &format!("goes{i}"), b"");
    }
    let c = s.caller();
    let handle = s.service.opendir(&c, ROOT).unwrap();
    let (mut seen, mut offset, mut round) = (Vec::new(), 0, 0);
    loop {
        let (from, before) = (offset, seen.len());
        let mut sink = |entry: DirEntry<'_>| {
            let room = seen.len() - before < 10;
            if room {
                offset = entry.next_offset;
                seen.push(String::from_utf8_lossy(entry.name.as_bytes()).into_owned());
            }
            room
        };
        s.service.readdir(&c, ROOT, handle, from, &mut sink).unwrap();
        if seen.len() == before {
            break;
        }
        if round < 100 {
            s.unlink(ROOT, &format!("goes{round}")).unwrap();
            s.file(ROOT, &format!("comes{round}"), b"");
        }
        round += 1;
    }
    s.service.releasedir(ROOT, handle);
    let found: BTreeSet<_> = seen.iter().cloned().collect();
    assert_eq!(found.len(), seen.len(), "no name twice");
    assert!(found.is_superset(&stays));
}

fn offset_0_reads_anew(s: &Stack) {
    s.file(ROOT, "a", b"");
    let c = s.caller();
    let handle = s.service.opendir(&c, ROOT).unwrap();
    let count = || {
        let mut count = 0;
        let mut sink = |_: DirEntry<'_>| {
            count += 1;
            true
        };
        s.service.readdir(&c, ROOT, handle, 0, &mut sink).unwrap();
        count
    };
    assert_eq!(count(), 1);
    s.file(ROOT, "b", b"");
    assert_eq!(count(), 2);
    s.unlink(ROOT, "a").unwrap();
    s.unlink(ROOT, "b").unwrap();
    assert_eq!(count(), 0);
}

fn listing_with_look_ups(s: &Stack) {
    s.seed_dir("d");
    s.seed_file("f", b"12345");
    let c = s.caller();
    let handle = s.service.opendir(&c, ROOT).unwrap();
    let mut found = Vec::new();
    let mut sink = |entry: DirEntry<'_>, looked_up: Option<&Entry>| {
        let looked_up = looked_up.unwrap().clone();
        assert_eq!(entry.ino, looked_up.attr.ino);
        assert!([0, looked_up.attr.file_type()].contains(&entry.file_type));
        found.push((entry.name.to_boxed(), looked_up));
        true
    };
    s.service.readdir_plus(&c, ROOT, handle, 0, &mut sink).unwrap();
    assert_eq!(found.len(), 2);
    for (text, entry) in &found {
        let again = s.service.lookup(&c, ROOT, text).unwrap();
        assert_eq!((again.node, &again.attr), (entry.node, &entry.attr));
        s.service.forget(again.node, 1);
        assert_eq!(s.attr(entry.node), entry.attr, "the listing's look-up is still held");
    }
    // What the sink refuses, nothing is held of.
    s.service.readdir_plus(&c, ROOT, handle, 0, &mut |_, _| false).unwrap();
    for (_, entry) in found {
        s.service.forget(entry.node, 1);
        assert!(s.service.getattr(&c, entry.node, None).is_err());
    }
    s.service.releasedir(ROOT, handle);
}

fn removed_directories_are_empty(s: &Stack) {
    let dir = s.mkdir(ROOT, "d");
    let handle = s.service.opendir(&s.caller(), dir).unwrap();
    s.service.rmdir(&s.caller(), ROOT, name("d")).unwrap();
    let mut sink = |_: DirEntry<'_>| panic!("a removed directory has no names");
    // The kernel says ENOENT or nothing of a directory that is gone.
    match s.service.readdir(&s.caller(), dir, handle, 0, &mut sink) {
        Ok(()) => {}
        Err(e) => assert!(e.is(Errno::NOENT), "{e}"),
    }
    s.service.releasedir(dir, handle);
}
