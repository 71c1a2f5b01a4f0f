//! System calls, made by hand.

use core::sync::atomic::AtomicU32;

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("polytropo-client makes its system calls by hand and knows x86-64 and AArch64 only");

#[cfg(target_arch = "x86_64")]
mod number {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const CLOSE: usize = 3;
    pub const MMAP: usize = 9;
    pub const MUNMAP: usize = 11;
    pub const MADVISE: usize = 28;
    pub const SOCKET: usize = 41;
    pub const CONNECT: usize = 42;
    pub const RECVFROM: usize = 45;
    pub const SENDMSG: usize = 46;
    pub const RECVMSG: usize = 47;
    pub const FCNTL: usize = 72;
    pub const FUTEX: usize = 202;
    pub const CLOCK_GETTIME: usize = 228;
    pub const OPENAT: usize = 257;
    pub const DUP3: usize = 292;
    pub const GETCPU: usize = 309;
}
#[cfg(target_arch = "aarch64")]
mod number {
    pub const READ: usize = 63;
    pub const WRITE: usize = 64;
    pub const CLOSE: usize = 57;
    pub const MMAP: usize = 222;
    pub const MUNMAP: usize = 215;
    pub const MADVISE: usize = 233;
    pub const SOCKET: usize = 198;
    pub const CONNECT: usize = 203;
    pub const RECVFROM: usize = 207;
    pub const SENDMSG: usize = 211;
    pub const RECVMSG: usize = 212;
    pub const FCNTL: usize = 25;
    pub const FUTEX: usize = 98;
    pub const CLOCK_GETTIME: usize = 113;
    pub const OPENAT: usize = 56;
    pub const DUP3: usize = 24;
    pub const GETCPU: usize = 168;
}

/// Makes a system call; below 0 it is a negated error number.
///
/// # Safety
/// The arguments must be right for the call, and the memory that they point to valid for it.
#[inline(always)]
unsafe fn call(number: usize, a: [usize; 6]) -> isize {
    let result: isize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the registers are those of the kernel's convention, all it clobbers is named; the caller vouches for the arguments.
    unsafe {
        core::arch::asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a[0], in("rsi") a[1],
            in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5], out("rcx") _, out("r11") _, options(nostack));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("svc 0", in("x8") number, inlateout("x0") a[0] as isize => result, in("x1") a[1],
            in("x2") a[2], in("x3") a[3], in("x4") a[4], in("x5") a[5], options(nostack));
    }
    result
}

/// An error number.
pub type Errno = i32;

fn outcome(result: isize) -> Result<usize, Errno> {
    if (-4095..0).contains(&result) { Err(-result as i32) } else { Ok(result as usize) }
}

/// A descriptor of this library's own, closed when dropped.
#[derive(Debug)]
pub struct Descriptor(i32);

impl Descriptor {
    pub fn number(&self) -> i32 {
        self.0
    }

    /// Gives the number up without closing it.
    pub fn forget(self) {
        core::mem::forget(self);
    }

    /// The same open file at a number of at least `lowest`, out of the way of programs that count on low ones.
    pub fn moved_up(self, lowest: i32) -> Self {
        const F_DUPFD_CLOEXEC: usize = 1030;
        // SAFETY: no memory is involved.
        let moved =
            unsafe { call(number::FCNTL, [self.0 as usize, F_DUPFD_CLOEXEC, lowest as usize, 0, 0, 0]) };
        match outcome(moved) {
            Ok(moved) => Self(moved as i32),
            Err(_) => self,
        }
    }

