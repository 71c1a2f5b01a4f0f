//! Files of an image that the kernel reads itself, and what happens when they are changed meanwhile.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::support::{Site, c_path, eventually, on_union_passing_through};

const OLD: &[u8] = b"as the image has it";

/// Whether `file` shows the bytes of the lower file `below` itself: the kernel's own cache of the mount would not see them
/// change.
fn is_passed_through(file: &File, below: &Path) -> bool {
    let before = read(file);
    let lower = OpenOptions::new().write(true).open(below).unwrap();
    lower.write_all_at(b"#", 0).unwrap();
    let seen = read(file)[0] == b'#';
    lower.write_all_at(&before[..1], 0).unwrap();
    seen
}

/// Linux 6.9 as root.
fn kernel_passes_through() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|word| word.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (6, 9)
}

fn on_image(prepare: impl FnOnce(&Path), test: impl FnOnce(&Site)) {
    if !kernel_passes_through() {
        eprintln!("skipped: this kernel cannot pass files through (Linux 6.9 can)");
        return;
    }
    on_union_passing_through(prepare, test);
}

fn read(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; 256];
    let count = file.read_at(&mut bytes, 0).unwrap();
    bytes.truncate(count);
    bytes
}

fn one_file(lower: &Path) {
    fs::write(lower.join("f"), OLD).unwrap();
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Open {
    Read,
    ReadDirect,
    Map,
    Write,
    ReadWrite,
    Append,
    Truncate,
    Create,
    CutByName,
    ChangeMode,
}

const OPENS: [Open; 10] = [
    Open::Read,
    Open::ReadDirect,
    Open::Map,
    Open::Write,
    Open::ReadWrite,
    Open::Append,
    Open::Truncate,
    Open::Create,
    Open::CutByName,
    Open::ChangeMode,
];

impl Open {
    fn writes(self) -> bool {
        !matches!(self, Open::Read | Open::ReadDirect | Open::Map | Open::CutByName | Open::ChangeMode)
    }

    /// Opens or changes `path`, and keeps account of what it then holds.
    fn act(self, path: &Path, truth: &mut Vec<u8>) -> Option<File> {
        let mut options = OpenOptions::new();
        match self {
            Open::Read | Open::Map => options.read(true),
            Open::ReadDirect => options.read(true).custom_flags(libc::O_DIRECT),
            Open::Write => options.write(true),
            Open::ReadWrite => options.read(true).write(true),
            Open::Append => options.append(true),
            Open::Truncate => {
                truth.clear();
                options.write(true).truncate(true)
            }
            Open::Create => options.read(true).write(true).create(true),
            Open::CutByName => {
                // SAFETY: a NUL-terminated path.
                assert_eq!(unsafe { libc::truncate(c_path(path).as_ptr(), 3) }, 0);
                truth.resize(3, 0);
                return None;
            }
            Open::ChangeMode => {
                fs::set_permissions(path, fs::Permissions::from_mode(0o604)).unwrap();
                return None;
            }
        };
        let mut file = options.open(path).unwrap_or_else(|error| panic!("{self:?}: {error}"));
        match self {
            Open::Append => {
                file.write_all(b"+").unwrap();
                truth.push(b'+');
            }
            Open::Write | Open::ReadWrite | Open::Create => {
                file.write_all_at(b"W", 0).unwrap();
                truth.resize(truth.len().max(1), 0);
                truth[0] = b'W';
            }
            Open::Map => {
                let len = file.metadata().unwrap().len() as usize;
                if len > 0 {
                    assert_eq!(Map::of(&file, len).bytes(), *truth);
                }
            }
            _ => {}
        }
        Some(file)
    }
}

/// A shared map for reading.
struct Map(*const u8, usize);

impl Map {
    fn of(file: &File, len: usize) -> Self {
        let (none, flags) = (std::ptr::null_mut(), libc::MAP_SHARED);
        // SAFETY: a new map touches no memory that exists.
        let start = unsafe { libc::mmap(none, len, libc::PROT_READ, flags, file.as_raw_fd(), 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self(start.cast(), len)
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: the map is `len` bytes of a file that is at least as long; volatile since others may write it.
        (0..self.1).map(|at| unsafe { self.0.add(at).read_volatile() }).collect()
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own map, to which no reference is left.
        unsafe { libc::munmap(self.0.cast_mut().cast(), self.1) };
    }
}

/// Any three opens or changes in any order, all kept open: none is refused, whoever opens afterwards sees what was written, the
/// inode number stays, and the image's file is as it was.
#[test]
fn every_order_of_opens_and_changes() {
    let orders: Vec<_> = OPENS
        .iter()
        .flat_map(|a| OPENS.iter().flat_map(move |b| OPENS.iter().map(move |c| [*a, *b, *c])))
        .collect();
    let prepare = |lower: &Path| {
        for number in 0..orders.len() {
            fs::write(lower.join(number.to_string()), OLD).unwrap();
        }
    };
    on_image(prepare, |site| {
        for (number, order) in orders.iter().enumerate() {
            let path = site.path(&number.to_string());
            let ino = fs::metadata(&path).unwrap().ino();
            let mut truth = OLD.to_vec();
            let mut held = Vec::new();
            for open in order {
                let file = open.act(&path, &mut truth);
                held.extend(file.map(|file| (*open, file)));
                assert_eq!(fs::read(&path).unwrap(), truth, "{order:?} after {open:?}");
                let now = fs::metadata(&path).unwrap();
                assert_eq!((now.ino(), now.len()), (ino, truth.len() as u64), "{order:?} after {open:?}");
            }
            for (open, file) in &held {
                assert_eq!(file.metadata().unwrap().ino(), ino);
                // Old readers have the image's bytes or the new ones; never others, never an error.
                if matches!(open, Open::Read | Open::Map) {
                    let seen = read(file);
                    assert!(seen == OLD || seen == truth, "{order:?}: {open:?} reads {seen:?}");
                }
            }
            for (open, file) in &held {
                if open.writes() && *open != Open::Append {
                    file.write_all_at(b"!", 1).unwrap();
                    truth.resize(truth.len().max(2), 0);
                    truth[1] = b'!';
                    assert_eq!(fs::read(&path).unwrap(), truth, "{order:?}: {open:?} still writes");
                }
            }
            drop(held);
            assert_eq!(fs::read(&path).unwrap(), truth, "{order:?} when all is closed");
            assert_eq!(fs::read(site.lower.join(number.to_string())).unwrap(), OLD);
        }
    });
}

#[test]
fn the_kernel_reads_the_images_file_itself_until_it_is_changed() {
    on_image(one_file, |site| {
        let reader = File::open(site.path("f")).unwrap();
        assert!(is_passed_through(&reader, &site.lower.join("f")));
        OpenOptions::new().append(true).open(site.path("f")).unwrap().write_all(b"+").unwrap();
        // The old reader keeps the old file; a new one has the copy, and is not passed through.
        assert!(is_passed_through(&reader, &site.lower.join("f")));
        let again = File::open(site.path("f")).unwrap();
        assert_eq!(read(&again), [OLD, b"+"].concat());
        assert!(!is_passed_through(&again, &site.lower.join("f")));
        let other = File::open(site.path("f")).unwrap();
        assert_eq!(other.metadata().unwrap().len(), OLD.len() as u64 + 1);
    });
}

/// `tail -f f & echo y >> f`, and the other way round.
#[test]
fn a_reader_and_an_appender_in_both_orders() {
    on_image(one_file, |site| {
        let append = |text: &[u8]| {
            OpenOptions::new().append(true).open(site.path("f")).unwrap().write_all(text).unwrap();
        };
        let mut early = File::open(site.path("f")).unwrap();
        append(b"1");
        let mut late = File::open(site.path("f")).unwrap();
        append(b"2");
        let mut bytes = Vec::new();
        late.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [OLD, b"12"].concat());
        append(b"3");
        bytes.clear();
        late.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"3");
        bytes.clear();
        early.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, OLD);
        // It can tell that it is behind.
        assert_eq!(early.metadata().unwrap().len(), OLD.len() as u64 + 3);
    });
}

