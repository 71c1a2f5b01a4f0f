//! Bytes: reading, writing, mapping, holes, durability.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use rustix::fs::{FallocateFlags, fallocate};

use crate::support::{CACHINGS, c_path, errno, eventually, on_each_mount, on_mount, on_small_disk};

fn read_write(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Bytes that differ everywhere.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(len)
    .collect()
}

#[test]
fn what_is_written_is_read_and_lies_below() {
    on_each_mount(|site| {
        let bytes = pattern(3 * 1024 * 1024 + 17);
        fs::write(site.path("f"), &bytes).unwrap();
        assert_eq!(fs::read(site.path("f")).unwrap(), bytes);
        File::open(site.path("f")).unwrap().sync_all().unwrap();
        assert_eq!(fs::read(site.source.join("f")).unwrap(), bytes);
        let file = read_write(&site.path("f"));
        file.write_all_at(b"xyz", 5_000).unwrap();
        let mut three = [0; 4];
        file.read_exact_at(&mut three, 4_999).unwrap();
        assert_eq!(&three, &[bytes[4_999], b'x', b'y', b'z']);
        assert_eq!(file.metadata().unwrap().len(), bytes.len() as u64);
    });
}

#[test]
fn times_that_programs_are_told_are_those_below() {
    let mtime = |path: &Path| {
        let told = fs::metadata(path).unwrap();
        (told.mtime(), told.mtime_nsec())
    };
    on_each_mount(|site| {
        for (round, bytes) in [&b"made"[..], b"cut and written"].into_iter().enumerate() {
            let told: Vec<_> = (0..50)
                .map(|number| {
                    let path = site.path(&number.to_string());
                    fs::write(&path, bytes).unwrap();
                    mtime(&path)
                })
                .collect();
            for (number, told) in told.into_iter().enumerate() {
                let name = number.to_string();
                File::open(site.path(&name)).unwrap().sync_all().unwrap();
                assert_eq!(mtime(&site.source.join(&name)), told, "file {number} of round {round}");
            }
        }
    });
}

#[test]
fn appends_of_several_writers_all_arrive() {
    on_each_mount(|site| {
        let path = site.path("log");
        std::thread::scope(|scope| {
            for writer in 0..4u8 {
                let path = &path;
                scope.spawn(move || {
                    let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
                    for _ in 0..200 {
                        file.write_all(&[b'a' + writer; 10]).unwrap();
                    }
                });
            }
        });
        let log = fs::read(&path).unwrap();
        assert_eq!(log.len(), 4 * 200 * 10);
        assert!(log.chunks(10).all(|line| line.iter().all(|&b| b == line[0])), "lines were torn");
    });
}

#[test]
fn truncation_cuts_and_extends_with_zeros() {
    on_each_mount(|site| {
        fs::write(site.path("f"), pattern(10_000)).unwrap();
        let file = read_write(&site.path("f"));
        file.set_len(5_000).unwrap();
        file.set_len(20_000).unwrap();
        let read = fs::read(site.path("f")).unwrap();
        assert_eq!(&read[..5_000], &pattern(10_000)[..5_000]);
        assert!(read[5_000..].iter().all(|&b| b == 0) && read.len() == 20_000);
        File::create(site.path("f")).unwrap();
        assert_eq!(fs::metadata(site.path("f")).unwrap().len(), 0);
        assert_eq!(fs::read(site.path("f")).unwrap(), b"");
    });
}

#[test]
fn a_file_open_only_for_writing_takes_partial_pages() {
    on_each_mount(|site| {
        fs::write(site.path("f"), pattern(10_000)).unwrap();
        let file = OpenOptions::new().write(true).open(site.path("f")).unwrap();
        file.write_all_at(b"middle", 4_090).unwrap();
        assert_eq!(file.read_at(&mut [0], 0).unwrap_err().raw_os_error(), Some(libc::EBADF));
        drop(file);
        let mut expected = pattern(10_000);
        expected[4_090..4_096].copy_from_slice(b"middle");
        assert_eq!(fs::read(site.path("f")).unwrap(), expected);
        assert_eq!(fs::read(site.source.join("f")).unwrap(), expected);
    });
}

struct Mapping(*mut u8, usize);

