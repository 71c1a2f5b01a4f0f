//! Lengths of x86-64 instructions, and as much of their meaning as moving them to another place takes.
//!
//! Not a disassembler: a length is all that finding the borders between instructions needs. A test holds it against
//! objdump over the C libraries of the machine.

/// What an instruction does to the flow of control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Goes on with the next instruction and may be copied elsewhere.
    Next,
    /// `syscall`.
    Syscall,
    /// A direct jump, conditional or not: `rel` counts from the end of the instruction.
    Branch { rel: i32 },
    /// A direct call.
    Call { rel: i32 },
    /// A jump through a register or memory: what follows may be reached from anywhere.
    IndirectJump,
    /// A call through a register or memory.
    IndirectCall,
    /// Return, trap, halt.
    Stop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub length: u8,
    pub flow: Flow,
    /// Where the four bytes of a displacement from the instruction pointer are, if it has one.
    pub rip_displacement_at: Option<u8>,
}

impl Instruction {
    /// Whether it means the same at another address once its displacement is corrected.
    pub fn is_movable(&self) -> bool {
        self.flow == Flow::Next
    }
}

/// The longest instruction that the processor takes.
pub const LENGTH_MAX: usize = 15;

#[derive(Clone, Copy)]
enum Immediate {
    None,
    Byte,
    Word,
    /// Two bytes with an operand-size prefix, else four.
    Operand,
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn next(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn skip(&mut self, count: usize) -> Option<()> {
        self.at = self.at.checked_add(count)?;
        (self.at <= self.bytes.len()).then_some(())
    }
}

#[derive(Default)]
struct Prefixes {
    operand_size: bool,
    address_size: bool,
    repeat: u8,
    wide: bool,
}

/// The instruction at the start of `bytes`; `None` if there is none in 64-bit mode, or not all of it.
pub fn decode(bytes: &[u8]) -> Option<Instruction> {
    let limit = bytes.len().min(LENGTH_MAX);
    let mut cursor = Cursor { bytes: bytes.get(..limit)?, at: 0 };
    let mut prefixes = Prefixes::default();
    let mut opcode = cursor.next()?;
    loop {
        match opcode {
            0x66 => prefixes.operand_size = true,
            0x67 => prefixes.address_size = true,
            0xf2 | 0xf3 => prefixes.repeat = opcode,
            0xf0 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 => {}
            _ => break,
        }
        opcode = cursor.next()?;
    }
    if opcode & 0xf0 == 0x40 {
        prefixes.wide = opcode & 8 != 0;
        opcode = cursor.next()?;
        // A prefix after REX makes the processor ignore REX; no compiler writes that.
        if opcode & 0xf0 == 0x40 {
            return None;
        }
    }
    match opcode {
        0x0f => two_bytes(&mut cursor, &prefixes),
        0xc4 | 0xc5 => vex(&mut cursor, opcode),
        0x62 => evex(&mut cursor),
        0x8f if bytes.get(cursor.at)? & 0x38 != 0 => xop(&mut cursor),
        _ => one_byte(&mut cursor, &prefixes, opcode),
    }
}

fn finish(cursor: &Cursor<'_>, flow: Flow, rip_displacement_at: Option<u8>) -> Option<Instruction> {
    Some(Instruction { length: cursor.at as u8, flow, rip_displacement_at })
}

fn branch8(cursor: &mut Cursor<'_>) -> Option<Instruction> {
    let rel = i32::from(cursor.next()? as i8);
    finish(cursor, Flow::Branch { rel }, None)
}

fn branch32(cursor: &mut Cursor<'_>) -> Option<Instruction> {
    let at = cursor.at;
    cursor.skip(4)?;
    let rel = i32::from_le_bytes(cursor.bytes.get(at..at + 4)?.try_into().ok()?);
    finish(cursor, Flow::Branch { rel }, None)
}

/// Steps over ModRM, SIB and displacement: the ModRM byte and the place of a displacement from the instruction pointer.
fn operand(cursor: &mut Cursor<'_>) -> Option<(u8, Option<u8>)> {
    let modrm = cursor.next()?;
    let (mode, rm) = (modrm >> 6, modrm & 7);
    let mut rip_at = None;
    if mode == 3 {
        return Some((modrm, None));
    }
    let mut base = rm;
    if rm == 4 {
        base = cursor.next()? & 7;
    }
    match mode {
        0 if rm == 5 => {
            rip_at = Some(cursor.at as u8);
            cursor.skip(4)?;
        }
        0 if rm == 4 && base == 5 => cursor.skip(4)?,
        1 => cursor.skip(1)?,
        2 => cursor.skip(4)?,
        _ => {}
    }
    Some((modrm, rip_at))
}

fn with_operand(
    cursor: &mut Cursor<'_>,
    prefixes: &Prefixes,
    immediate: Immediate,
) -> Option<(u8, Instruction)> {
    let (modrm, rip_at) = operand(cursor)?;
    skip_immediate(cursor, prefixes, immediate)?;
    Some((modrm, finish(cursor, Flow::Next, rip_at)?))
}

fn skip_immediate(cursor: &mut Cursor<'_>, prefixes: &Prefixes, immediate: Immediate) -> Option<()> {
    cursor.skip(match immediate {
        Immediate::None => 0,
        Immediate::Byte => 1,
        Immediate::Word => 2,
        Immediate::Operand if prefixes.operand_size && !prefixes.wide => 2,
        Immediate::Operand => 4,
    })
}

fn plain(cursor: &mut Cursor<'_>, prefixes: &Prefixes, immediate: Immediate) -> Option<Instruction> {
    skip_immediate(cursor, prefixes, immediate)?;
    finish(cursor, Flow::Next, None)
}

fn stop(cursor: &mut Cursor<'_>, immediate_bytes: usize) -> Option<Instruction> {
    cursor.skip(immediate_bytes)?;
    finish(cursor, Flow::Stop, None)
}

fn one_byte(cursor: &mut Cursor<'_>, prefixes: &Prefixes, opcode: u8) -> Option<Instruction> {
    use Immediate::{Byte, None as Nothing, Operand, Word};
    let operand_with = |cursor: &mut Cursor<'_>, immediate| {
        with_operand(cursor, prefixes, immediate).map(|(_, instruction)| instruction)
    };
    match opcode {
        0x00..=0x3f => match opcode & 7 {
            0..=3 => operand_with(cursor, Nothing),
            4 => plain(cursor, prefixes, Byte),
            5 => plain(cursor, prefixes, Operand),
            _ => None,
        },
        0x50..=0x5f | 0x6c..=0x6f | 0x90..=0x99 | 0x9b..=0x9f | 0xa4..=0xa7 | 0xaa..=0xaf => {
            plain(cursor, prefixes, Nothing)
        }
        0x63 | 0x84..=0x8f | 0xd0..=0xd3 | 0xd8..=0xdf => operand_with(cursor, Nothing),
        0x68 | 0xa9 => plain(cursor, prefixes, Operand),
        0x69 | 0x81 => operand_with(cursor, Operand),
        0x6a | 0xa8 | 0xb0..=0xb7 | 0xe4..=0xe7 => plain(cursor, prefixes, Byte),
        0x6b | 0x80 | 0x83 | 0xc0 | 0xc1 => operand_with(cursor, Byte),
        0x70..=0x7f | 0xe0..=0xe3 | 0xeb => branch8(cursor),
        0xa0..=0xa3 => {
            cursor.skip(if prefixes.address_size { 4 } else { 8 })?;
            finish(cursor, Flow::Next, None)
        }
        0xb8..=0xbf if prefixes.wide => {
            cursor.skip(8)?;
            finish(cursor, Flow::Next, None)
        }
        0xb8..=0xbf => plain(cursor, prefixes, Operand),
        0xc6 => match *cursor.bytes.get(cursor.at)? {
            // xabort: leaves the transaction.
            0xf8 => {
                cursor.skip(1)?;
                stop(cursor, 1)
            }
            _ => operand_with(cursor, Byte),
        },
        0xc7 if *cursor.bytes.get(cursor.at)? == 0xf8 => {
            cursor.skip(1)?;
            branch32(cursor)
        }
        0xc7 => operand_with(cursor, Operand),
        0xc8 => {
            cursor.skip(3)?;
            finish(cursor, Flow::Next, None)
        }
        0xc2 | 0xca => {
            skip_immediate(cursor, prefixes, Word)?;
            stop(cursor, 0)
        }
        0xc3 | 0xcb | 0xcc | 0xcf | 0xf1 | 0xf4 => stop(cursor, 0),
        0xcd => stop(cursor, 1),
        0xc9 | 0xd7 | 0xec..=0xef | 0xf5 | 0xf8..=0xfd => plain(cursor, prefixes, Nothing),
        // Direct calls and jumps have four bytes even with an operand-size prefix, as the linkers' TLS sequences rely on.
        0xe9 => branch32(cursor),
        0xe8 => {
            let instruction = branch32(cursor)?;
            let Flow::Branch { rel } = instruction.flow else { return None };
            Some(Instruction { flow: Flow::Call { rel }, ..instruction })
        }
        0xf6 | 0xf7 => {
            let test = cursor.bytes.get(cursor.at)? & 0x38 < 0x10;
            let immediate = if opcode == 0xf6 { Byte } else { Operand };
            operand_with(cursor, if test { immediate } else { Nothing })
        }
        0xfe => operand_with(cursor, Nothing),
        0xff => {
            let (modrm, instruction) = with_operand(cursor, prefixes, Nothing)?;
            let flow = match modrm >> 3 & 7 {
                2 | 3 => Flow::IndirectCall,
                4 | 5 => Flow::IndirectJump,
                7 => return None,
                _ => Flow::Next,
            };
            Some(Instruction { flow, ..instruction })
        }
        _ => None,
    }
}

