//! Which libraries matter, by their names.

use crate::trace::Aside;

/// Whether its calls are to be redirected.
pub fn is_wanted(name: &[u8]) -> bool {
    // glibc's loader opens, maps and closes libraries: nothing is gained there, and patching it costs 40 us at each start.
    const PREFIXES: [&[u8]; 4] = [b"libc.so", b"libc-2.", b"libpthread.so", b"libpthread-2."];
    name.starts_with(b"ld-musl-") || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Of one that is wanted.
pub fn is_musl(name: &[u8]) -> bool {
    !name.starts_with(b"libc.so.6") && !name.starts_with(b"libc-2.") && !name.starts_with(b"libpthread")
}

/// Why nothing is redirected where it is loaded.
pub fn objection(name: &[u8]) -> Option<Aside> {
    if name.starts_with(b"liburing.so") {
        // It asks for rings, and names descriptors in them, without the C library.
        return Some(Aside::OwnCalls);
    }
    is_sanitizer(name).then_some(Aside::Sanitizer)
}

/// Whether it rewrites programs, or runs them on a processor of its own.
fn is_sanitizer(name: &[u8]) -> bool {
    // The last two are the libraries by which valgrind and rr come into programs.
    const RUNTIMES: [&[u8]; 7] = [
        b"libasan.so",
        b"libtsan.so",
        b"libmsan.so",
        b"liblsan.so",
        b"libclang_rt.",
        b"vgpreload_core",
        b"librrpreload.so",
    ];
    RUNTIMES.iter().any(|runtime| name.starts_with(runtime))
}
