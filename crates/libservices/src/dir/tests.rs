//! What only the inside can see; behaviour is tested in `tests/`.

use std::fs as std_fs;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::stack::Ownership;

fn config() -> DirLayer {
    DirLayer {
        path: "/".into(),
        read_only: false,
        coherence: DirCoherence::Exclusive,
        ownership: Ownership::Native,
    }
}

fn name(text: &str) -> &Name {
    Name::new(text.as_bytes()).unwrap()
}

fn dir_with_budget(limit: usize) -> (tempfile::TempDir, Dir) {
    let temp = tempfile::tempdir().unwrap();
    let root = OwnedFd::from(std_fs::File::open(temp.path()).unwrap());
    let dir = Dir::with_budget(root, &config(), Budget::new(limit)).unwrap();
    (temp, dir)
}

#[test]
fn what_is_made_belongs_to_the_caller() {
    let (temp, dir) = dir_with_budget(64);
    let mut caller = Caller::service();
    caller.umask = 0o027;
    if rustix::process::geteuid().is_root() {
        (caller.uid, caller.gid) = (1234, 2345);
    }
    let (entry, opened) =
        dir.create(&caller, NodeId::ROOT, name("f"), 0o6777, OpenFlags::READ | OpenFlags::WRITE).unwrap();
    assert_eq!(dir.write(&caller, entry.node, opened.handle, 3, b"abc").unwrap(), 3);
    let mut buffer = [9; 10];
    assert_eq!(dir.read(&caller, entry.node, opened.handle, 0, &mut buffer).unwrap(), 6);
    assert_eq!(&buffer[..6], b"\0\0\0abc");
    let host = std_fs::metadata(temp.path().join("f")).unwrap();
    assert_eq!((host.uid(), host.gid(), host.mode() & 0o7777), (caller.uid, caller.gid, 0o6750));
    assert_eq!(entry.attr.mode & 0o7777, 0o6750);
}

#[test]
fn descriptors_stay_within_the_budget() {
    let (temp, dir) = dir_with_budget(16);
    let caller = Caller::service();
    let mut parent = NodeId::ROOT;
    let mut chain = Vec::new();
    for depth in 0..200 {
        let made = dir.mkdir(&caller, parent, name(&format!("d{depth}")), 0o755).unwrap();
        parent = made.node;
        chain.push(made.node);
    }
    assert!(dir.nodes.budget().open_count() <= 20, "{}", dir.nodes.budget().open_count());
    // The deepest can be reached again, also after its first ancestor was renamed.
    dir.rename(&caller, NodeId::ROOT, name("d0"), NodeId::ROOT, name("moved"), RenameFlags::empty()).unwrap();
    dir.mkdir(&caller, *chain.last().unwrap(), name("leaf"), 0o755).unwrap();
    assert!(temp.path().join("moved").exists());
    // Forgotten from the top down: each node stays as long as one below needs it.
    for node in &chain {
        dir.forget(*node, 1);
    }
    let leaf = dir.lookup(&caller, NodeId::ROOT, name("moved")).unwrap();
    dir.forget(leaf.node, 1);
    assert!(dir.nodes.len() > 1);
}

#[test]
fn an_unlinked_inode_lives_until_it_is_forgotten() {
    let (_temp, dir) = dir_with_budget(16);
    let caller = Caller::service();
    let rw = OpenFlags::READ | OpenFlags::WRITE;
    let (entry, opened) = dir.create(&caller, NodeId::ROOT, name("f"), 0o600, rw).unwrap();
    dir.write(&caller, entry.node, opened.handle, 0, b"still here").unwrap();
    dir.release(entry.node, opened.handle);
    dir.unlink(&caller, NodeId::ROOT, name("f")).unwrap();
    for i in 0..100 {
        let made = dir.mkdir(&caller, NodeId::ROOT, name(&format!("d{i}")), 0o755).unwrap();
        dir.mkdir(&caller, made.node, name("below"), 0o755).unwrap();
    }
    assert_eq!(dir.getattr(&caller, entry.node, None).unwrap().nlink, 0);
    let opened = dir.open(&caller, entry.node, OpenFlags::READ).unwrap();
    let mut buffer = [0; 10];
    assert_eq!(dir.read(&caller, entry.node, opened.handle, 0, &mut buffer).unwrap(), 10);
    assert_eq!(&buffer, b"still here");
    dir.release(entry.node, opened.handle);
    dir.forget(entry.node, 1);
    assert!(dir.getattr(&caller, entry.node, None).unwrap_err().is(Errno::STALE));
}

#[test]
fn extended_attributes_reach_the_inode() {
    let (temp, dir) = dir_with_budget(64);
    let caller = Caller::service();
    let made = dir.mkdir(&caller, NodeId::ROOT, name("d"), 0o755).unwrap();
    let long = vec![7; 3000];
    dir.setxattr(&caller, made.node, b"user.one", &long, XattrFlags::CREATE).unwrap();
    let again = dir.setxattr(&caller, made.node, b"user.one", b"2", XattrFlags::CREATE);
    assert!(again.unwrap_err().is(Errno::EXIST));
    assert_eq!(dir.getxattr(&caller, made.node, b"user.one").unwrap(), long);
    assert_eq!(dir.listxattr(&caller, made.node).unwrap(), b"user.one\0");
    dir.removexattr(&caller, made.node, b"user.one").unwrap();
    assert!(dir.getxattr(&caller, made.node, b"user.one").unwrap_err().is(Errno::NODATA));
    // A link's own attributes, not those of what it leads to.
    std_fs::write(temp.path().join("target"), b"").unwrap();
    let link = dir.symlink(&caller, NodeId::ROOT, name("l"), b"target").unwrap();
    assert!(
        dir.setxattr(&caller, link.node, b"user.one", b"2", XattrFlags::empty()).unwrap_err().is(Errno::PERM)
    );
}
