//! Setuid and setgid bits that are gone for a moment: the host takes them away with each write, and who may keep them gets them back.
//! Whoever may be killed in between has somebody else know of it.

use std::cell::RefCell;
use std::sync::Arc;

/// Knows which bits have to be given back.
pub trait Witness: Send + Sync {
    /// The file's mode is `mode` and is about to lose some bits.
    fn leave(&self, mode: u32);
    /// It has them again.
    fn back(&self);
}

/// The mode without what a write by an ordinary user takes away: setuid, and setgid of group-executables.
pub fn without(mode: u32) -> u32 {
    let setgid = if mode & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
    mode & 0o7777 & !(libc::S_ISUID | setgid)
}

thread_local! {
    static WITNESS: RefCell<Option<Arc<dyn Witness>>> = const { RefCell::new(None) };
}

/// From now on `witness` hears of what this thread does.
pub fn tell(witness: Arc<dyn Witness>) {
    WITNESS.set(Some(witness));
}

/// Does something that takes bits of `mode` away, and gives them back.
pub(crate) fn witnessed<T>(mode: u32, work: impl FnOnce() -> T) -> T {
    let witness = WITNESS.with_borrow(Clone::clone);
    let Some(witness) = witness else { return work() };
    witness.leave(mode);
    let done = work();
    witness.back();
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    struct Last(AtomicU32);

    impl Witness for Last {
        fn leave(&self, mode: u32) {
            self.0.store(mode, Relaxed);
        }
        fn back(&self) {
            self.0.store(0, Relaxed);
        }
    }

    #[test]
    fn bits_are_known_of_while_they_are_gone() {
        let last = Arc::new(Last(AtomicU32::new(0)));
        assert_eq!(witnessed(0o4755, || last.0.load(Relaxed)), 0);
        tell(last.clone());
        assert_eq!(witnessed(0o4755, || last.0.load(Relaxed)), 0o4755);
        assert_eq!(last.0.load(Relaxed), 0);
    }
}