fn two_bytes(cursor: &mut Cursor<'_>, prefixes: &Prefixes) -> Option<Instruction> {
    use Immediate::{Byte, None as Nothing};
    let opcode = cursor.next()?;
    let operand_with = |cursor: &mut Cursor<'_>, immediate| {
        with_operand(cursor, prefixes, immediate).map(|(_, instruction)| instruction)
    };
    match opcode {
        0x05 => finish(cursor, Flow::Syscall, None),
        0x07 | 0x0b | 0x35 => stop(cursor, 0),
        0x06 | 0x08 | 0x09 | 0x0e | 0x30..=0x34 | 0x37 | 0x77 | 0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf => {
            plain(cursor, prefixes, Nothing)
        }
        // Control and debug registers: the operand is a register, whatever its mode bits say.
        0x20..=0x23 => {
            cursor.skip(1)?;
            finish(cursor, Flow::Next, None)
        }
        0x04 | 0x0a | 0x0c | 0x24..=0x27 | 0x36 | 0x39 | 0x3b..=0x3f | 0x7a | 0x7b | 0xa6 | 0xa7 => None,
        0x38 => {
            cursor.next()?;
            operand_with(cursor, Nothing)
        }
        0x3a => {
            cursor.next()?;
            operand_with(cursor, Byte)
        }
        0x78 if prefixes.operand_size || prefixes.repeat == 0xf2 => {
            operand(cursor)?;
            cursor.skip(2)?;
            finish(cursor, Flow::Next, None)
        }
        0x80..=0x8f => branch32(cursor),
        0x0f | 0x70..=0x73 | 0xa4 | 0xac | 0xba | 0xc2 | 0xc4..=0xc6 => operand_with(cursor, Byte),
        _ => operand_with(cursor, Nothing),
    }
}