impl Mapping {
    fn new(file: &File, len: usize, protection: i32, flags: i32) -> Self {
        // SAFETY: a new mapping chosen by the kernel.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, file.as_raw_fd(), 0) };
        assert_ne!(start, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Self(start.cast(), len)
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping lives as long as `self`, and the file is longer than it.
        unsafe { std::slice::from_raw_parts_mut(self.0, self.1) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, no longer referred to.
        unsafe { libc::munmap(self.0.cast(), self.1) };
    }
}

#[test]
fn shared_and_private_mappings() {
    on_each_mount(|site| {
        fs::write(site.path("f"), pattern(8_192)).unwrap();
        let file = read_write(&site.path("f"));
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let mut private = Mapping::new(&file, 8_192, both, libc::MAP_PRIVATE);
        private.bytes()[0] = !pattern(1)[0];
        assert_eq!(fs::read(site.path("f")).unwrap(), pattern(8_192));
        let mut shared = Mapping::new(&file, 8_192, both, libc::MAP_SHARED);
        shared.bytes()[4_096..4_100].copy_from_slice(b"mmap");
        // SAFETY: the mapping is live and of that length.
        let synced = unsafe { libc::msync(shared.0.cast(), shared.1, libc::MS_SYNC) };
        assert_eq!(synced, 0);
        assert_eq!(&fs::read(site.path("f")).unwrap()[4_096..4_100], b"mmap");
        assert_eq!(&fs::read(site.source.join("f")).unwrap()[4_096..4_100], b"mmap");
    });
}

/// Starts a program that was just written. Another test's child may hold our descriptor between fork and exec.
fn spawn(command: &mut Command) -> std::process::Child {
    let mut started = None;
    eventually("the program starts", || match command.spawn() {
        Err(e) if e.raw_os_error() == Some(libc::ETXTBSY) => false,
        done => {
            started = Some(done.unwrap());
            true
        }
    });
    started.unwrap()
}

#[test]
fn programs_run_from_the_mount_and_are_busy_meanwhile() {
    on_each_mount(|site| {
        fs::copy("/bin/sleep", site.path("sleep")).unwrap();
        fs::set_permissions(site.path("sleep"), PermissionsExt::from_mode(0o755)).unwrap();
        let mut running = spawn(Command::new(site.path("sleep")).arg("30"));
        let refused = OpenOptions::new().write(true).open(site.path("sleep")).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ETXTBSY));
        running.kill().unwrap();
        running.wait().unwrap();
        assert!(spawn(Command::new(site.path("sleep")).arg("0")).wait().unwrap().success());
    });
}

#[test]
fn holes_are_punched_and_found() {
    on_each_mount(|site| {
        let file = read_write(&site.path("f"));
        file.write_all_at(&pattern(1 << 20), 0).unwrap();
        file.sync_all().unwrap();
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, punch, 65_536, 131_072).unwrap();
        let mut hole = vec![1; 131_072];
        file.read_exact_at(&mut hole, 65_536).unwrap();
        assert!(hole.iter().all(|&b| b == 0));
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        let seek = |offset, whence| {
            // SAFETY: moves the position of an open file.
            unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }
        };
        assert_eq!(seek(0, libc::SEEK_HOLE), 65_536);
        assert_eq!(seek(65_536, libc::SEEK_DATA), 65_536 + 131_072);
        assert_eq!((seek(1 << 20, libc::SEEK_DATA), errno()), (-1, libc::ENXIO));
        fallocate(&file, FallocateFlags::empty(), 1 << 20, 4_096).unwrap();
        assert_eq!(file.metadata().unwrap().len(), (1 << 20) + 4_096);
        fallocate(&file, FallocateFlags::KEEP_SIZE, 2 << 20, 4_096).unwrap();
        assert_eq!(file.metadata().unwrap().len(), (1 << 20) + 4_096);
    });
}

/// Of such files the service answers by itself, until somebody writes.
#[test]
fn files_that_nobody_wrote_to_are_data_until_somebody_does() {
    on_each_mount(|site| {
        fs::write(site.source.join("f"), pattern(65_536)).unwrap();
        let file = read_write(&site.path("f"));
        let seek = |offset, whence| {
            // SAFETY: moves the position of an open file.
            unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }
        };
        assert_eq!((seek(10, libc::SEEK_DATA), seek(10, libc::SEEK_HOLE)), (10, 65_536));
        assert_eq!((seek(65_536, libc::SEEK_DATA), errno()), (-1, libc::ENXIO));
        file.write_all_at(&pattern(4_096), 65_536).unwrap();
        assert_eq!((seek(65_536, libc::SEEK_DATA), seek(0, libc::SEEK_HOLE)), (65_536, 69_632));
        file.write_all_at(b"y", 1 << 20).unwrap();
        assert_eq!((seek(0, libc::SEEK_HOLE), seek(69_632, libc::SEEK_DATA)), (69_632, 1 << 20));
    });
}

