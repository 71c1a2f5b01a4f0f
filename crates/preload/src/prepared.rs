//! C libraries whose code was redirected before: programs map that code instead of changing their own.
//!
//! Changing code in memory copies each page of it, some fifty of them at each start of a program. A prepared file holds a whole C library
//! with the jumps in it, the trampolines behind, which lie at a fixed distance from the library, and a description at its end:
//!
//! ```text
//! the library | padding | trampolines, whole pages | description
//! ```
//!
//! Pages of both are those of the page cache, shared by all programs. In memory:
//!
//! ```text
//! base - DISTANCE: the entries' addresses, a page | trampolines ...             base: the library | its code, from the file | ...
//! ```
//!
//! It is used only for the very file that it was made of: the build id and the size of the code in memory, and the size and time of
//! the file that the loader has mapped, have to be those described.

use crate::elf::Image;
use crate::patch::{self, Entries, PAGE_BYTES};
use crate::scan::{Site, Summary};
use crate::{sys, table};

const MAGIC: &[u8; 8] = b"plcode02";
pub const SUFFIX: &[u8] = b".code";
const BUILD_ID_WORDS: usize = 4;
/// The description: everything in it are words of 64 bits.
const WORDS: usize = 24;
const DESCRIPTION_BYTES: usize = WORDS * 8;
/// Far below whatever else is mapped beside the library, and within reach of jumps.
const DISTANCE_BYTES: usize = 256 << 20;
/// C libraries have two megabytes; an image's may claim to be anything, and its file is kept in memory.
const FILE_BYTES_MAX: usize = 8 << 20;

/// Its bytes, and how many there are.
type BuildId = ([u64; BUILD_ID_WORDS], usize);

/// Which file a library is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub size_bytes: u64,
    pub mtime_s: i64,
    pub mtime_ns: u64,
}

#[derive(Clone, Copy)]
struct Description {
    build_id: BuildId,
    stamp: Stamp,
    /// Where the code lies in memory, from the base, in whole pages, and in the file.
    code_address: usize,
    code_bytes: usize,
    code_at: usize,
    trampolines_at: usize,
    trampolines_bytes: usize,
    summary: Summary,
}

impl Description {
    fn to_words(self) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        let (id, id_bytes) = self.build_id;
        let Summary { instructions, passed, no_room, unsure, leaving, sites } = self.summary;
        let head = [u64::from_le_bytes(*MAGIC), u64::from(table::SEEN_HASH), id_bytes as u64];
        let Stamp { size_bytes, mtime_s, mtime_ns } = self.stamp;
        let places =
            [self.code_address, self.code_bytes, self.code_at, self.trampolines_at, self.trampolines_bytes];
        let counters = [instructions, passed, no_room, unsure, leaving, sites];
        let all = head
            .into_iter()
            .chain(id)
            .chain([size_bytes, mtime_s as u64, mtime_ns])
            .chain(places.into_iter().map(|place| place as u64))
            .chain(counters.into_iter().map(u64::from));
        words.iter_mut().zip(all).for_each(|(place, word)| *place = word);
        words
    }

    fn from_words(words: &[u64; WORDS]) -> Option<Self> {
        let [magic, hash, id_bytes, ids @ .., s0, s1, s2, a, b, c, d, e, i, p, n, u, l, s, _, _, _] = words;
        (magic.to_le_bytes() == *MAGIC && *hash == u64::from(table::SEEN_HASH)).then_some(())?;
        let ids: &[u64; BUILD_ID_WORDS] = ids;
        let number = |word: &u64| u32::try_from(*word).ok();
        let place = |word: &u64| {
            usize::try_from(*word).ok().filter(|at| *at <= FILE_BYTES_MAX && at % PAGE_BYTES == 0)
        };
        Some(Self {
            build_id: (*ids, usize::try_from(*id_bytes).ok().filter(|bytes| *bytes <= size_of_val(ids))?),
            stamp: Stamp { size_bytes: *s0, mtime_s: *s1 as i64, mtime_ns: *s2 },
            code_address: place(a)?,
            code_bytes: place(b)?,
            code_at: place(c)?,
            trampolines_at: place(d)?,
            trampolines_bytes: place(e).filter(|bytes| *bytes > 0)?,
            summary: Summary {
                instructions: number(i)?,
                passed: number(p)?,
                no_room: number(n)?,
                unsure: number(u)?,
                leaving: number(l)?,
                sites: number(s)?,
            },
        })
    }
}

