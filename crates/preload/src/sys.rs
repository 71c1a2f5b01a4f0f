//! System calls, made directly.

use core::arch::asm;

pub const EINTR: isize = -4;
pub const EINVAL: isize = -22;
pub const AT_FDCWD: usize = -100_isize as usize;

pub mod nr {
    pub const CLOCK_GETTIME: usize = 228;
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const OPEN: usize = 2;
    pub const CLOSE: usize = 3;
    pub const STAT: usize = 4;
    pub const FSTAT: usize = 5;
    pub const LSTAT: usize = 6;
    pub const LSEEK: usize = 8;
    pub const MMAP: usize = 9;
    pub const MPROTECT: usize = 10;
    pub const MUNMAP: usize = 11;
    pub const PREAD64: usize = 17;
    pub const PWRITE64: usize = 18;
    pub const WRITEV: usize = 20;
    pub const FDATASYNC: usize = 75;
    pub const FTRUNCATE: usize = 77;
    pub const UMASK: usize = 95;
    pub const SETRLIMIT: usize = 160;
    pub const PRLIMIT64: usize = 302;
    pub const IOCTL: usize = 16;
    pub const POLL: usize = 7;
    pub const SELECT: usize = 23;
    pub const PSELECT6: usize = 270;
    pub const PPOLL: usize = 271;
    pub const NANOSLEEP: usize = 35;
    pub const MADVISE: usize = 28;
    pub const ACCESS: usize = 21;
    pub const DUP: usize = 32;
    pub const DUP2: usize = 33;
    pub const GETPID: usize = 39;
    pub const SENDMSG: usize = 46;
    pub const CLONE: usize = 56;
    pub const FORK: usize = 57;
    pub const VFORK: usize = 58;
    pub const EXECVE: usize = 59;
    pub const FCNTL: usize = 72;
    pub const FLOCK: usize = 73;
    pub const FSYNC: usize = 74;
    pub const GETCWD: usize = 79;
    pub const CHDIR: usize = 80;
    pub const FCHDIR: usize = 81;
    pub const RENAME: usize = 82;
    pub const MKDIR: usize = 83;
    pub const LINK: usize = 86;
    pub const UNLINK: usize = 87;
    pub const SYMLINK: usize = 88;
    pub const FCHMOD: usize = 91;
    pub const FCHOWN: usize = 93;
    pub const SYNC_FILE_RANGE: usize = 277;
    pub const UTIMENSAT: usize = 280;
    pub const FALLOCATE: usize = 285;
    pub const READLINK: usize = 89;
    pub const SETUID: usize = 105;
    pub const GETEUID: usize = 107;
    pub const GETEGID: usize = 108;
    pub const SETGID: usize = 106;
    pub const SETREUID: usize = 113;
    pub const SETREGID: usize = 114;
    pub const SETGROUPS: usize = 116;
    pub const SETRESUID: usize = 117;
    pub const SETRESGID: usize = 119;
    pub const SETFSUID: usize = 122;
    pub const SETFSGID: usize = 123;
    pub const CAPSET: usize = 126;
    pub const STATFS: usize = 137;
    pub const SENDFILE: usize = 40;
    pub const FSTATFS: usize = 138;
    pub const COPY_FILE_RANGE: usize = 326;
    pub const PIVOT_ROOT: usize = 155;
    pub const PRCTL: usize = 157;
    pub const ARCH_PRCTL: usize = 158;
    pub const CHROOT: usize = 161;
    pub const MOUNT: usize = 165;
    pub const UMOUNT2: usize = 166;
    pub const GETTID: usize = 186;
    pub const READAHEAD: usize = 187;
    pub const SETXATTR: usize = 188;
    pub const FSETXATTR: usize = 190;
    pub const GETXATTR: usize = 191;
    pub const FGETXATTR: usize = 193;
    pub const LISTXATTR: usize = 194;
    pub const FLISTXATTR: usize = 196;
    pub const REMOVEXATTR: usize = 197;
    pub const FREMOVEXATTR: usize = 199;
    pub const GETDENTS64: usize = 217;
    pub const FADVISE64: usize = 221;
    pub const EXIT_GROUP: usize = 231;
    pub const OPENAT: usize = 257;
    pub const MKDIRAT: usize = 258;
    pub const NEWFSTATAT: usize = 262;
    pub const UNLINKAT: usize = 263;
    pub const RENAMEAT: usize = 264;
    pub const LINKAT: usize = 265;
    pub const SYMLINKAT: usize = 266;
    pub const READLINKAT: usize = 267;
    pub const FACCESSAT: usize = 269;
    pub const UNSHARE: usize = 272;
    pub const INOTIFY_ADD_WATCH: usize = 254;
    pub const FANOTIFY_MARK: usize = 301;
    pub const DUP3: usize = 292;
    pub const SENDMMSG: usize = 307;
    pub const SETNS: usize = 308;
    pub const RENAMEAT2: usize = 316;
    pub const SECCOMP: usize = 317;
    pub const EXECVEAT: usize = 322;
    pub const STATX: usize = 332;
    pub const IO_SETUP: usize = 206;
    pub const PERF_EVENT_OPEN: usize = 298;
    pub const BPF: usize = 321;
    pub const IO_URING_SETUP: usize = 425;
    pub const FSCONFIG: usize = 431;
    pub const PIDFD_GETFD: usize = 438;
    pub const MOVE_MOUNT: usize = 429;
    pub const CLONE3: usize = 435;
    pub const CLOSE_RANGE: usize = 436;
    pub const FACCESSAT2: usize = 439;
    pub const LANDLOCK_RESTRICT_SELF: usize = 446;
}