    /// Moves to the number of a descriptor that is never used or closed again.
    pub(crate) fn take_number_of(&mut self, former: &Descriptor) {
        const O_CLOEXEC: usize = 0o2000000;
        // SAFETY: no memory is involved.
        let moved = unsafe { call(number::DUP3, [self.0 as usize, former.0 as usize, O_CLOEXEC, 0, 0, 0]) };
        if let Ok(moved) = outcome(moved) {
            drop(core::mem::replace(self, Self(moved as i32)));
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: the number belongs to this value. A failure leaves nothing to be done.
        unsafe { call(number::CLOSE, [self.0 as usize, 0, 0, 0, 0, 0]) };
    }
}

const AF_UNIX: usize = 1;
const SOCK_SEQPACKET: usize = 5;
const SOCK_CLOEXEC: usize = 0o2000000;
const MSG_DONTWAIT: usize = 0x40;
const MSG_PEEK: usize = 2;
const MSG_NOSIGNAL: usize = 0x4000;
const MSG_CMSG_CLOEXEC: usize = 0x4000_0000;
const SOL_SOCKET: i32 = 1;
const SCM_RIGHTS: i32 = 1;

#[repr(C)]
struct UnixAddress {
    family: u16,
    path: [u8; 108],
}

/// Connects to a Unix socket of packets. ENAMETOOLONG for paths of more than 107 bytes.
pub fn connect(path: &[u8]) -> Result<Descriptor, Errno> {
    let mut address = UnixAddress { family: AF_UNIX as u16, path: [0; 108] };
    let place = address.path.get_mut(..path.len()).filter(|place| place.len() < 108);
    place.ok_or(crate::ENAMETOOLONG)?.copy_from_slice(path);
    // SAFETY: no memory is involved.
    let socket = unsafe { call(number::SOCKET, [AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, 0, 0, 0]) };
    let socket = Descriptor(outcome(socket)? as i32);
    let address = [core::ptr::from_ref(&address) as usize, size_of::<UnixAddress>()];
    // SAFETY: the address lives through the call and is as long as told.
    let connected = unsafe { call(number::CONNECT, [socket.0 as usize, address[0], address[1], 0, 0, 0]) };
    outcome(connected)?;
    Ok(socket)
}

#[repr(C)]
struct Part {
    base: usize,
    length: usize,
}

#[repr(C)]
struct MessageHeader {
    name: usize,
    name_length: u32,
    parts: usize,
    part_count: usize,
    control: usize,
    control_length: usize,
    flags: i32,
}

/// Room for the descriptors of one message.
const CONTROL_DESCRIPTORS_MAX: usize = 8;

#[repr(C, align(8))]
struct Control {
    length: usize,
    level: i32,
    kind: i32,
    descriptors: [i32; CONTROL_DESCRIPTORS_MAX],
}
const CONTROL_HEADER_BYTES: usize = 16;

/// Sends one packet with one descriptor.
pub fn send(socket: &Descriptor, bytes: &[u8], descriptor: i32) -> Result<(), Errno> {
    let mut control = Control {
        length: CONTROL_HEADER_BYTES + 4,
        level: SOL_SOCKET,
        kind: SCM_RIGHTS,
        descriptors: [0; CONTROL_DESCRIPTORS_MAX],
    };
    control.descriptors[0] = descriptor;
    let part = Part { base: bytes.as_ptr() as usize, length: bytes.len() };
    let header = MessageHeader {
        name: 0,
        name_length: 0,
        parts: core::ptr::from_ref(&part) as usize,
        part_count: 1,
        control: core::ptr::from_ref(&control) as usize,
        control_length: CONTROL_HEADER_BYTES + 8,
        flags: 0,
    };
    let header = core::ptr::from_ref(&header) as usize;
    // SAFETY: the header, and all that it points to, live through the call and are as long as told.
    let sent = unsafe { call(number::SENDMSG, [socket.0 as usize, header, MSG_NOSIGNAL, 0, 0, 0]) };
    outcome(sent).map(drop)
}

/// Receives one packet and up to `N` descriptors; missing ones are None.
pub fn receive<const N: usize>(
    socket: &Descriptor,
    bytes: &mut [u8],
) -> Result<(usize, [Option<Descriptor>; N]), Errno> {
    const { assert!(N <= CONTROL_DESCRIPTORS_MAX) };
    let mut control = Control { length: 0, level: 0, kind: 0, descriptors: [-1; CONTROL_DESCRIPTORS_MAX] };
    let part = Part { base: bytes.as_mut_ptr() as usize, length: bytes.len() };
    let mut header = MessageHeader {
        name: 0,
        name_length: 0,
        parts: core::ptr::from_ref(&part) as usize,
        part_count: 1,
        control: core::ptr::from_mut(&mut control) as usize,
        control_length: CONTROL_HEADER_BYTES + 4 * N,
        flags: 0,
    };
    let count = loop {
        let header = core::ptr::from_mut(&mut header) as usize;
        // SAFETY: as in `send`; the kernel writes no more than the lengths allow.
        let received =
            unsafe { call(number::RECVMSG, [socket.0 as usize, header, MSG_CMSG_CLOEXEC, 0, 0, 0]) };
        match outcome(received) {
            Err(crate::EINTR) => {}
            done => break done?,
        }
    };
    let came = if control.level == SOL_SOCKET && control.kind == SCM_RIGHTS {
        control.length.saturating_sub(CONTROL_HEADER_BYTES) / 4
    } else {
        0
    };
    let found = core::array::from_fn(|at| {
        let number = control.descriptors.get(at).copied().filter(|number| at < came && *number >= 0);
        number.map(Descriptor)
    });
    Ok((count, found))
}

/// Whether the other end of `socket` has hung up.
pub fn has_hung_up(socket: &Descriptor) -> bool {
    let mut byte = 0u8;
    let place = core::ptr::from_mut(&mut byte) as usize;
    // SAFETY: the kernel writes at most one byte to a live one of ours.
    let received =
        unsafe { call(number::RECVFROM, [socket.0 as usize, place, 1, MSG_DONTWAIT | MSG_PEEK, 0, 0]) };
    !matches!(outcome(received), Err(crate::EAGAIN | crate::EINTR))
}

const PROT_READ: usize = 1;
const PROT_WRITE: usize = 2;
const MAP_SHARED: usize = 1;
const MAP_PRIVATE: usize = 2;
const MAP_ANONYMOUS: usize = 0x20;
const MAP_NORESERVE: usize = 0x4000;
const MADV_DONTNEED: usize = 4;
const MADV_DONTFORK: usize = 10;

/// A mapping of this library's own; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: core::ptr::NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the value; what lies in it is used through atomics or copied.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(bytes: usize, protection: usize, flags: usize, descriptor: i32) -> Result<Self, Errno> {
        // SAFETY: a new mapping, wherever the kernel likes.
        let mapped = unsafe { call(number::MMAP, [0, bytes, protection, flags, descriptor as usize, 0]) };
        let base = core::ptr::NonNull::new(outcome(mapped)? as *mut u8).ok_or(crate::ENOMEM)?;
        Ok(Self { base, bytes })
    }

    /// Zeroed memory, allocated as it is touched.
    pub fn anonymous(bytes: usize) -> Result<Self, Errno> {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        Self::new(bytes, PROT_READ | PROT_WRITE, flags, -1)
    }

    /// Memory shared with the service. A forked child does not have it.
    pub fn shared(descriptor: &Descriptor, bytes: usize, writable: bool) -> Result<Self, Errno> {
        let protection = if writable { PROT_READ | PROT_WRITE } else { PROT_READ };
        let made = Self::new(bytes, protection, MAP_SHARED, descriptor.0)?;
        let range = [made.base.as_ptr() as usize, bytes];
        // SAFETY: the range is the mapping just made.
        outcome(unsafe { call(number::MADVISE, [range[0], range[1], MADV_DONTFORK, 0, 0, 0]) })?;
        Ok(made)
    }

    /// A mapping that was forgotten.
    pub(crate) fn taken_back(base: core::ptr::NonNull<u8>, bytes: usize) -> Self {
        Self { base, bytes }
    }

    pub fn base(&self) -> core::ptr::NonNull<u8> {
        self.base
    }

    /// Of anonymous memory: all of it is zeros again, and takes no room.
    pub(crate) fn clear(&self) {
        let range = [self.base.as_ptr() as usize, self.bytes];
        // SAFETY: the range is this mapping, and who made it anonymous expects its words to change at any time. A failure leaves it as it was.
        unsafe { call(number::MADVISE, [range[0], range[1], MADV_DONTNEED, 0, 0, 0]) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and whoever uses the memory borrows from this value.
        unsafe { call(number::MUNMAP, [self.base.as_ptr() as usize, self.bytes, 0, 0, 0, 0]) };
    }
}

