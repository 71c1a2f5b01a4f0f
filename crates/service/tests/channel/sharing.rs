//! Containers on one image have its bytes once.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use polytropo_client::{At, Channel, Error, File};
use serde_json::json;

use crate::Test;
use crate::hostile::Raw;
use crate::support::{Site, fork_child, pattern};

pub const TESTS: &[Test] = &[
    ("an_image_is_cached_once", an_image_is_cached_once),
    ("small_files_of_an_image_are_read_once", small_files_of_an_image_are_read_once),
    ("a_file_of_ones_own_is_nobody_elses", a_file_of_ones_own_is_nobody_elses),
    ("doors_show_only_what_was_opened_through_them", doors_show_only_what_was_opened_through_them),
    ("the_host_does_not_keep_them_as_well", the_host_does_not_keep_them_as_well),
    ("the_ceiling_holds_under_load", the_ceiling_holds_under_load),
    ("a_door_that_ends_leaves_the_others_their_windows", a_door_that_ends_leaves_the_others_their_windows),
];

const RDONLY: u32 = libc::O_RDONLY as u32;
const RDWR: u32 = libc::O_RDWR as u32;
const SIZE: usize = (1 << 20) + 77;

/// A container on the image in `image`, with an upper of its own.
fn container(site: &mut Site, name: &str) -> PathBuf {
    let (lower, upper) = (site.directory("image"), site.directory(&format!("upper-{name}")));
    let lower = json!({"kind": "dir", "path": lower, "read_only": true, "coherence": "immutable"});
    let upper = json!({"kind": "dir", "path": upper, "coherence": "exclusive"});
    site.mount_stack(name, &json!({"kind": "union", "lowers": [lower], "upper": upper}))
}

fn site() -> Site {
    let site = Site::start_with(&["--channel-writes"]);
    for (name, seed) in [("large", 1), ("other", 2)] {
        fs::write(site.directory("image").join(name), pattern(seed, 0, SIZE)).unwrap();
    }
    site
}

fn open(channel: &Channel, name: &str, flags: u32) -> File {
    channel.open(At::Root, name.as_bytes(), flags, 0, 0).unwrap().file
}

fn read(channel: &Channel, file: File) -> Vec<u8> {
    let mut bytes = vec![0; SIZE + 1];
    let count = channel.pread(file, &mut bytes, 0).unwrap();
    bytes.truncate(count);
    bytes
}

/// The windows that programs on this mount could open if they knew their names: inode and bytes of memory.
fn windows(site: &Site, mnt: &Path) -> BTreeMap<u64, u64> {
    let raw = Raw::connect(site, mnt);
    let place = PathBuf::from(format!("/proc/self/fd/{}", raw.windows.as_raw_fd()));
    let entries = fs::read_dir(place).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    entries.map(|found| (found.ino(), found.blocks() * 512)).collect()
}

fn an_image_is_cached_once() {
    let mut site = site();
    let mounts: Vec<_> = (0..10).map(|n| container(&mut site, &format!("c{n}"))).collect();
    let channels: Vec<_> = mounts.iter().map(|mnt| site.connect(mnt)).collect();
    let mut seen = None;
    for (mnt, channel) in mounts.iter().zip(&channels) {
        assert_eq!(read(channel, open(channel, "large", RDONLY)), pattern(1, 0, SIZE));
        let found = windows(&site, mnt);
        assert_eq!(found.len(), 1);
        assert_eq!(*seen.get_or_insert(found.clone()), found, "the same memory, and no more of it");
    }
    // All of it, the window's words, and what is left of the last block.
    let bytes: u64 = seen.unwrap().values().sum();
    assert!((SIZE as u64..SIZE as u64 + (128 << 10)).contains(&bytes), "{bytes}");
}

