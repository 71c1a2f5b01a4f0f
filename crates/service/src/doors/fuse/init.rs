//! The first message: what both sides can do, and how the kernel may cache.

use std::time::Duration;

use polytropo_libservices::{Capabilities, Coherence, Errno, Error, Result};

use super::FuseOptions;
use super::abi::{self, InitFlags};
use super::device::PAYLOAD_BYTES_MAX;
use super::reply::Timeouts;
use super::request::Arguments;
use crate::state::Agreed;

/// For what cannot change unless we say so.
const LONG: Duration = Duration::from_secs(86_400);
/// The same for a kernel that cannot be told to forget every name, should notices ever pile up.
const LONG_WITHOUT_EPOCH: Duration = Duration::from_secs(60);
/// Requests that the kernel sends without waiting (read-ahead, write-back), and where it begins to slow down.
const BACKGROUND_MAX: u16 = 64;
const CONGESTION_THRESHOLD: u16 = 48;

/// What was agreed on.
#[derive(Clone, Copy, Debug)]
pub struct Negotiated {
    pub minor: u32,
    pub flags: InitFlags,
    pub timeouts: Timeouts,
    pub coherence: Coherence,
    pub capabilities: Capabilities,
}

impl Negotiated {
    pub fn writeback(&self) -> bool {
        self.flags.contains(InitFlags::WRITEBACK_CACHE)
    }

    /// The kernel opens files without asking.
    pub fn stateless_open(&self) -> bool {
        self.flags.contains(InitFlags::NO_OPEN_SUPPORT)
    }

    /// The kernel opens directories without asking.
    pub fn stateless_opendir(&self) -> bool {
        self.flags.contains(InitFlags::NO_OPENDIR_SUPPORT)
    }

    pub fn exclusive(&self) -> bool {
        self.coherence != Coherence::Shared
    }
}

/// The kernel's INIT.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: InitFlags,
}

impl Offer {
    pub fn take(arguments: &mut Arguments<'_>) -> Result<Self> {
        let short: abi::InitInShort = arguments.take()?;
        let mut flags = u64::from(short.flags);
        if flags & InitFlags::INIT_EXT.bits() != 0 {
            let more: abi::InitInMore = arguments.take()?;
            flags |= u64::from(more.flags2) << 32;
        }
        Ok(Self {
            major: short.major,
            minor: short.minor,
            max_readahead: short.max_readahead,
            flags: InitFlags::from_bits_retain(flags),
        })
    }
}

pub fn negotiate(
    offer: &Offer,
    capabilities: Capabilities,
    coherence: Coherence,
    options: &FuseOptions,
    ring_payload_bytes: Option<usize>,
) -> Result<(abi::InitOut, Negotiated)> {
    if offer.major != abi::MAJOR || offer.minor < abi::MINOR_MIN {
        log::error!(
            "FUSE door: the kernel speaks FUSE {}.{}, but at least {}.{} (Linux 5.4) is needed",
            offer.major,
            offer.minor,
            abi::MAJOR,
            abi::MINOR_MIN,
        );
        return Err(Error::new(Errno::PROTO, "agree with the kernel on a version of FUSE"));
    }
    let minor = offer.minor.min(abi::MINOR);
    let mut flags = wanted(offer, capabilities, coherence, options);
    flags.set(InitFlags::OVER_IO_URING, ring_payload_bytes.is_some());
    flags &= offer.flags;
    let over_rings = flags.contains(InitFlags::OVER_IO_URING);
    let payload_bytes =
        ring_payload_bytes.filter(|_| over_rings).map_or(PAYLOAD_BYTES_MAX, |b| b.min(PAYLOAD_BYTES_MAX));
    if flags.contains(InitFlags::PASSTHROUGH) {
        flags -= InitFlags::NO_OPEN_SUPPORT;
    }
    if !flags.contains(InitFlags::NO_OPEN_SUPPORT) {
        flags |= InitFlags::ATOMIC_O_TRUNC & offer.flags;
    }
    let timeouts = timeouts(minor, coherence, options);
    let out = abi::InitOut {
        major: abi::MAJOR,
        minor,
        max_readahead: (payload_bytes as u32).max(offer.max_readahead),
        flags: flags.bits() as u32,
        flags2: (flags.bits() >> 32) as u32,
        max_background: BACKGROUND_MAX,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: payload_bytes as u32,
        time_gran: 1,
        max_pages: (payload_bytes / 4096) as u16,
        // Files of filesystems that stand on no other are passed through, and overlayfs may still stand on this mount.
        max_stack_depth: if flags.contains(InitFlags::PASSTHROUGH) { 1 } else { 0 },
        ..Default::default()
    };
    Ok((out, Negotiated { minor, flags, timeouts, coherence, capabilities }))
}

