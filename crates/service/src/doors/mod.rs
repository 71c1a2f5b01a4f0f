//! The ways into a service.

pub mod fuse;
