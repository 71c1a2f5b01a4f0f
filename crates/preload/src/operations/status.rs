//! Attributes as the kernel's `struct stat` and `struct statx`.

use polytropo_client::Attributes;

use super::process;

/// Writes the program's `struct stat`.
pub fn put(found: &Attributes, to: usize) {
    let words = words(found);
    // SAFETY: the program's own structure, of 144 bytes.
    unsafe { (to as *mut [u64; 18]).write_unaligned(words) };
}

/// Writes the program's `struct statx`.
pub fn put_statx(found: &Attributes, to: usize) {
    // SAFETY: the program's own structure, of 256 bytes.
    unsafe { (to as *mut [u64; 32]).write_unaligned(statx_words(found)) };
}

/// The kernel's `struct statx`.
fn statx_words(found: &Attributes) -> [u64; 32] {
    const BASIC: u64 = 0x7ff;
    const BTIME: u64 = 0x800;
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let [major, minor] = split_device(found.rdev);
    let [own_major, own_minor] = split_device(process::setting().device());
    let block = if found.blksize_bytes == 0 { 4096 } else { 1 << found.blksize_bytes.ilog2() };
    let mut words = [0; 32];
    words[0] = BASIC | if found.has_btime { BTIME } else { 0 } | block << 32;
    words[2] = pair(found.nlink, found.uid);
    words[3] = pair(found.gid, found.mode & 0xffff);
    words[4] = found.ino;
    words[5] = found.size_bytes;
    words[6] = found.blocks_512;
    let times = [
        (found.atime_s, found.atime_ns),
        (found.btime_s, found.btime_ns),
        (found.ctime_s, found.ctime_ns),
        (found.mtime_s, found.mtime_ns),
    ];
    for (place, (seconds, nanoseconds)) in words[8..].chunks_exact_mut(2).zip(times) {
        (place[0], place[1]) = (seconds as u64, nanoseconds.into());
    }
    words[16] = pair(major, minor);
    words[17] = pair(own_major, own_minor);
    words
}

/// A device number's two parts.
fn split_device(device: u64) -> [u32; 2] {
    let major = (device >> 8 & 0xfff) | (device >> 32 & !0xfff);
    let minor = (device & 0xff) | (device >> 12 & !0xff);
    [major as u32, minor as u32]
}

/// The kernel's `struct stat`.
fn words(found: &Attributes) -> [u64; 18] {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    // FUSE keeps a power of two.
    let block = if found.blksize_bytes == 0 { 4096 } else { 1 << found.blksize_bytes.ilog2() };
    [
        process::setting().device(),
        found.ino,
        found.nlink.into(),
        pair(found.mode, found.uid),
        found.gid.into(),
        found.rdev,
        found.size_bytes,
        block,
        found.blocks_512,
        found.atime_s as u64,
        found.atime_ns.into(),
        found.mtime_s as u64,
        found.mtime_ns.into(),
        found.ctime_s as u64,
        found.ctime_ns.into(),
        0,
        0,
        0,
    ]
}
