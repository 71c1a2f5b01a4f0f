//! What happens before the program's own code runs: looks whether we may, finds the libraries, redirects them.

use crate::elf::{Image, Part};
use crate::initial::{self, Auxiliary, Registers};
use crate::loaded::{self, Library};
use crate::maps::{self, Mapping};
use crate::operations;
use crate::prepared::{self, Prepared, Stamp};
use crate::scan::{self, SITES_MAX, Site};
use crate::trace::{self, Aside};
use crate::{entry, known, libraries, patch, sys};

const LIBRARIES_MAX: usize = 6;
const PARTS_MAX: usize = 16;
/// Sanitizers reserve terabytes for their shadows.
const SHADOW_BYTES_MIN: usize = 1 << 40;
const CLOCK_GETTIME: usize = 228;
const ARCH_SHSTK_STATUS: usize = 0x5005;
/// No C library has fewer; one that somebody rewrote does.
const INSTRUCTIONS_MIN: u32 = 30;

/// The constructor.
pub fn start(registers: Registers) {
    let before = now_ns();
    match run(registers) {
        Ok(()) => trace::started(now_ns().saturating_sub(before)),
        Err(why) => trace::step_aside(why),
    }
}

fn run(registers: Registers) -> Result<(), Aside> {
    // First of all: a program with rights of others listens to no variable of theirs.
    let auxiliary = Auxiliary::read().ok_or(Aside::NoProc)?;
    if auxiliary.secure {
        return Err(Aside::Secure);
    }
    let variables = initial::variables(registers, &auxiliary)?;
    if variables.off {
        return Err(Aside::TurnedOff);
    }
    let setting = variables.setting();
    if setting.is_none() && !variables.trace {
        return Err(Aside::NoService);
    }
    if has_shadow_stack() {
        return Err(Aside::ShadowStack);
    }
    if has_threads()? {
        return Err(Aside::Threads);
    }
    if map_prepared(&auxiliary)?.is_none() {
        patch_found(&auxiliary)?;
    }
    if let Some(setting) = setting {
        operations::begin(setting);
    }
    Ok(())
}

/// The short way: the loader's list, and a C library that was prepared. `None` if the long way is to be gone.
fn map_prepared(auxiliary: &Auxiliary) -> Result<Option<()>, Aside> {
    let Some(program) = loaded::Program::of(auxiliary) else { return Ok(None) };
    let nothing = Library { base: 0, path: &[] };
    let (mut own, mut c_library, mut count, mut objection) = (nothing, nothing, 0, None);
    let whole = program.each(|library| {
        objection = objection.or_else(|| libraries::objection(library.name()));
        if libraries::is_wanted(library.name()) {
            (c_library, count) = (*library, count + 1);
        }
        if (own.base..=start as *const () as usize).contains(&library.base) {
            own = *library;
        }
    });
    if program.has_early_constructors {
        return Err(Aside::Sanitizer);
    }
    if let Some(why) = objection {
        return Err(why);
    }
    if !whole || count != 1 {
        return Ok(None);
    }
    // musl calls itself by another name than its file's, which is that of the loader.
    let file = if libraries::is_musl(c_library.name()) { program.interpreter } else { c_library.path };
    Ok(map_prepared_library(&own, &c_library, file))
}

fn map_prepared_library(own: &Library<'_>, c_library: &Library<'_>, file: &[u8]) -> Option<()> {
    // Of what was prelinked the list tells how far it was moved, not where it is.
    (c_library.base != 0).then_some(())?;
    // SAFETY: a library begins with a page of headers.
    let head = unsafe { core::slice::from_raw_parts(c_library.base as *const u8, patch::PAGE_BYTES) };
    let parts = [Part { address: 0, bytes: head, executable: false }];
    let image = Image { parts: &parts };
    let directory = own.path.get(..own.path.len() - own.name().len())?;
    (image.is_library() && directory.starts_with(b"/") && file.starts_with(b"/")).then_some(())?;
    let mut path = Path::default();
    path.put(file);
    path.put(&[0]);
    let status = sys::status_at(path.bytes()?)?;
    let stamp = Stamp { size_bytes: status.size_bytes, mtime_s: status.mtime_s, mtime_ns: status.mtime_ns };
    let mut path = Path::default();
    path.put(directory);
    known::write_name(&image, prepared::SUFFIX, |bytes| path.put(bytes))?;
    let prepared =
        Prepared::open(path.bytes()?, &image, stamp).filter(|prepared| is_good(prepared.summary()))?;
    // SAFETY: there is one thread, this one, and it is not in the library's code but for the loader's frames that called us,
    // whose return addresses lie behind calls, never inside of replaced instructions.
    unsafe { prepared.map(c_library.base, entry::addresses()) }.then_some(())?;
    trace::found(prepared.summary());
    Some(())
}

