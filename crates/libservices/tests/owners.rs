//! How owners are kept on disk: the format that ARCHITECTURE.md promises.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use polytropo_libservices::dir::Dir;
use polytropo_libservices::owners::Owners;
use polytropo_libservices::stack::{DirCoherence, DirLayer, Ownership};
use polytropo_libservices::*;

const STAT: &str = "user.polytropo.stat";

fn stack() -> (tempfile::TempDir, Owners) {
    let temp = tempfile::tempdir().unwrap();
    let root = OwnedFd::from(std::fs::File::open(temp.path()).unwrap());
    let config = DirLayer {
        path: temp.path().to_owned(),
        read_only: false,
        coherence: DirCoherence::Shared,
        ownership: Ownership::Xattr,
    };
    let dir = Dir::new(root, &config).unwrap();
    (temp, Owners::new(Arc::new(dir)))
}

fn name(text: &str) -> &Name {
    Name::new(text.as_bytes()).unwrap()
}

fn on_disk(path: &std::path::Path, attribute: &str) -> Option<Vec<u8>> {
    let mut buffer = [0; 200];
    let size = rustix::fs::lgetxattr(path, attribute, &mut buffer).ok()?;
    Some(buffer[..size].to_vec())
}

fn put_on_disk(path: &std::path::Path, value: &[u8]) {
    rustix::fs::lsetxattr(path, STAT, value, rustix::fs::XattrFlags::empty()).unwrap();
}

#[test]
fn the_host_keeps_the_record_and_nothing_else() {
    let (temp, owners) = stack();
    let caller = Caller { uid: 33, gid: 44, umask: 0o022, ..Caller::service() };
    let rw = OpenFlags::READ | OpenFlags::WRITE;
    owners.create(&caller, NodeId::ROOT, name("f"), 0o4777, rw).unwrap();
    owners.mkdir(&caller, NodeId::ROOT, name("d"), 0o1777).unwrap();
    owners.mknod(&caller, NodeId::ROOT, name("tty"), libc::S_IFCHR | 0o620, libc::makedev(4, 1)).unwrap();
    owners.mknod(&caller, NodeId::ROOT, name("fifo"), libc::S_IFIFO | 0o644, 99).unwrap();
    let link = owners.symlink(&caller, NodeId::ROOT, name("l"), b"f").unwrap();
    assert_eq!((link.attr.uid, link.attr.gid), (0, 0));
    for (text, mode, record) in [
        ("f", libc::S_IFREG | 0o600, "104755 33 44 0"),
        ("d", libc::S_IFDIR | 0o700, "41755 33 44 0"),
        ("tty", libc::S_IFREG | 0o600, "20600 33 44 1025"),
        ("fifo", libc::S_IFREG | 0o600, "10644 33 44 0"),
    ] {
        let path = temp.path().join(text);
        let host = std::fs::symlink_metadata(&path).unwrap();
        assert_eq!((host.mode(), host.uid()), (mode, rustix::process::geteuid().as_raw()), "{text}");
        assert_eq!(on_disk(&path, STAT).unwrap(), record.as_bytes(), "{text}");
    }
    assert!(on_disk(&temp.path().join("l"), STAT).is_none());
}

#[test]
fn programs_neither_see_nor_set_the_records() {
    let (temp, owners) = stack();
    let c = Caller::service();
    let node = owners.mkdir(&c, NodeId::ROOT, name("d"), 0o755).unwrap().node;
    let set = |key: &str| owners.setxattr(&c, node, key.as_bytes(), b"1", XattrFlags::empty());
    for key in [STAT, "user.polytropo.xattr.security.capability"] {
        assert!(set(key).unwrap_err().is(Errno::PERM));
        assert!(owners.removexattr(&c, node, key.as_bytes()).unwrap_err().is(Errno::PERM));
        assert!(owners.getxattr(&c, node, key.as_bytes()).unwrap_err().is(Errno::NODATA));
    }
    set("security.selinux").unwrap();
    set("trusted.overlay").unwrap();
    set("user.mine").unwrap();
    assert!(set("system.other").unwrap_err().is(Errno::OPNOTSUPP));
    let path = temp.path().join("d");
    assert_eq!(on_disk(&path, "user.polytropo.xattr.security.selinux").unwrap(), b"1");
    let list = owners.listxattr(&c, node).unwrap();
    let mut names: Vec<_> = list.split(|&b| b == 0).filter(|n| !n.is_empty()).collect();
    names.sort();
    assert_eq!(names, [&b"security.selinux"[..], b"trusted.overlay", b"user.mine"]);
}

#[test]
fn what_is_written_on_disk_is_shown_and_nonsense_stays_removable() {
    let (temp, owners) = stack();
    let c = Caller::service();
    let path = temp.path().join("f");
    std::fs::write(&path, b"").unwrap();
    let look = || owners.lookup(&c, NodeId::ROOT, name("f")).unwrap().attr;
    let on_host = std::fs::metadata(&path).unwrap().mode();
    assert_eq!((look().uid, look().gid, look().mode), (0, 0, on_host), "without a record");
    for (record, expected) in [
        ("100640 5 6 0", (5, 6, libc::S_IFREG | 0o640, 0)),
        ("60640 5 6 2049", (5, 6, libc::S_IFBLK | 0o640, 2049)),
        ("40755 5 6 0", (0, 0, on_host, 0)),
        ("120777 5 6 0", (0, 0, on_host, 0)),
        ("garbage", (0, 0, on_host, 0)),
    ] {
        put_on_disk(&path, record.as_bytes());
        let attr = look();
        assert_eq!((attr.uid, attr.gid, attr.mode, attr.rdev), expected, "{record}");
    }
    owners.unlink(&c, NodeId::ROOT, name("f")).unwrap();
}

#[test]
fn file_capabilities_go_with_the_bytes_they_were_given_to() {
    let (_temp, owners) = stack();
    let c = Caller::service();
    let rw = OpenFlags::READ | OpenFlags::WRITE;
    let (entry, opened) = owners.create(&c, NodeId::ROOT, name("f"), 0o755, rw).unwrap();
    let capability = &b"security.capability"[..];
    let give = || owners.setxattr(&c, entry.node, capability, b"x", XattrFlags::empty()).unwrap();
    let gone = || owners.getxattr(&c, entry.node, capability).unwrap_err().is(Errno::NODATA);
    give();
    owners.write(&c, entry.node, opened.handle, 0, b"x").unwrap();
    assert!(gone());
    give();
    let chown = SetAttr { uid: Some(1), ..SetAttr::default() };
    owners.setattr(&c, entry.node, None, &chown).unwrap();
    assert!(gone());
    give();
    owners.open(&c, entry.node, OpenFlags::WRITE | OpenFlags::TRUNCATE).unwrap();
    assert!(gone());
}

/// Two who change owner and mode of one file at the same time both get their way.
#[test]
fn changes_do_not_undo_each_other() {
    let (_temp, owners) = stack();
    let c = Caller::service();
    let node = owners.mkdir(&c, NodeId::ROOT, name("d"), 0o700).unwrap().node;
    for round in 1..200 {
        let uid = SetAttr { uid: Some(round), ..SetAttr::default() };
        let mode = SetAttr { mode: Some(round), ..SetAttr::default() };
        std::thread::scope(|scope| {
            scope.spawn(|| owners.setattr(&c, node, None, &uid).unwrap());
            scope.spawn(|| owners.setattr(&c, node, None, &mode).unwrap());
        });
        let attr = owners.getattr(&c, node, None).unwrap();
        assert_eq!((attr.uid, attr.mode), (round, libc::S_IFDIR | round));
    }
}