#[test]
fn a_map_outlives_the_copy() {
    on_image(one_file, |site| {
        let reader = File::open(site.path("f")).unwrap();
        let map = Map::of(&reader, OLD.len());
        drop(reader);
        fs::write(site.path("f"), "short").unwrap();
        assert_eq!(map.bytes(), OLD);
        let changed = File::open(site.path("f")).unwrap();
        assert_eq!(Map::of(&changed, 5).bytes(), b"short");
        assert_eq!(map.bytes(), OLD);
    });
}

#[test]
fn a_running_program_is_not_written_and_a_written_one_not_run() {
    let prepare = |lower: &Path| {
        fs::copy("/bin/sleep", lower.join("program")).unwrap();
    };
    on_image(prepare, |site| {
        let path = site.path("program");
        let open = || OpenOptions::new().write(true).open(&path);
        let mut running = Command::new(&path).arg("100").spawn().unwrap();
        assert_eq!(open().unwrap_err().raw_os_error(), Some(libc::ETXTBSY));
        running.kill().unwrap();
        running.wait().unwrap();
        // Somebody reads it, so that the writer gets an inode of its own.
        let reader = File::open(&path).unwrap();
        let writer = open().unwrap();
        let run = || Command::new(&path).arg("0").status();
        assert_eq!(run().unwrap_err().raw_os_error(), Some(libc::ETXTBSY));
        drop((writer, reader));
        assert!(run().unwrap().success());
    });
}