/// Space without data counts as data: a mapping may have put some there.
#[test]
fn data_stored_through_a_mapping_is_found() {
    on_each_mount(|site| {
        let below = File::create(site.source.join("f")).unwrap();
        fallocate(&below, FallocateFlags::empty(), 0, 65_536).unwrap();
        let file = read_write(&site.path("f"));
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of a file that is long enough; unmapped below.
        let map = unsafe {
            libc::mmap(std::ptr::null_mut(), 65_536, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(map, libc::MAP_FAILED);
        // SAFETY: within the mapping.
        unsafe { map.cast::<u8>().add(32_768).write_volatile(7) };
        // SAFETY: moves the position of an open file.
        let data = unsafe { libc::lseek(file.as_raw_fd(), 32_768, libc::SEEK_DATA) };
        assert_eq!(data, 32_768);
        // SAFETY: mapped above, and nobody refers to it.
        unsafe { libc::munmap(map, 65_536) };
    });
}

/// Of bytes that the kernel has not passed on yet.
#[test]
fn holes_are_found_in_what_was_just_written() {
    on_each_mount(|site| {
        // More at once than threads that answer.
        std::thread::scope(|scope| {
            for number in 0..12 {
                let path = site.path(&format!("f{number}"));
                scope.spawn(move || {
                    let file = read_write(&path);
                    let seek = |offset, whence| {
                        // SAFETY: moves the position of an open file.
                        unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }
                    };
                    for round in 1..5 {
                        file.write_all_at(&pattern(65_536), 0).unwrap();
                        let far = round << 20;
                        file.write_all_at(&pattern(4_096), far).unwrap();
                        assert_eq!(seek(0, libc::SEEK_HOLE), 65_536);
                        assert_eq!(seek(0, libc::SEEK_DATA), 0);
                        assert_eq!(seek(far as i64 - 5_000, libc::SEEK_DATA), far as i64);
                        file.set_len(0).unwrap();
                        assert_eq!((seek(0, libc::SEEK_DATA), errno()), (-1, libc::ENXIO));
                    }
                });
            }
        });
    });
}

#[test]
fn ranges_are_copied_below() {
    on_each_mount(|site| {
        let bytes = pattern(300_000);
        fs::write(site.path("from"), &bytes).unwrap();
        let (from, to) = (File::open(site.path("from")).unwrap(), read_write(&site.path("to")));
        let (mut read_at, mut write_at) = (1_000, 7);
        let mut left = 200_000;
        while left > 0 {
            let copied =
                rustix::fs::copy_file_range(&from, Some(&mut read_at), &to, Some(&mut write_at), left)
                    .unwrap();
            assert_ne!(copied, 0);
            left -= copied;
        }
        let written = fs::read(site.path("to")).unwrap();
        assert_eq!(&written[7..], &bytes[1_000..201_000]);
    });
}

#[test]
fn files_without_a_name_can_get_one() {
    on_each_mount(|site| {
        let tmpfile =
            || OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(&site.mount);
        let mut file = tmpfile().unwrap();
        file.write_all(b"anonymous").unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut read = String::new();
        file.read_to_string(&mut read).unwrap();
        assert_eq!(read, "anonymous");
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        let link = |file: &File, name: &str| {
            let from = c_path(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())));
            let to = c_path(&site.path(name));
            let flags = libc::AT_SYMLINK_FOLLOW;
            // SAFETY: both paths are NUL-terminated.
            match unsafe { libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags) } {
                0 => Ok(()),
                _ => Err(errno()),
            }
        };
        link(&file, "named").unwrap();
        assert_eq!(fs::read(site.path("named")).unwrap(), b"anonymous");
        let never = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_TMPFILE | libc::O_EXCL)
            .open(&site.mount)
            .unwrap();
        assert_eq!(link(&never, "never"), Err(libc::ENOENT));
    });
}

