//! The little of ELF that finding code takes, read from memory that may hold anything.

/// A library as it lies in memory: addresses count from its base.
#[derive(Clone, Copy)]
pub struct Image<'a> {
    /// Readable parts with their addresses, lowest first.
    pub parts: &'a [Part<'a>],
}

#[derive(Clone, Copy)]
pub struct Part<'a> {
    pub address: usize,
    pub bytes: &'a [u8],
    pub executable: bool,
}

const PROGRAM_HEADERS_MAX: usize = 64;
const DYNAMIC_ENTRIES_MAX: usize = 512;
const SYMBOLS_MAX: usize = 1 << 16;
const NOTE_BYTES_MAX: usize = 4096;

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_NOTE: u32 = 4;
const DT_HASH: u64 = 4;
const DT_SYMTAB: u64 = 6;
const DT_PREINIT_ARRAY: u64 = 32;
const DT_GNU_HASH: u64 = 0x6fff_fef5;
const EXECUTABLE: u32 = 1;
const MACHINE_X86_64: u16 = 62;
const SYMBOL_BYTES: usize = 24;
const FUNCTION: u8 = 2;
const INDIRECT_FUNCTION: u8 = 10;

#[derive(Clone, Copy)]
struct ProgramHeader {
    kind: u32,
    flags: u32,
    address: usize,
    size_bytes: usize,
}

