//! Files of which the upper holds some blocks only.

use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;

const SIZE: usize = 8 << 20;

/// Bytes that differ from place to place.
fn pattern(size_bytes: usize) -> Vec<u8> {
    (0..size_bytes as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// A lower with one large file, `d/f`.
fn rig() -> Rig {
    let rig = Rig::new(1);
    rig.put(0, "d/f", "");
    host::write(rig.lower(0, "d/f"), pattern(SIZE)).unwrap();
    rig
}

fn read_all(view: &View, path: &str) -> Vec<u8> {
    let handle = view.open(path, OpenFlags::READ).unwrap();
    let mut bytes = vec![0; SIZE + (1 << 20)];
    let count = view.union.read(&view.caller, NodeId::ROOT, handle, 0, &mut bytes).unwrap();
    view.close(handle);
    bytes.truncate(count);
    bytes
}

fn write_at(view: &View, path: &str, at: u64, bytes: &[u8]) {
    let handle = view.open(path, OpenFlags::READ | OpenFlags::WRITE).unwrap();
    assert_eq!(view.union.write(&view.caller, NodeId::ROOT, handle, at, bytes).unwrap(), bytes.len());
    view.close(handle);
}

fn space_bytes(path: PathBuf) -> u64 {
    host::metadata(path).unwrap().blocks() * 512
}

fn size(size_bytes: u64) -> SetAttr {
    SetAttr { size_bytes: Some(size_bytes), ..SetAttr::default() }
}

fn record_of(path: PathBuf) -> Option<Vec<u8>> {
    let mut value = vec![0; 4096];
    let length = rustix::fs::getxattr(path, "user.polytropo.blocks", &mut value[..]).ok()?;
    value.truncate(length);
    Some(value)
}

#[test]
fn a_small_change_of_a_large_file_copies_little() {
    let rig = rig();
    let view = rig.union();
    let before = view.attr("d/f").unwrap();
    write_at(&view, "d/f", 1_000_000, b"changed");
    let mut expected = pattern(SIZE);
    expected[1_000_000..1_000_007].copy_from_slice(b"changed");
    assert!(read_all(&view, "d/f") == expected);
    let after = view.attr("d/f").unwrap();
    assert_eq!((after.ino, after.size_bytes, after.nlink), (before.ino, before.size_bytes, 1));
    assert!(after.blocks_512.abs_diff(before.blocks_512) <= 16, "{} blocks", after.blocks_512);
    assert!(space_bytes(rig.upper("d/f")) <= (64 + 8) << 10);
    view.assert_nothing_held();
    drop(view);
    let view = rig.union();
    assert!(read_all(&view, "d/f") == expected, "after a restart");
    assert_eq!(view.attr("d/f").unwrap().ino, before.ino);
    assert!(host::read(rig.lower(0, "d/f")).unwrap() == pattern(SIZE));
}

#[test]
fn changes_of_attributes_and_names_copy_no_bytes() {
    let rig = rig();
    rig.put(0, "small", "a few bytes");
    let view = rig.union();
    for path in ["d/f", "small"] {
        view.setattr(path, &SetAttr { mode: Some(0o600), uid: Some(5), gid: Some(6), ..SetAttr::default() })
            .unwrap();
        let times = SetAttr {
            mtime: Some(SetTime::At(Timestamp { seconds: 7, nanoseconds: 8 })),
            ..SetAttr::default()
        };
        view.setattr(path, &times).unwrap();
        view.at(path, |entry| {
            view.union.setxattr(&view.caller, entry.node, b"user.k", b"v", XattrFlags::empty())
        })
        .unwrap();
    }
    view.link("d/f", "d/g").unwrap();
    view.rename("d/f", "moved").unwrap();
    view.rename("d", "e").unwrap();
    for path in ["moved", "e/g", "small"] {
        assert!(space_bytes(rig.upper(path)) <= 4096, "{path} takes no space but for its attributes");
    }
    for view in [view, rig.union()] {
        assert!(read_all(&view, "moved") == pattern(SIZE) && read_all(&view, "e/g") == pattern(SIZE));
        assert_eq!(view.read("small").unwrap(), "a few bytes");
        assert_eq!(view.attr("moved").unwrap().nlink, 2);
    }
}

#[test]
fn appending_copies_nothing() {
    let rig = rig();
    let view = rig.union();
    view.append("d/f", "+").unwrap();
    assert!(space_bytes(rig.upper("d/f")) <= 8 << 10);
    assert!(read_all(&view, "d/f") == [&pattern(SIZE)[..], b"+"].concat());
}

#[test]
fn small_files_come_up_whole_when_they_are_written() {
    let rig = rig();
    rig.put(0, "small", &"x".repeat(100_000));
    let view = rig.union();
    write_at(&view, "small", 5, b"+");
    view.read("small").unwrap();
    assert_eq!(record_of(rig.upper("small")), None);
    assert_eq!(&host::read(rig.upper("small")).unwrap()[..7], b"xxxxx+x");
    rig.put(0, "other", &"x".repeat(100_000));
    view.setattr("other", &SetAttr { mode: Some(0o600), ..SetAttr::default() }).unwrap();
    assert!(record_of(rig.upper("other")).is_some());
    write_at(&view, "other", 70_000, b"y");
    view.read("other").unwrap();
    assert_eq!(record_of(rig.upper("other")), None, "the rest comes along with the first write");
    assert_eq!(&host::read(rig.upper("other")).unwrap()[69_999..70_002], b"xyx");
}

#[test]
fn a_file_of_which_all_blocks_came_up_is_a_plain_one() {
    let rig = rig();
    let view = rig.union();
    let handle = view.open("d/f", OpenFlags::WRITE | OpenFlags::READ).unwrap();
    let step = 300_000;
    let writes = (0..SIZE).step_by(step).rev();
    for (n, at) in writes.enumerate() {
        let length = step.min(SIZE - at);
        assert!(record_of(rig.upper("d/f")).is_some() || n * step > SIZE / 2, "after {n} writes");
        view.union.write(&view.caller, NodeId::ROOT, handle, at as u64, &vec![b'w'; length]).unwrap();
    }
    view.union.fsync(&view.caller, NodeId::ROOT, handle, true).unwrap();
    assert_eq!(record_of(rig.upper("d/f")), None);
    view.close(handle);
    assert!(host::read(rig.upper("d/f")).unwrap() == vec![b'w'; SIZE]);
    assert!(read_all(&view, "d/f") == vec![b'w'; SIZE]);
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    let rig = rig();
    let view = rig.union();
    let reader = view.open("d/f", OpenFlags::READ).unwrap();
    view.setattr("d/f", &size(1_000_001)).unwrap();
    view.setattr("d/f", &size(2_000_000)).unwrap();
    let mut expected = pattern(1_000_001);
    expected.resize(2_000_000, 0);
    assert!(read_all(&view, "d/f") == expected);
    drop((reader, view));
    let view = rig.union();
    assert!(read_all(&view, "d/f") == expected);
    write_at(&view, "d/f", 1_000_500, b"!");
    expected[1_000_500] = b'!';
    assert!(read_all(&view, "d/f") == expected);
    assert!(space_bytes(rig.upper("d/f")) <= 16 << 10, "what lies behind the cut is the upper's own");
    view.write("d/f", "new").unwrap();
    assert_eq!(record_of(rig.upper("d/f")), None);
    assert_eq!(view.read("d/f").unwrap(), "new");
}

/// A service that was killed between cutting a file and recording that.
#[test]
fn a_cut_that_was_not_recorded_counts() {
    let rig = rig();
    write_at(&rig.union(), "d/f", 10, b"!");
    host::OpenOptions::new().write(true).open(rig.upper("d/f")).unwrap().set_len(500_000).unwrap();
    let view = rig.union();
    view.setattr("d/f", &size(600_000)).unwrap();
    let mut expected = pattern(500_000);
    expected[10] = b'!';
    expected.resize(600_000, 0);
    assert!(read_all(&view, "d/f") == expected);
}

#[test]
fn holes_and_data_are_told_from_both_layers() {
    let rig = Rig::new(1);
    let file = host::File::create(rig.lower(0, "sparse")).unwrap();
    file.set_len(16 << 20).unwrap();
    file.write_all_at(&[b'l'; 65_536], 4 << 20).unwrap();
    let view = rig.union();
    let handle = view.open("sparse", OpenFlags::READ | OpenFlags::WRITE).unwrap();
    view.union.write(&view.caller, NodeId::ROOT, handle, 8 << 20, &[b'u'; 65_536]).unwrap();
    let seek = |at, to| view.union.seek(&view.caller, NodeId::ROOT, handle, at, to);
    assert_eq!(seek(0, SeekTo::Data).unwrap(), 4 << 20);
    assert_eq!(seek(0, SeekTo::Hole).unwrap(), 0);
    assert_eq!(seek(4 << 20, SeekTo::Hole).unwrap(), (4 << 20) + 65_536);
    assert_eq!(seek(5 << 20, SeekTo::Data).unwrap(), 8 << 20);
    assert_eq!(errno(seek(9 << 20, SeekTo::Data)), Errno::NXIO);
    assert_eq!(seek(9 << 20, SeekTo::Hole).unwrap(), 9 << 20);
    assert_eq!(errno(seek(16 << 20, SeekTo::Hole)), Errno::NXIO);
    let punch = FallocateMode::PUNCH_HOLE | FallocateMode::KEEP_SIZE;
    view.union.fallocate(&view.caller, NodeId::ROOT, handle, punch, 4 << 20, 65_536).unwrap();
    assert_eq!(seek(0, SeekTo::Data).unwrap(), 8 << 20, "what was punched is the upper's own hole");
    view.close(handle);
}

#[test]
fn ranges_are_copied_from_both_layers() {
    let rig = rig();
    let view = rig.union();
    write_at(&view, "d/f", 100_000, &[b'w'; 1000]);
    view.write("copy", "").unwrap();
    let from = view.open("d/f", OpenFlags::READ).unwrap();
    let to = view.open("copy", OpenFlags::WRITE).unwrap();
    let mut at = 0;
    loop {
        let ends = ((NodeId::ROOT, from, at), (NodeId::ROOT, to, at));
        match view.union.copy_range(&view.caller, ends.0, ends.1, SIZE as u64).unwrap() {
            0 => break,
            copied => at += copied,
        }
    }
    assert!(read_all(&view, "copy") == read_all(&view, "d/f"));
    assert!(view.union.host_file(from).is_none(), "no file of the host has all its bytes");
    assert!(view.union.host_file(to).is_some());
}

/// Bytes that a lower does not have any more are told as an error, never as zeros.
#[test]
fn a_lower_that_was_replaced_is_an_error() {
    let rig = rig();
    write_at(&rig.union(), "d/f", 10, b"!");
    host::write(rig.lower(0, "d/f"), pattern(SIZE / 2)).unwrap();
    for gone in [false, true] {
        if gone {
            host::remove_file(rig.lower(0, "d/f")).unwrap();
        }
        let view = rig.union();
        assert_eq!(errno(view.open("d/f", OpenFlags::READ)), Errno::IO);
        assert_eq!(errno(view.open("d/f", OpenFlags::WRITE)), Errno::IO);
        assert_eq!(errno(view.setattr("d/f", &size(5))), Errno::IO);
        assert_eq!(view.attr("d/f").unwrap().size_bytes, SIZE as u64);
        view.rename("d/f", "d/g").unwrap();
        view.rename("d/g", "d/f").unwrap();
    }
    let view = rig.union();
    view.write("d/f", "new").unwrap();
    assert_eq!(view.read("d/f").unwrap(), "new");
    drop(view);
    assert_eq!(rig.union().read("d/f").unwrap(), "new");
}

/// What others may change cannot be relied on: it is copied whole.
#[test]
fn files_of_lowers_that_others_change_are_copied_whole() {
    let mut rig = rig();
    rig.coherence = DirCoherence::Shared;
    let view = rig.union();
    view.setattr("d/f", &SetAttr { mode: Some(0o600), ..SetAttr::default() }).unwrap();
    assert_eq!(record_of(rig.upper("d/f")), None);
    host::write(rig.lower(0, "d/f"), "other").unwrap();
    assert!(read_all(&view, "d/f") == pattern(SIZE));
}

#[test]
fn an_upper_says_which_versions_may_use_it() {
    let rig = rig();
    // As an earlier version left it.
    host::create_dir_all(rig.upper(".wh..wh.polytropo/tmp/7")).unwrap();
    host::create_dir(rig.upper("d")).unwrap();
    host::copy(rig.lower(0, "d/f"), rig.upper("d/f")).unwrap();
    let view = rig.union();
    assert!(read_all(&view, "d/f") == pattern(SIZE));
    view.unlink("d/f").unwrap();
    rig.put(0, "g", "bytes");
    assert!(!rig.upper(".wh..wh.polytropo/format-2").exists(), "earlier versions may still use it");
    view.setattr("g", &SetAttr { mode: Some(0o600), ..SetAttr::default() }).unwrap();
    assert!(rig.upper(".wh..wh.polytropo/format-2").exists());
    assert!(rig.upper(".wh..wh.polytropo/tmp").is_file(), "they want a directory there");
    drop(view);
    assert_eq!(rig.union().read("g").unwrap(), "bytes");
    host::write(rig.upper(".wh..wh.polytropo/format-3"), "").unwrap();
    let upper = dir_layer(&rig.upper(""), false, DirCoherence::Exclusive);
    let Err(refused) = Union::new(rig.lowers(), Some(upper)) else { panic!("a later format was accepted") };
    assert_eq!(refused.errno(), Errno::PROTONOSUPPORT);
    assert!(refused.attempt().contains("format 3"), "{refused}");
}

/// Many threads write and read their own places of one file, each a few bytes of blocks that others write as well.
#[test]
fn threads_share_blocks() {
    let rig = Rig::quick(1).with_sizes(BlockSizes { block_bytes: 64, whole_max_bytes: 0 });
    let bytes = pattern(64 << 10);
    host::write(rig.lower(0, "f"), &bytes).unwrap();
    let view = rig.union();
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let (view, bytes) = (&view, &bytes);
            scope.spawn(move || {
                let handle = view.open("f", OpenFlags::READ | OpenFlags::WRITE).unwrap();
                for place in (thread..bytes.len() / 16).step_by(4).rev() {
                    let at = place as u64 * 16;
                    view.union.write(&view.caller, NodeId::ROOT, handle, at + 3, b"new").unwrap();
                    let mut found = [0; 16];
                    view.union.read(&view.caller, NodeId::ROOT, handle, at, &mut found).unwrap();
                    let mut expected: [u8; 16] = bytes[place * 16..][..16].try_into().unwrap();
                    expected[3..6].copy_from_slice(b"new");
                    assert_eq!(found, expected);
                }
                view.close(handle);
            });
        }
    });
    assert_eq!(record_of(rig.upper("f")), None);
    view.assert_nothing_held();
}

