//! The record of a file that lies in the upper in part: which of its blocks are the upper's own, and where the others are.
//!
//! It is the extended attribute `user.polytropo.blocks` of the upper's file, so it goes wherever that goes, in one step with it:
//! a line of text, the path of the lower file, one bit a block, and the checksums of loose blocks: those that are the upper's own if
//! their bytes are there.

use super::layers::Origin;
use crate::name::Name;
use crate::types::{Attr, Timestamp};

/// Version of the line.
const VERSION: &str = "1";
/// Longest path that a record holds: attributes of a whole inode share 4 KiB on ext4.
pub const PATH_MAX_BYTES: usize = 1024;
/// Most blocks of a file: 2 KiB of bits.
pub const BLOCKS_MAX: u64 = 1 << 14;
/// Where attributes have less room than that (ext4 with blocks of 1 KiB).
pub const BLOCKS_FEW: u64 = 1 << 11;
/// Most loose blocks of a file.
pub const LOOSE_MAX: usize = 16;
const LOOSE_BYTES: usize = 12;
const BLOCK_MAX_BYTES: u64 = 1 << 50;

/// What a lower file was when its record was made. What differs is another file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub size_bytes: u64,
    pub mtime: Timestamp,
}

impl Identity {
    pub fn of(attr: &Attr) -> Self {
        Self { size_bytes: attr.size_bytes, mtime: attr.mtime }
    }
}

/// Where the bytes come from that the upper lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub origin: Origin,
    pub identity: Identity,
    /// In the layer of the origin, from its root.
    pub path: Box<[u8]>,
}

/// Which blocks are the upper's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    pub block_bytes: u64,
    /// From here on all bytes are the upper's own: the file was cut here once, or it ended here.
    pub limit_bytes: u64,
    own: Box<[u8]>,
    /// Of these, those that are not known to be on the device: with the checksum of their bytes, which do not change as long.
    loose: Vec<(u64, u32)>,
}

impl Blocks {
    /// None of the first `limit_bytes` is the upper's.
    pub fn none_own(block_bytes: u64, limit_bytes: u64) -> Self {
        let count = limit_bytes.div_ceil(block_bytes);
        Self { block_bytes, limit_bytes, own: vec![0; count.div_ceil(8) as usize].into(), loose: Vec::new() }
    }

    pub fn is_own(&self, block: u64) -> bool {
        self.own.get((block / 8) as usize).is_none_or(|byte| byte >> (block % 8) & 1 == 1)
    }

    /// Takes the blocks that lie in `start..end`, which begins with a block and ends with one or at the limit.
    pub fn take(&mut self, start: u64, end: u64) {
        for block in start / self.block_bytes..end.min(self.limit_bytes).div_ceil(self.block_bytes) {
            if let Some(byte) = self.own.get_mut((block / 8) as usize) {
                *byte |= 1 << (block % 8);
            }
        }
    }

    /// `take`, of blocks that are not known to be on the device. Says whether there is room for that.
    pub fn take_loosely(&mut self, sums: Vec<(u64, u32)>) -> bool {
        if self.loose.len() + sums.len() > LOOSE_MAX {
            return false;
        }
        for (block, _) in &sums {
            self.take(block * self.block_bytes, (block + 1) * self.block_bytes);
        }
        self.loose.extend(sums);
        true
    }

    pub fn loose(&self) -> &[(u64, u32)] {
        &self.loose
    }

    pub fn has_loose_in(&self, start: u64, end: u64) -> bool {
        let meets = |block: u64| block * self.block_bytes < end && start < (block + 1) * self.block_bytes;
        self.loose.iter().any(|(block, _)| meets(*block))
    }

    /// All blocks are on the device.
    pub fn settle(&mut self) {
        self.loose.clear();
    }

    /// Gives loose blocks back that did not come through.
    pub fn lose(&mut self, lost: &[u64]) {
        self.loose.retain(|(block, _)| !lost.contains(block));
        for block in lost {
            if let Some(byte) = self.own.get_mut((block / 8) as usize) {
                *byte &= !(1 << (block % 8));
            }
        }
    }

    /// Where a block begins and where it, or what the lower had of it, ends.
    pub fn bounds(&self, block: u64) -> (u64, u64) {
        let start = block * self.block_bytes;
        (start, (start + self.block_bytes).min(self.limit_bytes))
    }

