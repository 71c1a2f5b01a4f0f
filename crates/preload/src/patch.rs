//! Putting jumps to trampolines before system-call instructions.
//!
//! ```text
//! site:    jmp trampoline          (over the replaced instructions)
//! call:    syscall                 (stays: calls that are passed on are made here)
//!          ...
//! trampoline:
//!          the replaced instructions, displacements corrected
//!          lea call(%rip), %rcx    (syscall overwrites rcx, so it is free here)
//!          jmp *entry(%rip)
//! ```
//!
//! Of a call of the bridge (`bridge`) only the target is another:
//!
//! ```text
//! trampoline:
//!          lea bridge(%rip), %r11
//!          jmp *entry of the bridge(%rip)
//! ```
//!
//! Where the call itself had to be replaced, the trampoline goes on with it:
//!
//! ```text
//! call:    syscall
//!          the replaced instructions behind it
//!          jmp end of the site
//! ```

use crate::bridge::{Bridge, CALL, Entered};
use crate::decode::decode;
use crate::elf::Image;
use crate::scan::{JUMP_BYTES, MOVED_BYTES_MAX, Site};
use crate::sys::{self, PROT_EXEC, PROT_READ, PROT_WRITE};

pub const PAGE_BYTES: usize = 4096;
/// Where trampolines lead; stands at the start of their block.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Entries {
    pub of_calls: usize,
    pub of_bridge: usize,
}
const HEAD_BYTES: usize = size_of::<Entries>();
const OF_BRIDGE: usize = core::mem::offset_of!(Entries, of_bridge);
const TRAMPOLINE_BYTES: usize = 48;
const SYSCALL: [u8; 2] = [0x0f, 0x05];
const LEA_BYTES: usize = 7;
const INDIRECT_JUMP_BYTES: usize = 6;
const _: () = assert!(MOVED_BYTES_MAX + LEA_BYTES + INDIRECT_JUMP_BYTES + JUMP_BYTES <= TRAMPOLINE_BYTES);
/// How far a jump may go, with room for the library itself.
const REACH_BYTES: usize = 1 << 30;
const PROBE_BYTES: usize = 4 << 20;
const INT3: u8 = 0xcc;
const JUMP: u8 = 0xe9;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No room for trampolines near the library, or memory cannot be made executable.
    NoRoom,
    /// The library's code cannot be made writable.
    NotWritable,
}

/// Redirects the sites of the library at `base`, whose code is `code_bytes` at `code_address`. All of them or none.
///
/// # Safety
/// No other thread may run in this process. The image must be the library mapped at `base`, and the sites its own.
pub unsafe fn redirect(
    base: usize,
    image: &Image<'_>,
    sites: &[Site],
    entries: Entries,
) -> Result<u32, Refused> {
    if sites.is_empty() {
        return Ok(0);
    }
    let (code_address, code) = image.code().ok_or(Refused::NotWritable)?;
    let size = (HEAD_BYTES + sites.len() * TRAMPOLINE_BYTES).next_multiple_of(PAGE_BYTES);
    let block = map_near(base, size).ok_or(Refused::NoRoom)?;
    // SAFETY: mapped just now, `size` bytes, ours alone.
    let bytes = unsafe { core::slice::from_raw_parts_mut(block as *mut u8, size) };
    bytes[..OF_BRIDGE].copy_from_slice(&entries.of_calls.to_le_bytes());
    bytes[OF_BRIDGE..HEAD_BYTES].copy_from_slice(&entries.of_bridge.to_le_bytes());
    let trampolines = block + HEAD_BYTES;
    let written =
        write_trampolines(&mut bytes[HEAD_BYTES..], trampolines, block, base, image, sites).is_some();
    let start = (base + code_address) & !(PAGE_BYTES - 1);
    let length = (base + code_address + code.len()).next_multiple_of(PAGE_BYTES) - start;
    // The code is never without the right to execute: policies that forbid getting it back would leave a dead library.
    // SAFETY: rights are only added.
    let writable = written
        && unsafe { sys::protect(block, size, PROT_READ | PROT_EXEC) }
        && unsafe { sys::protect(start, length, PROT_READ | PROT_WRITE | PROT_EXEC) };
    if !writable {
        // SAFETY: nothing leads there yet.
        unsafe { sys::unmap(block, size) };
        return Err(if written { Refused::NotWritable } else { Refused::NoRoom });
    }
    for (index, site) in sites.iter().enumerate() {
        // SAFETY: nobody executes this code now; the bytes are those of the site.
        unsafe { write_jump(base, site, trampolines + trampoline_at(index)) };
    }
    // SAFETY: as it was before.
    unsafe { sys::protect(start, length, PROT_READ | PROT_EXEC) };
    Ok(sites.len() as u32)
}

/// Whole pages that the trampolines of so many sites take.
pub fn trampolines_bytes(sites: usize) -> usize {
    (sites * TRAMPOLINE_BYTES).next_multiple_of(PAGE_BYTES)
}

/// Where the trampoline of a site lies among all.
pub fn trampoline_at(index: usize) -> usize {
    index * TRAMPOLINE_BYTES
}

/// Writes the trampolines of a library at `base`, to lie at `address`; the entries are at `entry_slot`.
pub fn write_trampolines(
    to: &mut [u8],
    address: usize,
    entry_slot: usize,
    base: usize,
    image: &Image<'_>,
    sites: &[Site],
) -> Option<()> {
    to.fill(INT3);
    for (index, site) in sites.iter().enumerate() {
        let at = trampoline_at(index);
        let trampoline = to.get_mut(at..at + TRAMPOLINE_BYTES)?;
        write_trampoline(trampoline, address + at, entry_slot, base, image, site)?;
    }
    Some(())
}