/// What was agreed on by a worker that is dead.
pub fn resume(
    agreed: Agreed,
    capabilities: Capabilities,
    coherence: Coherence,
    options: &FuseOptions,
) -> Negotiated {
    let Agreed { minor, flags } = agreed;
    let timeouts = timeouts(minor, coherence, options);
    Negotiated { minor, flags: InitFlags::from_bits_retain(flags), timeouts, coherence, capabilities }
}

/// Whether another worker could go on from there: the kernel sends again what was not answered, and nothing lies in rings, or was bound to
/// files by registrations that have ended.
pub fn can_be_resumed(agreed: Agreed) -> bool {
    let flags = InitFlags::from_bits_retain(agreed.flags);
    flags.contains(InitFlags::HAS_RESEND)
        && !flags.intersects(InitFlags::OVER_IO_URING | InitFlags::PASSTHROUGH)
}

/// POSIX_LOCKS and FLOCK_LOCKS are left out on purpose: then the kernel keeps locks itself, for the one superblock
/// that all mounts of a stack share.
fn wanted(
    offer: &Offer,
    capabilities: Capabilities,
    coherence: Coherence,
    options: &FuseOptions,
) -> InitFlags {
    let mut flags = InitFlags::ASYNC_READ
        | InitFlags::ATOMIC_O_TRUNC
        | InitFlags::BIG_WRITES
        | InitFlags::DONT_MASK
        | InitFlags::DO_READDIRPLUS
        | InitFlags::READDIRPLUS_AUTO
        | InitFlags::ASYNC_DIO
        | InitFlags::PARALLEL_DIROPS
        | InitFlags::MAX_PAGES
        | InitFlags::CACHE_SYMLINKS
        | InitFlags::HANDLE_KILLPRIV_V2
        | InitFlags::SETXATTR_EXT
        | InitFlags::ABORT_ERROR
        | InitFlags::INIT_EXT
        | InitFlags::DIRECT_IO_ALLOW_MMAP
        | InitFlags::HAS_RESEND;
    flags.set(InitFlags::POSIX_ACL, capabilities.contains(Capabilities::POSIX_ACLS));
    flags.set(InitFlags::AUTO_INVAL_DATA, coherence == Coherence::Shared);
    flags.set(InitFlags::EXPLICIT_INVAL_DATA, coherence != Coherence::Shared);
    // The kernel has either of them.
    flags.set(InitFlags::PASSTHROUGH, options.passthrough.is_some());
    let writeback = options.writeback_cache
        && !(options.passthrough.is_some() && offer.flags.contains(InitFlags::PASSTHROUGH))
        && coherence == Coherence::Exclusive
        && capabilities.contains(Capabilities::WRITE);
    flags.set(InitFlags::WRITEBACK_CACHE, writeback);
    // The kernel alone knows the end of a file, and places what is appended.
    let alone = coherence != Coherence::Shared;
    if options.stateless_open && alone && capabilities.contains(Capabilities::STATELESS_OPEN) {
        flags |= InitFlags::NO_OPEN_SUPPORT | InitFlags::NO_OPENDIR_SUPPORT;
        // An open that is not asked for cannot truncate: the kernel sends SETATTR instead.
        flags -= InitFlags::ATOMIC_O_TRUNC;
    }
    flags
}