fn small_files_of_an_image_are_read_once() {
    let mut site = site();
    let image = site.directory("image");
    for number in 0..50 {
        fs::write(image.join(format!("small-{number}")), pattern(number, 0, number as usize * 900)).unwrap();
    }
    let mounts: Vec<_> = (0..3).map(|n| container(&mut site, &format!("c{n}"))).collect();
    let told = |site: &mut Site| {
        let told = site.order(&json!({"op": "stats"}));
        let slabs = &told["past"][0]["slabs"];
        let number = |name: &str| slabs[name].as_u64().unwrap();
        (number("fills"), number("files"), number("hits"), number("slab_bytes"))
    };
    let channels = [site.connect(&mounts[0]), site.connect(&mounts[1])];
    for channel in &channels {
        for number in 0..50 {
            let name = format!("small-{number}");
            assert_eq!(
                read(channel, open(channel, &name, RDONLY)),
                pattern(number, 0, number as usize * 900)
            );
        }
    }
    let (fills, files, hits, slab_bytes) = told(&mut site);
    assert_eq!((fills, files), (50, 50));
    assert!(hits >= 50 && slab_bytes < 4 << 20, "{hits} hits, {slab_bytes} bytes");
    // The kernel's way, in a third container.
    for number in 1..50 {
        let name = format!("small-{number}");
        assert!(fs::read(mounts[2].join(name)).unwrap() == pattern(number, 0, number as usize * 900));
    }
    let (fills, files, more, _) = told(&mut site);
    assert_eq!((fills, files), (50, 50));
    assert!(more >= hits + 49, "{more} hits after {hits}");
    // What one of them changes is its own.
    let opened = fs::File::open(mounts[2].join("small-9")).unwrap();
    fs::write(mounts[2].join("small-9"), b"changed").unwrap();
    assert_eq!(fs::read(mounts[2].join("small-9")).unwrap(), b"changed");
    let mut bytes = [0; 8];
    assert_eq!(std::os::unix::fs::FileExt::read_at(&opened, &mut bytes, 0).unwrap(), 7);
    assert_eq!(&bytes[..7], b"changed");
    let unchanged = read(&channels[1], open(&channels[1], "small-9", RDONLY));
    assert_eq!(unchanged, pattern(9, 0, 8_100));
    let again = open(&channels[0], "small-9", RDWR);
    channels[0].pwrite(again, b"other", 0).unwrap();
    let own = read(&channels[0], open(&channels[0], "small-9", RDONLY));
    assert_eq!((&own[..5], &own[5..]), (&b"other"[..], &pattern(9, 0, 8_100)[5..]));
}

fn a_file_of_ones_own_is_nobody_elses() {
    let mut site = site();
    let (first, second) = (container(&mut site, "first"), container(&mut site, "second"));
    let (ours, theirs) = (site.connect(&first), site.connect(&second));
    let (reader, their_reader) = (open(&ours, "large", RDONLY), open(&theirs, "large", RDONLY));
    let base = pattern(1, 0, SIZE);
    assert!(read(&ours, reader) == base && read(&theirs, their_reader) == base);
    let writer = open(&ours, "large", RDWR);
    let mut changed = base.clone();
    for turn in 0..20 {
        let at = turn * 50_000;
        changed[at..at + 3].copy_from_slice(b"new");
        assert_eq!(ours.pwrite(writer, b"new", at as u64).unwrap(), 3);
        assert!(read(&ours, reader) == changed, "the file of one's own, turn {turn}");
        assert!(read(&theirs, their_reader) == base, "the image's, turn {turn}");
    }
    assert!(read(&theirs, open(&theirs, "large", RDONLY)) == base);
    // Both read shared memory again, each its own.
    let (mine, other) = (windows(&site, &first), windows(&site, &second));
    assert_eq!((mine.len(), other.len()), (1, 1));
    assert!(mine.keys().all(|inode| !other.contains_key(inode)));
    // A file of the image that goes through the kernel is not read from shared memory any more.
    let kernels = fs::OpenOptions::new().read(true).write(true).open(second.join("large")).unwrap();
    let mut byte = [0];
    assert_eq!(theirs.pread(their_reader, &mut byte, 0), Err(Error::Kernel));
    drop(kernels);
    assert!(read(&ours, reader) == changed);
}

fn doors_show_only_what_was_opened_through_them() {
    let mut site = site();
    let (first, second) = (container(&mut site, "first"), container(&mut site, "second"));
    let (ours, theirs) = (site.connect(&first), site.connect(&second));
    read(&ours, open(&ours, "large", RDONLY));
    assert_eq!(windows(&site, &second).len(), 0);
    read(&theirs, open(&theirs, "other", RDONLY));
    let (mine, other) = (windows(&site, &first), windows(&site, &second));
    assert_eq!((mine.len(), other.len()), (1, 1));
    assert!(mine.keys().all(|inode| !other.contains_key(inode)));
}

fn a_door_that_ends_leaves_the_others_their_windows() {
    let mut site = site();
    let (first, second) = (container(&mut site, "first"), container(&mut site, "second"));
    {
        let (ours, theirs) = (site.connect(&first), site.connect(&second));
        read(&ours, open(&ours, "large", RDONLY));
        read(&theirs, open(&theirs, "large", RDONLY));
    }
    site.order(&json!({"op": "unmount", "mountpoint": first}));
    let theirs = site.connect(&second);
    assert_eq!(windows(&site, &second).len(), 1);
    assert_eq!(read(&theirs, open(&theirs, "large", RDONLY)), pattern(1, 0, SIZE));
    assert_eq!(windows(&site, &second).len(), 1);
    let again = container(&mut site, "first");
    let (ours, theirs) = (site.connect(&again), site.connect(&second));
    assert_eq!(windows(&site, &again).len(), 0);
    assert_eq!(read(&ours, open(&ours, "large", RDONLY)), pattern(1, 0, SIZE));
    assert_eq!(windows(&site, &again), windows(&site, &second));
    assert_eq!(read(&theirs, open(&theirs, "large", RDONLY)), pattern(1, 0, SIZE));
}

