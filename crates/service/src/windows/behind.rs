//! What a window has of a file that never changes, the host need not have as well.
//!
//! The host's cache is read through, since it reads ahead, and dropped behind: a read that leaves nothing there (RWF_DONTCACHE) took five
//! times as long. It keeps large pieces, which go only as a whole, so a range reaches back over some that were dropped in part.

use std::num::NonZeroU64;

use polytropo_libservices::{HandleId, Libservice};
use rustix::fs::Advice;

/// The largest pieces of the host's cache.
const PIECE_BYTES: u64 = 2 << 20;

/// A part of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BytesRead {
    from: u64,
    end: u64,
}

impl BytesRead {
    pub fn add(&mut self, from: u64, count: u64) {
        let end = from + count;
        *self = if self.is_empty() {
            Self { from, end }
        } else {
            Self { from: self.from.min(from), end: self.end.max(end) }
        };
    }

    pub fn is_empty(self) -> bool {
        self.end == self.from
    }

    /// With the piece before, and that of the beginning. Not beyond the end, where the host has read ahead.
    fn to_drop(self) -> (u64, u64) {
        let from = (self.from / PIECE_BYTES * PIECE_BYTES).saturating_sub(PIECE_BYTES);
        (from, self.end - from)
    }
}

/// What others map stays.
pub fn drop_from_host(stack: &dyn Libservice, handle: HandleId, bytes: BytesRead) {
    let Some(file) = stack.host_file(handle) else { return };
    let (from, count) = bytes.to_drop();
    if let Err(errno) = rustix::fs::fadvise(&*file, from, NonZeroU64::new(count), Advice::DontNeed) {
        log::debug!("bytes stay in the host's cache: {errno}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_reaches_back_but_not_ahead() {
        let mut bytes = BytesRead::default();
        assert!(bytes.is_empty());
        bytes.add(5 << 20, 100);
        assert_eq!(bytes.to_drop(), (2 << 20, (3 << 20) + 100));
        bytes.add(0, 1);
        bytes.add(6 << 20, 1);
        assert_eq!(bytes.to_drop(), (0, (6 << 20) + 1));
    }
}
