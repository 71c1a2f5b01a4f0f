//! The whole parameter space, for a search.

use crate::features::Features;
use crate::variant::{Align, Hint, Load, Move, Order, Prefetch, Registers, Store, Variant};

const WIDTHS: [u8; 4] = [8, 16, 32, 64];
const BLOCKS: [u16; 5] = [64, 128, 256, 512, 1024];
const ORDERS: [Order; 4] = [Order::Ascending, Order::Staged, Order::Pages(2), Order::Pages(4)];
const DISTANCES: [u8; 8] = [0, 1, 2, 4, 8, 16, 32, 64];
const HINTS: [Hint; 5] = [Hint::T0, Hint::T1, Hint::T2, Hint::NonTemporal, Hint::Write];
const ALIGNS: [Align; 3] = [Align::Neither, Align::Destination, Align::Source];

fn prefetches() -> impl Iterator<Item = Option<Prefetch>> {
    let some = HINTS.into_iter().flat_map(|hint| {
        DISTANCES.into_iter().map(move |distance_lines| Some(Prefetch { hint, distance_lines }))
    });
    core::iter::once(None).chain(some)
}

fn registers() -> impl Iterator<Item = Move> {
    WIDTHS.into_iter().flat_map(|width_bytes| {
        BLOCKS.into_iter().flat_map(move |block_bytes| {
            ORDERS.into_iter().flat_map(move |order| {
                prefetches().flat_map(move |prefetch| {
                    let stores = [
                        (Store::Temporal, Load::Plain),
                        (Store::NonTemporal, Load::Plain),
                        (Store::Temporal, Load::Streaming),
                    ];
                    stores.into_iter().map(move |(store, load)| {
                        Move::Registers(Registers { width_bytes, block_bytes, store, load, order, prefetch })
                    })
                })
            })
        })
    })
}

/// Every variant that this processor can run; with `keep`, those that give vector registers back (and those that use none).
pub fn variants(features: Features, keep: bool) -> Vec<Variant> {
    let moves = [Move::Library, Move::Bytes, Move::Words].into_iter().chain(registers());
    let aligned =
        moves.flat_map(|moves| ALIGNS.into_iter().map(move |align| Variant { moves, align, keep: false }));
    aligned
        .map(|variant| {
            let uses_vectors =
                matches!(variant.moves, Move::Registers(_)) && variant.clobbers().vector_registers > 0;
            Variant { keep: keep && uses_vectors, ..variant }
        })
        .filter(|variant| variant.is_sound() && variant.runs_on(features))
        .filter(|variant| !keep || variant.clobbers().vector_registers == 0)
        .collect()
}
