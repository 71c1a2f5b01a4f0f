//! The shell around `polytropo-preload` that is linked into a library without start files: the constructor and the panic handler.
#![no_std]

use core::panic::PanicInfo;

/// glibc calls constructors with main's arguments, musl with none.
extern "C" fn initialize(count: usize, arguments: usize, environment: usize) {
    polytropo_preload::start(polytropo_preload::Registers([count, arguments, environment]));
}

#[used]
#[unsafe(link_section = ".init_array")]
static INITIALIZE: extern "C" fn(usize, usize, usize) = initialize;

/// Nothing here panics; a defect that does stops the program where it is, for a debugger to see.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        // SAFETY: raises SIGILL.
        unsafe { core::arch::asm!("ud2", options(nomem, nostack)) };
    }
}
