//! Finding the system-call instructions of a library, and for each the instructions before it that can be replaced by a jump.
//!
//! The whole code is decoded once, from its first byte. That the borders so found are the true ones is not taken on trust: every
//! function of the symbol table and every target of a direct jump must be such a border. A site is used only if, since the
//! last border that is confirmed in this way, nothing undecodable was met, and the next confirmed one is a border too.
//!
//! A jump takes five bytes of movable instructions that no other jump leads into: those before the call, which then stays where
//! it is; or, where they are too few, those around it.

use crate::bridge::{Bridge, CALL_BYTES, Entered};
use crate::decode::{Flow, LENGTH_MAX, decode};
use crate::elf::Image;
use crate::table;

/// The bytes of a direct jump.
pub const JUMP_BYTES: usize = 5;
/// Five bytes are never more than five instructions; a few more, so that the replaced ones can be long.
const BEFORE_MAX: usize = 5;
pub const SITES_MAX: usize = 1024;
/// The longest run of instructions that is replaced: four bytes, and one more instruction.
pub const MOVED_BYTES_MAX: usize = 4 + LENGTH_MAX;
const SYSCALL_BYTES: usize = 2;

/// How far from its `switch` a label is expected at most.
const SWITCH_BYTES: usize = 2048;

/// A system-call instruction that can be redirected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// Where the jump goes: the first replaced instruction, counted from the library's base.
    pub patch: u32,
    /// The `syscall` instruction. Where a call of the bridge is led elsewhere: the bridge.
    pub syscall: u32,
    /// The end of what is replaced: at the call, which then stays, or behind it.
    pub end: u32,
    /// The call's number, where the instruction before says it.
    pub number: Option<u16>,
}

impl Site {
    /// Whether it is a call of the bridge.
    pub fn calls_bridge(&self) -> bool {
        !(self.patch..=self.end).contains(&self.syscall)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// System-call instructions met.
    pub instructions: u32,
    /// Those of calls that are passed on in any case.
    pub passed: u32,
    /// Those without five movable bytes that no jump leads into.
    pub no_room: u32,
    /// Those where the borders between instructions are not confirmed.
    pub unsure: u32,
    /// Jumps and calls that leave the code: none, unless somebody has redirected it. Ways into the bridge that are no plain calls.
    pub leaving: u32,
    /// Sites found.
    pub sites: u32,
}

/// Bytes of scratch memory that [`scan`] needs for so much code.
pub fn scratch_bytes(code_bytes: usize) -> usize {
    4 * code_bytes.div_ceil(8)
}

struct Bits<'a>(&'a mut [u8]);

impl Bits<'_> {
    fn set(&mut self, at: usize) {
        if let Some(byte) = self.0.get_mut(at / 8) {
            *byte |= 1 << (at % 8);
        }
    }

    fn has(&self, at: usize) -> bool {
        self.0.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1)
    }

    fn next(&self, from: usize, limit: usize) -> Option<usize> {
        (from..limit).find(|at| self.has(*at))
    }
}

/// Where undecodable bytes stood; more of them than this and nothing after the last is believed.
const HOLES_MAX: usize = 256;

struct Borders<'a> {
    /// Where instructions begin.
    starts: Bits<'a>,
    /// Where jumps and the symbol table say that they begin.
    targets: Bits<'a>,
    /// Where functions begin, as far as calls and the symbol table tell.
    functions: Bits<'a>,
    /// Jumps to where a table says: the labels of a `switch` among others.
    indirect_jumps: Bits<'a>,
    holes: [usize; HOLES_MAX],
    hole_count: usize,
}