pub const PROT_READ: usize = 1;
pub const PROT_WRITE: usize = 2;
pub const PROT_EXEC: usize = 4;
pub const MAP_PRIVATE: usize = 2;
pub const MAP_ANONYMOUS: usize = 0x20;
pub const MAP_FIXED_NOREPLACE: usize = 0x10_0000;
pub const O_WRONLY: usize = 1;
pub const O_CREAT: usize = 0o100;
pub const O_APPEND: usize = 0o2000;
pub const O_DIRECTORY: usize = 0o200_000;
pub const O_PATH: usize = 0o10_000_000;
pub const O_CLOEXEC: usize = 0o2_000_000;

/// The result is a value or a negated errno.
///
/// # Safety
/// The call must be allowed to do to memory what its arguments say.
#[inline(always)]
pub unsafe fn call(number: usize, arguments: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the kernel changes rax, rcx and r11 only; memory as the caller promised.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            in("r9") arguments[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Opens a path that ends with a zero byte: a descriptor or a negated errno.
pub fn open(path: &[u8], flags: usize, mode: usize) -> isize {
    debug_assert_eq!(path.last(), Some(&0));
    // SAFETY: the kernel reads the path up to its zero byte.
    unsafe { call(nr::OPENAT, [AT_FDCWD, path.as_ptr() as usize, flags | O_CLOEXEC, mode, 0, 0]) }
}

pub fn read(descriptor: i32, buffer: &mut [u8]) -> isize {
    loop {
        // SAFETY: the kernel writes into the buffer, within its length.
        let got = unsafe {
            call(nr::READ, [descriptor as usize, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0, 0])
        };
        if got != EINTR {
            return got;
        }
    }
}

/// Reads words at a place in a file: how many bytes, or a negated errno.
pub fn read_at(descriptor: i32, words: &mut [u64], at: usize) -> isize {
    let arguments = [descriptor as usize, words.as_mut_ptr() as usize, size_of_val(words), at, 0, 0];
    // SAFETY: the kernel writes into the words, within their length; any bits are numbers.
    unsafe { call(nr::PREAD64, arguments) }
}

/// How many bytes of the auxiliary vector came; `None` before Linux 6.4.
pub fn auxiliary_vector(words: &mut [u64]) -> Option<usize> {
    const PR_GET_AUXV: usize = 0x4155_5856;
    let bytes = size_of_val(words);
    // SAFETY: the kernel writes into the words, within their length.
    let got = unsafe { call(nr::PRCTL, [PR_GET_AUXV, words.as_mut_ptr() as usize, bytes, 0, 0, 0]) };
    // It tells how many there are, which may be more.
    usize::try_from(got).ok().map(|got| got.min(bytes))
}

/// Succeeds and does nothing where a process has one thread; EINVAL where it has more. The result as it comes.
pub fn unshare_memory() -> isize {
    const CLONE_VM: usize = 0x100;
    // SAFETY: concerns no memory but as said.
    unsafe { call(nr::UNSHARE, [CLONE_VM, 0, 0, 0, 0, 0]) }
}

/// Where an open file ends.
pub fn size_of(descriptor: i32) -> Option<usize> {
    const SEEK_END: usize = 2;
    // SAFETY: concerns no memory.
    let end = unsafe { call(nr::LSEEK, [descriptor as usize, 0, SEEK_END, 0, 0, 0]) };
    usize::try_from(end).ok()
}

/// Ends the process.
pub fn exit(status: usize) -> ! {
    loop {
        // SAFETY: concerns no memory that anybody will use.
        unsafe { call(nr::EXIT_GROUP, [status, 0, 0, 0, 0, 0]) };
    }
}

/// Writes all of it, or as much as the kernel takes.
pub fn write_all(descriptor: i32, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the kernel reads the bytes.
        let written =
            unsafe { call(nr::WRITE, [descriptor as usize, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0]) };
        match written {
            EINTR => {}
            1.. => bytes = bytes.get(written as usize..).unwrap_or(&[]),
            _ => return,
        }
    }
}

pub fn close(descriptor: i32) {
    // SAFETY: concerns no memory; callers close what they opened.
    unsafe { call(nr::CLOSE, [descriptor as usize, 0, 0, 0, 0, 0]) };
}

/// Sleeps so long, or less when a signal comes.
pub fn nap(duration_ns: u64) {
    let time = [0, duration_ns];
    // SAFETY: the kernel reads the two words.
    unsafe { call(nr::NANOSLEEP, [time.as_ptr() as usize, 0, 0, 0, 0, 0]) };
}

/// Fresh memory, readable and writable; at `address` or nowhere if that is not zero.
pub fn map(address: usize, length: usize) -> Option<usize> {
    let fixed = if address == 0 { 0 } else { MAP_FIXED_NOREPLACE };
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | fixed;
    // SAFETY: an anonymous mapping that replaces nothing.
    let got = unsafe { call(nr::MMAP, [address, length, PROT_READ | PROT_WRITE, flags, usize::MAX, 0]) };
    if got < 0 {
        return None;
    }
    let got = got as usize;
    if address != 0 && got != address {
        // Kernels before 4.17 take the address as a hint.
        // SAFETY: it was mapped just now, and nobody knows of it.
        unsafe { call(nr::MUNMAP, [got, length, 0, 0, 0, 0]) };
        return None;
    }
    Some(got)
}

/// A file's pages at an address, in the place of what is there. False if the kernel refuses.
///
/// # Safety
/// What is in the range is replaced by what is in the file.
pub unsafe fn map_file(address: usize, length: usize, rights: usize, descriptor: i32, at: usize) -> bool {
    const MAP_FIXED: usize = 0x10;
    let arguments = [address, length, rights, MAP_PRIVATE | MAP_FIXED, descriptor as usize, at];
    // SAFETY: as the caller promised.
    unsafe { call(nr::MMAP, arguments) == address as isize }
}

/// # Safety
/// Nothing may use the range afterwards.
pub unsafe fn unmap(address: usize, length: usize) {
    // SAFETY: as the caller promised.
    unsafe { call(nr::MUNMAP, [address, length, 0, 0, 0, 0]) };
}

/// # Safety
/// Nobody may rely on rights that the range loses.
pub unsafe fn protect(address: usize, length: usize, rights: usize) -> bool {
    // SAFETY: as the caller promised.
    unsafe { call(nr::MPROTECT, [address, length, rights, 0, 0, 0]) == 0 }
}

/// Fills the range with zeros in forked children.
///
/// # Safety
/// The range must be private anonymous memory that may be zeroed there.
pub unsafe fn wipe_on_fork(address: usize, length: usize) -> bool {
    const MADV_WIPEONFORK: usize = 18;
    // SAFETY: as the caller promised.
    unsafe { call(nr::MADVISE, [address, length, MADV_WIPEONFORK, 0, 0, 0]) == 0 }
}

/// The monotonic clock, as fine as it is cheap: some milliseconds.
pub fn coarse_clock_ms() -> u64 {
    const CLOCK_MONOTONIC_COARSE: usize = 6;
    let mut time = [0u64; 2];
    // SAFETY: the kernel writes the two words.
    unsafe { call(nr::CLOCK_GETTIME, [CLOCK_MONOTONIC_COARSE, time.as_mut_ptr() as usize, 0, 0, 0, 0]) };
    time[0] * 1000 + time[1] / 1_000_000
}

pub fn process() -> u32 {
    // SAFETY: concerns no memory.
    unsafe { call(nr::GETPID, [0; 6]) as u32 }
}

pub fn thread() -> u32 {
    // SAFETY: concerns no memory.
    unsafe { call(nr::GETTID, [0; 6]) as u32 }
}

/// Some of `struct stat`.
pub struct Status {
    pub device: u64,
    pub inode: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub links: u64,
    pub size_bytes: u64,
    pub mtime_s: i64,
    pub mtime_ns: u64,
    pub ctime_s: u64,
    pub ctime_ns: u64,
}

impl Status {
    pub fn is_regular(&self) -> bool {
        self.mode & 0o170_000 == 0o100_000
    }

    pub fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    fn from_words(words: &[u64; 18]) -> Self {
        Self {
            device: words[0],
            inode: words[1],
            links: words[2],
            mode: words[3] as u32,
            uid: (words[3] >> 32) as u32,
            gid: words[4] as u32,
            size_bytes: words[6],
            mtime_s: words[11] as i64,
            mtime_ns: words[12],
            ctime_s: words[13],
            ctime_ns: words[14],
        }
    }
}

pub fn status(descriptor: usize) -> Option<Status> {
    let mut words = [0; 18];
    // SAFETY: the kernel writes the 144 bytes of its structure.
    let done = unsafe { call(nr::FSTAT, [descriptor, words.as_mut_ptr() as usize, 0, 0, 0, 0]) };
    (done == 0).then(|| Status::from_words(&words))
}

/// Nothing of a mount is executed; in the flags of statfs(2).
pub const ST_NOEXEC: u64 = 8;

/// Flags of the mount where a path, which ends with a zero byte, leads to.
pub fn mount_flags(path: &[u8]) -> Option<u64> {
    const ST_VALID: u64 = 0x20;
    const FLAGS_AT: usize = 10;
    debug_assert!(path.contains(&0));
    let mut words = [0u64; 15];
    // SAFETY: the path ends with a zero byte, and the kernel writes its structure, of that many words.
    let done = unsafe { call(nr::STATFS, [path.as_ptr() as usize, words.as_mut_ptr() as usize, 0, 0, 0, 0]) };
    (done == 0 && words[FLAGS_AT] & ST_VALID != 0).then_some(words[FLAGS_AT])
}

/// Of a path with a zero byte somewhere.
pub fn status_at(path: &[u8]) -> Option<Status> {
    path.contains(&0).then_some(())?;
    let mut words = [0; 18];
    let arguments = [AT_FDCWD, path.as_ptr() as usize, words.as_mut_ptr() as usize, 0, 0, 0];
    // SAFETY: the kernel reads up to the zero byte, and writes the 144 bytes of its structure.
    let done = unsafe { call(nr::NEWFSTATAT, arguments) };
    (done == 0).then(|| Status::from_words(&words))
}

/// What a name of the program's is, without following it.
pub fn status_of_name(directory: usize, path: usize) -> Option<Status> {
    const AT_SYMLINK_NOFOLLOW: usize = 0x100;
    let mut words = [0; 18];
    let arguments = [directory, path, words.as_mut_ptr() as usize, AT_SYMLINK_NOFOLLOW, 0, 0];
    // SAFETY: the program's own path; the kernel writes the 144 bytes of its structure.
    let done = unsafe { call(nr::NEWFSTATAT, arguments) };
    (done == 0).then(|| Status::from_words(&words))
}

/// The process's umask, as /proc tells it: asking for it by umask(2) would change it for a moment.
pub fn umask() -> Option<u32> {
    const NAME: &[u8] = b"\nUmask:\t";
    let file = i32::try_from(open(b"/proc/self/status\0", 0, 0)).ok().filter(|file| *file >= 0)?;
    let mut text = [0; 512];
    let got = usize::try_from(read(file, &mut text));
    close(file);
    let text = text.get(..got.ok()?)?;
    let at = text.windows(NAME.len()).position(|part| part == NAME)? + NAME.len();
    let digits = text.get(at..)?.iter().take_while(|byte| (b'0'..b'8').contains(byte));
    Some(digits.fold(0, |umask, digit| umask << 3 | u32::from(digit - b'0')))
}

/// The device that a path of the program's leads to.
pub fn device_of(path: usize) -> Option<u64> {
    let mut words = [0; 18];
    // SAFETY: the kernel reads the path, or says EFAULT, and writes the 144 bytes of its structure.
    let done = unsafe { call(nr::NEWFSTATAT, [AT_FDCWD, path, words.as_mut_ptr() as usize, 0, 0, 0]) };
    (done == 0).then(|| Status::from_words(&words).device)
}

/// Whether a path of the program's is one that it may execute.
pub fn is_executable(path: usize) -> bool {
    const X_OK: usize = 1;
    // SAFETY: the kernel reads the path, or says EFAULT.
    unsafe { call(nr::FACCESSAT, [AT_FDCWD, path, X_OK, 0, 0, 0]) == 0 }
}

/// Opened for reading and nothing else, and not for direct I/O.
pub fn is_for_reading_only(descriptor: usize) -> bool {
    const F_GETFL: usize = 3;
    const O_DIRECT: isize = 0o40_000;
    // SAFETY: concerns no memory.
    let flags = unsafe { call(nr::FCNTL, [descriptor, F_GETFL, 0, 0, 0, 0]) };
    flags >= 0 && flags & (3 | O_DIRECT | O_PATH as isize) == 0
}

/// Where the kernel says that a descriptor's file is.
pub fn path_of(descriptor: usize, buffer: &mut [u8]) -> Option<&[u8]> {
    let mut link = crate::text::Text::<40>::default();
    link.push(b"/proc/self/fd/").number(descriptor as u64).push(&[0]);
    let arguments =
        [AT_FDCWD, link.bytes().as_ptr() as usize, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0];
    // SAFETY: the kernel reads up to the zero byte and writes into the buffer, within its length.
    let got = unsafe { call(nr::READLINKAT, arguments) };
    buffer.get(..usize::try_from(got).ok()?).filter(|path| path.len() < buffer.len())
}