/// Memory within reach of jumps from `base`.
fn map_near(base: usize, size: usize) -> Option<usize> {
    let mut distance = size + PROBE_BYTES;
    while distance < REACH_BYTES {
        let below = base.checked_sub(distance).map(|address| address & !(PAGE_BYTES - 1));
        if let Some(block) = below.and_then(|address| sys::map(address, size)) {
            return Some(block);
        }
        distance += PROBE_BYTES;
    }
    None
}

fn write_trampoline(
    trampoline: &mut [u8],
    address: usize,
    entry_slot: usize,
    base: usize,
    image: &Image<'_>,
    site: &Site,
) -> Option<()> {
    let (patch, syscall, end) = (site.patch as usize, site.syscall as usize, site.end as usize);
    if site.calls_bridge() {
        leads_to_bridge(image, site).then_some(())?;
        let mut to = Writer { bytes: trampoline, at: 0, address };
        to.relative(&[0x4c, 0x8d, 0x1d], base + syscall)?;
        to.relative(&[0xff, 0x25], entry_slot + OF_BRIDGE)?;
        return distance(base + patch + JUMP_BYTES, address).map(|_| ());
    }
    let length = end.checked_sub(patch).filter(|length| (JUMP_BYTES..=MOVED_BYTES_MAX).contains(length))?;
    (image.bytes(syscall, SYSCALL.len())? == SYSCALL).then_some(())?;
    let moved = image.bytes(patch, length)?;
    let mut to = Writer { bytes: trampoline, at: 0, address };
    let before = syscall.checked_sub(patch)?;
    to.copy(moved.get(..before)?, base + patch)?;
    let stays = end == syscall;
    let call = if stays { base + syscall } else { to.here() + LEA_BYTES + INDIRECT_JUMP_BYTES };
    to.relative(&[0x48, 0x8d, 0x0d], call)?;
    to.relative(&[0xff, 0x25], entry_slot)?;
    if !stays {
        to.push(&SYSCALL)?;
        to.copy(moved.get(before + SYSCALL.len()..)?, base + syscall + SYSCALL.len())?;
        to.relative(&[0xe9], base + end)?;
    }
    distance(base + patch + JUMP_BYTES, address).map(|_| ())
}

/// Whether a call of the bridge is there, and the bridge.
pub fn leads_to_bridge(image: &Image<'_>, site: &Site) -> bool {
    let Some((address, code)) = image.code() else { return false };
    let at = |of: u32| (of as usize).checked_sub(address);
    let (Some(call), Some(start), Some(end)) = (at(site.patch), at(site.syscall), at(site.end)) else {
        return false;
    };
    let entered = code.get(call..end).and_then(decode).and_then(|instruction| {
        let bridge = Bridge::from_start(code, start)?;
        bridge.entered_by(instruction, end)
    });
    entered == Some(Entered::Called)
}

struct Writer<'a> {
    bytes: &'a mut [u8],
    at: usize,
    address: usize,
}

impl Writer<'_> {
    fn here(&self) -> usize {
        self.address + self.at
    }

    fn push(&mut self, bytes: &[u8]) -> Option<()> {
        self.bytes.get_mut(self.at..self.at + bytes.len())?.copy_from_slice(bytes);
        self.at += bytes.len();
        Some(())
    }

    /// An instruction that ends with a displacement to an address.
    fn relative(&mut self, opcode: &[u8], to: usize) -> Option<()> {
        self.push(opcode)?;
        self.push(&distance(self.here() + 4, to)?)
    }

    /// Movable instructions that stood at `from`.
    fn copy(&mut self, instructions: &[u8], from: usize) -> Option<()> {
        let start = self.at;
        let shift = from.wrapping_sub(self.here()) as isize;
        self.push(instructions)?;
        let mut at = 0;
        while at < instructions.len() {
            let instruction = decode(&instructions[at..]).filter(|instruction| instruction.is_movable())?;
            if let Some(place) = instruction.rip_displacement_at {
                let field_at = start + at + usize::from(place);
                let field = self.bytes.get_mut(field_at..field_at + 4)?;
                let old = i32::from_le_bytes((&*field).try_into().ok()?);
                let new = i32::try_from(isize::try_from(old).ok()?.checked_add(shift)?).ok()?;
                field.copy_from_slice(&new.to_le_bytes());
            }
            at += usize::from(instruction.length);
        }
        (at == instructions.len()).then_some(())
    }
}

fn distance(from: usize, to: usize) -> Option<[u8; 4]> {
    i32::try_from(to.wrapping_sub(from) as isize).ok().map(i32::to_le_bytes)
}

/// # Safety
/// The site's bytes must be writable, and nobody may execute them now.
unsafe fn write_jump(base: usize, site: &Site, trampoline: usize) {
    let length = (site.end - site.patch) as usize;
    let address = base + site.patch as usize;
    // SAFETY: the site lies in the library's code, which the caller made writable.
    let bytes = unsafe { core::slice::from_raw_parts_mut(address as *mut u8, length) };
    // `write_trampoline` has tried the distance.
    let _ = put_jump(bytes, address, trampoline);
}

/// Writes the jump of a site at `address` over all of its bytes. What calls goes on to call.
pub fn put_jump(bytes: &mut [u8], address: usize, trampoline: usize) -> Option<()> {
    let (jump, rest) = bytes.split_at_mut_checked(JUMP_BYTES)?;
    jump[1..].copy_from_slice(&distance(address.checked_add(JUMP_BYTES)?, trampoline)?);
    if jump[0] != CALL {
        jump[0] = JUMP;
    }
    rest.fill(INT3);
    Some(())
}
