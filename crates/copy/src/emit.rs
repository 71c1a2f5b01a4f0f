//! Machine code of a variant, for x86-64: a function `(rdi: destination, rsi: source, rdx: bytes)`.
//!
//! ```text
//! short copies (less than a register)   --------------------------> tail by 8, by 1
//! align -> whole pages (staged, x2, x4) -> whole blocks -> tail by registers, the last one overlapping -> fence
//! ```
//!
//! Nothing outside of the two ranges is read or written; prefetches may name lines beyond, which is not an access.

use crate::encode::{Access, Address, Assembler, Condition, Data, General};
use crate::features::Features;
use crate::variant::{Align, Hint, LINE_BYTES, Load, Move, Order, PAGE_BYTES, Registers, Store, Variant};
use General::{R8, R9, R10, R11, Rax, Rcx, Rdi, Rdx, Rsi, Rsp};

/// No variant's code is longer.
pub const CODE_BYTES_MAX: usize = 4096;

const ADD: u8 = 0;
const AND: u8 = 4;
const SUB: u8 = 5;
const CMP: u8 = 7;
const ADD_REGISTER: u8 = 0x01;
const SUB_REGISTER: u8 = 0x29;
const CMP_REGISTER: u8 = 0x39;
const TEST_REGISTER: u8 = 0x85;
const MOV_REGISTER: u8 = 0x89;

/// Writes the code of `variant` to `room` and tells its length; None if this processor cannot run it, it does not fit, or is not
/// ours to write ([`Move::Library`]).
pub fn emit(variant: &Variant, features: Features, room: &mut [u8]) -> Option<usize> {
    if !variant.is_sound() || !variant.runs_on(features) {
        return None;
    }
    let mut a = Assembler::new(room);
    match variant.moves {
        Move::Library => return None,
        Move::Bytes => string(&mut a, false, variant.align),
        Move::Words => string(&mut a, true, variant.align),
        Move::Registers(registers) => {
            Copy { registers, align: variant.align, keep: variant.keep, features }.emit(&mut a)
        }
    }
    a.finish()
}

fn at(base: General, displacement: usize) -> Address {
    Address { base, index: None, displacement: displacement as i32 }
}

fn return_(a: &mut Assembler<'_>) {
    a.bytes(&[0xc3]);
}

/// `rcx` = bytes to go until `register` is a multiple of `width`; moves both pointers there. The first `width` bytes are copied.
fn align(a: &mut Assembler<'_>, register: General, width: u8, data: Data) {
    a.access(data, at(Rsi, 0), Access::Load);
    a.access(data, at(Rdi, 0), Access::Store);
    a.with_register(MOV_REGISTER, Rcx, register);
    a.negate(Rcx);
    a.with_constant(AND, Rcx, i32::from(width) - 1);
    a.with_register(ADD_REGISTER, Rdi, Rcx);
    a.with_register(ADD_REGISTER, Rsi, Rcx);
    a.with_register(SUB_REGISTER, Rdx, Rcx);
}

fn string(a: &mut Assembler<'_>, words: bool, alignment: Align) {
    if alignment == Align::Destination {
        a.with_constant(CMP, Rdx, 64);
        let short = a.jump(Condition::Below);
        // Eight times eight bytes, so that the rest begins at a line.
        for (index, register) in [R8, R9, R10, R11].into_iter().cycle().take(8).enumerate() {
            a.access(Data::General(register), at(Rsi, 8 * index), Access::Load);
            a.access(Data::General(register), at(Rdi, 8 * index), Access::Store);
        }
        a.with_register(MOV_REGISTER, Rcx, Rdi);
        a.negate(Rcx);
        a.with_constant(AND, Rcx, 63);
        a.with_register(ADD_REGISTER, Rdi, Rcx);
        a.with_register(ADD_REGISTER, Rsi, Rcx);
        a.with_register(SUB_REGISTER, Rdx, Rcx);
        a.land(short);
    }
    a.with_register(MOV_REGISTER, Rcx, Rdx);
    if words {
        a.bytes(&[0x48, 0xc1, 0xe9, 3]); // shr rcx, 3
        a.bytes(&[0xf3, 0x48, 0xa5]); // rep movsq
        a.with_register(MOV_REGISTER, Rcx, Rdx);
        a.with_constant(AND, Rcx, 7);
    }
    a.bytes(&[0xf3, 0xa4]); // rep movsb
    return_(a);
}

struct Copy {
    registers: Registers,
    align: Align,
    keep: bool,
    features: Features,
}

impl Copy {
    fn width(&self) -> usize {
        self.registers.width_bytes.into()
    }

    fn block(&self) -> usize {
        self.registers.block_bytes.into()
    }

