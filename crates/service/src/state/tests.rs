use std::sync::atomic::Ordering::Relaxed;

use polytropo_libservices::{HostInode, OpenFlags, Timestamp};

use super::area::Area;
use super::*;

fn record(number: u64) -> OpenRecord {
    let born = Some(Timestamp { seconds: -5, nanoseconds: 999_999_999 });
    OpenRecord {
        node: number,
        kernel_node: number << 40,
        handle: !number,
        flags: OpenFlags::READ | OpenFlags::SYNC,
        kind: Kind::File,
        through: Through::Fuse,
        bytes: Bytes::Passthrough,
        uid: u32::MAX,
        gid: 7,
        pid: 1 << 31,
        backing: 9,
        lookups: 1,
        number: number * 3,
        inode: Some(HostInode { device: 1 << 60, ino: number, born }),
    }
}

fn table() -> (std::sync::Arc<OpenTable>, StateReader, Area) {
    let (state, reader, area) = state();
    (state.opens.clone(), reader, area)
}

fn state() -> (std::sync::Arc<DoorState>, StateReader, Area) {
    let descriptor = make(5).unwrap();
    let reader = StateReader::new(&descriptor).unwrap();
    let area = Area::map(&descriptor, true).unwrap();
    (DoorState::new(descriptor).unwrap(), reader, area)
}

fn nodes(reader: &StateReader) -> Vec<u64> {
    let mut found: Vec<_> = reader.open_files().unwrap().files.into_iter().map(|file| file.node).collect();
    found.sort();
    found
}

#[test]
fn what_is_listed_is_read_whole_until_it_is_struck_out() {
    let (table, reader, _) = table();
    let first = table.list(&record(1)).unwrap();
    let without = OpenRecord { inode: None, bytes: Bytes::None, kind: Kind::Place, ..record(2) };
    let second = table.list(&without).unwrap();
    assert_eq!(reader.open_files().unwrap().files, [record(1), without]);
    drop(first);
    assert_eq!(nodes(&reader), [2]);
    let third = table.list(&record(3)).unwrap();
    assert_eq!(nodes(&reader), [2, 3]);
    drop((second, third));
    let found = reader.open_files().unwrap();
    assert!(found.files.is_empty() && found.untold == 0 && found.damaged == 0);
}

#[test]
fn a_full_table_says_so() {
    let (table, reader, _) = table();
    let mut listed: Vec<_> =
        (0..CAPACITY as u64).map(|number| table.list(&record(number)).unwrap()).collect();
    assert!(table.list(&record(0)).is_none());
    let found = reader.open_files().unwrap();
    assert_eq!((found.files.len(), found.untold), (CAPACITY, 1));
    listed.pop();
    assert!(table.list(&record(0)).is_some());
}

#[test]
fn nothing_in_the_area_makes_the_reader_err() {
    let (table, reader, area) = table();
    let _listed: Vec<_> = (0..10).map(|number| table.list(&record(number)).unwrap()).collect();
    area.entry(3).words[3].store(u64::MAX, Relaxed);
    area.entry(4).words[11].store(u64::MAX, Relaxed);
    area.entry(5).words[5].store(u64::MAX, Relaxed);
    let found = reader.open_files().unwrap();
    assert_eq!((found.files.len(), found.damaged), (7, 3));
    area.header().used.store(u64::MAX, Relaxed);
    assert_eq!(reader.open_files().unwrap().files.len(), 7);
    // Half of it, as a worker leaves it that dies in the middle.
    area.entry(20).words[0].store(77, Relaxed);
    assert_eq!(reader.open_files().unwrap().files.len(), 7);
    let mut state = 1u64;
    for index in 0..CAPACITY {
        let entry = area.entry(index);
        for word in std::iter::once(&entry.commit).chain(&entry.words) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.store(state >> 17, Relaxed);
        }
    }
    let found = reader.open_files().unwrap();
    assert!(found.damaged + found.files.len() as u64 <= CAPACITY as u64 && found.damaged > 0);
    area.header().version.store(99, Relaxed);
    assert!(reader.open_files().is_none());
}

#[test]
fn an_area_of_another_size_is_refused() {
    let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
    let other = rustix::fs::memfd_create("other", flags).unwrap();
    assert!(StateReader::new(&other).is_err());
}

/// Readers beside writers see whole records only.
#[test]
fn readers_never_see_halves() {
    let (table, reader, _) = table();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (table, stop) = (&table, &stop);
            scope.spawn(move || {
                let mut number = seed;
                while !stop.load(Relaxed) {
                    number += 2;
                    drop(table.list(&record(number)));
                }
            });
        }
        for _ in 0..2000 {
            for file in reader.open_files().unwrap().files {
                assert_eq!(file, record(file.node));
            }
        }
        stop.store(true, Relaxed);
    });
}