    /// Nothing needs to be recorded any more.
    pub fn is_done(&self) -> bool {
        self.loose.is_empty() && self.missing_bytes() == 0
    }

    /// The file was cut to `size_bytes`: nothing beyond is the lower's any more.
    pub fn cut(&mut self, size_bytes: u64) {
        self.limit_bytes = self.limit_bytes.min(size_bytes);
    }

    fn count(&self) -> u64 {
        self.limit_bytes.div_ceil(self.block_bytes)
    }

    /// Bytes that are the lower's.
    pub fn missing_bytes(&self) -> u64 {
        let last = self.count().saturating_sub(1);
        let missing = (0..self.count()).filter(|block| !self.is_own(*block));
        let length = |block| {
            if block == last { self.limit_bytes - block * self.block_bytes } else { self.block_bytes }
        };
        missing.map(length).sum()
    }

    /// Whether the bytes at `at` are the upper's own, and where (at most `until`) that ends.
    pub fn run(&self, at: u64, until: u64) -> (bool, u64) {
        if at >= self.limit_bytes {
            return (true, until);
        }
        let first = at / self.block_bytes;
        let own = self.is_own(first);
        let mut block = first + 1;
        while block < self.count() && block * self.block_bytes < until && self.is_own(block) == own {
            block += 1;
        }
        let end = if block < self.count() {
            block * self.block_bytes
        } else if own {
            until
        } else {
            self.limit_bytes
        };
        (own, end.min(until))
    }

    /// The missing blocks around `start..end` (all missing) within the `cluster_bytes` in which these lie: where they begin and end.
    pub fn around(&self, start: u64, end: u64, cluster_bytes: u64) -> (u64, u64) {
        let cluster = cluster_bytes.max(self.block_bytes) / self.block_bytes;
        let (mut first, mut last) = (start / self.block_bytes, (end - 1) / self.block_bytes);
        let (least, most) =
            (first / cluster * cluster, (last / cluster).saturating_add(1).saturating_mul(cluster));
        while first > least && !self.is_own(first - 1) {
            first -= 1;
        }
        while last + 1 < most.min(self.count()) && !self.is_own(last + 1) {
            last += 1;
        }
        (first * self.block_bytes, ((last + 1) * self.block_bytes).min(self.limit_bytes))
    }
}

/// The value of the attribute.
pub fn encode(source: &Source, blocks: &Blocks) -> Vec<u8> {
    let Source { origin, identity: Identity { size_bytes, mtime }, path } = source;
    let line = format!(
        "{VERSION} {} {} {} {size_bytes} {}.{:09} {} {}\n",
        blocks.block_bytes,
        blocks.limit_bytes,
        origin.text(),
        mtime.seconds,
        mtime.nanoseconds,
        path.len(),
        blocks.loose.len(),
    );
    let mut value = [line.as_bytes(), path, &blocks.own].concat();
    for (block, sum) in &blocks.loose {
        value.extend_from_slice(&block.to_le_bytes());
        value.extend_from_slice(&sum.to_le_bytes());
    }
    value
}

/// `None` when it is no record that this version understands.
pub fn decode(value: &[u8]) -> Option<(Source, Blocks)> {
    let end = value.iter().position(|byte| *byte == b'\n')?;
    let (line, rest) = (std::str::from_utf8(&value[..end]).ok()?, &value[end + 1..]);
    let fields: Vec<_> = line.split(' ').collect();
    let [version, block_bytes, limit_bytes, origin, size_bytes, mtime, path_length, loose_count] = fields[..]
    else {
        return None;
    };
    let number = |text: &str| text.parse::<u64>().ok();
    let (block_bytes, limit_bytes) = (number(block_bytes)?, number(limit_bytes)?);
    let (seconds, nanoseconds) = mtime.split_once('.')?;
    let mtime = Timestamp { seconds: seconds.parse().ok()?, nanoseconds: nanoseconds.parse().ok()? };
    let identity = Identity { size_bytes: number(size_bytes)?, mtime };
    let path_length = usize::try_from(number(path_length)?).ok()?;
    let loose_count = usize::try_from(number(loose_count)?).ok().filter(|count| *count <= LOOSE_MAX)?;
    let (path, rest) = rest.split_at_checked(path_length)?;
    let (own, loose) = rest.split_at_checked(rest.len().checked_sub(loose_count * LOOSE_BYTES)?)?;
    let fits =
        block_bytes.is_power_of_two() && block_bytes <= BLOCK_MAX_BYTES && limit_bytes <= identity.size_bytes;
    if version != VERSION || !fits || limit_bytes.div_ceil(block_bytes) > (own.len() as u64) * 8 {
        return None;
    }
    if own.len() as u64 > BLOCKS_MAX / 8 || path.len() > PATH_MAX_BYTES || !is_path(path) {
        return None;
    }
    let source = Source { origin: Origin::parse(origin.as_bytes())?, identity, path: path.into() };
    let mut blocks = Blocks { block_bytes, limit_bytes, own: own.into(), loose: Vec::new() };
    for entry in loose.chunks_exact(LOOSE_BYTES) {
        let block = u64::from_le_bytes(entry[..8].try_into().ok()?);
        if block >= blocks.count() || !blocks.is_own(block) {
            return None;
        }
        blocks.loose.push((block, u32::from_le_bytes(entry[8..].try_into().ok()?)));
    }
    Some((source, blocks))
}

