//! What happens before the program's own code runs: looks whether we may, finds the libraries, redirects them.

use crate::elf::{Image, Part};
use crate::maps::{self, Mapping};
use crate::operations::{self, Setting};
use crate::scan::{self, SITES_MAX, Site};
use crate::trace::{self, Aside};
use crate::{entry, known, patch, sys};

const AT_PHDR: usize = 3;
const AT_SECURE: usize = 23;
const ENVIRONMENT_BYTES_MAX: usize = 4 << 20;
const LIBRARIES_MAX: usize = 6;
const PARTS_MAX: usize = 16;
/// Sanitizers reserve terabytes for their shadows.
const SHADOW_BYTES_MIN: usize = 1 << 40;
const CLOCK_GETTIME: usize = 228;
const ARCH_SHSTK_STATUS: usize = 0x5005;
/// No C library has fewer; one that somebody rewrote does.
const INSTRUCTIONS_MIN: u32 = 30;

/// The constructor.
pub fn start() {
    let before = now_ns();
    match run() {
        Ok(()) => trace::started(now_ns().saturating_sub(before)),
        Err(why) => trace::step_aside(why),
    }
}

fn run() -> Result<(), Aside> {
    // First of all: a program with rights of others listens to no variable of theirs.
    let [secure, program_headers] = auxiliary([AT_SECURE, AT_PHDR]).ok_or(Aside::NoProc)?;
    if secure != 0 {
        return Err(Aside::Secure);
    }
    let variables = environment()?;
    if variables.off {
        return Err(Aside::TurnedOff);
    }
    let mut setting = variables.setting();
    if setting.is_none() && !variables.trace {
        return Err(Aside::NoService);
    }
    if has_shadow_stack() {
        return Err(Aside::ShadowStack);
    }
    if has_threads()? {
        return Err(Aside::Threads);
    }
    let mut found = Found { program_headers, ..Found::default() };
    if !maps::each(|mapping| found.see(mapping)) {
        return Err(Aside::NoProc);
    }
    if found.sanitizer || found.program.with_image(|image| image.has_early_constructors()) {
        return Err(Aside::Sanitizer);
    }
    found.redirect()?;
    if let Some(setting) = &mut setting {
        setting.set_opens(!found.is_musl());
        operations::begin(*setting);
    }
    Ok(())
}

fn now_ns() -> u64 {
    let mut time = [0_u64; 2];
    // SAFETY: the kernel writes two words.
    unsafe { sys::call(CLOCK_GETTIME, [1, time.as_mut_ptr() as usize, 0, 0, 0, 0]) };
    time[0] * 1_000_000_000 + time[1]
}

/// Values of the auxiliary vector, 0 for what it has not; `None` if it cannot be read.
fn auxiliary(wanted: [usize; 2]) -> Option<[usize; 2]> {
    let descriptor = sys::open(b"/proc/self/auxv\0", 0, 0);
    if descriptor < 0 {
        return None;
    }
    let mut bytes = [0; 1024];
    let got = sys::read(descriptor as i32, &mut bytes);
    sys::close(descriptor as i32);
    let bytes = bytes.get(..usize::try_from(got).ok()?)?;
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, usize::from_le_bytes);
    Some(wanted.map(|wanted| {
        let pair = bytes.chunks_exact(16).find(|pair| word(&pair[..8]) == wanted);
        pair.map_or(0, |pair| word(&pair[8..]))
    }))
}

/// Reads our variables.
fn environment() -> Result<Variables, Aside> {
    let descriptor = sys::open(b"/proc/self/environ\0", 0, 0);
    if descriptor < 0 {
        return Err(Aside::NoProc);
    }
    let mut variables = Variables::default();
    let mut buffer = [0; 4096];
    let mut seen_bytes = 0;
    loop {
        let got = sys::read(descriptor as i32, &mut buffer);
        if got <= 0 || seen_bytes > ENVIRONMENT_BYTES_MAX {
            break;
        }
        seen_bytes += got as usize;
        buffer[..got as usize].iter().for_each(|byte| variables.feed(*byte));
    }
    sys::close(descriptor as i32);
    variables.feed(0);
    if variables.trace {
        trace::enable(variables.file.get(..variables.file_length));
    }
    Ok(variables)
}

/// Where containers have their service's socket.
const CHANNEL: &[u8] = b"/run/.polytropo/channel.sock";
const NAME: &[u8] = b"POLYTROPO_";
const VARIABLE_BYTES: usize = 512;

/// Picks our variables out of all, a byte at a time; longer values than fit are none.
struct Variables {
    current: [u8; VARIABLE_BYTES],
    length: usize,
    trace: bool,
    off: bool,
    file: [u8; VARIABLE_BYTES],
    file_length: usize,
    channel: [u8; VARIABLE_BYTES],
    channel_length: usize,
    mount: [u8; VARIABLE_BYTES],
    mount_length: usize,
}

impl Default for Variables {
    fn default() -> Self {
        let zeros = [0; VARIABLE_BYTES];
        Self {
            current: zeros,
            length: 0,
            trace: false,
            off: false,
            file: zeros,
            file_length: 0,
            channel: zeros,
            channel_length: 0,
            mount: zeros,
            mount_length: 0,
        }
    }
}

impl Variables {
    fn setting(&self) -> Option<Setting> {
        let channel = &self.channel[..self.channel_length];
        let channel = if channel.is_empty() { CHANNEL } else { channel };
        Setting::new(channel, &self.mount[..self.mount_length])
    }

    fn feed(&mut self, byte: u8) {
        if byte == 0 {
            self.end();
            self.length = 0;
            return;
        }
        if let Some(place) = self.current.get_mut(self.length) {
            *place = byte;
        }
        // What is not ours is not kept.
        let foreign = NAME.get(self.length).is_some_and(|expected| *expected != byte);
        self.length = if foreign { VARIABLE_BYTES + 1 } else { self.length.saturating_add(1) };
    }