impl<'a> Image<'a> {
    /// The bytes at an address, if all of them lie in one readable part.
    pub fn bytes(&self, address: usize, length: usize) -> Option<&'a [u8]> {
        self.parts.iter().find_map(|part| {
            let from = address.checked_sub(part.address)?;
            part.bytes.get(from..from.checked_add(length)?)
        })
    }

    fn u16(&self, address: usize) -> Option<u16> {
        Some(u16::from_le_bytes(self.bytes(address, 2)?.try_into().ok()?))
    }

    fn u32(&self, address: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(address, 4)?.try_into().ok()?))
    }

    fn u64(&self, address: usize) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(address, 8)?.try_into().ok()?))
    }

    /// Whether it begins as a 64-bit x86 library does.
    pub fn is_library(&self) -> bool {
        self.bytes(0, 6) == Some(b"\x7fELF\x02\x01") && self.u16(18) == Some(MACHINE_X86_64)
    }

    fn program_headers(&self) -> impl Iterator<Item = ProgramHeader> + use<'a> {
        let image = *self;
        let table = image.u64(32).unwrap_or(0) as usize;
        let size = usize::from(image.u16(54).unwrap_or(0));
        let count = usize::from(image.u16(56).unwrap_or(0)).min(PROGRAM_HEADERS_MAX);
        (0..count).map_while(move |index| {
            let at = table.checked_add(index * size)?;
            Some(ProgramHeader {
                kind: image.u32(at)?,
                flags: image.u32(at.checked_add(4)?)?,
                address: image.u64(at.checked_add(16)?)? as usize,
                size_bytes: image.u64(at.checked_add(40)?)? as usize,
            })
        })
    }

    /// The code, with its address: the first executable segment.
    pub fn code(&self) -> Option<(usize, &'a [u8])> {
        let (address, size_bytes) = self.code_range()?;
        Some((address, self.bytes(address, size_bytes)?))
    }

    /// Where the code is, and how many bytes, as the headers tell.
    pub fn code_range(&self) -> Option<(usize, usize)> {
        let header =
            self.program_headers().find(|header| header.kind == PT_LOAD && header.flags & EXECUTABLE != 0)?;
        Some((header.address, header.size_bytes))
    }

    /// The linker's hash of the contents, if it wrote one.
    pub fn build_id(&self) -> Option<&'a [u8]> {
        for header in self.program_headers().filter(|header| header.kind == PT_NOTE) {
            let size = header.size_bytes.min(NOTE_BYTES_MAX);
            let Some(notes) = self.bytes(header.address, size) else { continue };
            let mut rest = notes;
            while let Some((name_bytes, id_bytes, kind)) = note_header(rest) {
                let id_at = 12 + name_bytes.next_multiple_of(4);
                let Some(id) = rest.get(id_at..).and_then(|tail| tail.get(..id_bytes)) else { break };
                if kind == 3 && rest.get(12..16) == Some(b"GNU\0") {
                    return Some(id);
                }
                let Some(after) = rest.get(id_at + id_bytes.next_multiple_of(4)..) else { break };
                rest = after;
            }
        }
        None
    }

    /// Shows the address of each function in the dynamic symbol table; false if there is none.
    pub fn each_function(&self, mut visit: impl FnMut(usize)) -> bool {
        let Some((table, count)) = self.symbol_table() else { return false };
        for index in 0..count.min(SYMBOLS_MAX) {
            let at = table.saturating_add(index * SYMBOL_BYTES);
            let Some(symbol) = self.bytes(at, SYMBOL_BYTES) else { break };
            let defined = symbol[6..8] != [0, 0];
            if defined && matches!(symbol[4] & 15, FUNCTION | INDIRECT_FUNCTION) {
                visit(u64::from_le_bytes(symbol[8..16].try_into().unwrap_or_default()) as usize);
            }
        }
        true
    }

    /// Whether it is a program with constructors that run before those of libraries, as sanitizers' programs are: our own
    /// constructor runs before those, too, and sees nothing of them in memory yet.
    pub fn has_early_constructors(&self) -> bool {
        let Some(dynamic) = self.program_headers().find(|header| header.kind == PT_DYNAMIC) else {
            return false;
        };
        // A program that is not position-independent has absolute addresses; its base is then its first one.
        let first =
            self.program_headers().find(|header| header.kind == PT_LOAD).map_or(0, |header| header.address);
        let table = dynamic.address.wrapping_sub(first & !0xfff);
        (0..DYNAMIC_ENTRIES_MAX)
            .map_while(|index| self.u64(table.checked_add(index * 16)?).filter(|tag| *tag != 0))
            .any(|tag| tag == DT_PREINIT_ARRAY)
    }

    fn symbol_table(&self) -> Option<(usize, usize)> {
        let dynamic = self.program_headers().find(|header| header.kind == PT_DYNAMIC)?;
        let (mut symbols, mut count) = (None, None);
        for index in 0..DYNAMIC_ENTRIES_MAX {
            let at = dynamic.address.checked_add(index * 16)?;
            let value = self.u64(at.checked_add(8)?)? as usize;
            match self.u64(at)? {
                0 => break,
                DT_SYMTAB => symbols = Some(self.relative(value)),
                DT_HASH => {
                    count = count.max(self.u32(self.relative(value).checked_add(4)?).map(|n| n as usize))
                }
                DT_GNU_HASH => count = count.max(self.gnu_hash_count(self.relative(value))),
                _ => {}
            }
        }
        Some((symbols?, count?))
    }

    /// glibc's loader turns the dynamic section's addresses into absolute ones, musl's leaves them.
    fn relative(&self, address: usize) -> usize {
        if self.bytes(address, 1).is_some() {
            return address;
        }
        let base = self.parts.first().map_or(0, |part| part.bytes.as_ptr() as usize - part.address);
        address.wrapping_sub(base)
    }

    /// The number of symbols, as the end of the last chain tells.
    fn gnu_hash_count(&self, hash: usize) -> Option<usize> {
        let buckets = self.u32(hash)? as usize;
        let first = self.u32(hash.checked_add(4)?)? as usize;
        let bloom_words = self.u32(hash.checked_add(8)?)? as usize;
        let table = hash.checked_add(16)?.checked_add(bloom_words.checked_mul(8)?)?;
        let mut last = 0;
        for bucket in 0..buckets.min(SYMBOLS_MAX) {
            last = last.max(self.u32(table.checked_add(bucket * 4)?)? as usize);
        }
        if last < first {
            return Some(first);
        }
        let chains = table.checked_add(buckets.checked_mul(4)?)?;
        for _ in 0..SYMBOLS_MAX {
            let link = self.u32(chains.checked_add((last - first).checked_mul(4)?)?)?;
            last += 1;
            if link & 1 == 1 {
                return Some(last);
            }
        }
        None
    }
}

fn note_header(notes: &[u8]) -> Option<(usize, usize, u32)> {
    let word = |at: usize| Some(u32::from_le_bytes(notes.get(at..at + 4)?.try_into().ok()?));
    let (name, id) = (word(0)? as usize, word(4)? as usize);
    (name <= NOTE_BYTES_MAX && id <= NOTE_BYTES_MAX).then_some(())?;
    Some((name, id, word(8)?))
}