#[test]
fn other_names_of_a_file_show_its_change() {
    let prepare = |lower: &Path| {
        fs::write(lower.join("a"), OLD).unwrap();
        fs::hard_link(lower.join("a"), lower.join("b")).unwrap();
    };
    on_image(prepare, |site| {
        let (a, b) = (site.path("a"), site.path("b"));
        let held = [File::open(&a).unwrap(), File::open(&b).unwrap()];
        fs::write(&b, "changed").unwrap();
        for path in [&a, &b] {
            assert_eq!(fs::metadata(path).unwrap().len(), 7);
            assert_eq!(fs::read(path).unwrap(), b"changed");
        }
        assert_eq!(fs::metadata(&a).unwrap().ino(), fs::metadata(&b).unwrap().ino());
        fs::write(&a, "again").unwrap();
        assert_eq!(fs::read(&b).unwrap(), b"again");
        held.iter().for_each(|file| assert_eq!(read(file), OLD));
    });
}

#[test]
fn renamed_linked_and_removed_while_open() {
    on_image(one_file, |site| {
        let reader = File::open(site.path("f")).unwrap();
        fs::rename(site.path("f"), site.path("g")).unwrap();
        assert_eq!(fs::read(site.path("g")).unwrap(), OLD);
        fs::hard_link(site.path("g"), site.path("h")).unwrap();
        fs::write(site.path("h"), "new").unwrap();
        assert_eq!(fs::read(site.path("g")).unwrap(), b"new");
        fs::remove_file(site.path("g")).unwrap();
        fs::remove_file(site.path("h")).unwrap();
        assert_eq!(read(&reader), OLD);
        fs::write(site.path("f"), "another").unwrap();
        assert_eq!(fs::read(site.path("f")).unwrap(), b"another");
    });
}

/// There is no name to look up again behind /proc/self/fd. The kernel would open the image's file for writing.
#[test]
fn reopened_by_its_descriptor_an_old_inode_is_written_once_nobody_reads_the_image_by_it() {
    on_image(one_file, |site| {
        let reader = File::open(site.path("f")).unwrap();
        let place = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(site.path("f")).unwrap();
        let itself = format!("/proc/self/fd/{}", place.as_raw_fd());
        let write = || OpenOptions::new().read(true).write(true).open(&itself);
        for _ in 0..3 {
            assert_eq!(write().unwrap_err().raw_os_error(), Some(libc::ETXTBSY));
        }
        fs::write(site.path("f"), "new").unwrap();
        assert_eq!(read(&File::open(&itself).unwrap()), b"new");
        assert_eq!(read(&reader), OLD);
        assert_eq!(fs::read(site.lower.join("f")).unwrap(), OLD);
        drop(reader);
        // The service hears of it a moment later.
        eventually("nobody reads the image's file", || write().is_ok());
        for (count, byte) in [b"1", b"2", b"3"].into_iter().enumerate() {
            let writer = write().unwrap();
            writer.write_all_at(byte, 0).unwrap();
            assert_eq!(read(&writer)[0], byte[0]);
            assert_eq!(fs::read(site.path("f")).unwrap(), [byte, &b"ew"[..]].concat(), "round {count}");
        }
        fs::write(site.path("f"), "end").unwrap();
        assert_eq!(fs::read(site.path("f")).unwrap(), b"end");
    });
}
