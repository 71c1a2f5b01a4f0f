//! The fixed layout of a queue in memory; `LAYOUT.md` draws it byte by byte.
//!
//! Everything is found by offsets that follow from seven numbers of the header. A participant reads the header once, checks it,
//! and keeps its own copy: nothing that a peer does to the header afterwards has an effect.

use crate::Error;
use crate::cell::Cell;
use crate::handle::View;
use crate::lane::{LINE, LaneControl, Slots};
use crate::lanes::{LANES_MAX, Lanes};
use crate::pool::{BufferHeader, Hint, Participant, Pool};
use crate::sync::{AtomicU32, AtomicU64, Relaxed};
use crate::wait::{Events, Statistics};
use core::mem::size_of;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

pub const MAGIC: u64 = u64::from_le_bytes(*b"POLY-RCQ");
pub const VERSION: u32 = 2;
const ALIGNMENT: usize = 128;
const READY: u32 = 0x5EA1_ED01;
pub const SLOTS_MAX: u64 = 1 << 20;
pub const ITEM_SIZE_MAX: u64 = 1 << 24;

/// Which queue lies in the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Kind {
    Single = 1,
    Double = 2,
    Bytes = 3,
}

impl Kind {
    fn cell_size(self) -> usize {
        match self {
            Self::Double => size_of::<crate::cell::DoubleCell>(),
            Self::Single | Self::Bytes => size_of::<crate::cell::SingleCell>(),
        }
    }

    fn line_spread(self) -> u32 {
        (LINE / self.cell_size()).trailing_zeros()
    }
}

/// What a queue is made with. All numbers are checked by the queue's constructor.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Items that the queue holds; a power of two.
    pub capacity: usize,
    /// 1 for strict order; more, a power of two up to 64, to let as many CPUs work without sharing cache lines.
    pub lanes: usize,
    /// With several lanes, how many tickets one may be ahead of another.
    pub skew: u32,
    /// Whether slots lie side by side; else each has a cache line of its own. Side by side costs less where CPUs share a lane (they
    /// fetch a line for eight items), and takes an eighth of the memory; lines keep neighbours from disturbing each other.
    pub packed: bool,
    /// Bytes of the largest item (RCQB).
    pub item_size: usize,
    /// Participants that may be attached at once (RCQB).
    pub participants: usize,
}

/// Measured: 64 costs 2-3 % more processor time in pairs, none at all (`u32::MAX`, no bound) 2-4 % less.
pub const DEFAULT_SKEW: u32 = 256;

impl Config {
    /// One lane: strict order.
    pub fn strict(capacity: usize) -> Self {
        Self { capacity, lanes: 1, skew: DEFAULT_SKEW, packed: true, item_size: 8, participants: 64 }
    }

    /// A lane for each of `cpus` CPUs, fewer if the capacity is small.
    pub fn relaxed(capacity: usize, cpus: usize) -> Self {
        let lanes = cpus.max(1).next_power_of_two().min(LANES_MAX).min((capacity / 2).max(1));
        Self { lanes, packed: false, ..Self::strict(capacity) }
    }
}

#[repr(C, align(128))]
pub struct Header {
    magic: AtomicU64,
    version: AtomicU32,
    kind: AtomicU32,
    /// Written last.
    ready: AtomicU32,
    lane_slots_log2: AtomicU32,
    lanes: AtomicU32,
    skew: AtomicU32,
    spread: AtomicU32,
    item_size: AtomicU32,
    participants: AtomicU32,
    total_size: AtomicU64,
}

/// The checked numbers of one queue, and the offsets that follow from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub kind: Kind,
    pub shift: u32,
    pub lanes: u32,
    pub skew: u32,
    /// Logarithm of the cells from one slot to the next.
    pub spread: u32,
    pub item_size: u32,
    pub participants: u32,
}

const EVENTS_AT: usize = size_of::<Header>();
const STATISTICS_AT: usize = EVENTS_AT + size_of::<Events>();
const LANES_AT: usize = STATISTICS_AT + size_of::<Statistics>();

impl Geometry {
    pub fn new(kind: Kind, config: &Config) -> Result<Self, Error> {
        let number = |value: usize| u32::try_from(value).map_err(|_| Error::Invalid);
        if !config.lanes.is_power_of_two()
            || !config.capacity.is_power_of_two()
            || config.capacity < 2 * config.lanes
        {
            return Err(Error::Invalid);
        }
        let shift = (config.capacity / config.lanes).trailing_zeros();
        // Lanes share no line, so that those of less than one line are not packed.
        let packed = config.packed && kind.cell_size() << shift.min(20) >= LINE;
        let geometry = Self {
            kind,
            shift,
            spread: if packed { 0 } else { kind.line_spread() },
            lanes: number(config.lanes)?,
            skew: config.skew,
            item_size: number(config.item_size)?,
            participants: number(config.participants)?,
        };
        geometry.check()?;
        Ok(geometry)
    }

