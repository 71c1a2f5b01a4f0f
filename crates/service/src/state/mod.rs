//! The keeper's state area: what a worker's successor has to know, in memory that outlives it.
//!
//! The keeper makes one area a door ([`make`]); the worker writes down there ([`DoorState`]) what its programs have open, which
//! nodes the kernel holds and what its threads are doing; the keeper reads it ([`StateReader`]), believing nothing. A worker may die between
//! any two instructions: an entry counts only by its commit word, which is written last.

mod area;
mod door;
mod journal;
mod layout;
mod nodes;
#[cfg(test)]
mod nodes_tests;
mod reader;
#[cfg(test)]
mod tests;
mod vacancies;
mod writer;

pub use area::make;
pub use door::{Agreed, DoorState, Past};
pub use journal::{BLAME_OF_FAULT, BLAME_OF_KILL, Begun, Intent, JournalSlot, LostBits};
pub use layout::{Bytes, CAPACITY, Kind, OpenRecord, Through};
pub use nodes::{NodeRecord, NodeTable, Nodes, Seen};
pub use reader::{OpenFiles, StateReader};
pub use writer::{Listed, OpenTable};