/// The library's code in whole pages: address and size.
fn code_pages(image: &Image<'_>) -> Option<(usize, usize)> {
    let (address, bytes) = image.code_range()?;
    let start = address & !(PAGE_BYTES - 1);
    let end = address.checked_add(bytes)?.checked_next_multiple_of(PAGE_BYTES)?;
    Some((start, end - start))
}

fn build_id(image: &Image<'_>) -> Option<BuildId> {
    let id = image.build_id().filter(|id| (1..=BUILD_ID_WORDS * 8).contains(&id.len()))?;
    let mut words = [0; BUILD_ID_WORDS];
    for (at, byte) in id.iter().enumerate() {
        words[at / 8] |= u64::from(*byte) << (at % 8 * 8);
    }
    Some((words, id.len()))
}

/// Bytes that [`write`] needs for a library of this size.
pub fn file_bytes(library_bytes: usize, sites: usize) -> usize {
    library_bytes.next_multiple_of(PAGE_BYTES) + patch::trampolines_bytes(sites) + DESCRIPTION_BYTES
}

/// Turns `file`, which begins with a library and has [`file_bytes`], into a prepared one. `image` is the library as it lies in memory,
/// and `code_at` where its first executable segment lies in the file.
pub fn write(
    file: &mut [u8],
    image: &Image<'_>,
    code_at: usize,
    stamp: Stamp,
    summary: &Summary,
    sites: &[Site],
) -> Option<()> {
    let (address, _) = image.code_range()?;
    let (code_address, code_bytes) = code_pages(image)?;
    let code_at = code_at.checked_sub(address - code_address).filter(|at| at % PAGE_BYTES == 0)?;
    let trampolines_at = usize::try_from(stamp.size_bytes).ok()?.checked_next_multiple_of(PAGE_BYTES)?;
    let trampolines_bytes = patch::trampolines_bytes(sites.len());
    (code_at.checked_add(code_bytes)? <= trampolines_at && trampolines_at <= FILE_BYTES_MAX).then_some(())?;
    let (library, rest) = file.split_at_mut_checked(trampolines_at)?;
    let (trampolines, description) = rest.split_at_mut_checked(trampolines_bytes)?;
    // Distances alone matter.
    let base = 2 * DISTANCE_BYTES;
    let block = base - DISTANCE_BYTES;
    patch::write_trampolines(trampolines, block + PAGE_BYTES, block, base, image, sites)?;
    for (index, site) in sites.iter().enumerate() {
        let from = (site.patch as usize).checked_sub(code_address)?.checked_add(code_at)?;
        let place = library.get_mut(from..from.checked_add((site.end - site.patch) as usize)?)?;
        patch::put_jump(place, base + site.patch as usize, block + PAGE_BYTES + patch::trampoline_at(index))?;
    }
    let told = Description {
        build_id: build_id(image)?,
        stamp,
        code_address,
        code_bytes,
        code_at,
        trampolines_at,
        trampolines_bytes,
        summary: *summary,
    };
    let words = told.to_words();
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    (description.len() == DESCRIPTION_BYTES).then_some(())?;
    description.iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte);
    Some(())
}

/// A prepared file that is one of the library in memory.
pub struct Prepared {
    descriptor: i32,
    told: Description,
}

