//! What the keeper makes of the memory that a dead worker left.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;
use rustix::io::Errno;

use super::layout::{self, Area, PAGE_BYTES, PAGES, range_word};
use super::{Recovered, fits, recover};

fn memory() -> (OwnedFd, Area) {
    let memory = layout::make(1).unwrap();
    let area = Area::map(&memory).unwrap();
    (memory, area)
}

fn hold(area: &Area, page: usize, (key, offset): (u64, u64), range: u64, byte: u8) {
    let entry = area.entry(page);
    entry.offset.store(offset, Relaxed);
    entry.range.store(range, Relaxed);
    // SAFETY: one page, which nobody else uses.
    unsafe { area.page(page).as_ptr().write_bytes(byte, PAGE_BYTES) };
    entry.key.store(key, Relaxed);
}

fn kept(file: &std::fs::File, key: u64) -> HashMap<u64, OwnedFd> {
    HashMap::from([(key, file.try_clone().unwrap().into())])
}

#[test]
fn what_is_held_goes_to_its_place_also_twice() {
    let (memory, area) = memory();
    let temp = tempfile::NamedTempFile::new().unwrap();
    // As a log that is appended to: the places that entries tell count all the same.
    let file = std::fs::OpenOptions::new().append(true).open(temp.path()).unwrap();
    std::fs::write(temp.path(), vec![b'.'; 5000]).unwrap();
    hold(&area, 0, (7, 4096), range_word(10, 20), b'a');
    hold(&area, PAGES - 1, (7, 8192), range_word(0, 4096), b'b');
    for _ in 0..2 {
        let recovered = recover(&memory, &kept(&file, 7)).unwrap();
        assert_eq!(recovered, Recovered { bytes: 4106, ..Recovered::default() });
    }
    let mut expected = vec![b'.'; 5000];
    expected[4106..4116].fill(b'a');
    expected.resize(8192, 0);
    expected.resize(12_288, b'b');
    assert!(std::fs::read(temp.path()).unwrap() == expected);
}

#[test]
fn what_makes_no_sense_is_counted_and_passed_over() {
    let (memory, area) = memory();
    let file = tempfile::tempfile().unwrap();
    let good = range_word(0, 1);
    let wrong = [
        (8, 0, good),
        (7, 1, good),
        (7, i64::MAX as u64 - 4095, good),
        (7, u64::MAX - 4095, good),
        (7, 0, range_word(5, 5)),
        (7, 0, range_word(6, 5)),
        (7, 0, range_word(0, 4097)),
        (7, 0, u64::MAX),
    ];
    for (page, (key, offset, range)) in wrong.into_iter().enumerate() {
        hold(&area, page, (key, offset), range, b'x');
    }
    let recovered = recover(&memory, &kept(&file, 7)).unwrap();
    assert_eq!(recovered, Recovered { damaged: wrong.len() as u64, ..Recovered::default() });
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn what_cannot_be_written_is_told() {
    let (memory, area) = memory();
    hold(&area, 3, (1, 0), range_word(0, 100), b'x');
    hold(&area, 4, (2, 0), range_word(0, 100), b'y');
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let file = tempfile::tempfile().unwrap();
    let mut files = kept(&full, 1);
    files.extend(kept(&file, 2));
    let recovered = recover(&memory, &files).unwrap();
    let expected = Recovered { bytes: 100, lost_bytes: 100, problem: Some(Errno::NOSPC), damaged: 0 };
    assert_eq!(recovered, expected);
}

#[test]
fn a_file_that_refuses_takes_no_other_along() {
    let (memory, area) = memory();
    hold(&area, 3, (1, 0), range_word(0, 100), b'x');
    hold(&area, 4, (2, 0), range_word(0, 100), b'y');
    let temp = tempfile::NamedTempFile::new().unwrap();
    let flags = rustix::fs::OFlags::PATH;
    let place = rustix::fs::open(temp.path(), flags, rustix::fs::Mode::empty()).unwrap();
    let file = tempfile::tempfile().unwrap();
    let mut files = kept(&file, 2);
    files.insert(1, place);
    let recovered = recover(&memory, &files).unwrap();
    let expected = Recovered { bytes: 100, lost_bytes: 100, problem: Some(Errno::BADF), damaged: 0 };
    assert_eq!(recovered, expected);
}

#[test]
fn only_files_that_can_be_written_are_kept() {
    let temp = tempfile::NamedTempFile::new().unwrap();
    let open = |options: &std::fs::OpenOptions| OwnedFd::from(options.open(temp.path()).unwrap());
    let options = std::fs::OpenOptions::new;
    assert_eq!(fits(&open(options().write(true))), Ok(true));
    assert_eq!(fits(&open(options().read(true).append(true))), Ok(true));
    assert_eq!(fits(&open(options().read(true))), Ok(false));
    assert_eq!(fits(&std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap().into()), Ok(false));
    assert_eq!(fits(&std::os::unix::net::UnixStream::pair().unwrap().0.into()), Ok(false));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_memory_is_read(words in prop::collection::vec((0u64..4, any::<u64>(), any::<u64>(), any::<bool>()), 1..50)) {
        let (memory, area) = memory();
        let file = tempfile::tempfile().unwrap();
        for (page, (key, offset, range, small)) in words.iter().enumerate() {
            // Some of them nearly right.
            let (offset, range) = if *small { (offset % 16 * 2048, range & 0x1fff_0000_1fff) } else { (*offset, *range) };
            hold(&area, page, (*key, offset), range, 1);
        }
        let recovered = recover(&memory, &kept(&file, 2)).unwrap();
        let held = words.iter().filter(|(key, ..)| *key != 0).count() as u64;
        prop_assert!(recovered.damaged <= held && recovered.bytes <= (held - recovered.damaged) * 4096);
        let mut bytes = vec![0; 16 * PAGE_BYTES];
        let count = file.read_at(&mut bytes, 0).unwrap();
        prop_assert!(bytes[..count].iter().all(|byte| *byte <= 1));
    }
}
