//! Making inodes as their owner: the filesystem ids of the thread.
//!
//! What is made belongs to its owner from the first moment: with chown(2) afterwards, another stack over the same
//! directory could open it in between, a service that dies there would leave it to the wrong user, and quotas would count it
//! for the wrong one.

use std::cell::Cell;

use rustix::thread::{CapabilitiesSecureBits, CapabilitySet};

/// Whether this process may give files to others.
pub fn may_chown() -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::CHOWN))
}

/// Runs `operation` with the filesystem ids `wanted` in place of `own`. Where that is not allowed it runs with those that
/// the thread has.
pub fn with_ids<T>(wanted: (u32, u32), own: (u32, u32), operation: impl FnOnce() -> T) -> T {
    if wanted == own || wanted.0 == u32::MAX || wanted.1 == u32::MAX || !capabilities_stay() {
        return operation();
    }
    let _restored = Restore(own);
    set(wanted);
    operation()
}

struct Restore((u32, u32));

impl Drop for Restore {
    fn drop(&mut self) {
        set(self.0);
    }
}

fn set((uid, gid): (u32, u32)) {
    // SAFETY: these calls change ids of this thread alone and touch no memory. They do not report failure: who
    // relies on the ids looks at what was made.
    unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
    }
}

/// A change of the filesystem uid from 0 drops the capabilities that our work needs, unless the thread is told to keep
/// them. Says whether that is so.
fn capabilities_stay() -> bool {
    thread_local! {
        static STAY: Cell<Option<bool>> = const { Cell::new(None) };
    }
    STAY.get().unwrap_or_else(|| {
        let kept = CapabilitiesSecureBits::NO_SETUID_FIXUP;
        let stay = rustix::thread::capabilities_secure_bits().is_ok_and(|bits| {
            bits.contains(kept) || rustix::thread::set_capabilities_secure_bits(bits | kept).is_ok()
        });
        STAY.set(Some(stay));
        stay
    })
}