/// The long way: the mappings, and changes to the code in them.
fn patch_found(auxiliary: &Auxiliary) -> Result<(), Aside> {
    let mut found = Found { program_headers: auxiliary.headers, ..Found::default() };
    if !maps::each(|mapping| found.see(mapping)) {
        return Err(Aside::NoProc);
    }
    if let Some(why) = found.objection {
        return Err(why);
    }
    if found.program.with_image(|image| image.has_early_constructors()) {
        return Err(Aside::Sanitizer);
    }
    found.redirect()
}

/// Whether this is a C library as it was built.
fn is_good(summary: &scan::Summary) -> bool {
    summary.leaving == 0 && summary.instructions >= INSTRUCTIONS_MIN && summary.sites > 0
}

fn now_ns() -> u64 {
    let mut time = [0_u64; 2];
    // SAFETY: the kernel writes two words.
    unsafe { sys::call(CLOCK_GETTIME, [1, time.as_mut_ptr() as usize, 0, 0, 0, 0]) };
    time[0] * 1_000_000_000 + time[1]
}

fn has_shadow_stack() -> bool {
    let mut features = 0_u64;
    let arguments = [ARCH_SHSTK_STATUS, &raw mut features as usize, 0, 0, 0, 0];
    // SAFETY: the kernel writes one word, or refuses where it does not know the question.
    let known = unsafe { sys::call(sys::nr::ARCH_PRCTL, arguments) } == 0;
    known && features & 1 != 0
}

/// Whether there are threads beside this one.
fn has_threads() -> Result<bool, Aside> {
    // To share memory with nobody is what a process with one thread does anyway. Filters of calls may refuse to be asked.
    match sys::unshare_memory() {
        0 => return Ok(false),
        sys::EINVAL => return Ok(true),
        _ => {}
    }
    // The directory of threads has a link for each beside its own two. Takes 14 us, the first time that a process looks there.
    let mut attributes = [0_u64; 18];
    let path = b"/proc/self/task\0";
    let arguments = [sys::AT_FDCWD, path.as_ptr() as usize, attributes.as_mut_ptr() as usize, 0, 0, 0];
    // SAFETY: the kernel reads the path and writes the 144 bytes of its `struct stat`.
    match unsafe { sys::call(sys::nr::NEWFSTATAT, arguments) } {
        0 => Ok(attributes[2] > 3),
        _ => Err(Aside::NoProc),
    }
}

/// A path, with a slash at its end.
#[derive(Clone, Copy)]
struct Directory {
    bytes: [u8; DIRECTORY_BYTES],
    length: usize,
}
const DIRECTORY_BYTES: usize = 400;

impl Default for Directory {
    fn default() -> Self {
        Self { bytes: [0; DIRECTORY_BYTES], length: 0 }
    }
}

impl Directory {
    fn set(&mut self, mapping: &Mapping<'_>) {
        let path = &mapping.path[..mapping.path.len() - mapping.name().len()];
        if let Some(place) = self.bytes.get_mut(..path.len()) {
            place.copy_from_slice(path);
            self.length = path.len();
        }
    }

    /// Reads the file of known sites of a library.
    fn read_known(&self, image: &Image<'_>, buffer: &mut [u8]) -> Option<usize> {
        let mut path = Path::default();
        (self.length > 0).then_some(())?;
        path.put(&self.bytes[..self.length]);
        known::write_name(image, known::SUFFIX, |bytes| path.put(bytes))?;
        let descriptor = sys::open(path.bytes()?, 0, 0);
        if descriptor < 0 {
            return None;
        }
        let got = sys::read(descriptor as i32, buffer);
        sys::close(descriptor as i32);
        usize::try_from(got).ok()
    }
}

/// A path that is being put together; of one that is too long there is nothing.
struct Path {
    bytes: [u8; PATH_BYTES],
    length: usize,
}
const PATH_BYTES: usize = 512;

impl Default for Path {
    fn default() -> Self {
        Self { bytes: [0; PATH_BYTES], length: 0 }
    }
}