    fn data(&self, index: u8) -> Data {
        match self.registers.width_bytes {
            8 => Data::General([R8, R9, R10, R11][usize::from(index) & 3]),
            // The upper sixteen registers: using them needs no VZEROUPPER.
            64 => Data::Vector(16 + index, 64),
            width => Data::Vector(index, width),
        }
    }

    fn emit(&self, a: &mut Assembler<'_>) {
        a.with_constant(CMP, Rdx, self.width() as i32);
        let short = a.jump(Condition::Below);
        self.save(a);
        // Room for the alignment's step, a turn of the pages and one block.
        a.with_constant(CMP, Rdx, (self.block() + self.width()) as i32);
        let rest = a.jump(Condition::Below);
        match self.align {
            Align::Neither => {}
            Align::Destination => align(a, Rdi, self.registers.width_bytes, self.data(0)),
            Align::Source => align(a, Rsi, self.registers.width_bytes, self.data(0)),
        }
        match self.registers.order {
            Order::Ascending => {}
            Order::Staged => self.staged(a),
            Order::Pages(pages) => self.pages(a, pages.into()),
        }
        self.blocks(a);
        a.land(rest);
        self.tail(a);
        self.restore(a);
        return_(a);
        a.land(short);
        short_tail(a);
        return_(a);
    }

    /// Whole blocks, one after the other; after it less than a block is left.
    fn blocks(&self, a: &mut Assembler<'_>) {
        a.with_register(MOV_REGISTER, Rcx, Rdx);
        a.with_constant(AND, Rcx, -(self.block() as i32));
        let none = a.jump(Condition::Equal);
        a.with_register(SUB_REGISTER, Rdx, Rcx);
        a.with_register(ADD_REGISTER, Rcx, Rdi);
        let turn = a.label();
        if self.registers.order == Order::Ascending {
            self.prefetch_block(a, 0);
        }
        self.copy_block(a, 0);
        self.advance(a, self.block());
        a.with_register(CMP_REGISTER, Rdi, Rcx);
        a.jump_back(Condition::Below, turn);
        a.land(none);
    }

    /// Whole pages: each is prefetched and then copied.
    fn staged(&self, a: &mut Assembler<'_>) {
        a.with_constant(CMP, Rdx, PAGE_BYTES as i32);
        let none = a.jump(Condition::Below);
        let page = a.label();
        if let Some(prefetch) = self.registers.prefetch {
            for line in 0..PAGE_BYTES / LINE_BYTES {
                let ahead = (line + usize::from(prefetch.distance_lines)) * LINE_BYTES;
                prefetch_line(a, prefetch.hint, ahead);
            }
        }
        a.address_of(Rcx, Rdi, PAGE_BYTES as i32);
        let turn = a.label();
        self.copy_block(a, 0);
        self.advance(a, self.block());
        a.with_register(CMP_REGISTER, Rdi, Rcx);
        a.jump_back(Condition::Below, turn);
        a.with_constant(SUB, Rdx, PAGE_BYTES as i32);
        a.with_constant(CMP, Rdx, PAGE_BYTES as i32);
        a.jump_back(Condition::AboveOrEqual, page);
        a.land(none);
    }

    /// Several pages at a time, a block of each in turn.
    fn pages(&self, a: &mut Assembler<'_>, pages: usize) {
        a.with_constant(CMP, Rdx, (pages * PAGE_BYTES) as i32);
        let none = a.jump(Condition::Below);
        let group = a.label();
        a.address_of(Rcx, Rdi, PAGE_BYTES as i32);
        let turn = a.label();
        for page in 0..pages {
            self.prefetch_block(a, page * PAGE_BYTES);
            self.copy_block(a, page * PAGE_BYTES);
        }
        self.advance(a, self.block());
        a.with_register(CMP_REGISTER, Rdi, Rcx);
        a.jump_back(Condition::Below, turn);
        self.advance(a, (pages - 1) * PAGE_BYTES);
        a.with_constant(SUB, Rdx, (pages * PAGE_BYTES) as i32);
        a.with_constant(CMP, Rdx, (pages * PAGE_BYTES) as i32);
        a.jump_back(Condition::AboveOrEqual, group);
        a.land(none);
    }

    fn prefetch_block(&self, a: &mut Assembler<'_>, from: usize) {
        if let Some(prefetch) = self.registers.prefetch {
            for line in 0..self.block() / LINE_BYTES {
                prefetch_line(
                    a,
                    prefetch.hint,
                    from + (line + usize::from(prefetch.distance_lines)) * LINE_BYTES,
                );
            }
        }
    }

