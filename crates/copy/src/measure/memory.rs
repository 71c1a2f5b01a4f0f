//! The memory that copies are measured on, and the CPU that they are measured on.

use std::io;

/// malloc(3) of large blocks returns addresses 16 bytes after a line; windows and channels begin at pages.
const DESTINATION_OFFSET: usize = 16;
const PAGE_BYTES: usize = 4096;
/// What is handed from core to core at once: within the second-level cache.
const POOL_BYTES: usize = 256 << 10;
const SLOTS_MAX: usize = 1024;

/// Anonymous memory, all of it touched.
struct Area {
    at: *mut u8,
    size_bytes: usize,
}

// SAFETY: raw memory; the two threads agree about who uses it by what they ask of each other.
unsafe impl Sync for Area {}
// SAFETY: as above.
unsafe impl Send for Area {}

impl Area {
    fn new(size_bytes: usize) -> io::Result<Self> {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
        );
        // SAFETY: new memory.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), size_bytes, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: all of the new mapping, so that no page is the shared one of zeros.
        unsafe { std::ptr::write_bytes(at.cast::<u8>(), 0x5a, size_bytes) };
        Ok(Self { at: at.cast(), size_bytes })
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.at.cast(), self.size_bytes) };
    }
}

/// Sources and destinations of one size, slot by slot.
pub struct Pools {
    sources: Area,
    destinations: Area,
    slots: usize,
    stride_bytes: usize,
    size_bytes: usize,
}

impl Pools {
    /// What two cores hand each other at once.
    pub fn shared(size_bytes: usize) -> io::Result<Self> {
        let line_or_page = if size_bytes < PAGE_BYTES { 64 } else { PAGE_BYTES };
        let stride_bytes = size_bytes.next_multiple_of(line_or_page);
        Self::new(size_bytes, stride_bytes, (POOL_BYTES / stride_bytes).clamp(1, SLOTS_MAX))
    }

    /// As many slots (a power of two) as make up `room_bytes`: more than caches hold.
    pub fn beyond_caches(size_bytes: usize, room_bytes: usize) -> io::Result<Self> {
        let stride_bytes = size_bytes.next_power_of_two().max(64);
        Self::new(size_bytes, stride_bytes, (room_bytes / stride_bytes).max(1))
    }

    fn new(size_bytes: usize, stride_bytes: usize, slots: usize) -> io::Result<Self> {
        let room_bytes = slots * stride_bytes + PAGE_BYTES;
        let (sources, destinations) = (Area::new(room_bytes)?, Area::new(room_bytes)?);
        Ok(Self { sources, destinations, slots, stride_bytes, size_bytes })
    }

    /// The same memory for another size, of which at least one fits into `room_bytes`, as what was there before did.
    pub fn resized(self, size_bytes: usize, room_bytes: usize) -> Self {
        let stride_bytes = size_bytes.next_power_of_two().max(64);
        let slots = room_bytes / stride_bytes;
        assert!(slots > 0 && self.sources.size_bytes >= room_bytes + PAGE_BYTES);
        Self { slots, stride_bytes, size_bytes, ..self }
    }

    pub fn slots(&self) -> usize {
        self.slots
    }

    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    /// `slot` counts round.
    pub fn source(&self, slot: usize) -> *mut u8 {
        // SAFETY: each slot lies in the area.
        unsafe { self.sources.at.add(slot % self.slots * self.stride_bytes) }
    }

    /// `slot` counts round.
    pub fn destination(&self, slot: usize) -> *mut u8 {
        // SAFETY: as above; there is a page more than the slots take.
        unsafe { self.destinations.at.add(slot % self.slots * self.stride_bytes + DESTINATION_OFFSET) }
    }

    /// Writes the first sources, as the program that the bytes come from would.
    pub fn write_sources(&self, slots: usize, byte: u8) {
        for slot in 0..slots.min(self.slots) {
            // SAFETY: a slot of the sources; the measuring thread waits.
            unsafe { std::ptr::write_bytes(self.source(slot), byte, self.size_bytes) };
        }
    }

    /// Reads every word of the first destinations, as the program that the bytes are for will.
    pub fn read_destinations(&self, slots: usize) {
        for slot in 0..slots.min(self.slots) {
            let mut sum = 0u64;
            let words = self.destination(slot).cast::<u64>();
            for index in 0..self.size_bytes / 8 {
                // SAFETY: within the slot; the measuring thread waits.
                sum = sum.wrapping_add(unsafe { words.add(index).read_unaligned() });
            }
            std::hint::black_box(sum);
        }
    }
}

/// Keeps this thread on one CPU; gives it back where it may run.
pub struct Pinned(libc::cpu_set_t);

impl Pinned {
    pub fn to(cpu: usize) -> io::Result<Self> {
        // SAFETY: sets of this size, as the calls want them; the thread is our own.
        unsafe {
            let mut before: libc::cpu_set_t = std::mem::zeroed();
            let mut one: libc::cpu_set_t = std::mem::zeroed();
            let size = size_of::<libc::cpu_set_t>();
            if cpu >= libc::CPU_SETSIZE as usize || libc::sched_getaffinity(0, size, &mut before) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::CPU_SET(cpu, &mut one);
            if libc::sched_setaffinity(0, size, &one) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(before))
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the set that the kernel gave us. Failing, the thread stays where it is.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &self.0) };
    }
}