/// Bytes of a file in the host's cache.
fn cached(file: &fs::File) -> usize {
    let size = file.metadata().unwrap().len() as usize;
    let (read, shared) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::SHARED);
    // SAFETY: a new mapping, of which nothing is touched.
    let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), size, read, shared, file, 0) }.unwrap();
    let mut pages = vec![0u8; size.div_ceil(4096)];
    // SAFETY: the mapping, and a byte for each of its pages.
    assert_eq!(unsafe { libc::mincore(base, size, pages.as_mut_ptr()) }, 0);
    // SAFETY: mapped above.
    unsafe { rustix::mm::munmap(base, size) }.unwrap();
    pages.iter().filter(|page| **page & 1 != 0).count() * 4096
}

fn the_host_does_not_keep_them_as_well() {
    const LARGE: usize = 16 << 20;
    let mut site = site();
    let path = site.directory("image").join("library");
    fs::write(&path, pattern(7, 0, LARGE)).unwrap();
    let file = fs::File::open(&path).unwrap();
    file.sync_all().unwrap();
    if rustix::fs::fstatfs(&file).unwrap().f_type == 0x0102_1994 {
        println!("skipped in part: files of a tmpfs have no other place");
        return;
    }
    let mnt = container(&mut site, "one");
    let channel = site.connect(&mnt);
    let large = open(&channel, "library", RDONLY);
    let mut bytes = vec![0; 100_000];
    for at in (0..LARGE).step_by(bytes.len()) {
        let count = channel.pread(large, &mut bytes, at as u64).unwrap();
        assert!(bytes[..count] == pattern(7, at as u64, count));
    }
    let left = cached(&file);
    assert!(left <= 5 << 20, "{left} bytes of {LARGE} are there twice");
}

/// What the whole tmpfs holds, in bytes.
fn used(site: &Site, mnt: &Path) -> u64 {
    let found = rustix::fs::fstatfs(&Raw::connect(site, mnt).windows).unwrap();
    (found.f_blocks - found.f_bfree) * found.f_bsize as u64
}

/// Many files, several programs, two doors, and room for a few blocks: what the tmpfs really holds stays below the ceiling.
fn the_ceiling_holds_under_load() {
    const CACHE_BYTES: u64 = 4 << 20;
    const FILES: u64 = 40;
    let mut site = Site::start_with(&["--channel-writes", "--cache-bytes", &CACHE_BYTES.to_string()]);
    let image = site.directory("image");
    let size = 400_000;
    for n in 0..FILES {
        fs::write(image.join(n.to_string()), pattern(n, 0, size)).unwrap();
    }
    let mounts = [container(&mut site, "first"), container(&mut site, "second")];
    let children: Vec<_> = (0..4)
        .map(|child| {
            let (site, mnt) = (&site, &mounts[child % 2]);
            fork_child(move || {
                let channel = site.connect(mnt);
                let files: Vec<_> = (0..FILES).map(|n| open(&channel, &n.to_string(), RDONLY)).collect();
                let mut random = child as u64 + 1;
                let mut bytes = vec![0; 100_000];
                for _ in 0..3000 {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // A few files are read often.
                    let n = (random >> 33) % if random >> 32 & 1 == 0 { FILES } else { 3 };
                    let at = (random >> 40) % size as u64;
                    let count = channel.pread(files[n as usize], &mut bytes, at).unwrap();
                    assert_eq!(count, (size - at as usize).min(bytes.len()));
                    assert!(bytes[..count] == pattern(n, at, count), "other bytes than those of {n} at {at}");
                }
            })
        })
        .collect();
    let mut most = 0;
    for _ in 0..50 {
        most = most.max(used(&site, &mounts[0]));
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!(children.into_iter().all(|child| child.wait()));
    let last = used(&site, &mounts[0]);
    let told = site.order(&json!({"op": "stats"}));
    let (told, rss_bytes) = (&told["past"][0]["windows"], told["rss_bytes"].as_u64().unwrap());
    // A sixteenth is left to what the service holds beside windows.
    assert_eq!(told["bytes_max"], CACHE_BYTES - CACHE_BYTES / 16);
    assert!(told["bytes"].as_u64().unwrap() >= last, "{told} of {last}");
    assert!(
        told["fills"].as_u64() > told["evictions"].as_u64() && told["shown_again"].as_u64() > Some(0),
        "{told}"
    );
    // What the worker itself takes beside the cache does not grow with it.
    assert!(rss_bytes < CACHE_BYTES + (48 << 20), "{rss_bytes}");
    assert!(last > CACHE_BYTES / 2, "nothing much is kept: {last}");
    assert!(most <= CACHE_BYTES, "{most} bytes");
}
