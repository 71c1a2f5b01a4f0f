//! Which ids of the host a worker's ids are.

use std::fs;
use std::io;

/// How a worker's user namespace maps ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ids {
    /// To a range that is nobody else's. Directories are handed over through idmapped mounts, so that what is 0 on
    /// disk is 0 inside.
    Shifted { base: u32, count: u32 },
    /// To themselves, for filesystems that cannot be idmapped. The worker owns what such ids own, if it can reach it: only
    /// what is handed to it.
    Same { count: u32 },
}

impl Ids {
    fn map(self) -> String {
        match self {
            Ids::Shifted { base, count } => format!("0 {base} {count}\n"),
            Ids::Same { count } => format!("0 0 {count}\n"),
        }
    }

    /// Writes the maps of the process `pid`, which waits in a new user namespace.
    pub fn write(self, pid: u32) -> io::Result<()> {
        let map = self.map();
        let count = match self {
            Ids::Shifted { count, .. } | Ids::Same { count } => count,
        };
        if count == 1 {
            // Who may map just its own id must first rule out that groups are dropped.
            fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
        }
        fs::write(format!("/proc/{pid}/gid_map"), &map)?;
        fs::write(format!("/proc/{pid}/uid_map"), &map)
    }
}
