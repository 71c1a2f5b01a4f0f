//! The three system calls that make memory executable, without a C library.

const MMAP: usize = 9;
const MPROTECT: usize = 10;
const MUNMAP: usize = 11;
const MSEAL: usize = 462;
const PROT_READ: usize = 1;
const PROT_WRITE: usize = 2;
const PROT_EXEC: usize = 4;
const MAP_PRIVATE_ANONYMOUS: usize = 0x22;

/// # Safety
/// The arguments must be right for the call, and the memory that they name the caller's.
unsafe fn system_call(number: usize, a: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the registers are those of the kernel's convention, all it clobbers is named; the caller vouches for the arguments.
    unsafe {
        core::arch::asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a[0], in("rsi") a[1],
            in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5], out("rcx") _, out("r11") _, options(nostack));
    }
    result
}

fn errno(result: isize) -> Result<usize, i32> {
    if result < 0 { Err(-result as i32) } else { Ok(result as usize) }
}

/// Fresh zeroed memory that may be written.
pub fn map(size_bytes: usize) -> Result<*mut u8, i32> {
    // SAFETY: asks for new memory at an address that the kernel chooses.
    let at = unsafe {
        system_call(MMAP, [0, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE_ANONYMOUS, usize::MAX, 0])
    };
    errno(at).map(|at| at as *mut u8)
}

/// Makes memory of [`map`] executable and no more writable; for good where the kernel knows mseal(2) and `seal` is asked for.
///
/// # Safety
/// The memory came from [`map`] and nobody will write to it.
pub unsafe fn make_executable(at: *mut u8, size_bytes: usize, seal: bool) -> Result<(), i32> {
    // SAFETY: the caller's own mapping.
    errno(unsafe { system_call(MPROTECT, [at as usize, size_bytes, PROT_READ | PROT_EXEC, 0, 0, 0]) })?;
    if seal {
        // SAFETY: as above. Kernels before 6.10 answer ENOSYS, and the mapping stays merely read-only.
        let _ = unsafe { system_call(MSEAL, [at as usize, size_bytes, 0, 0, 0, 0]) };
    }
    Ok(())
}

/// # Safety
/// The memory came from [`map`], is not sealed, and nobody uses it any more.
pub unsafe fn unmap(at: *mut u8, size_bytes: usize) {
    // SAFETY: the caller's own mapping. It cannot fail for a whole mapping.
    let _ = unsafe { system_call(MUNMAP, [at as usize, size_bytes, 0, 0, 0, 0]) };
}
