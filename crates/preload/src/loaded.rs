//! What the loader has loaded, as its own list tells, which debuggers use as well: no file of /proc has to be read and parsed.

use crate::initial::Auxiliary;

const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const PT_PHDR: u32 = 6;
const DT_DEBUG: usize = 21;
const DT_PREINIT_ARRAY: usize = 32;
const HEADERS_MAX: usize = 64;
const DYNAMIC_ENTRIES_MAX: usize = 512;
const LIBRARIES_MAX: usize = 4096;
const PATH_BYTES_MAX: usize = 4096;

#[repr(C)]
struct ProgramHeader {
    kind: u32,
    _flags: u32,
    _offset: usize,
    address: usize,
    _rest: [usize; 4],
}

#[repr(C)]
struct Debug {
    _version: usize,
    first: *const LinkMap,
}

#[repr(C)]
struct LinkMap {
    base: usize,
    path: *const u8,
    _dynamic: usize,
    next: *const LinkMap,
}

/// A library in the list.
#[derive(Clone, Copy)]
pub struct Library<'a> {
    pub base: usize,
    pub path: &'a [u8],
}

impl<'a> Library<'a> {
    /// The last component of the path.
    pub fn name(&self) -> &'a [u8] {
        &self.path[self.path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1)..]
    }
}

/// The program itself.
pub struct Program {
    debug: *const Debug,
    pub has_early_constructors: bool,
    /// The loader that it asks for.
    pub interpreter: &'static [u8],
}

impl Program {
    /// `None` if its headers do not lead to the loader's list.
    pub fn of(auxiliary: &Auxiliary) -> Option<Self> {
        let count = auxiliary.header_count.min(HEADERS_MAX);
        (auxiliary.headers != 0 && auxiliary.headers % align_of::<ProgramHeader>() == 0).then_some(())?;
        // SAFETY: the kernel says that the program's headers are there.
        let headers =
            unsafe { core::slice::from_raw_parts(auxiliary.headers as *const ProgramHeader, count) };
        let find = |kind| headers.iter().find(|header| header.kind == kind).map(|header| header.address);
        let base = auxiliary.headers.wrapping_sub(find(PT_PHDR)?);
        let mut found = Self { debug: core::ptr::null(), has_early_constructors: false, interpreter: &[] };
        if let Some(at) = find(PT_INTERP) {
            // SAFETY: the headers say that a string is there, which the kernel has read.
            found.interpreter = unsafe { string(base.wrapping_add(at) as *const u8) };
        }
        let mut entry = base.wrapping_add(find(PT_DYNAMIC)?) as *const [usize; 2];
        for _ in 0..DYNAMIC_ENTRIES_MAX {
            // SAFETY: the headers say that the dynamic section is there, and it goes on until its end was met.
            match unsafe { entry.read() } {
                [0, _] => break,
                [DT_DEBUG, value] => found.debug = value as *const Debug,
                [DT_PREINIT_ARRAY, _] => found.has_early_constructors = true,
                _ => {}
            }
            entry = entry.wrapping_add(1);
        }
        (!found.debug.is_null()).then_some(found)
    }

    /// Shows each library, the program first; false if the list goes on for too long. No thread may run.
    pub fn each(&self, mut visit: impl FnMut(&Library<'static>)) -> bool {
        // SAFETY: the loader has put its list there before it ran any constructor, and nobody changes it now.
        let mut next = unsafe { (*self.debug).first };
        for _ in 0..LIBRARIES_MAX {
            // SAFETY: as above.
            let Some(map) = (unsafe { next.as_ref() }) else { return true };
            let path = if map.path.is_null() {
                &[][..]
            } else {
                // SAFETY: as above.
                unsafe { string(map.path) }
            };
            visit(&Library { base: map.base, path });
            next = map.next;
        }
        false
    }
}

/// # Safety
/// Bytes up to a zero must be there, and stay.
unsafe fn string(at: *const u8) -> &'static [u8] {
    // SAFETY: as the caller promised, since none behind the zero is read.
    let length = (0..PATH_BYTES_MAX).find(|index| unsafe { at.add(*index).read() } == 0).unwrap_or(0);
    // SAFETY: just read.
    unsafe { core::slice::from_raw_parts(at, length) }
}