    fn copy_block(&self, a: &mut Assembler<'_>, from: usize) {
        let load = if self.registers.load == Load::Streaming { Access::StreamingLoad } else { Access::Load };
        let store =
            if self.registers.store == Store::NonTemporal { Access::NonTemporalStore } else { Access::Store };
        let group = usize::from(self.registers.registers()) * self.width();
        for begin in (0..self.block()).step_by(group) {
            for index in 0..self.registers.registers() {
                let offset = from + begin + usize::from(index) * self.width();
                a.access(self.data(index), at(Rsi, offset), load);
            }
            for index in 0..self.registers.registers() {
                let offset = from + begin + usize::from(index) * self.width();
                a.access(self.data(index), at(Rdi, offset), store);
            }
        }
    }

    fn advance(&self, a: &mut Assembler<'_>, by: usize) {
        a.with_constant(ADD, Rsi, by as i32);
        a.with_constant(ADD, Rdi, by as i32);
    }

    /// What is left: whole registers, then the last one so that it ends where the range ends. At least a register was
    /// asked for, so that its begin lies within what is copied.
    fn tail(&self, a: &mut Assembler<'_>) {
        let width = self.width() as i32;
        a.with_constant(CMP, Rdx, width);
        let last = a.jump(Condition::Below);
        let turn = a.label();
        a.access(self.data(0), at(Rsi, 0), Access::Load);
        a.access(self.data(0), at(Rdi, 0), Access::Store);
        self.advance(a, self.width());
        a.with_constant(SUB, Rdx, width);
        a.with_constant(CMP, Rdx, width);
        a.jump_back(Condition::AboveOrEqual, turn);
        a.land(last);
        a.with_register(TEST_REGISTER, Rdx, Rdx);
        let done = a.jump(Condition::Equal);
        let end = |base| Address { base, index: Some(Rdx), displacement: -width };
        a.access(self.data(0), end(Rsi), Access::Load);
        a.access(self.data(0), end(Rdi), Access::Store);
        a.land(done);
        if self.registers.store == Store::NonTemporal {
            a.bytes(&[0x0f, 0xae, 0xf8]); // sfence
        }
    }

    /// The width at which registers are saved. VEX and EVEX writes clear the bits above theirs; legacy SSE does not.
    fn saved_width(&self) -> usize {
        match self.registers.width_bytes {
            16 => 16,
            _ if self.features.avx512f => 64,
            _ => 32,
        }
    }

    fn each_saved(&self, a: &mut Assembler<'_>, access: Access) {
        let width = self.saved_width();
        for index in 0..self.registers.registers() {
            let Data::Vector(number, _) = self.data(index) else { return };
            a.access(Data::Vector(number, width as u8), at(Rsp, usize::from(index) * width), access);
        }
    }

    fn save(&self, a: &mut Assembler<'_>) {
        if self.keep {
            a.with_constant(SUB, Rsp, (usize::from(self.registers.registers()) * self.saved_width()) as i32);
            self.each_saved(a, Access::Store);
        }
    }

    fn restore(&self, a: &mut Assembler<'_>) {
        if self.keep {
            self.each_saved(a, Access::Load);
            a.with_constant(ADD, Rsp, (usize::from(self.registers.registers()) * self.saved_width()) as i32);
        } else if self.registers.width_bytes == 32 {
            a.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
        }
    }
}

fn prefetch_line(a: &mut Assembler<'_>, hint: Hint, displacement: usize) {
    let (operation, number, base) = match hint {
        Hint::NonTemporal => (0x18, 0, Rsi),
        Hint::T0 => (0x18, 1, Rsi),
        Hint::T1 => (0x18, 2, Rsi),
        Hint::T2 => (0x18, 3, Rsi),
        Hint::Write => (0x0d, 1, Rdi),
    };
    a.prefetch(operation, number, base, displacement as i32);
}

/// Less than a register: by eight bytes, then by one.
fn short_tail(a: &mut Assembler<'_>) {
    a.with_constant(CMP, Rdx, 8);
    let bytes = a.jump(Condition::Below);
    let words = a.label();
    a.access(Data::General(Rax), at(Rsi, 0), Access::Load);
    a.access(Data::General(Rax), at(Rdi, 0), Access::Store);
    a.with_constant(ADD, Rsi, 8);
    a.with_constant(ADD, Rdi, 8);
    a.with_constant(SUB, Rdx, 8);
    a.with_constant(CMP, Rdx, 8);
    a.jump_back(Condition::AboveOrEqual, words);
    a.land(bytes);
    a.with_register(TEST_REGISTER, Rdx, Rdx);
    let done = a.jump(Condition::Equal);
    a.with_register(ADD_REGISTER, Rdx, Rsi);
    let turn = a.label();
    a.byte();
    a.with_constant(ADD, Rsi, 1);
    a.with_constant(ADD, Rdi, 1);
    a.with_register(CMP_REGISTER, Rsi, Rdx);
    a.jump_back(Condition::Below, turn);
    a.land(done);
}