/// Finds the sites of a library. `scratch` is zeroed memory of [`scratch_bytes`].
pub fn scan(image: &Image<'_>, scratch: &mut [u8], sites: &mut [Site]) -> Option<Summary> {
    let (address, code) = image.code()?;
    u32::try_from(address.checked_add(code.len())?).ok()?;
    let mut bits = scratch.chunks_exact_mut(code.len().div_ceil(8)).map(Bits);
    let mut borders = Borders {
        starts: bits.next()?,
        targets: bits.next()?,
        functions: bits.next()?,
        indirect_jumps: bits.next()?,
        holes: [0; HOLES_MAX],
        hole_count: 0,
    };
    image.each_function(|function| {
        if let Some(at) = function.checked_sub(address).filter(|at| *at < code.len()) {
            borders.targets.set(at);
            borders.functions.set(at);
        }
    });
    // Calls are noted in the first pass, judged when all jumps are known.
    let mut found = 0;
    let mut summary = Summary::default();
    let leaving = borders.sweep(code, |at| {
        summary.instructions += 1;
        if let Some(site) = sites.get_mut(found) {
            site.syscall = at as u32;
            found += 1;
        }
    });
    summary.leaving = leaving;
    let bridge = sites[..found].iter().find_map(|site| Bridge::at(code, site.syscall as usize));
    let mut kept = 0;
    for index in 0..found {
        let at = sites[index].syscall as usize;
        if bridge.is_some_and(|bridge| bridge.syscall == at) {
            continue;
        }
        match borders.judge(code, at) {
            Ok(site) if is_wanted(site.number) => {
                let moved = |at: u32| at + address as u32;
                sites[kept] = Site {
                    patch: moved(site.patch),
                    syscall: moved(site.syscall),
                    end: moved(site.end),
                    ..site
                };
                kept += 1;
            }
            Ok(_) => summary.passed += 1,
            Err(Left::NoRoom) => summary.no_room += 1,
            Err(Left::Unsure) => summary.unsure += 1,
        }
    }
    if let Some(bridge) = bridge {
        kept = borders.add_callers(code, address as u32, &bridge, (&mut *sites, kept), &mut summary.leaving);
    }
    summary.sites = kept as u32;
    Some(summary)
}

fn is_wanted(number: Option<u16>) -> bool {
    number.is_none_or(|number| table::SEEN.get(usize::from(number)).is_some_and(|seen| *seen != 0))
}

enum Left {
    NoRoom,
    Unsure,
}

impl Borders<'_> {
    /// Decodes all of the code, and shows the system calls. How many jumps leave it?
    fn sweep(&mut self, code: &[u8], mut syscall: impl FnMut(usize)) -> u32 {
        let mut leaving = 0;
        let mut at = 0;
        while at < code.len() {
            let Some(instruction) = decode(&code[at..]) else {
                if let Some(hole) = self.holes.get_mut(self.hole_count) {
                    *hole = at;
                }
                self.hole_count += 1;
                at += 1;
                continue;
            };
            self.starts.set(at);
            let end = at + usize::from(instruction.length);
            match instruction.flow {
                Flow::Syscall => syscall(at),
                Flow::Branch { rel } | Flow::Call { rel } => {
                    match end.checked_add_signed(rel as isize).filter(|target| *target < code.len()) {
                        Some(target) => {
                            self.targets.set(target);
                            if matches!(instruction.flow, Flow::Call { .. }) {
                                self.functions.set(target);
                            }
                        }
                        None => leaving += 1,
                    }
                }
                Flow::IndirectJump => self.indirect_jumps.set(at),
                _ => {}
            }
            at = end;
        }
        leaving
    }

    /// Adds the calls of the bridge to the `kept` first of the sites. How many are there then?
    fn add_callers(
        &self,
        code: &[u8],
        address: u32,
        bridge: &Bridge,
        (sites, mut kept): (&mut [Site], usize),
        others: &mut u32,
    ) -> usize {
        let own = bridge.start..bridge.syscall + SYSCALL_BYTES;
        let before = kept;
        let mut at = 0;
        while at < code.len() {
            let Some(instruction) = decode(&code[at..]) else {
                at += 1;
                continue;
            };
            let end = at + usize::from(instruction.length);
            let entered = bridge.entered_by(instruction, end).filter(|_| !own.contains(&at));
            match (entered, sites.get_mut(kept)) {
                (Some(Entered::Called), Some(site)) if self.is_confirmed(code.len(), at) => {
                    let patch = address + at as u32;
                    let syscall = address + bridge.start as u32;
                    *site = Site { patch, syscall, end: patch + CALL_BYTES as u32, number: None };
                    kept += 1;
                }
                (Some(_), _) => *others += 1,
                (None, _) => {}
            }
            at = end;
        }
        if kept == before {
            *others += 1;
        }
        sites[..kept].sort_unstable_by_key(|site| site.patch);
        kept
    }

    /// The site of the call at `at`.
    fn judge(&self, code: &[u8], at: usize) -> Result<Site, Left> {
        if !self.is_confirmed(code.len(), at) {
            return Err(Left::Unsure);
        }
        // Backwards, up to an instruction that something jumps to: it may be the first replaced one, not a later one.
        let mut patch = at;
        let mut end = at;
        let mut moved = 0;
        let mut number = Number::Unmet;
        while at - patch < JUMP_BYTES && moved < BEFORE_MAX && !self.targets.has(patch) {
            let Some(before) = self.before(code, patch) else { break };
            number = number.before(&code[before..patch]);
            patch = before;
            moved += 1;
        }
        if at - patch < JUMP_BYTES {
            // The call, too, and what follows.
            end = at + SYSCALL_BYTES;
            moved += 1;
            while end - patch < JUMP_BYTES {
                let Some(instruction) = decode(&code[end..]) else { return Err(Left::NoRoom) };
                if self.targets.has(end) || !instruction.is_movable() {
                    return Err(Left::NoRoom);
                }
                end += usize::from(instruction.length);
                moved += 1;
            }
        }
        if end - patch > MOVED_BYTES_MAX || (moved > 1 && self.is_in_switch(at)) {
            return Err(Left::NoRoom);
        }
        Ok(Site { patch: patch as u32, syscall: at as u32, end: end as u32, number: number.known() })
    }

    /// The movable instruction that ends at `end`.
    fn before(&self, code: &[u8], end: usize) -> Option<usize> {
        let start = (end.saturating_sub(LENGTH_MAX)..end).rev().find(|start| self.starts.has(*start))?;
        let instruction = decode(&code[start..])?;
        (start + usize::from(instruction.length) == end && instruction.is_movable()).then_some(start)
    }

    /// Whether its function jumps by a table: labels may then stand anywhere, and no direct jump tells.
    fn is_in_switch(&self, at: usize) -> bool {
        let from = at.saturating_sub(SWITCH_BYTES);
        let from = (from..=at).rev().find(|place| self.functions.has(*place)).unwrap_or(from);
        let to = self.functions.next(at + 1, at + SWITCH_BYTES).unwrap_or(at + SWITCH_BYTES);
        self.indirect_jumps.next(from, to).is_some()
    }

    /// Whether the borders around `at` agree with what is known from elsewhere.
    fn is_confirmed(&self, code_bytes: usize, at: usize) -> bool {
        if self.hole_count > HOLES_MAX {
            return false;
        }
        let Some(before) = (0..=at).rev().find(|place| self.targets.has(*place)) else { return false };
        let after = self.targets.next(at + 1, code_bytes);
        let undecodable = |hole: &usize| (before..after.unwrap_or(code_bytes)).contains(hole);
        self.starts.has(before)
            && after.is_none_or(|after| self.starts.has(after))
            && !self.holes[..self.hole_count].iter().any(undecodable)
    }
}