impl Path {
    fn put(&mut self, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(self.length..self.length + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        self.length += bytes.len();
    }

    fn bytes(&self) -> Option<&[u8]> {
        self.bytes.get(..self.length)
    }
}

/// What the mappings show.
#[derive(Default)]
struct Found {
    /// An address in the program's first mapping.
    program_headers: usize,
    program: Mapped,
    objection: Option<Aside>,
    /// Where our own library lies.
    directory: Directory,
    libraries: [Mapped; LIBRARIES_MAX],
    count: usize,
    /// The range of the library seen last, while its mappings go on.
    open: bool,
}

/// A library's mappings: the first, and the readable ones.
#[derive(Clone, Copy, Default)]
struct Mapped {
    base: usize,
    end: usize,
    parts: [(usize, usize, bool); PARTS_MAX],
    part_count: usize,
    path_hash: u64,
}

fn hash(path: &[u8]) -> u64 {
    path.iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

impl Found {
    fn see(&mut self, mapping: &Mapping<'_>) {
        let shadow = mapping.end - mapping.start >= SHADOW_BYTES_MIN;
        let objection = if shadow { Some(Aside::Sanitizer) } else { libraries::objection(mapping.name()) };
        self.objection = self.objection.or(objection);
        if (mapping.start..mapping.end).contains(&(start as *const () as usize)) {
            self.directory.set(mapping);
        }
        let path_hash = hash(mapping.path);
        if (mapping.start..mapping.end).contains(&self.program_headers) {
            self.program = Mapped { base: mapping.start, path_hash, ..Mapped::default() };
        }
        if self.program.base != 0 && self.program.path_hash == path_hash {
            self.program.add(mapping);
        }
        if self.open
            && let Some(library) = self.libraries.get_mut(self.count - 1)
            && library.path_hash == path_hash
        {
            library.add(mapping);
            return;
        }
        self.open = libraries::is_wanted(mapping.name());
        if self.open {
            let Some(library) = self.libraries.get_mut(self.count) else {
                self.open = false;
                return;
            };
            *library = Mapped { base: mapping.start, path_hash, ..Mapped::default() };
            library.add(mapping);
            self.count += 1;
        }
    }

    fn redirect(&self) -> Result<(), Aside> {
        let mut any = Err(Aside::NoLibrary);
        for library in &self.libraries[..self.count] {
            match library.redirect(&self.directory) {
                Ok(()) => any = Ok(()),
                Err(why) if any.is_err() => any = Err(why),
                Err(_) => {}
            }
        }
        any
    }
}

impl Mapped {
    fn add(&mut self, mapping: &Mapping<'_>) {
        self.end = mapping.end;
        if mapping.readable
            && let Some(part) = self.parts.get_mut(self.part_count)
        {
            *part = (mapping.start, mapping.end, mapping.executable);
            self.part_count += 1;
        }
    }

    fn with_image<T>(&self, run: impl FnOnce(&Image<'_>) -> T) -> T {
        let mut parts = [Part { address: 0, bytes: &[], executable: false }; PARTS_MAX];
        for (part, (start, end, executable)) in parts.iter_mut().zip(self.parts).take(self.part_count) {
            // SAFETY: the kernel has just told that this range is mapped and readable, and no thread runs that could unmap it.
            let bytes = unsafe { core::slice::from_raw_parts(start as *const u8, end - start) };
            *part = Part { address: start - self.base, bytes, executable };
        }
        run(&Image { parts: &parts[..self.part_count] })
    }

    fn redirect(&self, directory: &Directory) -> Result<(), Aside> {
        self.with_image(|image| self.redirect_image(image, directory))
    }

    fn redirect_image(&self, image: &Image<'_>, directory: &Directory) -> Result<(), Aside> {
        if !image.is_library() {
            return Err(Aside::NoLibrary);
        }
        let (_, code) = image.code().ok_or(Aside::NoLibrary)?;
        let scratch_bytes =
            scan::scratch_bytes(code.len()).max(known::FILE_BYTES_MAX) + size_of::<[Site; SITES_MAX]>();
        let memory = sys::map(0, scratch_bytes).ok_or(Aside::NoRoom)?;
        let done = self.find_and_redirect(image, directory, memory, scratch_bytes);
        // SAFETY: borrowed by that function only.
        unsafe { sys::unmap(memory, scratch_bytes) };
        done
    }

    fn find_and_redirect(
        &self,
        image: &Image<'_>,
        directory: &Directory,
        memory: usize,
        bytes: usize,
    ) -> Result<(), Aside> {
        let sites_bytes = size_of::<[Site; SITES_MAX]>();
        // SAFETY: fresh zeroed memory of that size; a zeroed Site is a valid one.
        let sites = unsafe { core::slice::from_raw_parts_mut(memory as *mut Site, SITES_MAX) };
        // SAFETY: the rest of it.
        let scratch = unsafe {
            core::slice::from_raw_parts_mut((memory + sites_bytes) as *mut u8, bytes - sites_bytes)
        };
        let known = directory
            .read_known(image, scratch)
            .and_then(|got| known::read(scratch.get(..got)?, image, sites));
        let summary = match known {
            Some(summary) => summary,
            None => {
                scratch.fill(0);
                scan::scan(image, scratch, sites).ok_or(Aside::NoLibrary)?
            }
        };
        if !is_good(&summary) {
            return Err(Aside::AlreadyRewritten);
        }
        let sites = &sites[..summary.sites as usize];
        // SAFETY: there is one thread, this one, and it is not in the library's code but for the loader's frames that called us,
        // whose return addresses lie behind calls, never inside of replaced instructions.
        unsafe { patch::redirect(self.base, image, sites, entry::addresses()) }.map_err(|refused| {
            match refused {
                patch::Refused::NoRoom => Aside::NoRoom,
                patch::Refused::NotWritable => Aside::NotWritable,
            }
        })?;
        trace::found(&summary);
        Ok(())
    }
}
