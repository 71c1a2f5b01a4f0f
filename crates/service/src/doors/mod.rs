//! The ways into a service.

pub mod channel;
mod crew;
pub mod fuse;
pub mod modes;
mod spin;
