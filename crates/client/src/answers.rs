//! Answers that programs of the same rights share: read where the service wrote them.

use core::ptr::NonNull;
use core::sync::atomic::Ordering::Relaxed;

use polytropo_wire::VERSION;
use polytropo_wire::answers::{
    Header, Kind, LOG_AT, LOG_WORDS, MAGIC, PLACES, PLACES_AT, Record, TOTAL_BYTES, View,
};

use crate::sys::{Descriptor, Errno, Mapping};

/// See the module.
pub struct Answers(Mapping);

impl Answers {
    pub fn over(memory: &Descriptor) -> Result<Self, Errno> {
        let made = Self(Mapping::shared(memory, TOTAL_BYTES, false)?);
        let header = made.view().header;
        let known = header.magic.load(Relaxed) == MAGIC
            && header.version.load(Relaxed) == u64::from(VERSION)
            && header.log_words.load(Relaxed) == LOG_WORDS as u64;
        if known { Ok(made) } else { Err(crate::EPROTO) }
    }

    #[inline]
    fn view(&self) -> View<'_> {
        let base = self.0.base();
        // SAFETY: header, places and log lie in the mapping, whose memory is sealed in its size, one behind the other and aligned; all are
        // atomics, which are only read here.
        unsafe {
            View {
                header: base.cast::<Header>().as_ref(),
                places: NonNull::slice_from_raw_parts(base.add(PLACES_AT).cast(), PLACES).as_ref(),
                log: NonNull::slice_from_raw_parts(base.add(LOG_AT).cast(), LOG_WORDS).as_ref(),
            }
        }
    }

    #[inline]
    pub fn find(&self, kind: Kind, ino: u64) -> Option<Record<'_>> {
        self.view().find(kind, ino)
    }

    #[inline]
    pub fn record(&self, position: u64) -> Option<Record<'_>> {
        self.view().record(position)
    }

    /// To be asked after a record was read.
    #[inline]
    pub fn is_there(&self, position: u64) -> bool {
        self.view().is_there(position)
    }
}
