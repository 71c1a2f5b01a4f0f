//! Whole trees side by side.

use std::collections::BTreeMap;

use polytropo_libservices::*;

use crate::model::{self, Ino, Kind, Model};
use crate::operations::Answer;
use crate::subject::{read, shown};

/// The stack's inode number of each inode of the model: it stays the same as long as the inode lives.
pub type Numbers = BTreeMap<Ino, u64>;

/// Panics at the first difference.
pub fn compare(model: &Model, stack: &dyn Libservice, numbers: &mut Numbers) {
    let mut seen = Numbers::new();
    compare_dir(model, model::ROOT, stack, NodeId::ROOT, "", &mut seen);
    for (ino, number) in &seen {
        let before = numbers.get(ino).copied().unwrap_or(*number);
        assert_eq!(before, *number, "the inode number of model inode {ino} changed");
    }
    let mut owners = BTreeMap::new();
    for (ino, number) in &seen {
        let other = owners.insert(*number, *ino);
        assert_eq!(other, None, "two inodes have the number {number}");
    }
    *numbers = seen;
}

fn compare_dir(
    model: &Model,
    ino: Ino,
    stack: &dyn Libservice,
    node: NodeId,
    path: &str,
    seen: &mut Numbers,
) {
    let caller = Caller::service();
    let handle = stack.opendir(&caller, node).unwrap();
    let mut listed = BTreeMap::new();
    let mut sink = |entry: DirEntry<'_>| {
        let name = String::from_utf8(entry.name.as_bytes().to_vec()).unwrap();
        let twice = listed.insert(name, entry.ino);
        assert_eq!(twice, None, "{path}: a name is listed twice");
        true
    };
    stack.readdir(&caller, node, handle, 0, &mut sink).unwrap();
    stack.releasedir(node, handle);
    let entries = model.entries(ino).unwrap();
    assert!(listed.keys().eq(entries.keys()), "{path}/: listed {listed:?}, expected {entries:?}");
    for (name, &child) in entries {
        let path = format!("{path}/{name}");
        let entry = stack.lookup(&caller, node, Name::new(name.as_bytes()).unwrap()).unwrap();
        assert_eq!(listed[name], entry.attr.ino, "{path}: inode number as listed");
        let number = seen.entry(child).or_insert(entry.attr.ino);
        assert_eq!(*number, entry.attr.ino, "{path}: inode number of a hard link");
        compare_inode(model, child, stack, &entry, &path, seen);
        stack.forget(entry.node, 1);
    }
}

fn compare_inode(
    model: &Model,
    ino: Ino,
    stack: &dyn Libservice,
    entry: &Entry,
    path: &str,
    seen: &mut Numbers,
) {
    let (caller, expected, node) = (Caller::service(), &model.inodes[ino], entry.node);
    assert_eq!(shown(&entry.attr), expected.shown(), "{path}: attributes");
    assert_eq!(stack.getattr(&caller, node, None).unwrap(), entry.attr, "{path}: attributes, asked twice");
    match &expected.kind {
        Kind::Dir(_) => compare_dir(model, ino, stack, node, path, seen),
        Kind::Link(target) => assert_eq!(stack.readlink(&caller, node).unwrap(), target.as_bytes(), "{path}"),
        Kind::Fifo => return,
        Kind::File(bytes) => {
            let handle = stack.open(&caller, node, OpenFlags::READ).unwrap().handle;
            let Answer::Bytes(found) = read(stack, node, handle, 0, bytes.len() + 10).unwrap() else {
                unreachable!()
            };
            stack.release(node, handle);
            let differ = found.iter().zip(bytes).position(|(a, b)| a != b);
            assert_eq!((found.len(), differ), (bytes.len(), None), "{path}: bytes");
        }
    }
    if !matches!(expected.kind, Kind::Link(_)) {
        compare_xattrs(expected, stack, node, path);
    }
}

fn compare_xattrs(expected: &model::Inode, stack: &dyn Libservice, node: NodeId, path: &str) {
    let caller = Caller::service();
    let list = stack.listxattr(&caller, node).unwrap();
    let names = list.split(|&b| b == 0).filter(|name| name.starts_with(b"user."));
    let found: BTreeMap<_, _> = names
        .map(|name| {
            let value = stack.getxattr(&caller, node, name).unwrap();
            (String::from_utf8(name.to_vec()).unwrap(), value)
        })
        .collect();
    assert_eq!(found, expected.xattrs, "{path}: extended attributes");
}
