//! `polytropo-sites DIRECTORY LIBRARY...`: scans C libraries once, so that the programs that use them need not.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::ExitCode;

use polytropo_preload::elf::{Image, Part};
use polytropo_preload::known;
use polytropo_preload::prepared::{self, Stamp};
use polytropo_preload::scan::{SITES_MAX, Site, scan, scratch_bytes};

/// C libraries have a few megabytes; what is larger is none.
const LIBRARY_BYTES_MAX: usize = 64 << 20;
const HEADER_BYTES: usize = 56;
const FILE_MODE: u32 = 0o644;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let Some(directory) = arguments.next() else {
        eprintln!("polytropo-sites: name a directory and libraries");
        return ExitCode::from(2);
    };
    let mut status = ExitCode::SUCCESS;
    for library in arguments {
        if let Err(error) = record(Path::new(&directory), Path::new(&library)) {
            eprintln!("polytropo-sites: {}: {error}", Path::new(&library).display());
            status = ExitCode::FAILURE;
        }
    }
    status
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn record(directory: &Path, library: &Path) -> io::Result<()> {
    let mut opened = std::fs::File::open(library)?;
    let mut file = Vec::new();
    Read::by_ref(&mut opened).take(LIBRARY_BYTES_MAX as u64 + 1).read_to_end(&mut file)?;
    let metadata = opened.metadata()?;
    let (memory, segments) = lay_out(&file).ok_or_else(|| invalid("is no ELF library"))?;
    let parts: Vec<_> = segments
        .iter()
        .map(|segment| Part {
            address: segment.address,
            bytes: &memory[segment.address..segment.end],
            executable: segment.executable,
        })
        .collect();
    let image = Image { parts: &parts };
    let (_, code) =
        image.code().filter(|_| image.is_library()).ok_or_else(|| invalid("is no x86-64 library"))?;
    let mut scratch = vec![0; scratch_bytes(code.len())];
    let mut sites = vec![Site::default(); SITES_MAX];
    let summary = scan(&image, &mut scratch, &mut sites).ok_or_else(|| invalid("cannot be scanned"))?;
    let sites = &sites[..summary.sites as usize];
    let mut bytes = Vec::new();
    known::write(&image, &summary, sites, |piece| bytes.extend_from_slice(piece))
        .ok_or_else(|| invalid("cannot be described"))?;
    put(directory, &name(&image, known::SUFFIX)?, &bytes)?;
    let stamp = Stamp {
        size_bytes: metadata.size(),
        mtime_s: metadata.mtime(),
        mtime_ns: metadata.mtime_nsec() as u64,
    };
    if stamp.size_bytes != file.len() as u64 {
        return Err(invalid("changes"));
    }
    let code_at = segments.iter().find(|segment| segment.executable).map_or(0, |segment| segment.offset);
    let mut bytes = file;
    bytes.resize(prepared::file_bytes(bytes.len(), sites.len()), 0);
    // Programs then change the code themselves.
    prepared::write(&mut bytes, &image, code_at, stamp, &summary, sites)
        .ok_or_else(|| invalid("cannot be prepared"))?;
    put(directory, &name(&image, prepared::SUFFIX)?, &bytes)
}

fn name(image: &Image<'_>, suffix: &[u8]) -> io::Result<String> {
    let mut name = Vec::new();
    known::write_name(image, suffix, |bytes| name.extend_from_slice(bytes))
        .ok_or_else(|| invalid("has no build id"))?;
    name.pop();
    String::from_utf8(name).map_err(|_| invalid("has no build id"))
}

/// Whole or not at all: programs may be reading what was there before. They run it, so that nobody else may write it, whatever the umask says.
fn put(directory: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let unfinished = directory.join(format!("{name}.{}", std::process::id()));
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(FILE_MODE).open(&unfinished)?;
        file.set_permissions(Permissions::from_mode(FILE_MODE))?;
        file.write_all(bytes)?;
        std::fs::rename(&unfinished, directory.join(name))
    };
    write().inspect_err(|_| _ = std::fs::remove_file(&unfinished))
}

struct Segment {
    address: usize,
    end: usize,
    offset: usize,
    executable: bool,
}

/// The segments at their addresses, as the loader maps them.
fn lay_out(file: &[u8]) -> Option<(Vec<u8>, Vec<Segment>)> {
    let word =
        |at: usize| Some(u64::from_le_bytes(file.get(at..at.checked_add(8)?)?.try_into().ok()?) as usize);
    (file.get(..5)? == b"\x7fELF\x02").then_some(())?;
    let table = word(32)?;
    let count = usize::from(u16::from_le_bytes(file.get(56..58)?.try_into().ok()?));
    let (mut memory, mut segments) = (Vec::new(), Vec::new());
    for index in 0..count {
        let header = table.checked_add(index * HEADER_BYTES)?;
        if file.get(header..header.checked_add(4)?)? != [1, 0, 0, 0] {
            continue;
        }
        let (offset, address) = (word(header + 8)?, word(header + 16)?);
        let (in_file, in_memory) = (word(header + 32)?, word(header + 40)?);
        let end =
            address.checked_add(in_memory).filter(|end| *end <= LIBRARY_BYTES_MAX && in_file <= in_memory)?;
        memory.resize(memory.len().max(end), 0);
        let bytes = file.get(offset..offset.checked_add(in_file)?)?;
        memory[address..address + in_file].copy_from_slice(bytes);
        segments.push(Segment { address, end, offset, executable: file[header + 4] & 1 == 1 });
    }
    Some((memory, segments))
}