fn timeouts(minor: u32, coherence: Coherence, options: &FuseOptions) -> Timeouts {
    let has_epoch = minor >= abi::notify::INC_EPOCH_MINOR;
    match coherence {
        Coherence::Exclusive if !has_epoch => Timeouts {
            entry: LONG_WITHOUT_EPOCH,
            attributes: LONG_WITHOUT_EPOCH,
            negative: LONG_WITHOUT_EPOCH,
        },
        Coherence::Immutable | Coherence::Exclusive => {
            Timeouts { entry: LONG, attributes: LONG, negative: LONG }
        }
        Coherence::Shared => Timeouts {
            entry: options.shared_timeout,
            attributes: options.shared_timeout,
            negative: options.shared_timeout,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agree(coherence: Coherence, minor: u32) -> Result<Negotiated> {
        let offer = Offer { major: 7, minor, max_readahead: 1 << 17, flags: InitFlags::all() };
        negotiate(&offer, Capabilities::all(), coherence, &FuseOptions::default(), None)
            .map(|(_, agreed)| agreed)
    }

    #[test]
    fn only_what_nobody_else_changes_is_cached_for_long() {
        let shared = agree(Coherence::Shared, 45).unwrap();
        assert_eq!(shared.timeouts.entry, Duration::ZERO);
        assert!(shared.flags.contains(InitFlags::AUTO_INVAL_DATA) && !shared.writeback());
        let exclusive = agree(Coherence::Exclusive, 45).unwrap();
        assert_eq!(exclusive.timeouts.negative, LONG);
        assert!(exclusive.writeback() && !exclusive.flags.contains(InitFlags::AUTO_INVAL_DATA));
        assert!(!agree(Coherence::Immutable, 45).unwrap().writeback());
        assert_eq!(agree(Coherence::Exclusive, 43).unwrap().timeouts.entry, LONG_WITHOUT_EPOCH);
    }

    #[test]
    fn locks_stay_with_the_kernel() {
        let flags = agree(Coherence::Exclusive, 45).unwrap().flags;
        assert!(!flags.intersects(InitFlags::POSIX_LOCKS | InitFlags::FLOCK_LOCKS));
    }

    #[test]
    fn files_opened_without_asking_are_truncated_by_setattr() {
        let stateless = |coherence| {
            let agreed = agree(coherence, 45).unwrap();
            assert_ne!(agreed.stateless_open(), agreed.flags.contains(InitFlags::ATOMIC_O_TRUNC));
            agreed.stateless_open()
        };
        assert!(stateless(Coherence::Exclusive) && stateless(Coherence::Immutable));
        assert!(!stateless(Coherence::Shared));
    }

    #[test]
    fn files_are_opened_without_asking_also_where_writes_are_not_held_back() {
        let offer = Offer { major: 7, minor: 45, max_readahead: 1 << 17, flags: InitFlags::all() };
        let agreed = |stateless_open| {
            let options = FuseOptions { writeback_cache: false, stateless_open, ..FuseOptions::default() };
            negotiate(&offer, Capabilities::all(), Coherence::Exclusive, &options, None).unwrap().1
        };
        assert!(agreed(true).stateless_open() && !agreed(true).writeback());
        assert!(!agreed(false).stateless_open());
    }

    #[test]
    fn speaks_the_older_minor_of_both() {
        assert_eq!(agree(Coherence::Shared, 31).unwrap().minor, 31);
        assert_eq!(agree(Coherence::Shared, 99).unwrap().minor, 45);
        assert!(agree(Coherence::Shared, 30).unwrap_err().is(Errno::PROTO));
    }
}
