//! The ways into a service.

pub mod fuse;
pub mod modes;
