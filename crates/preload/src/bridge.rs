//! The bridge: the one function by which musl, and glibc from 2.41 on, make calls that a thread can be cancelled in.
//!
//! It looks at the thread's mark, then makes the call; the handler of the cancelling signal ends the thread only between the two, by the
//! address at which it finds it. So the bridge is not touched, else a thread that is with us when the signal comes would go on to wait in the kernel for good.
//! Its callers are led to us instead, and go on to the bridge as if they had just come to it.
//!
//! ```text
//! mov (%rdi),%eax ...; jne cancelled     the mark
//! mov %rdi,%r11; mov %rsi,%rax ...       a C function's arguments (mark, number, six more) to a call's
//! syscall
//! ```

use crate::decode::{Flow, Instruction};

/// Both libraries', to the byte.
const MOVES_AND_CALL: [u8; 35] = [
    0x49, 0x89, 0xfb, // mov %rdi,%r11
    0x48, 0x89, 0xf0, // mov %rsi,%rax
    0x48, 0x89, 0xd7, // mov %rdx,%rdi
    0x48, 0x89, 0xce, // mov %rcx,%rsi
    0x4c, 0x89, 0xc2, // mov %r8,%rdx
    0x4d, 0x89, 0xca, // mov %r9,%r10
    0x4c, 0x8b, 0x44, 0x24, 0x08, // mov 8(%rsp),%r8
    0x4c, 0x8b, 0x4c, 0x24, 0x10, // mov 16(%rsp),%r9
    0x4c, 0x89, 0x5c, 0x24, 0x08, // mov %r11,8(%rsp)
    0x0f, 0x05, // syscall
];
const SYSCALL_BYTES: usize = 2;
/// glibc's look at the mark: one bit of several.
const GLIBC_LOOK: [u8; 7] = [0x8b, 0x07, 0xf6, 0x07, 0x08, 0x0f, 0x85];
/// musl's: a word.
const MUSL_LOOK: [u8; 5] = [0x8b, 0x07, 0x85, 0xc0, 0x75];
/// The jump's distance behind each.
const GLIBC_DISTANCE_BYTES: usize = 4;
const MUSL_DISTANCE_BYTES: usize = 1;
const LANDING: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// Bits of both marks that say that the thread is to end: glibc's, musl's. glibc's other meaning of the last, that the thread
/// cannot be cancelled, is never met here.
pub const MARK: u8 = 8 | 1;
/// A direct call.
pub const CALL_BYTES: usize = 5;
pub const CALL: u8 = 0xe8;

/// Where it begins, and its call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bridge {
    pub start: usize,
    pub syscall: usize,
}

impl Bridge {
    /// The bridge whose call is at `syscall`.
    pub fn at(code: &[u8], syscall: usize) -> Option<Self> {
        let end = syscall.checked_add(SYSCALL_BYTES)?;
        let moves = end.checked_sub(MOVES_AND_CALL.len())?;
        (code.get(moves..end)? == MOVES_AND_CALL).then_some(())?;
        let begins = |look: &[u8], distance: usize| {
            let start = moves.checked_sub(look.len() + distance)?;
            code.get(start..)?.starts_with(look).then_some(start)
        };
        let start =
            begins(&GLIBC_LOOK, GLIBC_DISTANCE_BYTES).or_else(|| begins(&MUSL_LOOK, MUSL_DISTANCE_BYTES))?;
        // With landings for indirect calls that is where callers go.
        let landing = start.checked_sub(LANDING.len());
        let landing = landing.filter(|landing| code[*landing..].starts_with(&LANDING));
        Some(Self { start: landing.unwrap_or(start), syscall })
    }

    /// The bridge that begins at `start`.
    pub fn from_start(code: &[u8], start: usize) -> Option<Self> {
        let longest = LANDING.len() + GLIBC_LOOK.len() + GLIBC_DISTANCE_BYTES + MOVES_AND_CALL.len();
        let ends = start..=start.checked_add(longest)?;
        ends.filter_map(|syscall| Self::at(code, syscall)).find(|bridge| bridge.start == start)
    }

    /// How an instruction that ends at `end` leads here.
    pub fn entered_by(&self, instruction: Instruction, end: usize) -> Option<Entered> {
        let (rel, called) = match instruction.flow {
            Flow::Call { rel } => (rel, true),
            Flow::Branch { rel } => (rel, false),
            _ => return None,
        };
        let target = end.checked_add_signed(rel as isize)?;
        (self.start..=self.syscall).contains(&target).then_some(())?;
        let plain = called && target == self.start && usize::from(instruction.length) == CALL_BYTES;
        Some(if plain { Entered::Called } else { Entered::Otherwise })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    Called,
    /// By a way that cannot be led elsewhere.
    Otherwise,
}