impl Prepared {
    /// Opens the file at `path`, if it was made of the library that `image` shows the beginning of and that `stamp` tells of.
    pub fn open(path: &[u8], image: &Image<'_>, stamp: Stamp) -> Option<Self> {
        let descriptor = i32::try_from(sys::open(path, 0, 0)).ok().filter(|descriptor| *descriptor >= 0)?;
        let told = describe(descriptor).filter(|told| {
            let size = told.trampolines_at + told.trampolines_bytes + DESCRIPTION_BYTES;
            told.stamp == stamp
                && build_id(image).is_some_and(|id| id == told.build_id)
                && code_pages(image) == Some((told.code_address, told.code_bytes))
                && told.code_at + told.code_bytes <= told.trampolines_at
                && sys::size_of(descriptor) == Some(size)
        });
        if told.is_none() {
            sys::close(descriptor);
        }
        Some(Self { descriptor, told: told? })
    }

    pub fn summary(&self) -> &Summary {
        &self.told.summary
    }

    /// Puts the code in the place of the library's at `base`. False if there is no room for trampolines, or no right to map code.
    ///
    /// # Safety
    /// No other thread may run in this process, and the library must be mapped at `base`.
    pub unsafe fn map(&self, base: usize, entries: Entries) -> bool {
        let rights = sys::PROT_READ | sys::PROT_EXEC;
        let Some(block) = base.checked_sub(DISTANCE_BYTES) else { return false };
        let told = &self.told;
        // The entries' addresses lie before the trampolines; all in one range, so that nothing else comes between.
        let bytes = PAGE_BYTES + told.trampolines_bytes;
        if sys::map(block, bytes).is_none() {
            return false;
        }
        let trampolines = block + PAGE_BYTES;
        // SAFETY: mapped just now, and nobody knows of it.
        let mapped = unsafe {
            (block as *mut Entries).write(entries);
            sys::map_file(trampolines, told.trampolines_bytes, rights, self.descriptor, told.trampolines_at)
                && sys::protect(block, PAGE_BYTES, sys::PROT_READ)
        };
        if !mapped {
            // SAFETY: nothing leads there yet.
            unsafe { sys::unmap(block, bytes) };
            return false;
        }
        let code = base + told.code_address;
        // SAFETY: the same instructions, but for those that were replaced, which nobody is in.
        if !unsafe { sys::map_file(code, told.code_bytes, rights, self.descriptor, told.code_at) } {
            // What was there may be gone, and the C library with it: no way leads back.
            sys::write_all(2, b"polytropo: the C library's code cannot be mapped\n");
            sys::exit(127);
        }
        true
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        sys::close(self.descriptor);
    }
}

fn describe(descriptor: i32) -> Option<Description> {
    let size = sys::size_of(descriptor)?;
    let mut words = [0_u64; WORDS];
    let got = sys::read_at(descriptor, &mut words, size.checked_sub(DESCRIPTION_BYTES)?);
    (got == DESCRIPTION_BYTES as isize).then_some(())?;
    Description::from_words(&words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_are_read_as_they_were_written() {
        let told = Description {
            build_id: ([7; BUILD_ID_WORDS], 20),
            stamp: Stamp { size_bytes: 5, mtime_s: -6, mtime_ns: 7 },
            code_address: 0x1000,
            code_bytes: 0x2000,
            code_at: 0x3000,
            trampolines_at: 0x5000,
            trampolines_bytes: 0x1000,
            summary: Summary { instructions: 6, passed: 5, no_room: 4, unsure: 3, leaving: 0, sites: 1 },
        };
        let words = told.to_words();
        assert_eq!(Description::from_words(&words).unwrap().to_words(), words);
        for (at, wrong) in [(0, 1), (1, words[1] ^ 1), (2, 33), (10, 0x1001), (14, 0), (15, 1 << 32)] {
            let mut damaged = words;
            damaged[at] = wrong;
            assert!(Description::from_words(&damaged).is_none(), "{at}");
        }
    }
}
