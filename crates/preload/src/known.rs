//! Sites that were found before: decoding all of a C library takes milliseconds, which short programs would pay at each start.
//!
//! A file beside the library, named after the build id of what was scanned. It is believed only as far as it can be checked: the build
//! id, the size of the code, and at every site the instructions that are to be replaced.

use crate::decode::decode;
use crate::elf::Image;
use crate::scan::{JUMP_BYTES, MOVED_BYTES_MAX, SITES_MAX, Site, Summary};
use crate::{patch, table};

const MAGIC: &[u8; 8] = b"plsites2";
const BUILD_ID_BYTES_MAX: usize = 32;
const COUNTERS: usize = 6;
/// Magic, which calls it is about, build id and its length, code's length, counters.
const HEADER_BYTES: usize = 8 + 4 + 4 + BUILD_ID_BYTES_MAX + 4 + 4 * COUNTERS;
const SITE_BYTES: usize = 16;
const NO_NUMBER: u32 = u32::MAX;
pub const FILE_BYTES_MAX: usize = HEADER_BYTES + SITES_MAX * SITE_BYTES;
pub const SUFFIX: &[u8] = b".sites";

/// The file's name, with a zero byte at its end; `None` if the library has no build id to go by.
pub fn write_name(image: &Image<'_>, suffix: &[u8], mut put: impl FnMut(&[u8])) -> Option<()> {
    let id = image.build_id().filter(|id| (1..=BUILD_ID_BYTES_MAX).contains(&id.len()))?;
    for byte in id {
        let digit = |value: u8| b"0123456789abcdef"[usize::from(value & 15)];
        put(&[digit(byte >> 4), digit(*byte)]);
    }
    put(suffix);
    put(&[0]);
    Some(())
}

/// Writes what a scan found, a piece at a time.
pub fn write(image: &Image<'_>, summary: &Summary, sites: &[Site], mut put: impl FnMut(&[u8])) -> Option<()> {
    let id = image.build_id().filter(|id| id.len() <= BUILD_ID_BYTES_MAX)?;
    let (_, code) = image.code()?;
    put(MAGIC);
    put(&table::SEEN_HASH.to_le_bytes());
    put(&(id.len() as u32).to_le_bytes());
    put(id);
    put(&[0; BUILD_ID_BYTES_MAX][id.len()..]);
    put(&u32::try_from(code.len()).ok()?.to_le_bytes());
    let Summary { instructions, passed, no_room, unsure, leaving, sites: count } = *summary;
    for counter in [instructions, passed, no_room, unsure, leaving, count] {
        put(&counter.to_le_bytes());
    }
    for site in sites {
        for word in [site.patch, site.syscall, site.end, site.number.map_or(NO_NUMBER, u32::from)] {
            put(&word.to_le_bytes());
        }
    }
    Some(())
}

/// What such a file says, if it is about this library as it lies in memory.
pub fn read(file: &[u8], image: &Image<'_>, sites: &mut [Site]) -> Option<Summary> {
    let mut words = Words { rest: file };
    (words.take(8)? == MAGIC && words.next()? == table::SEEN_HASH).then_some(())?;
    let id_bytes = words.next()? as usize;
    let id = words.take(BUILD_ID_BYTES_MAX)?.get(..id_bytes)?;
    let (address, code) = image.code()?;
    (image.build_id()? == id && words.next()? as usize == code.len()).then_some(())?;
    let [instructions, passed, no_room, unsure, leaving, count] = {
        let mut counters = [0; COUNTERS];
        for counter in &mut counters {
            *counter = words.next()?;
        }
        counters
    };
    let mut last_end = 0;
    let places = sites.get_mut(..count as usize)?;
    for place in places {
        let site = Site {
            patch: words.next()?,
            syscall: words.next()?,
            end: words.next()?,
            number: u16::try_from(words.next()?).ok(),
        };
        (site.patch >= last_end && is_site(image, &site) && site.end as usize <= address + code.len())
            .then_some(())?;
        last_end = site.end;
        *place = site;
    }
    words.rest.is_empty().then_some(Summary { instructions, passed, no_room, unsure, leaving, sites: count })
}

/// Whether whole movable instructions and a `syscall` are there, or a call of the bridge.
fn is_site(image: &Image<'_>, site: &Site) -> bool {
    if site.calls_bridge() {
        return patch::leads_to_bridge(image, site);
    }
    let Some(length) = site.end.checked_sub(site.patch).map(|length| length as usize) else { return false };
    let at_call = site.syscall.checked_sub(site.patch).map(|length| length as usize);
    let Some(bytes) = image.bytes(site.patch as usize, length + 2) else { return false };
    let (Some(at_call), JUMP_BYTES..=MOVED_BYTES_MAX) = (at_call, length) else { return false };
    let mut at = 0;
    let mut met = false;
    while at < length || (at == at_call && !met) {
        if at == at_call {
            met = bytes.get(at..at + 2) == Some(&[0x0f, 0x05]);
            if !met {
                return false;
            }
            at += 2;
            continue;
        }
        match decode(&bytes[at..]).filter(|instruction| instruction.is_movable()) {
            Some(instruction) => at += usize::from(instruction.length),
            None => return false,
        }
    }
    met && (at == length || at_call == length)
}

struct Words<'a> {
    rest: &'a [u8],
}

impl<'a> Words<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(taken)
    }

    fn next(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }
}
