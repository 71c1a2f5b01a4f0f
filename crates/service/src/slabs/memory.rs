//! The memory of one slab: filled from its beginning on, read any number of times, given back as a whole.

use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use polytropo_wire::window::BLOCK_BYTES;
use rustix::mm::{Advice, MapFlags, ProtFlags};

pub const SLAB_BYTES: usize = BLOCK_BYTES as usize;

/// Pages come as bytes are put into them.
pub struct Slab {
    /// None: given back. Held shared by who copies.
    mapping: RwLock<Option<Mapping>>,
    vacant: Arc<Vacant>,
}

/// Address ranges of slabs that were given back, without memory. They are used again: the kernel bounds how many pieces an address space has, and
/// ranges that come and go fall to pieces.
#[derive(Default)]
pub struct Vacant(Mutex<Vec<Mapping>>);

struct Mapping(NonNull<u8>);

// SAFETY: the mapping belongs to the value; who copies in or out keeps to ranges that nobody else changes (see `Slab`).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Slab {
    pub fn new(vacant: &Arc<Vacant>) -> rustix::io::Result<Self> {
        let used = vacant.0.lock().pop();
        let mapping = used.map_or_else(Mapping::new, Ok)?;
        Ok(Self { mapping: RwLock::new(Some(mapping)), vacant: vacant.clone() })
    }

    /// Copies a range out; false if the slab was given back.
    pub fn take(&self, at: usize, to: &mut [u8]) -> bool {
        assert!(at.checked_add(to.len()).is_some_and(|end| end <= SLAB_BYTES));
        let mapping = self.mapping.read();
        let Some(mapping) = &*mapping else { return false };
        // SAFETY: the range lies in the mapping, which stays while the lock is held; where it was put is told only after that, and then it
        // never changes.
        unsafe { std::ptr::copy_nonoverlapping(mapping.0.add(at).as_ptr(), to.as_mut_ptr(), to.len()) };
        true
    }

    /// Copies bytes in; false if the slab was given back.
    ///
    /// # Safety
    /// Nobody else was given the range, and nobody takes anything from it before this returns.
    pub unsafe fn put(&self, at: usize, from: &[u8]) -> bool {
        assert!(at.checked_add(from.len()).is_some_and(|end| end <= SLAB_BYTES));
        let mapping = self.mapping.read();
        let Some(mapping) = &*mapping else { return false };
        // SAFETY: the range lies in the mapping, which stays while the lock is held; the caller's word that it is nobody else's.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), mapping.0.add(at).as_ptr(), from.len()) };
        true
    }

    /// Waits for those who are copying.
    pub fn give_back(&self) {
        let Some(mapping) = self.mapping.write().take() else { return };
        // SAFETY: the whole mapping, which nobody uses any more: it was taken alone.
        let emptied =
            unsafe { rustix::mm::madvise(mapping.0.as_ptr().cast(), SLAB_BYTES, Advice::LinuxDontNeed) };
        if emptied.is_ok() {
            self.vacant.0.lock().push(mapping);
        }
    }
}

impl Mapping {
    fn new() -> rustix::io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: new memory, wherever the kernel likes.
        let base = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), SLAB_BYTES, protection, MapFlags::PRIVATE)?
        };
        Ok(Self(NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size; whoever uses it borrows from this value. A failure would only leave it mapped.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), SLAB_BYTES) };
    }
}
