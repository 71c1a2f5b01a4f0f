//! What the kernel may have been told: who changes something else need not tell it.
//!
//! A name is marked before it is looked up for the kernel, whatever the answer; a change is made before the mark is looked at. So either the
//! answer has the change in it, or the change sees the mark and the kernel is sent a notice. A mark is taken away before its notice is
//! sent: the kernel holds the directory's lock from before it asks until it has the answer, and the notice waits for that lock. A slot
//! knows one name. Where two meet, both count as told for good, which costs notices only.

use polytropo_wire::sync::{AcqRel, Acquire, AtomicU64, SeqCst, fence};

/// Nothing was told of names that fall here.
const NONE: u64 = 0;
/// Of several.
const SEVERAL: u64 = u64::MAX;

/// Names by their hashes.
pub struct Slots {
    slots: Box<[AtomicU64]>,
    /// Changes that were about to look at marks.
    looked: AtomicU64,
}

impl Slots {
    /// As many as a power of two, all zero.
    pub fn new(slots: Box<[AtomicU64]>) -> Self {
        assert!(slots.len().is_power_of_two());
        Self { slots, looked: AtomicU64::new(0) }
    }

    fn slot(&self, key: u64) -> (&AtomicU64, u64) {
        // The lowest bits choose the slot; what is left of the values is told apart.
        let key = if matches!(key, NONE | SEVERAL) { 1 } else { key };
        (&self.slots[key as usize & (self.slots.len() - 1)], key)
    }

    /// Before something is looked up of which the kernel will be told.
    pub fn mark(&self, key: u64) {
        let (slot, key) = self.slot(key);
        let mut found = slot.load(Acquire);
        while found != key && found != SEVERAL {
            let marked = if found == NONE { key } else { SEVERAL };
            match slot.compare_exchange(found, marked, AcqRel, Acquire) {
                Ok(_) => break,
                Err(other) => found = other,
            }
        }
        // The other one is in `look`: one of both sees what the other has done.
        fence(SeqCst);
    }

    /// After a change and `look`: whether the kernel may know what was there before.
    pub fn is_marked(&self, key: u64) -> bool {
        let (slot, key) = self.slot(key);
        let found = slot.load(Acquire);
        found == key || found == SEVERAL
    }

    /// Before the notice is sent.
    pub fn clear(&self, key: u64) {
        let (slot, key) = self.slot(key);
        // Nothing to do if it is another's, or that of several.
        let _ = slot.compare_exchange(key, NONE, AcqRel, Acquire);
    }

    /// After a change, before any mark is looked at.
    pub fn look(&self) {
        self.looked.fetch_add(1, AcqRel);
        fence(SeqCst);
    }

    /// To be compared with itself: if it is the same after something was marked as it was before that was looked at, no change missed the
    /// mark.
    pub fn looked(&self) -> u64 {
        self.looked.load(Acquire)
    }
}