/// Opens `name` (which ends with a NUL) below a directory, for reading.
pub fn open_below(directory: &Descriptor, name: &[u8]) -> Result<Descriptor, Errno> {
    const O_CLOEXEC: usize = 0o2000000;
    const O_NOFOLLOW: usize = 0o400000;
    if name.last() != Some(&0) {
        return Err(crate::EINVAL);
    }
    let flags = O_CLOEXEC | O_NOFOLLOW;
    // SAFETY: the name ends with a NUL and lives through the call.
    let opened =
        unsafe { call(number::OPENAT, [directory.0 as usize, name.as_ptr() as usize, flags, 0, 0, 0]) };
    Ok(Descriptor(outcome(opened)? as i32))
}

/// Wakes the service that sleeps at an eventfd.
pub fn ring(bell: &Descriptor) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes that live through the call. EAGAIN means that it rings already.
    unsafe { call(number::WRITE, [bell.0 as usize, one.as_ptr() as usize, 8, 0, 0, 0]) };
}

/// Reads from a descriptor that the caller owns.
pub fn read(descriptor: &Descriptor, bytes: &mut [u8]) -> Result<usize, Errno> {
    let place = [bytes.as_mut_ptr() as usize, bytes.len()];
    // SAFETY: the kernel writes no more than the slice holds.
    outcome(unsafe { call(number::READ, [descriptor.0 as usize, place[0], place[1], 0, 0, 0]) })
}

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