fn is_path(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/').skip(1).all(|name| Name::new(name).is_ok())
        && path.first() == Some(&b'/')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn source(path: &[u8]) -> Source {
        let mtime = Timestamp { seconds: -5, nanoseconds: 7 };
        let identity = Identity { size_bytes: 1 << 40, mtime };
        Source { origin: Origin { ordinal: 3, ino: 77 }, identity, path: path.into() }
    }

    #[test]
    fn reads_what_it_wrote() {
        let mut blocks = Blocks::none_own(64, 1000);
        blocks.take(64, 192);
        blocks.take(960, 1000);
        assert!(blocks.take_loosely(vec![(4, 0xffff_0001), (5, 2)]));
        let wrote = encode(&source(b"/a/b \n\xff"), &blocks);
        assert_eq!(decode(&wrote), Some((source(b"/a/b \n\xff"), blocks)));
    }

    #[test]
    fn refuses_what_is_no_record() {
        let good = encode(&source(b"/f"), &Blocks::none_own(64, 1000));
        assert!(decode(&good).is_some());
        for end in 0..good.len() {
            assert_eq!(decode(&good[..end]), None, "cut to {end}");
        }
        for path in [&b"f"[..], b"", b"/", b"/..", b"/a/../b", b"//a", b"/a/", b"/a\0b"] {
            assert_eq!(decode(&encode(&source(path), &Blocks::none_own(64, 1000))), None, "{path:?}");
        }
        let mut loose = Blocks::none_own(64, 1000);
        assert!(loose.take_loosely(vec![(4, 1)]));
        loose.own.fill(0);
        assert_eq!(decode(&encode(&source(b"/f"), &loose)), None, "a loose block is the upper's");
        let later = [b"2", &good[1..]].concat();
        assert_eq!(decode(&later), None);
        for line in [
            "1 0 1 1-1 5 0.0 2 0\n/f\0",
            "1 3 1 1-1 5 0.0 2 0\n/f\0",
            "1 4 9 1-1 5 0.0 2 0\n/f\0\0\0",
            "1 4 1 0-1 5 0.0 2 0\n/f\0",
        ] {
            assert_eq!(decode(line.as_bytes()), None, "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn never_fails_on_any_bytes(value in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&value);
        }

        /// Runs say of every byte what a set of blocks says.
        #[test]
        fn runs_cover_every_byte(
            limit in 1..200u64,
            taken in prop::collection::vec(0..50u64, 0..20),
            cut in 0..300u64,
            until in 1..300u64,
        ) {
            let mut blocks = Blocks::none_own(4, limit);
            taken.iter().filter(|block| **block * 4 < limit).for_each(|block| blocks.take(block * 4, block * 4 + 4));
            blocks.cut(cut);
            let own = |at: u64| at >= limit.min(cut) || taken.contains(&(at / 4));
            let mut at = 0;
            while at < until {
                let (is_own, end) = blocks.run(at, until);
                prop_assert!(end > at && end <= until);
                prop_assert!((at..end).all(|byte| own(byte) == is_own), "{at}..{end}");
                prop_assert!(end == until || own(end) != is_own);
                at = end;
            }
            prop_assert_eq!(blocks.missing_bytes(), (0..limit).filter(|at| !own(*at)).count() as u64);
        }
    }
}
