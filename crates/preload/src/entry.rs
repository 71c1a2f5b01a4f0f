//! Where the trampolines lead: decides in a few instructions whether anybody wants to see the call.
//!
//! On entry the registers are those of the call, and rcx says where the `syscall` instruction is. rcx and r11 are free, since
//! `syscall` overwrites both. To pass a call on is to jump to that instruction; to answer it, to the one after. The stack
//! below the red zone is used only for calls that are looked at. Flags are not kept: compilers take them as lost across a call.

use core::arch::global_asm;

use crate::patch::Entries;
use crate::{bridge, hooks, table};

/// The registers of a call, as the entry stores them.
#[repr(C)]
pub struct Call {
    pub arguments: [usize; 6],
    /// The number; the result, once it is answered.
    pub rax: usize,
    /// Where the program goes on; [`FROM_BRIDGE`], and the length of its instruction once it is answered.
    pub resume_at: usize,
}

/// In the place of the address of a call that was on its way to the bridge.
pub const FROM_BRIDGE: usize = 0;

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

// In the place of the bridge: a C function of the thread's mark, a call's number and its arguments. r11 has the bridge, to which whoever is passed
// on goes as he came, so that it looks at the mark once more.
global_asm!(
    ".pushsection .text.polytropo_preload_entry, \"ax\", @progbits",
    ".p2align 6",
    ".globl polytropo_preload_bridge_entry",
    ".hidden polytropo_preload_bridge_entry",
    ".type polytropo_preload_bridge_entry, @function",
    "polytropo_preload_bridge_entry:",
    ".cfi_startproc",
    "test byte ptr [rdi], {mark}",
    "jne 3f",
    "cmp rsi, {numbers}",
    "jae 3f",
    "lea rax, [rip + {seen}]",
    "cmp byte ptr [rax + rsi], 0",
    "je 3f",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "push r11",
    "push r9",
    "push r8",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    // A `Call`, from its end.
    "push {from_bridge}",
    "push rsi",
    "push qword ptr [rbp + 24]",
    "push qword ptr [rbp + 16]",
    "push r9",
    "push r8",
    "push rcx",
    "push rdx",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {dispatch}",
    "cmp qword ptr [rbp - 64], {from_bridge}",
    "mov rax, [rbp - 72]",
    "je 2f",
    "leave",
    ".cfi_remember_state",
    ".cfi_def_cfa rsp, 8",
    "ret",
    ".cfi_restore_state",
    "2:",
    "mov rdi, [rbp - 56]",
    "mov rsi, [rbp - 48]",
    "mov rdx, [rbp - 40]",
    "mov rcx, [rbp - 32]",
    "mov r8, [rbp - 24]",
    "mov r9, [rbp - 16]",
    "mov r11, [rbp - 8]",
    "leave",
    ".cfi_def_cfa rsp, 8",
    "3:",
    "jmp r11",
    ".cfi_endproc",
    ".size polytropo_preload_bridge_entry, . - polytropo_preload_bridge_entry",
    ".popsection",
    mark = const bridge::MARK,
    numbers = const table::NUMBERS,
    from_bridge = const FROM_BRIDGE,
    seen = sym table::SEEN,
    dispatch = sym hooks::dispatch,
);

unsafe extern "C" {
    fn polytropo_preload_entry();
    fn polytropo_preload_bridge_entry();
}

/// The addresses that trampolines jump to.
pub fn addresses() -> Entries {
    Entries {
        of_calls: polytropo_preload_entry as *const () as usize,
        of_bridge: polytropo_preload_bridge_entry as *const () as usize,
    }
}
