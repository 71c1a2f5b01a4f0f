//! Resource limits.

use rustix::io::Result;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// As many descriptors as are allowed: every open file of every container is one.
pub fn raise_descriptors() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
}

/// No core dumps (they would hold tenants' data), no POSIX queues, no locked memory.
pub fn lower() -> Result<()> {
    for resource in [Resource::Core, Resource::Msgqueue, Resource::Memlock] {
        setrlimit(resource, Rlimit { current: Some(0), maximum: Some(0) })?;
    }
    Ok(())
}