/// What is known of eax at the call, going backwards.
#[derive(Clone, Copy)]
enum Number {
    /// Nothing met so far has written it.
    Unmet,
    Known(u16),
    Unknown,
}

impl Number {
    fn before(self, instruction: &[u8]) -> Self {
        match self {
            Self::Unmet => match number_in(instruction) {
                Some(number) => Self::Known(number),
                None if leaves_eax(instruction) => Self::Unmet,
                None => Self::Unknown,
            },
            met => met,
        }
    }

    fn known(self) -> Option<u16> {
        match self {
            Self::Known(number) => Some(number),
            _ => None,
        }
    }
}

/// Whether an instruction surely does not write rax: some moves, and arithmetic between other registers.
fn leaves_eax(instruction: &[u8]) -> bool {
    let (rex, rest) = match instruction {
        [rex @ 0x40..=0x4f, rest @ ..] => (*rex, rest),
        rest => (0, rest),
    };
    let (reg_extended, rm_extended) = (rex & 4 != 0, rex & 1 != 0);
    match *rest {
        // To the register of the ModRM byte: mov, movslq, lea.
        [0x8b | 0x63 | 0x8d, modrm, ..] => reg_extended || modrm >> 3 & 7 != 0,
        // To the other operand, which is not in memory: mov, xor.
        [0x89 | 0x31, modrm] => modrm >> 6 == 3 && (rm_extended || modrm & 7 != 0),
        // A number into another register.
        [opcode @ 0xb8..=0xbf, _, _, _, _] => rm_extended || opcode != 0xb8,
        // and, or, add, sub with a number.
        [0x83, modrm, _] | [0x81, modrm, _, _, _, _] => modrm >> 6 == 3 && (rm_extended || modrm & 7 != 0),
        _ => false,
    }
}

/// The number that `mov $n,%eax`, `mov $n,%rax` or `xor %eax,%eax` loads.
fn number_in(instruction: &[u8]) -> Option<u16> {
    let number = match *instruction {
        [0xb8, a, b, c, d] | [0x48, 0xc7, 0xc0, a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
        [0x31 | 0x33, 0xc0] => 0,
        _ => return None,
    };
    u16::try_from(number).ok()
}
