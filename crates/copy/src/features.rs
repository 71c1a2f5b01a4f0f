//! What the processor can do, and which processor it is.

/// Instruction sets that variants need; only those that the operating system saves, too.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features {
    pub sse41: bool,
    pub avx: bool,
    pub avx2: bool,
    pub avx512f: bool,
    /// Fast `rep movsb` (ERMS).
    pub erms: bool,
    /// Fast `rep movsb` of short sizes.
    pub fsrm: bool,
}

/// Tells one processor model from another: a plan found on one need not be good on the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Processor {
    /// CPUID's vendor, for example `AuthenticAMD`.
    pub vendor: [u8; 12],
    pub family: u16,
    pub model: u16,
    pub stepping: u8,
}

impl Processor {
    pub fn vendor_str(&self) -> &str {
        core::str::from_utf8(&self.vendor).ok().filter(|vendor| vendor.is_ascii()).unwrap_or("unknown")
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Features, Processor};
    use core::arch::x86_64::{__cpuid, __cpuid_count, __get_cpuid_max};

    const OSXSAVE: u32 = 1 << 27;
    /// XCR0: SSE and AVX state; opmask and both halves of AVX-512's.
    const YMM_STATE: u64 = 0b110;
    const ZMM_STATE: u64 = 0b1110_0110;

    fn xcr0() -> u64 {
        let (low, high): (u32, u32);
        // SAFETY: reads a register; only called where CPUID says that the operating system allows XGETBV.
        unsafe {
            core::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
        }
        u64::from(high) << 32 | u64::from(low)
    }

    pub fn features() -> Features {
        let (highest, _) = __get_cpuid_max(0);
        let one = __cpuid(1);
        let state = if one.ecx & OSXSAVE != 0 { xcr0() } else { 0 };
        let seven = if highest >= 7 { __cpuid_count(7, 0) } else { __cpuid_count(0, 0) };
        let known = highest >= 7;
        let ymm = state & YMM_STATE == YMM_STATE;
        Features {
            sse41: one.ecx & (1 << 19) != 0,
            avx: ymm && one.ecx & (1 << 28) != 0,
            avx2: known && ymm && seven.ebx & (1 << 5) != 0,
            avx512f: known && state & ZMM_STATE == ZMM_STATE && seven.ebx & (1 << 16) != 0,
            erms: known && seven.ebx & (1 << 9) != 0,
            fsrm: known && seven.edx & (1 << 4) != 0,
        }
    }

    pub fn processor() -> Processor {
        let zero = __cpuid(0);
        let one = __cpuid(1).eax;
        let mut vendor = [0; 12];
        for (room, word) in vendor.chunks_exact_mut(4).zip([zero.ebx, zero.edx, zero.ecx]) {
            room.copy_from_slice(&word.to_le_bytes());
        }
        let (family, model) = ((one >> 8) & 15, (one >> 4) & 15);
        Processor {
            vendor,
            family: (if family == 15 { 15 + ((one >> 20) & 255) } else { family }) as u16,
            model: (if family == 6 || family == 15 { model | ((one >> 12) & 0xf0) } else { model }) as u16,
            stepping: (one & 15) as u8,
        }
    }
}

impl Features {
    /// Those of this processor.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        return x86::features();
        #[cfg(not(target_arch = "x86_64"))]
        Self::default()
    }
}

impl Processor {
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        return x86::processor();
        #[cfg(not(target_arch = "x86_64"))]
        Self::default()
    }
}
