//! The ways into a service.

pub mod channel;
mod crew;
pub mod fuse;
pub(crate) mod handed;
pub mod modes;
mod spin;