/// Opcodes of the first map that have an immediate byte, the same in VEX and EVEX.
fn first_map_immediate(opcode: u8) -> Immediate {
    match opcode {
        0x70..=0x73 | 0xc2 | 0xc4..=0xc6 => Immediate::Byte,
        _ => Immediate::None,
    }
}

fn vector(cursor: &mut Cursor<'_>, immediate: Immediate) -> Option<Instruction> {
    with_operand(cursor, &Prefixes::default(), immediate).map(|(_, instruction)| instruction)
}

fn vex(cursor: &mut Cursor<'_>, opcode: u8) -> Option<Instruction> {
    let first = cursor.next()?;
    let map = if opcode == 0xc5 {
        1
    } else {
        cursor.next()?;
        first & 0x1f
    };
    let operation = cursor.next()?;
    match map {
        1 if operation == 0x77 => finish(cursor, Flow::Next, None),
        1 => vector(cursor, first_map_immediate(operation)),
        2 => vector(cursor, Immediate::None),
        3 => vector(cursor, Immediate::Byte),
        _ => None,
    }
}

fn evex(cursor: &mut Cursor<'_>) -> Option<Instruction> {
    let map = cursor.next()? & 7;
    cursor.skip(2)?;
    let operation = cursor.next()?;
    match map {
        1 => vector(cursor, first_map_immediate(operation)),
        2 | 5 | 6 => vector(cursor, Immediate::None),
        3 => vector(cursor, Immediate::Byte),
        _ => None,
    }
}

fn xop(cursor: &mut Cursor<'_>) -> Option<Instruction> {
    let map = cursor.next()? & 0x1f;
    cursor.skip(2)?;
    match map {
        8 => vector(cursor, Immediate::Byte),
        9 => vector(cursor, Immediate::None),
        10 => vector(cursor, Immediate::Operand),
        _ => None,
    }
}
