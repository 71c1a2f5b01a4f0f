//! Held writes: bytes that programs have written and that the layers have not got yet.
//!
//! Who alone has a file open writes without waiting (`doors/channel/grants`). What it posts is copied into memory that the keeper has made
//! and goes to the layers later, in large pieces: after a second, when there is much of it, and before anybody else may look at
//! the file or the program itself does anything with it but write and read. So nothing is held of a file that others know.
//!
//! The memory outlives the worker, and the keeper has a descriptor of each file of which something is held: if the worker dies the keeper
//! writes it ([`recover`]).

mod bell;
mod file;
mod layer;
mod layout;
mod recovery;
mod store;
#[cfg(test)]
mod tests;
mod writing;

pub use file::{HeldFile, LateError};
pub use layer::HeldLayer;
pub use layout::make;
pub use recovery::{Recovered, fits, recover};
pub(crate) use recovery::{read_all, write_all};
pub use store::{Custodian, FILES_MAX, Held, Piece, Putting, Source};
pub use writing::is_writing_back;
