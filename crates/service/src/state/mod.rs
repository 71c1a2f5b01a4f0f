//! The keeper's state area: what a worker's successor has to know, in memory that outlives it.
//!
//! The keeper makes one area a door ([`make`]); the worker writes down there what its programs have open ([`OpenTable`]); the keeper
//! reads it ([`StateReader`]), believing nothing. A worker may die between any two instructions: an entry counts only by its
//! commit word, which is written last.

mod area;
mod layout;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use area::make;
pub use layout::{Bytes, CAPACITY, Kind, OpenRecord, Through};
pub use reader::{OpenFiles, StateReader};
pub use writer::{Listed, OpenTable};