    fn check(&self) -> Result<(), Error> {
        let good = (1..=20).contains(&self.shift)
            && self.lanes.is_power_of_two()
            && self.lanes as usize <= LANES_MAX
            && u64::from(self.lanes) << self.shift <= SLOTS_MAX
            && (1..=ITEM_SIZE_MAX).contains(&u64::from(self.item_size))
            && (1..=1024).contains(&self.participants)
            && self.skew >= 1
            && (self.spread == 0 && self.kind.cell_size() << self.shift >= LINE
                || self.spread == self.kind.line_spread());
        if good { Ok(()) } else { Err(Error::Invalid) }
    }

    pub fn capacity(&self) -> usize {
        (self.lanes as usize) << self.shift
    }

    fn slots_at(&self) -> usize {
        LANES_AT + self.lanes as usize * size_of::<LaneControl>()
    }

    /// Cells of all slots, those between them included.
    fn cells(&self) -> usize {
        self.capacity() << self.spread
    }

    fn hints_at(&self) -> usize {
        self.pool_at() + self.participants as usize * size_of::<Participant>()
    }

    fn headers_at(&self) -> usize {
        self.hints_at() + self.capacity().div_ceil(64) * size_of::<Hint>()
    }

    fn payload_at(&self) -> usize {
        self.headers_at() + self.capacity() * size_of::<BufferHeader>()
    }

    /// Bytes from one buffer to the next.
    pub fn stride(&self) -> usize {
        (self.item_size as usize).next_multiple_of(64)
    }

    /// Where what follows the slots begins: the pool of an RCQB.
    fn pool_at(&self) -> usize {
        self.slots_at() + self.cells() * self.kind.cell_size()
    }

    pub fn total_size(&self) -> usize {
        match self.kind {
            Kind::Single | Kind::Double => self.pool_at(),
            Kind::Bytes => self.payload_at() + self.capacity() * self.stride(),
        }
    }
}

/// Memory that holds a queue.
///
/// # Safety
/// `base` must point to `size` bytes that are readable and writable, aligned to 128, and stay so, at the same place, as long as the
/// value lives, also when it is moved. Other processes may change the bytes at any time.
pub unsafe trait Memory: Send + Sync {
    fn base(&self) -> NonNull<u8>;
    fn size(&self) -> usize;
}

/// A part of memory that somebody else keeps mapped.
pub struct Borrowed {
    base: NonNull<u8>,
    size_bytes: usize,
}

// SAFETY: queues use their memory through atomics, or as the protocol of their slots says.
unsafe impl Send for Borrowed {}
// SAFETY: as above.
unsafe impl Sync for Borrowed {}

impl Borrowed {
    /// # Safety
    /// What [`Memory`] asks for holds for these bytes as long as the value lives.
    pub const unsafe fn new(base: NonNull<u8>, size_bytes: usize) -> Self {
        Self { base, size_bytes }
    }
}

// SAFETY: whoever made the value vouches for it.
unsafe impl Memory for Borrowed {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
    fn size(&self) -> usize {
        self.size_bytes
    }
}

/// Writes a new, empty queue. The memory must be zeroed, and nobody else may use it yet.
pub fn create(memory: &impl Memory, geometry: &Geometry) -> Result<(), Error> {
    geometry.check()?;
    let header = header(memory)?;
    if memory.size() < geometry.total_size() {
        return Err(Error::Invalid);
    }
    if header.ready.load(Ordering::Acquire) != 0 {
        return Err(Error::Invalid);
    }
    header.magic.store(MAGIC, Relaxed);
    header.version.store(VERSION, Relaxed);
    header.kind.store(geometry.kind as u32, Relaxed);
    header.lane_slots_log2.store(geometry.shift, Relaxed);
    header.lanes.store(geometry.lanes, Relaxed);
    header.skew.store(geometry.skew, Relaxed);
    header.spread.store(geometry.spread, Relaxed);
    header.item_size.store(geometry.item_size, Relaxed);
    header.participants.store(geometry.participants, Relaxed);
    header.total_size.store(geometry.total_size() as u64, Relaxed);
    header.ready.store(READY, Ordering::Release);
    Ok(())
}

/// Reads and checks the header of an existing queue.
pub fn attach(memory: &impl Memory) -> Result<Geometry, Error> {
    let header = header(memory)?;
    if header.ready.load(Ordering::Acquire) != READY || header.magic.load(Relaxed) != MAGIC {
        return Err(Error::NotAQueue);
    }
    if header.version.load(Relaxed) != VERSION {
        return Err(Error::OtherVersion);
    }
    let kind = match header.kind.load(Relaxed) {
        1 => Kind::Single,
        2 => Kind::Double,
        3 => Kind::Bytes,
        _ => return Err(Error::NotAQueue),
    };
    let geometry = Geometry {
        kind,
        shift: header.lane_slots_log2.load(Relaxed),
        lanes: header.lanes.load(Relaxed),
        skew: header.skew.load(Relaxed),
        spread: header.spread.load(Relaxed),
        item_size: header.item_size.load(Relaxed),
        participants: header.participants.load(Relaxed),
    };
    geometry.check().map_err(|_| Error::NotAQueue)?;
    if memory.size() < geometry.total_size()
        || header.total_size.load(Relaxed) != geometry.total_size() as u64
    {
        return Err(Error::NotAQueue);
    }
    Ok(geometry)
}

