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
    /// Ids to themselves, as far as this process's own maps reach, and at most `count`.
    pub fn same(count: u32) -> io::Result<Self> {
        let known = |name: &str| -> io::Result<u32> {
            let extents = extents(&fs::read_to_string(format!("/proc/self/{name}"))?, u32::MAX);
            // From 0 on without a gap.
            Ok(extents.iter().fold(0, |end, &(first, length)| if first == end { end + length } else { end }))
        };
        Ok(Ids::Same { count: count.min(known("uid_map")?).min(known("gid_map")?) })
    }

    fn map(self, own_map: &str) -> String {
        match self {
            Ids::Shifted { base, count } => format!("0 {base} {count}\n"),
            // An extent may not span two of ours.
            Ids::Same { count } => extents(own_map, count)
                .iter()
                .map(|(first, length)| format!("{first} {first} {length}\n"))
                .collect(),
        }
    }

    /// Writes the maps of the process `pid`, which waits in a new user namespace.
    pub fn write(self, pid: u32) -> io::Result<()> {
        for name in ["gid_map", "uid_map"] {
            let own_map = fs::read_to_string(format!("/proc/self/{name}"))?;
            fs::write(format!("/proc/{pid}/{name}"), self.map(&own_map))?;
        }
        Ok(())
    }
}

/// First id and length of each line of a map like /proc/self/uid_map, cut at `count`, in order.
fn extents(map: &str, count: u32) -> Vec<(u32, u32)> {
    let line = |line: &str| -> Option<(u32, u32)> {
        let mut numbers = line.split_ascii_whitespace().map(|number| number.parse::<u32>().ok());
        let (first, _, length) = (numbers.next()??, numbers.next()??, numbers.next()??);
        (first < count).then(|| (first, length.min(count - first)))
    };
    let mut found: Vec<_> = map.lines().filter_map(line).collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_ids() {
        let whole = "         0          0 4294967295\n";
        assert_eq!(Ids::Shifted { base: 1_000_000, count: 65_536 }.map(whole), "0 1000000 65536\n");
        assert_eq!(Ids::Same { count: 65_536 }.map(whole), "0 0 65536\n");
        let rootless = "0 1000 1\n1 100000 65535\n";
        assert_eq!(Ids::Same { count: 65_536 }.map(rootless), "0 0 1\n1 1 65535\n");
        assert_eq!(Ids::Same { count: 1 }.map(rootless), "0 0 1\n");
    }
}
