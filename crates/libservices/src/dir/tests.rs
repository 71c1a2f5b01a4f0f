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

#[test]
fn names_that_go_leave_no_descriptors_behind() {
    let (temp, dir) = dir_with_budget(16);
    let caller = Caller::service();
    let mut nodes = Vec::new();
    for i in 0..100 {
        let (kept, gone) = (format!("kept{i}"), format!("gone{i}"));
        std_fs::write(temp.path().join(&kept), &kept).unwrap();
        let node = dir.lookup(&caller, NodeId::ROOT, name(&kept)).unwrap().node;
        dir.link(&caller, node, NodeId::ROOT, name(&gone)).unwrap();
        if i % 2 == 0 {
            dir.unlink(&caller, NodeId::ROOT, name(&gone)).unwrap();
        } else {
            let renamed = format!("renamed{i}");
            let none = RenameFlags::empty();
            dir.rename(&caller, NodeId::ROOT, name(&kept), NodeId::ROOT, name(&renamed), none).unwrap();
            dir.unlink(&caller, NodeId::ROOT, name(&gone)).unwrap();
        }
        nodes.push((node, kept));
    }
    assert!(dir.nodes.budget().open_count() <= 20, "{}", dir.nodes.budget().open_count());
    for (node, content) in nodes {
        let opened = dir.open(&caller, node, OpenFlags::READ).unwrap();
        let mut buffer = [0; 16];
        let size = dir.read(&caller, node, opened.handle, 0, &mut buffer).unwrap();
        assert_eq!(&buffer[..size], content.as_bytes());
        dir.release(node, opened.handle);
        dir.forget(node, 2);
    }
    assert_eq!(dir.nodes.len(), 1);
}

#[test]
fn nodes_stay_reachable_while_names_move_under_look_ups() {
    let (_temp, dir) = dir_with_budget(16);
    let caller = Caller::service();
    let [a, b] = ["a", "b"].map(|n| dir.mkdir(&caller, NodeId::ROOT, name(n), 0o755).unwrap().node);
    let rw = OpenFlags::READ | OpenFlags::WRITE;
    let (file, opened) = dir.create(&caller, a, name("f"), 0o644, rw).unwrap();
    dir.release(file.node, opened.handle);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let searchers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        for parent in [a, b] {
                            if let Ok(entry) = dir.lookup(&caller, parent, name("f")) {
                                dir.forget(entry.node, 1);
                            }
                        }
                    }
                })
            })
            .collect();
        for i in 0..3000 {
            let (from, to) = if i % 2 == 0 { (a, b) } else { (b, a) };
            dir.rename(&caller, from, name("f"), to, name("f"), RenameFlags::empty()).unwrap();
            // Nothing but the recorded name leads to the inode now.
            dir.node(file.node).unwrap().evict();
            assert_eq!(dir.getattr(&caller, file.node, None).unwrap().ino, file.attr.ino);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        searchers.into_iter().for_each(|searcher| searcher.join().unwrap());
    });
}

#[test]
fn deep_trees_are_dropped_without_recursion() {
    let (_temp, dir) = dir_with_budget(64);
    let caller = Caller::service();
    let mut parent = NodeId::ROOT;
    for _ in 0..3000 {
        parent = dir.mkdir(&caller, parent, name("d"), 0o755).unwrap().node;
    }
    std::thread::Builder::new().stack_size(64 * 1024).spawn(move || drop(dir)).unwrap().join().unwrap();
}

/// Somebody swaps a served directory for a link to the outside, again and again, while it is in use.
#[test]
fn links_put_in_the_place_of_directories_lead_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    std_fs::write(outside.path().join("f"), b"secret").unwrap();
    let temp = tempfile::tempdir().unwrap();
    std_fs::create_dir(temp.path().join("d")).unwrap();
    std_fs::write(temp.path().join("d/f"), b"inside").unwrap();
    std::os::unix::fs::symlink(outside.path(), temp.path().join("trap")).unwrap();
    let root = OwnedFd::from(std_fs::File::open(temp.path()).unwrap());
    let shared = DirLayer { coherence: DirCoherence::Shared, ..config() };
    let dir = Dir::with_budget(root, &shared, Budget::new(16)).unwrap();
    let caller = Caller::service();
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut found = 0;
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let (d, trap) = (temp.path().join("d"), temp.path().join("trap"));
                let at = rustix::fs::CWD;
                rustix::fs::renameat_with(at, &d, at, &trap, rustix::fs::RenameFlags::EXCHANGE).unwrap();
            }
        });
        for i in 0..5000 {
            let Ok(entry) = dir.lookup(&caller, NodeId::ROOT, name("d")) else { continue };
            let _ = dir.node(entry.node).map(|node| node.evict());
            if let Ok(file) = dir.lookup(&caller, entry.node, name("f")) {
                let _ = dir.node(file.node).map(|node| node.evict());
                if let Ok(opened) = dir.open(&caller, file.node, OpenFlags::READ) {
                    let mut buffer = [0; 6];
                    dir.read(&caller, file.node, opened.handle, 0, &mut buffer).unwrap();
                    assert_eq!(&buffer, b"inside");
                    dir.release(file.node, opened.handle);
                    found += 1;
                }
                dir.forget(file.node, 1);
            }
            if let Ok(made) = dir.mkdir(&caller, entry.node, name(&format!("made{i}")), 0o755) {
                dir.forget(made.node, 1);
            }
            dir.forget(entry.node, 1);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        swapper.join().unwrap();
    });
    assert!(found > 0, "the directory was in use");
    assert_eq!(std_fs::read_dir(outside.path()).unwrap().count(), 1, "nothing was made outside");
}

