//! The ways into a service.

pub mod channel;
pub mod fuse;
pub mod modes;
