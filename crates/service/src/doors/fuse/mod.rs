//! The FUSE door: the kernel's FUSE protocol, spoken directly on `/dev/fuse`.