fn header(memory: &impl Memory) -> Result<&Header, Error> {
    if memory.size() < LANES_AT || memory.base().as_ptr() as usize % ALIGNMENT != 0 {
        return Err(Error::NotAQueue);
    }
    // SAFETY: the header lies in the memory and is aligned, both just checked; it is made of atomics, for which every pattern of bits is
    // a value and for which changes by others are no data race.
    Ok(unsafe { memory.base().cast::<Header>().as_ref() })
}

/// The parts of the queue that `geometry` describes. The caller must have got `geometry` from [`attach`], or from [`create`].
pub fn view<'a, C: Cell>(memory: &'a impl Memory, geometry: &Geometry) -> View<'a, C> {
    assert!(memory.size() >= geometry.total_size(), "the memory is smaller than its queue");
    assert_eq!(size_of::<C>(), geometry.kind.cell_size());
    let base = memory.base();
    // SAFETY: all offsets lie below the total size, just checked against the memory's; each is a multiple of 128 or, for slots, of
    // lines of 64 bytes, to which cells are aligned. Everything there is made of atomics (see `header`), and lives as long as the memory does.
    unsafe {
        let controls = base.add(LANES_AT).cast::<LaneControl>().as_ptr();
        let cells = base.add(geometry.slots_at()).cast::<C>().as_ptr();
        let controls = core::slice::from_raw_parts(controls, geometry.lanes as usize);
        let slots =
            Slots { cells: core::slice::from_raw_parts(cells, geometry.cells()), spread: geometry.spread };
        let lanes = Lanes::new(controls, slots, geometry.shift, u64::from(geometry.skew));
        View {
            lanes,
            events: base.add(EVENTS_AT).cast::<Events>().as_ref(),
            statistics: base.add(STATISTICS_AT).cast::<Statistics>().as_ref(),
        }
    }
}

/// The pool of an RCQB, and where its first buffer begins.
pub fn pool<'a>(memory: &'a impl Memory, geometry: &Geometry) -> (Pool<'a>, NonNull<u8>) {
    assert!(
        memory.size() >= geometry.total_size() && geometry.kind == Kind::Bytes,
        "the memory is not that of an RCQB"
    );
    let (base, capacity) = (memory.base(), geometry.capacity());
    // SAFETY: as in `view`; all these parts are multiples of 64 bytes long and aligned so.
    unsafe {
        let participants = base.add(geometry.pool_at()).cast::<Participant>().as_ptr();
        let hints = base.add(geometry.hints_at()).cast::<Hint>().as_ptr();
        let headers = base.add(geometry.headers_at()).cast::<BufferHeader>().as_ptr();
        let pool = Pool {
            participants: core::slice::from_raw_parts(participants, geometry.participants as usize),
            hints: core::slice::from_raw_parts(hints, capacity.div_ceil(64)),
            headers: core::slice::from_raw_parts(headers, capacity),
        };
        (pool, base.add(geometry.payload_at()))
    }
}

/// Zeroed memory of this process.
#[cfg(feature = "alloc")]
pub struct Heap {
    base: NonNull<u8>,
    layout: core::alloc::Layout,
}

#[cfg(feature = "alloc")]
impl Heap {
    pub fn new(size: usize) -> Result<Self, Error> {
        let layout = core::alloc::Layout::from_size_align(size.max(ALIGNMENT), ALIGNMENT)
            .map_err(|_| Error::Invalid)?;
        // SAFETY: the size is not zero.
        let base = unsafe { alloc::alloc::alloc_zeroed(layout) };
        Ok(Self { base: NonNull::new(base).ok_or(Error::NoMemory)?, layout })
    }
}

#[cfg(feature = "alloc")]
impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and owned by this value alone.
        unsafe { alloc::alloc::dealloc(self.base.as_ptr(), self.layout) }
    }
}

// SAFETY: the memory belongs to the value and is used through atomics only.
#[cfg(feature = "alloc")]
unsafe impl Send for Heap {}
// SAFETY: as above.
#[cfg(feature = "alloc")]
unsafe impl Sync for Heap {}

// SAFETY: `new` allocated that many bytes with that alignment, and only `drop` frees them.
#[cfg(feature = "alloc")]
unsafe impl Memory for Heap {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
    fn size(&self) -> usize {
        self.layout.size()
    }
}
