//! The service: the process that gives a tenant's programs their files.
//!
//! Requests come in through a door ([`doors`]) and end in a stack of libservices. The [`keeper`] takes orders from
//! persons ([`control`]) and mounts; its child, the confined [`worker`], touches data. They talk over a [`link`].

pub mod control;
pub mod copies;
pub mod custody;
pub mod doors;
pub mod enter;
pub mod epochs;
pub mod futex;
pub mod held;
pub mod isolation;
pub mod keeper;
pub mod link;
pub mod logging;
pub mod passing;
pub mod sealed;
pub mod slabs;
pub mod state;
pub mod windows;
pub mod worker;