    fn end(&mut self) {
        let Some(variable) = self.current.get(..self.length) else { return };
        let Some(variable) = variable.strip_prefix(NAME) else { return };
        if let Some(value) = variable.strip_prefix(b"TRACE=") {
            self.trace = value == b"1";
        } else if let Some(value) = variable.strip_prefix(b"PRELOAD=") {
            self.off = value == b"off";
        } else if let Some(value) = variable.strip_prefix(b"TRACE_FILE=") {
            self.file[..value.len()].copy_from_slice(value);
            self.file_length = value.len();
        } else if let Some(value) = variable.strip_prefix(b"CHANNEL=") {
            self.channel[..value.len()].copy_from_slice(value);
            self.channel_length = value.len();
        } else if let Some(value) = variable.strip_prefix(b"MOUNT=") {
            self.mount[..value.len()].copy_from_slice(value);
            self.mount_length = value.len();
        }
    }
}

fn has_shadow_stack() -> bool {
    let mut features = 0_u64;
    let arguments = [ARCH_SHSTK_STATUS, &raw mut features as usize, 0, 0, 0, 0];
    // SAFETY: the kernel writes one word, or refuses where it does not know the question.
    let known = unsafe { sys::call(sys::nr::ARCH_PRCTL, arguments) } == 0;
    known && features & 1 != 0
}

/// The directory of threads has a link for each beside its own two.
fn has_threads() -> Result<bool, Aside> {
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
        let mut path = [0; DIRECTORY_BYTES + 128];
        let mut length = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(place) = path.get_mut(length..length + bytes.len()) {
                place.copy_from_slice(bytes);
            }
            length += bytes.len();
        };
        (self.length > 0).then_some(())?;
        put(&self.bytes[..self.length]);
        known::write_name(image, &mut put)?;
        let path = path.get(..length)?;
        let descriptor = sys::open(path, 0, 0);
        if descriptor < 0 {
            return None;
        }
        let got = sys::read(descriptor as i32, buffer);
        sys::close(descriptor as i32);
        usize::try_from(got).ok()
    }
}

/// What the mappings show.
#[derive(Default)]
struct Found {
    /// An address in the program's first mapping.
    program_headers: usize,
    program: Library,
    sanitizer: bool,
    /// Where our own library lies.
    directory: Directory,
    libraries: [Library; LIBRARIES_MAX],
    count: usize,
    /// The range of the library seen last, while its mappings go on.
    open: bool,
}

/// A library's mappings: the first, and the readable ones.
#[derive(Clone, Copy, Default)]
struct Library {
    base: usize,
    end: usize,
    parts: [(usize, usize, bool); PARTS_MAX],
    part_count: usize,
    path_hash: u64,
    is_musl: bool,
}

fn is_wanted(name: &[u8]) -> bool {
    // glibc's loader opens, maps and closes libraries: nothing is gained there, and patching it costs 40 us at each start.
    const PREFIXES: [&[u8]; 4] = [b"libc.so", b"libc-2.", b"libpthread.so", b"libpthread-2."];
    name.starts_with(b"ld-musl-") || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn is_sanitizer(mapping: &Mapping<'_>) -> bool {
    // The last two are the libraries by which valgrind and rr come into programs: both run or rewrite the C library's code themselves.
    const RUNTIMES: [&[u8]; 7] = [
        b"libasan.so",
        b"libtsan.so",
        b"libmsan.so",
        b"liblsan.so",
        b"libclang_rt.",
        b"vgpreload_core",
        b"librrpreload.so",
    ];
    mapping.end - mapping.start >= SHADOW_BYTES_MIN
        || RUNTIMES.iter().any(|name| mapping.name().starts_with(name))
}

fn hash(path: &[u8]) -> u64 {
    path.iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

impl Found {
    fn see(&mut self, mapping: &Mapping<'_>) {
        self.sanitizer |= is_sanitizer(mapping);
        if (mapping.start..mapping.end).contains(&(start as *const () as usize)) {
            self.directory.set(mapping);
        }
        let path_hash = hash(mapping.path);
        if (mapping.start..mapping.end).contains(&self.program_headers) {
            self.program = Library { base: mapping.start, path_hash, ..Library::default() };
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
        self.open = is_wanted(mapping.name());
        if self.open {
            let Some(library) = self.libraries.get_mut(self.count) else {
                self.open = false;
                return;
            };
            let is_musl = !mapping.name().starts_with(b"libc.so.6")
                && !mapping.name().starts_with(b"libc-2.")
                && !mapping.name().starts_with(b"libpthread");
            *library = Library { base: mapping.start, path_hash, is_musl, ..Library::default() };
            library.add(mapping);
            self.count += 1;
        }
    }

    /// musl, and glibc from 2.41 on, cancel a thread only at their own instruction.
    fn is_musl(&self) -> bool {
        self.libraries[..self.count].iter().any(|library| library.is_musl)
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

impl Library {
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
        if summary.leaving > 0 || summary.instructions < INSTRUCTIONS_MIN || summary.sites == 0 {
            return Err(Aside::AlreadyRewritten);
        }
        let sites = &sites[..summary.sites as usize];
        // SAFETY: there is one thread, this one, and it is not in the library's code but for the loader's frames that called us,
        // whose return addresses lie behind calls, never inside of replaced instructions.
        unsafe { patch::redirect(self.base, image, sites, entry::address()) }.map_err(
            |refused| match refused {
                patch::Refused::NoRoom => Aside::NoRoom,
                patch::Refused::NotWritable => Aside::NotWritable,
            },
        )?;
        trace::found(&summary);
        Ok(())
    }
}
