//! System calls, made directly.

use core::arch::asm;

pub const EINTR: isize = -4;
pub const AT_FDCWD: usize = -100_isize as usize;

pub mod nr {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const CLOSE: usize = 3;
    pub const MMAP: usize = 9;
    pub const MPROTECT: usize = 10;
    pub const MUNMAP: usize = 11;
    pub const GETPID: usize = 39;
    pub const ARCH_PRCTL: usize = 158;
    pub const EXIT_GROUP: usize = 231;
    pub const OPENAT: usize = 257;
    pub const NEWFSTATAT: usize = 262;
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
