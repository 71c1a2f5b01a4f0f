//! A way to copy, as parameters, and the word that names it in plans.
//!
//! `movsb`, `movsq.dst`: string instructions, perhaps with the destination aligned first. Otherwise dot by dot: `v32`, bytes of
//! a register; `b256`, bytes a turn; `nt`, stores past the caches; `sl`, streaming loads; `staged`, `x2` or `x4`, the
//! order of blocks; `t0@8`, prefetch and its distance in cache lines; `dst` or `src`, what is aligned; `keep`, vector
//! registers are given back as they were. For example `v32.b256.nt.nta@16.dst`. `libc` is memcpy(3) as the program has it.

use crate::features::Features;
use crate::text::{Text, number};

pub const LINE_BYTES: usize = 64;
pub const PAGE_BYTES: usize = 4096;
/// The longest name of a variant.
pub const NAME_BYTES_MAX: usize = 48;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Move {
    /// memcpy(3) of whatever the program is linked with.
    Library,
    /// `rep movsb`.
    Bytes,
    /// `rep movsq`, then the rest byte by byte.
    Words,
    /// Loads and stores of registers.
    Registers(Registers),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Registers {
    /// 8 (general registers), 16 (SSE), 32 (AVX) or 64 (AVX-512).
    pub width_bytes: u8,
    /// Bytes copied in a turn of the loop: a power of two from 64 to 1,024.
    pub block_bytes: u16,
    pub store: Store,
    pub load: Load,
    pub order: Order,
    pub prefetch: Option<Prefetch>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Store {
    Temporal,
    /// Past the caches, fenced at the end. Aligns the destination.
    NonTemporal,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Load {
    Plain,
    /// MOVNTDQA. Aligns the source.
    Streaming,
}

/// In which order blocks are copied.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Order {
    Ascending,
    /// A page is prefetched whole, then copied.
    Staged,
    /// As many pages at a time, a block of each in turn: 2 or 4.
    Pages(u8),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Prefetch {
    pub hint: Hint,
    /// How far ahead, in lines of 64 bytes: 0 to 64.
    pub distance_lines: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Hint {
    T0,
    T1,
    T2,
    NonTemporal,
    /// Of the destination, to be written.
    Write,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Align {
    Neither,
    Destination,
    Source,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Variant {
    pub moves: Move,
    pub align: Align,
    /// Vector registers hold after the copy what they held before.
    pub keep: bool,
}

/// What a variant changes besides memory, RAX, RCX, RDX, RSI, RDI, R8-R11 and the flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clobbers {
    /// Vector registers that do not come back as they were.
    pub vector_registers: u8,
    pub width_bytes: u8,
}

const HINTS: [(Hint, &str); 5] =
    [(Hint::T0, "t0"), (Hint::T1, "t1"), (Hint::T2, "t2"), (Hint::NonTemporal, "nta"), (Hint::Write, "w")];

impl Variant {
    pub const LIBRARY: Self = Self { moves: Move::Library, align: Align::Neither, keep: false };
    pub const MOVSB: Self = Self { moves: Move::Bytes, align: Align::Neither, keep: false };
    pub const MOVSQ: Self = Self { moves: Move::Words, align: Align::Neither, keep: false };

    /// Whether the parameters make sense together, whatever the processor.
    pub fn is_sound(&self) -> bool {
        let r = match self.moves {
            Move::Registers(r) => r,
            Move::Library => return *self == Self::LIBRARY,
            Move::Bytes | Move::Words => return !self.keep && self.align != Align::Source,
        };
        let prefetch = match r.prefetch {
            None => r.order != Order::Staged,
            Some(p) => p.distance_lines <= 64 && (p.distance_lines > 0 || r.order == Order::Staged),
        };
        matches!(r.width_bytes, 8 | 16 | 32 | 64)
            && r.block_bytes.is_power_of_two()
            && (64..=1024).contains(&r.block_bytes)
            && matches!(r.order, Order::Ascending | Order::Staged | Order::Pages(2 | 4))
            // Longer turns of these only make code that does not fit the instruction cache.
            && (r.block_bytes <= 256 || (r.width_bytes > 8 && !matches!(r.order, Order::Pages(_))))
            && prefetch
            && (r.store == Store::Temporal || self.align == Align::Destination)
            && (r.load == Load::Plain || (r.width_bytes >= 16 && self.align == Align::Source))
            && !(self.keep && r.width_bytes == 8)
    }

    pub fn runs_on(&self, features: Features) -> bool {
        match self.moves {
            Move::Registers(Registers { width_bytes: 64, .. }) => features.avx512f,
            Move::Registers(Registers { width_bytes: 32, load: Load::Streaming, .. }) => features.avx2,
            Move::Registers(Registers { width_bytes: 32, .. }) => features.avx,
            Move::Registers(Registers { load: Load::Streaming, .. }) => features.sse41,
            _ => true,
        }
    }

    /// Whether a copy of this size is any different from that of a simpler variant.
    pub fn is_worth_trying(&self, size_bytes: usize) -> bool {
        let Move::Registers(r) = self.moves else { return true };
        let ahead = match (r.prefetch, r.order) {
            (Some(p), Order::Ascending | Order::Pages(_)) => {
                usize::from(p.distance_lines) * LINE_BYTES < size_bytes
            }
            _ => true,
        };
        let pages = match r.order {
            Order::Ascending => 0,
            Order::Staged => 1,
            Order::Pages(pages) => usize::from(pages),
        };
        usize::from(r.block_bytes) <= size_bytes && ahead && pages * PAGE_BYTES <= size_bytes
    }

    pub fn clobbers(&self) -> Clobbers {
        match self.moves {
            Move::Registers(r) if r.width_bytes > 8 && !self.keep => {
                Clobbers { vector_registers: r.registers(), width_bytes: r.width_bytes }
            }
            // Nobody knows, so all of them.
            Move::Library => Clobbers { vector_registers: 32, width_bytes: 64 },
            _ => Clobbers { vector_registers: 0, width_bytes: 0 },
        }
    }

    /// Reads a name. None if it is none, or says what cannot be.
    pub fn parse(name: &str) -> Option<Self> {
        let mut words = name.split('.');
        let first = words.next()?;
        let mut variant = Self { moves: Move::Bytes, align: Align::Neither, keep: false };
        let mut registers = match first {
            "libc" => {
                variant.moves = Move::Library;
                None
            }
            "movsb" => None,
            "movsq" => {
                variant.moves = Move::Words;
                None
            }
            _ => Some(Registers {
                width_bytes: number(first.strip_prefix('v')?)?,
                block_bytes: number(words.next()?.strip_prefix('b')?)?,
                store: Store::Temporal,
                load: Load::Plain,
                order: Order::Ascending,
                prefetch: None,
            }),
        };
        for word in words {
            match (word, &mut registers) {
                ("dst", _) => variant.align = Align::Destination,
                ("src", _) => variant.align = Align::Source,
                ("keep", _) => variant.keep = true,
                ("nt", Some(r)) => r.store = Store::NonTemporal,
                ("sl", Some(r)) => r.load = Load::Streaming,
                ("staged", Some(r)) => r.order = Order::Staged,
                ("x2", Some(r)) => r.order = Order::Pages(2),
                ("x4", Some(r)) => r.order = Order::Pages(4),
                (word, Some(r)) => {
                    let (hint, distance) = word.split_once('@')?;
                    let hint = HINTS.iter().find(|(_, name)| *name == hint)?.0;
                    r.prefetch = Some(Prefetch { hint, distance_lines: number(distance)? });
                }
                _ => return None,
            }
        }
        if let Some(registers) = registers {
            variant.moves = Move::Registers(registers);
        }
        variant.is_sound().then_some(variant)
    }

    pub fn name(&self) -> Text<NAME_BYTES_MAX> {
        let mut name = Text::default();
        match self.moves {
            Move::Library => name.push("libc"),
            Move::Bytes => name.push("movsb"),
            Move::Words => name.push("movsq"),
            Move::Registers(r) => r.push_name(&mut name),
        }
        match self.align {
            Align::Neither => {}
            Align::Destination => name.push(".dst"),
            Align::Source => name.push(".src"),
        }
        if self.keep {
            name.push(".keep");
        }
        name
    }
}

impl Registers {
    /// How many registers a turn uses: more than eight gain nothing and would have to be saved.
    pub fn registers(&self) -> u8 {
        let wanted = self.block_bytes / u16::from(self.width_bytes);
        let most = if self.width_bytes == 8 { 4 } else { 8 };
        wanted.min(most) as u8
    }

    fn push_name(&self, name: &mut Text<NAME_BYTES_MAX>) {
        name.push("v");
        name.push_number(self.width_bytes.into());
        name.push(".b");
        name.push_number(self.block_bytes.into());
        if self.store == Store::NonTemporal {
            name.push(".nt");
        }
        if self.load == Load::Streaming {
            name.push(".sl");
        }
        match self.order {
            Order::Ascending => {}
            Order::Staged => name.push(".staged"),
            Order::Pages(pages) => {
                name.push(".x");
                name.push_number(pages.into());
            }
        }
        if let Some(prefetch) = self.prefetch {
            name.push(".");
            for (hint, word) in HINTS {
                if hint == prefetch.hint {
                    name.push(word);
                }
            }
            name.push("@");
            name.push_number(prefetch.distance_lines.into());
        }
    }
}
