//! The service: the process that gives a tenant's programs their files.
//!
//! Requests come in through a door ([`doors`]) and end in a stack of libservices.

pub mod doors;
