//! Libservices: stackable storage functions behind one trait.
//!
//! A libservice knows nothing of doors or channels. Start reading at [`Libservice`].

pub mod build;
pub mod capabilities;
pub mod dir;
pub mod error;
pub mod fault;
pub mod handles;
mod lease;
pub mod libservice;
pub mod name;
mod notices;
mod numbers;
pub mod owners;
pub mod privileges;
pub mod stack;
pub mod types;
pub mod union;

pub use build::{Interner, build, build_with};
pub use capabilities::{Capabilities, Coherence};
pub use error::{Attempt, Errno, Error, Result};
pub use handles::Handles;
pub use libservice::{Change, Libservice, Observer};
pub use name::Name;
pub use numbers::{begin_numbers_at, first_number};
pub use types::*;