#[test]
fn direct_reads_and_writes_agree_with_cached_ones() {
    on_each_mount(|site| {
        fs::write(site.path("f"), pattern(65_536)).unwrap();
        let direct = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(site.path("f"))
            .unwrap();
        let cached = read_write(&site.path("f"));
        let mut block = vec![0; 4_096];
        direct.read_exact_at(&mut block, 8_192).unwrap();
        assert_eq!(block, pattern(65_536)[8_192..12_288]);
        direct.write_all_at(&[7; 4_096], 4_096).unwrap();
        cached.read_exact_at(&mut block, 4_096).unwrap();
        assert_eq!(block, [7; 4_096]);
        cached.write_all_at(&[8; 4_096], 0).unwrap();
        direct.read_exact_at(&mut block, 0).unwrap();
        assert_eq!(block, [8; 4_096]);
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let mut mapped = Mapping::new(&direct, 65_536, both, libc::MAP_SHARED);
        assert_eq!(mapped.bytes()[4_096], 7);
    });
}

#[test]
fn times_are_set_kept_and_born() {
    on_each_mount(|site| {
        fs::write(site.path("f"), "x").unwrap();
        let file = read_write(&site.path("f"));
        let old = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
        file.set_times(fs::FileTimes::new().set_modified(old).set_accessed(old)).unwrap();
        drop(file);
        for path in [site.path("f"), site.source.join("f")] {
            let found = fs::metadata(path).unwrap();
            assert_eq!((found.mtime(), found.mtime_nsec()), (1_000_000_000, 123_456_789));
        }
        let born = fs::metadata(site.path("f")).unwrap().created().unwrap();
        assert_eq!(born, fs::metadata(site.source.join("f")).unwrap().created().unwrap());
    });
}

#[test]
fn a_read_only_mount_refuses_changes() {
    on_mount(&["--coherence", "immutable", "--read-only"], |site| {
        let refused = fs::write(site.path("f"), "x").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
        assert_eq!(fs::create_dir(site.path("d")).unwrap_err().raw_os_error(), Some(libc::EROFS));
    });
}

/// Held-back writes fail late, but never silently: by fsync at the latest, and once.
#[test]
fn a_full_disk_is_told_and_what_was_there_stays() {
    for flags in CACHINGS {
        on_small_disk(flags, 2 << 20, |site| {
            fs::write(site.path("kept"), pattern(100_000)).unwrap();
            let file = File::create(site.path("f")).unwrap();
            let written = file.write_all_at(&pattern(4 << 20), 0);
            let refused = written.and_then(|()| file.sync_all()).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC), "{flags:?}");
            assert_eq!(fs::read(site.path("kept")).unwrap(), pattern(100_000));
            drop(file);
            fs::remove_file(site.path("f")).unwrap();
            eventually("there is room again", || {
                fs::write(site.path("small"), "fits").is_ok()
                    && File::open(site.path("small")).unwrap().sync_all().is_ok()
            });
            assert_eq!(fs::read(site.source.join("small")).unwrap(), b"fits");
        });
    }
}

/// A copying program that took what is held back for a hole would lose it.
#[test]
fn holes_are_found_among_bytes_that_are_held_back() {
    on_each_mount(|site| {
        std::thread::scope(|scope| {
            for number in 0..6 {
                scope.spawn(move || {
                    let file = read_write(&site.path(&format!("f{number}")));
                    let seek = |offset, whence| {
                        // SAFETY: moves the position of an open file.
                        unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }
                    };
                    for round in 0..10 {
                        file.set_len(0).unwrap();
                        file.write_all_at(&[round + 1; 65_536], 0).unwrap();
                        file.write_all_at(b"y", 1 << 20).unwrap();
                        assert_eq!(seek(0, libc::SEEK_DATA), 0);
                        // Whole files count as data where too many ask at once.
                        let (hole, end) = (seek(0, libc::SEEK_HOLE), (1 << 20) + 1);
                        assert!(hole == 65_536 || hole == end, "{hole}");
                        assert_eq!(seek(1 << 20, libc::SEEK_DATA), 1 << 20);
                    }
                });
            }
        });
    });
}

#[test]
fn one_program_sees_holes_in_what_it_has_just_written() {
    on_each_mount(|site| {
        let file = read_write(&site.path("f"));
        file.write_all_at(&[7; 65_536], 0).unwrap();
        file.write_all_at(b"y", 1 << 20).unwrap();
        let seek = |offset, whence| {
            // SAFETY: moves the position of an open file.
            unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }
        };
        assert_eq!((seek(0, libc::SEEK_HOLE), seek(65_536, libc::SEEK_DATA)), (65_536, 1 << 20));
        assert_eq!(fs::metadata(site.path("f")).unwrap().len(), (1 << 20) + 1);
    });
}
