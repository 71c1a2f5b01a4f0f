//! A variant in 32 bits, for plans that are handed over in shared memory. Zero is memcpy(3).
//!
//! Bits from the lowest: 2 move, 2 align, 1 keep, 2 width, 3 block, 1 store, 1 load, 2 order, 3 prefetch, 7 its distance.

use crate::variant::{Align, Hint, Load, Move, Order, Prefetch, Registers, Store, Variant};

const HINTS: [Hint; 5] = [Hint::T0, Hint::T1, Hint::T2, Hint::NonTemporal, Hint::Write];
const BITS: u32 = 24;

/// Takes fields off a word, or puts them on, from the lowest bit.
struct Fields {
    word: u32,
    at: u32,
}

impl Fields {
    fn take(&mut self, bits: u32) -> u32 {
        let found = (self.word >> self.at) & ((1 << bits) - 1);
        self.at += bits;
        found
    }

    fn put(&mut self, bits: u32, value: u32) {
        debug_assert!(value < 1 << bits);
        self.word |= value << self.at;
        self.at += bits;
    }
}

impl Variant {
    pub fn to_word(&self) -> u32 {
        let mut fields = Fields { word: 0, at: 0 };
        fields.put(
            2,
            match self.moves {
                Move::Library => 0,
                Move::Bytes => 1,
                Move::Words => 2,
                Move::Registers(_) => 3,
            },
        );
        fields.put(
            2,
            match self.align {
                Align::Neither => 0,
                Align::Destination => 1,
                Align::Source => 2,
            },
        );
        fields.put(1, self.keep.into());
        let Move::Registers(r) = self.moves else { return fields.word };
        fields.put(2, r.width_bytes.trailing_zeros().saturating_sub(3));
        fields.put(3, r.block_bytes.trailing_zeros().saturating_sub(6));
        fields.put(1, (r.store == Store::NonTemporal).into());
        fields.put(1, (r.load == Load::Streaming).into());
        fields.put(
            2,
            match r.order {
                Order::Ascending => 0,
                Order::Staged => 1,
                Order::Pages(2) => 2,
                Order::Pages(_) => 3,
            },
        );
        let hint = r.prefetch.and_then(|p| HINTS.iter().position(|hint| *hint == p.hint));
        fields.put(3, hint.map_or(0, |index| index as u32 + 1));
        fields.put(7, r.prefetch.map_or(0, |p| p.distance_lines.into()));
        fields.word
    }

    /// None for a word that says what cannot be.
    pub fn from_word(word: u32) -> Option<Self> {
        let mut fields = Fields { word, at: 0 };
        let kind = fields.take(2);
        let align = match fields.take(2) {
            0 => Align::Neither,
            1 => Align::Destination,
            2 => Align::Source,
            _ => return None,
        };
        let keep = fields.take(1) == 1;
        let moves = match kind {
            0 => Move::Library,
            1 => Move::Bytes,
            2 => Move::Words,
            _ => Move::Registers(registers(&mut fields)?),
        };
        let variant = Self { moves, align, keep };
        let whole = word >> BITS == 0 && (fields.at == BITS || word >> fields.at == 0);
        (whole && variant.is_sound()).then_some(variant)
    }
}

fn registers(fields: &mut Fields) -> Option<Registers> {
    let width_bytes = 8 << fields.take(2);
    let block_bytes = 64u16.checked_shl(fields.take(3)).filter(|bytes| *bytes <= 1024)?;
    let store = if fields.take(1) == 1 { Store::NonTemporal } else { Store::Temporal };
    let load = if fields.take(1) == 1 { Load::Streaming } else { Load::Plain };
    let order = match fields.take(2) {
        0 => Order::Ascending,
        1 => Order::Staged,
        2 => Order::Pages(2),
        _ => Order::Pages(4),
    };
    let (hint, distance_lines) = (fields.take(3) as usize, fields.take(7) as u8);
    let prefetch = match hint.checked_sub(1) {
        None if distance_lines == 0 => None,
        None => return None,
        Some(index) => Some(Prefetch { hint: *HINTS.get(index)?, distance_lines }),
    };
    Some(Registers { width_bytes, block_bytes, store, load, order, prefetch })
}