#[test]
fn the_kernel_gives_what_is_made_to_the_caller_at_once() {
    if !identity::may_chown() {
        eprintln!("skipped: this process may not give files to others");
        return;
    }
    let (temp, dir) = dir_with_budget(64);
    let caller = Caller { uid: 1234, gid: 2345, ..Caller::service() };
    let path = temp.path().join("f");
    let ids = |path: &std::path::Path| {
        let found = std_fs::symlink_metadata(path).unwrap();
        (found.uid(), found.gid())
    };
    dir.as_caller(&caller, || {
        std_fs::write(&path, b"").unwrap();
        Ok(())
    })
    .unwrap();
    assert_eq!(ids(&path), (1234, 2345));
    let link = dir.symlink(&caller, NodeId::ROOT, name("l"), b"f").unwrap();
    assert_eq!((link.attr.uid, link.attr.gid), (1234, 2345));
    // Afterwards the thread makes files of its own again.
    std_fs::write(temp.path().join("g"), b"").unwrap();
    assert_eq!(ids(&temp.path().join("g")), dir.own_ids);
}

/// Many threads on few names, some of them past us: nothing panics, and in the end nothing is held.
#[test]
fn nothing_is_held_after_a_turmoil() {
    let temp = tempfile::tempdir().unwrap();
    let root = OwnedFd::from(std_fs::File::open(temp.path()).unwrap());
    let shared = DirLayer { coherence: DirCoherence::Shared, ..config() };
    let dir = Dir::with_budget(root, &shared, Budget::new(16)).unwrap();
    std::thread::scope(|scope| {
        for seed in 1..=3 {
            let (dir, path) = (&dir, temp.path());
            scope.spawn(move || turmoil(dir, path, seed));
        }
    });
    assert_eq!(dir.nodes.len(), 1, "the root is left");
    assert_eq!(dir.nodes.budget().open_count(), 1, "the root's descriptor is left");
}

fn turmoil(dir: &Dir, path: &std::path::Path, seed: u64) {
    let caller = Caller::service();
    let mut state = seed;
    let mut dice = |sides: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % sides
    };
    let names = ["a", "b", "c"].map(name);
    let mut held = vec![NodeId::ROOT];
    for _ in 0..1500 {
        let parent = held[dice(held.len() as u64) as usize];
        let other = held[dice(held.len() as u64) as usize];
        let (this, that) = (names[dice(3) as usize], names[dice(3) as usize]);
        let rw = OpenFlags::READ | OpenFlags::WRITE;
        let got = match dice(10) {
            0 | 1 => dir.lookup(&caller, parent, this).ok(),
            2 => dir.mkdir(&caller, parent, this, 0o755).ok(),
            3 => dir.create(&caller, parent, this, 0o644, rw).ok().map(|(entry, opened)| {
                let _ = dir.write(&caller, entry.node, opened.handle, 0, b"x");
                dir.release(entry.node, opened.handle);
                entry
            }),
            4 => dir.link(&caller, other, parent, this).ok(),
            5 => dir.unlink(&caller, parent, this).ok().and(None),
            6 => dir.rmdir(&caller, parent, this).ok().and(None),
            7 => dir.rename(&caller, parent, this, other, that, RenameFlags::empty()).ok().and(None),
            8 => dir.rename(&caller, parent, this, other, that, RenameFlags::EXCHANGE).ok().and(None),
            _ => {
                let (from, to) = (path.join("a"), path.join("b"));
                let _ = std_fs::rename(from, to.join("c")).or_else(|_| std_fs::remove_file(to));
                None
            }
        };
        held.extend(got.map(|entry| entry.node));
        if held.len() > 12 {
            let gone = held.swap_remove(1 + dice(11) as usize);
            dir.forget(gone, 1);
        }
        let _ = dir.getattr(&caller, other, None);
    }
    for node in held {
        dir.forget(node, 1);
    }
}

/// As in a service, whose thread has no CAP_FSETID that counts: the host drops setuid bits at each write.
fn without_fsetid() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::FSETID);
    set_capabilities(None, sets).unwrap();
}

#[test]
fn setuid_bits_outlast_writes_at_the_same_time() {
    let (temp, dir) = dir_with_budget(64);
    let caller = Caller::service();
    let flags = OpenFlags::READ | OpenFlags::WRITE;
    let (entry, opened) = dir.create(&caller, NodeId::ROOT, name("f"), 0o755, flags).unwrap();
    let mode = SetAttr { mode: Some(0o4755), ..SetAttr::default() };
    dir.setattr(&caller, entry.node, None, &mode).unwrap();
    let setuid = |attr: Attr| assert_eq!(attr.mode & 0o7777, 0o4755);
    std::thread::scope(|scope| {
        for writer in 0..3 {
            let (dir, caller) = (&dir, &caller);
            scope.spawn(move || {
                without_fsetid();
                for at in 0..500 {
                    dir.write(caller, entry.node, opened.handle, writer * 4096 + at, b"x").unwrap();
                }
            });
        }
        for _ in 0..500 {
            setuid(dir.getattr(&caller, entry.node, None).unwrap());
            let found = dir.lookup(&caller, NodeId::ROOT, name("f")).unwrap();
            dir.forget(found.node, 1);
            setuid(found.attr);
        }
    });
    setuid(dir.getattr(&caller, entry.node, None).unwrap());
    drop(temp);
}