/// Bytes that the journal knew of and the device did not get, as after a power cut.
#[test]
fn loose_blocks_whose_bytes_are_lost_are_the_lowers() {
    let rig = rig();
    let view = rig.union();
    write_at(&view, "d/f", 1_000_000, b"lost");
    write_at(&view, "d/f", 3_000_000, b"kept");
    drop(view);
    let file = host::OpenOptions::new().write(true).open(rig.upper("d/f")).unwrap();
    file.write_all_at(&[0; 4096], 1_000_000 / 4096 * 4096).unwrap();
    let view = rig.union();
    let mut expected = pattern(SIZE);
    expected[3_000_000..3_000_004].copy_from_slice(b"kept");
    // The first was ordered when the file was opened once more; nobody may touch what was.
    let (start, end) = (1_000_000 / 4096 * 4096, 1_000_000 / 4096 * 4096 + 4096);
    expected[start..end].fill(0);
    assert!(read_all(&view, "d/f") == expected);
    write_at(&view, "d/f", 5_000_000, b"lost");
    drop(view);
    file.write_all_at(&[0; 4096], 5_000_000 / 4096 * 4096).unwrap();
    let view = rig.union();
    assert!(read_all(&view, "d/f") == expected, "the old bytes are back");
    write_at(&view, "d/f", 5_000_000, b"again");
    expected[5_000_000..5_000_005].copy_from_slice(b"again");
    drop(view);
    assert!(read_all(&rig.union(), "d/f") == expected);
}
