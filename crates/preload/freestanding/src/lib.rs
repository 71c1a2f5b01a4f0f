//! The shell around `polytropo-preload` that is linked into a library without start files: the constructor and the panic handler.
#![no_std]

use core::panic::PanicInfo;

extern "C" fn initialize() {
    polytropo_preload::start();
}

#[used]
#[unsafe(link_section = ".init_array")]
static INITIALIZE: extern "C" fn() = initialize;

/// Nothing here panics; a defect that does stops the program where it is, for a debugger to see.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        // SAFETY: raises SIGILL.
        unsafe { core::arch::asm!("ud2", options(nomem, nostack)) };
    }
}
