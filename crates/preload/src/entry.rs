//! Where the trampolines lead: decides in a few instructions whether anybody wants to see the call.
//!
//! On entry the registers are those of the call, and rcx says where the `syscall` instruction is. rcx and r11 are free, since
//! `syscall` overwrites both. To pass a call on is to jump to that instruction; to answer it, to the one after. The stack
//! below the red zone is used only for calls that are looked at. Flags are not kept: compilers take them as lost across a call.

use core::arch::global_asm;

use crate::{hooks, table};

/// The registers of a call, as the entry stores them.
#[repr(C)]
pub struct Call {
    pub arguments: [usize; 6],
    /// The number; the result, once it is answered.
    pub rax: usize,
    /// Where the program goes on.
    pub resume_at: usize,
}

global_asm!(
    ".pushsection .text.polytropo_preload_entry, \"ax\", @progbits",
    ".p2align 6",
    ".globl polytropo_preload_entry",
    ".hidden polytropo_preload_entry",
    ".type polytropo_preload_entry, @function",
    "polytropo_preload_entry:",
    // For unwinders the caller stands at the call's instruction, exactly (a signal frame), with its stack as it is.
    ".cfi_startproc simple",
    ".cfi_signal_frame",
    ".cfi_def_cfa rsp, 0",
    ".cfi_register rip, rcx",
    "cmp rax, {numbers}",
    "jae 2f",
    "lea r11, [rip + {seen}]",
    "cmp byte ptr [r11 + rax], 0",
    "je 2f",
    "lea rsp, [rsp - 128]",
    ".cfi_def_cfa_offset 128",
    "push rcx",
    ".cfi_def_cfa_offset 136",
    ".cfi_offset rip, -136",
    "push rax",
    "push r9",
    "push r8",
    "push r10",
    "push rdx",
    "push rsi",
    "push rdi",
    ".cfi_def_cfa_offset 192",
    "mov rdi, rsp",
    "push rbp",
    ".cfi_def_cfa_offset 200",
    ".cfi_offset rbp, -200",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "and rsp, -16",
    "call {dispatch}",
    "mov rsp, rbp",
    ".cfi_def_cfa_register rsp",
    "pop rbp",
    ".cfi_restore rbp",
    ".cfi_def_cfa_offset 192",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop r10",
    "pop r8",
    "pop r9",
    "pop rax",
    "pop rcx",
    ".cfi_register rip, rcx",
    ".cfi_def_cfa_offset 128",
    "lea rsp, [rsp + 128]",
    ".cfi_def_cfa_offset 0",
    "2:",
    "jmp rcx",
    ".cfi_endproc",
    ".size polytropo_preload_entry, . - polytropo_preload_entry",
    ".popsection",
    numbers = const table::NUMBERS,
    seen = sym table::SEEN,
    dispatch = sym hooks::dispatch,
);

unsafe extern "C" {
    fn polytropo_preload_entry();
}

/// The address that trampolines jump to.
pub fn address() -> usize {
    polytropo_preload_entry as *const () as usize
}
