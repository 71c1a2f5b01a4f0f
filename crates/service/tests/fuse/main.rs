//! The FUSE door on real mounts of a real directory, by what programs do to files.

mod coherence;
mod files;
mod lifetime;
mod locks;
mod names;
mod passthrough;
mod permissions;
mod support;
mod unions;
