//! Names: making, moving, listing, removing.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::support::{c_path, errno, on_each_mount};

fn names(path: &Path) -> BTreeSet<OsString> {
    let names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name());
    // What a union keeps in its upper.
    names.filter(|name| !name.as_bytes().starts_with(b".wh.")).collect()
}

fn set(names: &[&str]) -> BTreeSet<OsString> {
    names.iter().map(Into::into).collect()
}

#[test]
fn names_come_move_and_go() {
    on_each_mount(|site| {
        fs::create_dir_all(site.path("a/b/c")).unwrap();
        fs::write(site.path("a/f"), "f").unwrap();
        assert_eq!(fs::metadata(site.path("missing")).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        fs::rename(site.path("a/f"), site.path("a/b/g")).unwrap();
        fs::rename(site.path("a/b"), site.path("moved")).unwrap();
        assert_eq!(fs::read(site.path("moved/g")).unwrap(), b"f");
        assert_eq!((names(&site.mount), names(&site.path("a"))), (set(&["a", "moved"]), set(&[])));
        assert_eq!(fs::remove_dir(site.path("moved")).unwrap_err().raw_os_error(), Some(libc::ENOTEMPTY));
        fs::write(site.path("missing"), "now there").unwrap();
        assert_eq!(fs::read(site.path("missing")).unwrap(), b"now there");
        fs::remove_dir_all(site.path("moved")).unwrap();
        assert_eq!(names(&site.source), set(&["a", "missing"]));
    });
}

#[test]
fn rename_obeys_its_flags() {
    on_each_mount(|site| {
        fs::write(site.path("a"), "a").unwrap();
        fs::create_dir(site.path("b")).unwrap();
        let rename = |flags| renameat_with(CWD, site.path("a"), CWD, site.path("b"), flags);
        assert_eq!(rename(RenameFlags::NOREPLACE).unwrap_err().raw_os_error(), libc::EEXIST);
        rename(RenameFlags::EXCHANGE).unwrap();
        assert!(fs::metadata(site.path("a")).unwrap().is_dir());
        assert_eq!(fs::read(site.path("b")).unwrap(), b"a");
        renameat_with(CWD, site.path("b"), CWD, site.path("c"), RenameFlags::NOREPLACE).unwrap();
        assert_eq!(names(&site.source), set(&["a", "c"]));
    });
}

#[test]
fn names_need_not_be_text() {
    on_each_mount(|site| {
        let odd: BTreeSet<OsString> = [&b"\xff\xfe"[..], b"new\nline", b" ", b"\x01", &[b'n'; 255]]
            .map(|n| OsString::from_vec(n.into()))
            .into();
        for name in &odd {
            fs::write(site.mount.join(name), name.as_bytes()).unwrap();
        }
        assert_eq!(names(&site.mount), odd);
        assert_eq!(names(&site.source), odd);
        assert_eq!(fs::read(site.mount.join(OsStr::from_bytes(b"\xff\xfe"))).unwrap(), b"\xff\xfe");
        let long = site.mount.join("n".repeat(256));
        assert_eq!(fs::write(long, "").unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
    });
}

#[test]
fn links_share_one_inode() {
    on_each_mount(|site| {
        fs::write(site.path("a"), "one").unwrap();
        fs::hard_link(site.path("a"), site.path("b")).unwrap();
        fs::write(site.path("b"), "two").unwrap();
        assert_eq!(fs::read(site.path("a")).unwrap(), b"two");
        let (a, b) = (fs::metadata(site.path("a")).unwrap(), fs::metadata(site.path("b")).unwrap());
        assert_eq!((a.ino(), a.nlink()), (b.ino(), 2));
        fs::remove_file(site.path("a")).unwrap();
        assert_eq!(fs::metadata(site.path("b")).unwrap().nlink(), 1);
        symlink("b", site.path("soft")).unwrap();
        symlink("nowhere", site.path("dangling")).unwrap();
        assert_eq!(fs::read(site.path("soft")).unwrap(), b"two");
        assert_eq!(fs::read_link(site.path("dangling")).unwrap(), Path::new("nowhere"));
        assert_eq!(fs::read(site.path("dangling")).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    });
}

#[test]
fn an_unlinked_file_lives_until_it_is_closed() {
    on_each_mount(|site| {
        let mut file = File::create_new(site.path("f")).unwrap();
        file.write_all(b"alive").unwrap();
        fs::remove_file(site.path("f")).unwrap();
        file.write_all(b" still").unwrap();
        let mut again =
            File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
        let mut read = String::new();
        again.read_to_string(&mut read).unwrap();
        assert_eq!(read, "alive still");
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        file.set_len(3).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3);
        assert_eq!(names(&site.mount), set(&[]));
    });
}

#[test]
fn a_file_renamed_over_stays_readable() {
    on_each_mount(|site| {
        fs::write(site.path("a"), "old").unwrap();
        let mut old = File::open(site.path("a")).unwrap();
        fs::write(site.path("b"), "new").unwrap();
        fs::rename(site.path("b"), site.path("a")).unwrap();
        let mut read = String::new();
        old.read_to_string(&mut read).unwrap();
        assert_eq!((read.as_str(), fs::read(site.path("a")).unwrap()), ("old", b"new".to_vec()));
    });
}

#[test]
fn special_files_work() {
    on_each_mount(|site| {
        let make = |name: &str, mode, device| {
            let path = c_path(&site.path(name));
            // SAFETY: a NUL-terminated path.
            assert_eq!(unsafe { libc::mknod(path.as_ptr(), mode, device) }, 0, "mknod: {}", errno());
        };
        make("fifo", libc::S_IFIFO | 0o600, 0);
        make("null", libc::S_IFCHR | 0o666, libc::makedev(1, 3));
        make("big", libc::S_IFBLK | 0o600, libc::makedev(259, 70_000));
        make("plain", libc::S_IFREG | 0o600, 0);
        let _listener = std::os::unix::net::UnixListener::bind(site.path("socket")).unwrap();
        let found = |name: &str| fs::symlink_metadata(site.path(name)).unwrap();
        assert!(found("fifo").file_type().is_fifo() && found("socket").file_type().is_socket());
        assert!(found("plain").is_file());
        assert_eq!(found("null").rdev(), libc::makedev(1, 3));
        assert_eq!(found("big").rdev(), libc::makedev(259, 70_000));
        let reader = {
            let path = site.path("fifo");
            std::thread::spawn(move || fs::read(path).unwrap())
        };
        fs::write(site.path("fifo"), "through").unwrap();
        assert_eq!(reader.join().unwrap(), b"through");
        assert!(std::os::unix::net::UnixStream::connect(site.path("socket")).is_ok());
    });
}

#[test]
fn large_directories_are_listed_whole() {
    on_each_mount(|site| {
        let all: BTreeSet<OsString> = (0..1_500).map(|n| format!("file-{n:04}").into()).collect();
        for name in &all {
            File::create(site.path(name.to_str().unwrap())).unwrap();
        }
        assert_eq!(names(&site.mount), all);
        for name in all.iter().filter(|name| name.as_bytes().ends_with(b"7")) {
            fs::remove_file(site.mount.join(name)).unwrap();
        }
        assert_eq!(names(&site.mount), names(&site.source));
        assert_eq!(names(&site.mount).len(), 1_350);
    });
}

/// getdents64(2) with a buffer for few entries: positions, and their end.
fn list_in_steps(path: &Path, buffer_len: usize) -> Vec<(Vec<u8>, i64)> {
    let directory = File::open(path).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&directory);
    let mut buffer = vec![0u8; buffer_len];
    let mut found = Vec::new();
    loop {
        // SAFETY: the kernel writes at most `buffer.len()` bytes.
        let count = unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), buffer.len()) };
        assert!(count >= 0, "getdents64: {}", errno());
        let mut rest = &buffer[..count as usize];
        if rest.is_empty() {
            return found;
        }
        while !rest.is_empty() {
            let next = i64::from_ne_bytes(rest[8..16].try_into().unwrap());
            let len = usize::from(u16::from_ne_bytes([rest[16], rest[17]]));
            let name = CString::new(rest[19..len].split(|&b| b == 0).next().unwrap()).unwrap();
            found.push((name.into_bytes(), next));
            rest = &rest[len..];
        }
    }
}

#[test]
fn a_listing_goes_on_where_it_stopped() {
    on_each_mount(|site| {
        for number in 0..50 {
            File::create(site.path(&format!("f{number}"))).unwrap();
        }
        // One entry at a time, the dots included.
        let found = list_in_steps(&site.mount, 32);
        let unique: BTreeSet<_> = found.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!((found.len(), unique.len()), (52, 52));
        assert!(unique.contains(&b"."[..]) && unique.contains(&b".."[..]));
        let directory = File::open(&site.mount).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&directory);
        // SAFETY: moves the position of an open directory.
        assert_eq!(unsafe { libc::lseek(fd, found[20].1, libc::SEEK_SET) }, found[20].1);
        let mut buffer = [0u8; 64];
        // SAFETY: the kernel writes at most `buffer.len()` bytes.
        let count = unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), buffer.len()) };
        assert!(count > 0);
        let name = buffer[19..].split(|&b| b == 0).next().unwrap();
        assert_eq!(name, found[21].0);
    });
}