/// Sleeps while `word` is `expected`, at most for `nap_ns`; may return early.
pub fn futex_wait(word: &AtomicU32, expected: u32, nap_ns: i64) {
    const FUTEX_WAIT: usize = 0;
    let nap = Timespec { seconds: nap_ns / 1_000_000_000, nanoseconds: nap_ns % 1_000_000_000 };
    let (word, nap) = (core::ptr::from_ref(word) as usize, core::ptr::from_ref(&nap) as usize);
    // SAFETY: the word and the time live through the call; every result means: look again.
    unsafe { call(number::FUTEX, [word, FUTEX_WAIT, expected as usize, nap, 0, 0]) };
}

/// The monotonic clock.
pub fn now_ns() -> u64 {
    const CLOCK_MONOTONIC: usize = 1;
    let mut now = Timespec { seconds: 0, nanoseconds: 0 };
    let place = core::ptr::from_mut(&mut now) as usize;
    // SAFETY: the kernel writes one timespec to a live one of ours.
    unsafe { call(number::CLOCK_GETTIME, [CLOCK_MONOTONIC, place, 0, 0, 0, 0]) };
    now.seconds as u64 * 1_000_000_000 + now.nanoseconds as u64
}

/// Whether the CPU's number can be read without a system call. In virtual machines asking costs 10 us: ask once.
pub fn has_quick_cpu() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::__cpuid_count;
        #[allow(unused_unsafe, reason = "safe in newer toolchains")]
        // SAFETY: every x86-64 processor has cpuid.
        let (highest, leaf) = unsafe { (__cpuid_count(0, 0).eax, __cpuid_count(7, 0)) };
        highest >= 7 && leaf.ecx & (1 << 22) != 0
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The CPU that runs this thread now, plus one; a hint.
#[inline(always)]
pub fn current_cpu(quick: bool) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if quick {
        let value: u64;
        // SAFETY: rdpid reads a register that Linux sets to (node << 12 | cpu); `quick` says that the processor has it.
        unsafe { core::arch::asm!("rdpid {}", out(reg) value, options(nomem, nostack, preserves_flags)) };
        return (value & 0xfff) as u32 + 1;
    }
    let _ = quick;
    let mut cpu = 0u32;
    let place = core::ptr::from_mut(&mut cpu) as usize;
    // SAFETY: the kernel writes one u32 to a live one of ours.
    unsafe { call(number::GETCPU, [place, 0, 0, 0, 0, 0]) };
    cpu + 1
}
