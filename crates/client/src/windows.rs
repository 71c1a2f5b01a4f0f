//! Windows as readers see them.

use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use polytropo_wire::VERSION;
pub use polytropo_wire::window::Found;
use polytropo_wire::window::{Geometry, Header, MAGIC, View, WORDS_AT};

use crate::channel::Channel;
use crate::copies::Situation;
use crate::sys::{self, Mapping};
use crate::{EPROTO, Error, Result};

/// A mapped window. Valid as long as the file that it belongs to is in use.
#[derive(Clone, Copy)]
pub struct Window {
    base: NonNull<u8>,
    geometry: Geometry,
}

impl Window {
    /// Maps the window called by these words. Tells the base and how many bytes it has room for.
    pub fn map(channel: &Channel, name: [u64; 2]) -> Result<(NonNull<u8>, u64)> {
        let mut text = [0u8; 33];
        let digits = name.iter().flat_map(|word| (0..16).rev().map(move |at| (word >> (4 * at)) as u8 & 15));
        for (place, digit) in text.iter_mut().zip(digits) {
            *place = if digit < 10 { b'0' + digit } else { b'a' + digit - 10 };
        }
        let file = sys::open_below(&channel.windows, &text).map_err(Error::Errno)?;
        // The header first, to know how much there is.
        let header = Mapping::shared(&file, WORDS_AT as usize, false).map_err(Error::Errno)?;
        // SAFETY: the mapping is as long as a page and the header is made of atomics.
        let seen: &Header = unsafe { header.base().cast().as_ref() };
        let capacity_bytes = seen.capacity_bytes.load(Relaxed);
        let sound = seen.magic.load(Acquire) == MAGIC && seen.version.load(Relaxed) == VERSION;
        let geometry = Geometry::of(capacity_bytes).filter(|g| sound && g.capacity_bytes == capacity_bytes);
        let total_bytes = geometry.ok_or(Error::Errno(EPROTO))?.total_bytes();
        let whole = Mapping::shared(&file, total_bytes as usize, false).map_err(Error::Errno)?;
        let base = whole.base();
        core::mem::forget(whole);
        Ok((base, capacity_bytes))
    }

    /// A window that was mapped.
    pub fn at(base: NonNull<u8>, capacity_bytes: u64) -> Self {
        Self { base, geometry: Geometry { capacity_bytes } }
    }

    pub fn unmap(base: NonNull<u8>, capacity_bytes: u64) {
        drop(Mapping::taken_back(base, Geometry { capacity_bytes }.total_bytes() as usize));
    }

    fn view(&self) -> View<'_> {
        // SAFETY: mapped, page-aligned, longer than the header, made of atomics.
        let header: &Header = unsafe { self.base.cast().as_ref() };
        // SAFETY: the words of all blocks lie in the mapping, from WORDS_AT on; they are atomics.
        let words = unsafe {
            let first = self.base.add(WORDS_AT as usize).cast::<AtomicU64>();
            core::slice::from_raw_parts(first.as_ptr(), self.geometry.blocks() as usize)
        };
        View::new(header, words)
    }

    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub fn is_retired(&self) -> bool {
        self.view().is_retired()
    }

    /// Copies bytes out.
    ///
    /// # Safety
    /// `to` must be writable for `count` bytes.
    #[inline]
    pub unsafe fn read(&self, channel: &Channel, to: *mut u8, count: usize, offset: u64) -> Found {
        let copy = channel.copier(count, Situation::Read);
        let bytes_at = self.geometry.bytes_at();
        let found = self.view().read(count, offset, |done, at, part| {
            // SAFETY: the range lies below the size, which is not above the capacity, so in the mapping; `to` is writable for `count`
            // bytes. That the service may change the bytes meanwhile makes the copy worthless, which the looks around it tell.
            unsafe { copy(to.add(done), self.base.as_ptr().add((bytes_at + at) as usize), part) }
        });
        if let Found::Bytes(done) = found {
            channel.count_copy(done, Situation::Read);
        }
        found
    }
}
