//! What the core asks of Linux, without a C library: futexes, the clock, the number of the CPU.

use core::sync::atomic::AtomicU32;

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("polytropo-queue makes its system calls by hand and knows x86-64 and AArch64 only");

#[cfg(target_arch = "x86_64")]
mod number {
    pub const FUTEX: usize = 202;
    pub const GETCPU: usize = 309;
    pub const CLOCK_GETTIME: usize = 228;
}
#[cfg(target_arch = "aarch64")]
mod number {
    pub const FUTEX: usize = 98;
    pub const GETCPU: usize = 168;
    pub const CLOCK_GETTIME: usize = 113;
}

const ETIMEDOUT: isize = -110;
const FUTEX_WAKE: usize = 1;
const FUTEX_WAIT_BITSET: usize = 9;
const ANY_BIT: usize = u32::MAX as usize;
const CLOCK_MONOTONIC: usize = 1;

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

/// # Safety
/// The arguments must be right for the call, and the memory that they point to valid for it.
#[cfg(not(miri))]
unsafe fn system_call(number: usize, a: [usize; 6]) -> isize {
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

/// Sleeps while `word` is `expected`, at most until `until_ns` of the monotonic clock; tells whether that time came. May
/// return early; callers look again.
#[cfg(not(miri))]
pub fn futex_wait(word: &AtomicU32, expected: u32, until_ns: u64) -> bool {
    let until = Timespec {
        seconds: (until_ns / 1_000_000_000) as i64,
        nanoseconds: (until_ns % 1_000_000_000) as i64,
    };
    let word = core::ptr::from_ref(word) as usize;
    let timeout = core::ptr::from_ref(&until) as usize;
    let arguments = [word, FUTEX_WAIT_BITSET, expected as usize, timeout, 0, ANY_BIT];
    // SAFETY: the word and the time live through the call. Not FUTEX_PRIVATE: the word may be shared with other processes.
    // Every result (woken, changed, timed out, interrupted) means: look again.
    unsafe { system_call(number::FUTEX, arguments) == ETIMEDOUT }
}

/// Wakes up to `count` sleepers of `word`.
#[cfg(not(miri))]
pub fn futex_wake(word: &AtomicU32, count: u32) {
    let address = core::ptr::from_ref(word) as usize;
    let count = count.min(i32::MAX as u32) as usize;
    // SAFETY: FUTEX_WAKE uses the address as a key only.
    unsafe { system_call(number::FUTEX, [address, FUTEX_WAKE, count, 0, 0, 0]) };
}

/// The monotonic clock.
#[cfg(not(miri))]
pub fn now_ns() -> u64 {
    let mut now = Timespec { seconds: 0, nanoseconds: 0 };
    let address = core::ptr::from_mut(&mut now) as usize;
    // SAFETY: the kernel writes one timespec to a live one of ours.
    unsafe { system_call(number::CLOCK_GETTIME, [CLOCK_MONOTONIC, address, 0, 0, 0, 0]) };
    now.seconds as u64 * 1_000_000_000 + now.nanoseconds as u64
}

/// The CPU that runs this thread now; a hint, old as soon as it is told.
#[cfg(not(miri))]
pub fn current_cpu(quick: bool) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if quick {
        let value: u64;
        // SAFETY: rdpid reads a register that Linux sets to (node << 12 | cpu); `quick` says that the processor has it.
        unsafe { core::arch::asm!("rdpid {}", out(reg) value, options(nomem, nostack, preserves_flags)) };
        return (value & 0xfff) as u32;
    }
    let _ = quick;
    let mut cpu = 0u32;
    let address = core::ptr::from_mut(&mut cpu) as usize;
    // SAFETY: the kernel writes one u32 to a live one of ours.
    unsafe { system_call(number::GETCPU, [address, 0, 0, 0, 0, 0]) };
    cpu
}

/// Whether the CPU's number can be read without a system call. Asked once: in virtual machines `cpuid` costs 10 us.
pub fn has_quick_cpu() -> bool {
    use core::sync::atomic::{AtomicU8, Ordering::Relaxed};
    static ANSWER: AtomicU8 = AtomicU8::new(0);
    if ANSWER.load(Relaxed) == 0 {
        ANSWER.store(if ask_for_quick_cpu() { 2 } else { 1 }, Relaxed);
    }
    ANSWER.load(Relaxed) == 2
}

fn ask_for_quick_cpu() -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use core::arch::x86_64::__cpuid_count;
        #[allow(unused_unsafe, reason = "safe in newer toolchains")]
        // SAFETY: every x86-64 processor has cpuid.
        let (highest, leaf) = unsafe { (__cpuid_count(0, 0).eax, __cpuid_count(7, 0)) };
        highest >= 7 && leaf.ecx & (1 << 22) != 0
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    false
}

/// Miri knows neither futexes nor inline assembly: there a sleep is a turn for the others.
#[cfg(miri)]
mod under_miri {
    extern crate std;
    use super::AtomicU32;
    use core::sync::atomic::AtomicU64;
    use core::sync::atomic::Ordering::Relaxed;
    static TIME_NS: AtomicU64 = AtomicU64::new(0);

    pub fn futex_wait(_: &AtomicU32, _: u32, _: u64) -> bool {
        std::thread::yield_now();
        false
    }
    pub fn futex_wake(_: &AtomicU32, _: u32) {}
    pub fn now_ns() -> u64 {
        TIME_NS.fetch_add(1000, Relaxed)
    }
    pub fn current_cpu(_: bool) -> u32 {
        0
    }
}
#[cfg(miri)]
pub use under_miri::*;
