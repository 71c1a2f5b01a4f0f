//! Every variant of the space, in memory that ends at pages that must not be touched.
#![cfg(all(feature = "std", target_arch = "x86_64"))]

use polytropo_copy::code::{Code, CopyFunction};
use polytropo_copy::features::Features;
use polytropo_copy::space::variants;
use polytropo_copy::variant::{PAGE_BYTES, Variant};
use std::arch::global_asm;

const ROOM_BYTES: usize = 10 * PAGE_BYTES;

/// Pages with one before and one after that cannot be read or written.
struct Guarded {
    map: *mut libc::c_void,
}

impl Guarded {
    fn new() -> Self {
        let (all, anonymous) = (ROOM_BYTES + 2 * PAGE_BYTES, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory; then the middle of it is opened.
        let map = unsafe {
            let map = libc::mmap(std::ptr::null_mut(), all, libc::PROT_NONE, anonymous, -1, 0);
            assert_ne!(map, libc::MAP_FAILED);
            let middle = map.byte_add(PAGE_BYTES);
            assert_eq!(libc::mprotect(middle, ROOM_BYTES, libc::PROT_READ | libc::PROT_WRITE), 0);
            map
        };
        Self { map }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the opened middle, borrowed from us.
        unsafe { std::slice::from_raw_parts_mut(self.map.byte_add(PAGE_BYTES).cast(), ROOM_BYTES) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.map, ROOM_BYTES + 2 * PAGE_BYTES) };
    }
}

/// Small, repeatable, good enough to choose sizes and places.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

fn functions(all: &[Variant]) -> (Code, Vec<CopyFunction>) {
    let mut functions = Vec::new();
    let code =
        Code::new(all.iter().copied(), Features::detect(), false, |_, function| functions.push(function))
            .expect("code of every variant");
    (code, functions)
}

/// Copies `size` bytes to where they end at the guard page, begin after the one before, or lie in the middle.
fn check(
    function: CopyFunction,
    name: &str,
    size: usize,
    from: &mut Guarded,
    to: &mut Guarded,
    random: &mut Random,
) {
    let mut place = || match random.below(3) {
        0 => 0,
        1 => ROOM_BYTES - size,
        _ => random.below(ROOM_BYTES - size + 1),
    };
    let (source, destination) = (place(), place());
    to.bytes().fill(0xa5);
    let expected = from.bytes()[source..source + size].to_vec();
    // SAFETY: both ranges lie in their rooms.
    unsafe { function(to.bytes().as_mut_ptr().add(destination), from.bytes().as_ptr().add(source), size) };
    let found = to.bytes();
    assert_eq!(found[destination..destination + size], expected, "{name} copied {size} bytes wrongly");
    let outside = found[..destination].iter().chain(&found[destination + size..]);
    assert!(outside.copied().all(|byte| byte == 0xa5), "{name} wrote outside of its {size} bytes");
}

#[test]
fn every_variant_copies_what_it_is_asked_for_and_touches_nothing_else() {
    let (mut from, mut to) = (Guarded::new(), Guarded::new());
    let mut random = Random(1);
    from.bytes().iter_mut().for_each(|byte| *byte = random.below(256) as u8);
    for keep in [false, true] {
        let all = variants(Features::detect(), keep);
        let (_code, functions) = functions(&all);
        for (variant, function) in all.iter().zip(functions) {
            let name = variant.name();
            let sizes =
                [random.below(64), random.below(600), random.below(5000), 4096, random.below(ROOM_BYTES)];
            for size in sizes {
                check(function, name.as_str(), size, &mut from, &mut to, &mut random);
            }
        }
    }
}

#[test]
fn plain_ones_are_right_at_every_size_and_alignment() {
    let (mut from, mut to) = (Guarded::new(), Guarded::new());
    let mut random = Random(2);
    from.bytes().iter_mut().for_each(|byte| *byte = random.below(256) as u8);
    let names =
        ["movsb", "movsb.dst", "movsq.dst", "v8.b64", "v16.b128.dst", "v16.b64.sl.src", "v16.b256.nt.dst"];
    let wide = ["v32.b128", "v32.b256.nt.nta@8.dst", "v64.b512.t0@4.src", "v64.b128.x2.dst.keep"];
    let features = Features::detect();
    let all: Vec<_> = names
        .iter()
        .chain(&wide)
        .filter_map(|name| Variant::parse(name))
        .filter(|v| v.runs_on(features))
        .collect();
    let (_code, functions) = functions(&all);
    for (variant, function) in all.iter().zip(functions) {
        for size in (0..700).chain([4095, 4096, 4097, 8191, 8193, 12345]) {
            check(function, variant.name().as_str(), size, &mut from, &mut to, &mut random);
        }
    }
}

// call_with_registers(function, destination, source, size, before, after): loads all vector registers, calls, stores them.
global_asm!(
    "call_with_zmm:",
    "push rbx",
    "push r12",
    "push r13",
    "mov rax, rdi",
    "mov r12, r9",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovups zmm\\n, [r8 + \\n*64]",
    ".endr",
    "call rax",
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovups [r12 + \\n*64], zmm\\n",
    ".endr",
    "vzeroupper",
    "pop r13",
    "pop r12",
    "pop rbx",
    "ret",
    "call_with_xmm:",
    "push rbx",
    "push r12",
    "push r13",
    "mov rax, rdi",
    "mov r12, r9",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movups xmm\\n, [r8 + \\n*64]",
    ".endr",
    "call rax",
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movups [r12 + \\n*64], xmm\\n",
    ".endr",
    "pop r13",
    "pop r12",
    "pop rbx",
    "ret",
);

type WithRegisters = unsafe extern "sysv64" fn(CopyFunction, *mut u8, *const u8, usize, *const u8, *mut u8);

unsafe extern "sysv64" {
    fn call_with_zmm(
        f: CopyFunction,
        to: *mut u8,
        from: *const u8,
        size: usize,
        before: *const u8,
        after: *mut u8,
    );
    fn call_with_xmm(
        f: CopyFunction,
        to: *mut u8,
        from: *const u8,
        size: usize,
        before: *const u8,
        after: *mut u8,
    );
}

#[test]
fn only_declared_registers_change() {
    // Of a processor without AVX-512 the low 16 bytes of 16 registers are watched, else all of all.
    let (call, count, width): (WithRegisters, usize, usize) =
        if Features::detect().avx512f { (call_with_zmm, 32, 64) } else { (call_with_xmm, 16, 16) };
    let before: Vec<u8> = (0..32 * 64).map(|i| (i * 7 + i / 64) as u8).collect();
    let source = vec![0x3c; 5000];
    for keep in [false, true] {
        let all = variants(Features::detect(), keep);
        let (_code, functions) = functions(&all);
        for (variant, function) in all.iter().zip(functions) {
            let (mut after, mut destination) = (vec![0; 32 * 64], vec![0; 5000]);
            // SAFETY: both buffers have that size; the registers' room too.
            unsafe {
                call(
                    function,
                    destination.as_mut_ptr(),
                    source.as_ptr(),
                    5000,
                    before.as_ptr(),
                    after.as_mut_ptr(),
                );
            }
            let changed = (0..count)
                .filter(|n| before[n * 64..n * 64 + width] != after[n * 64..n * 64 + width])
                .count();
            let clobbers = variant.clobbers();
            // VZEROUPPER clears the upper halves of all sixteen, which no caller may rely on.
            let most = if clobbers.width_bytes == 32 { 16 } else { usize::from(clobbers.vector_registers) };
            assert!(changed <= most, "{} changes {changed} registers and declares {most}", variant.name());
        }
    }
}
