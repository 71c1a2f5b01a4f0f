//! Mounts a directory of the host through the FUSE door, until it is unmounted or told to end.
//!
//!     mount_dir SOURCE MOUNTPOINT [--coherence shared|exclusive|immutable] [--read-only] [--threads N] [--lower DIRECTORY]
//!               [--no-writeback] [--ask-for-opens] [--passthrough SIZE_MIN_BYTES] [--also MOUNTPOINT]... [--statistics]
//!               [--fuse-transport auto|device|uring]
//!
//! `--lower` makes SOURCE the upper of a union. `--also` gives the same stack a second door with a superblock of its own. Prints `ready` when everything is mounted.

use std::ffi::CString;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use polytropo_libservices::dir::Dir;
use polytropo_libservices::stack::{DirCoherence, DirLayer, Ownership};
use polytropo_libservices::union::Union;
use polytropo_libservices::{DoorId, Libservice};
use polytropo_service::doors::fuse::{
    FuseDoor, FuseOptions, OwnRegistrar, Passthrough, Transport, mount_options,
};
use rustix::fs::{Mode, OFlags};

type Failure = Box<dyn std::error::Error>;

struct Arguments {
    source: PathBuf,
    lower: Option<PathBuf>,
    mountpoints: Vec<PathBuf>,
    coherence: DirCoherence,
    read_only: bool,
    statistics: bool,
    /// Files of that size at least are passed through.
    passthrough: Option<u64>,
    options: FuseOptions,
}

fn arguments() -> Result<Arguments, Failure> {
    let mut given = std::env::args_os().skip(1);
    let mut next = |what: &str| given.next().ok_or(format!("give {what}"));
    let mut parsed = Arguments {
        source: next("the directory to serve")?.into(),
        lower: None,
        mountpoints: vec![next("the directory to mount on")?.into()],
        coherence: DirCoherence::Exclusive,
        read_only: false,
        statistics: false,
        passthrough: None,
        options: FuseOptions::default(),
    };
    while let Ok(flag) = next("") {
        match flag.to_str() {
            Some("--coherence") => {
                parsed.coherence = match next("shared, exclusive or immutable")?.to_str() {
                    Some("shared") => DirCoherence::Shared,
                    Some("exclusive") => DirCoherence::Exclusive,
                    Some("immutable") => DirCoherence::Immutable,
                    _ => return Err("--coherence is shared, exclusive or immutable".into()),
                }
            }
            Some("--read-only") => parsed.read_only = true,
            Some("--statistics") => parsed.statistics = true,
            Some("--ask-for-opens") => parsed.options.stateless_open = false,
            Some("--no-writeback") => parsed.options.writeback_cache = false,
            Some("--passthrough") => {
                parsed.passthrough = Some(next("a size")?.to_str().unwrap_or_default().parse()?);
            }
            Some("--threads") => {
                parsed.options.threads = next("a number")?.to_str().unwrap_or_default().parse()?;
            }
            Some("--fuse-transport") => {
                parsed.options.transport = match next("auto, device or uring")?.to_str() {
                    Some("auto") => Transport::Auto,
                    Some("device") => Transport::Device,
                    Some("uring") => Transport::Uring,
                    _ => return Err("--fuse-transport is auto, device or uring".into()),
                }
            }
            Some("--lower") => parsed.lower = Some(next("the lower directory")?.into()),
            Some("--also") => parsed.mountpoints.push(next("another mountpoint")?.into()),
            _ => return Err(format!("{flag:?} is not known").into()),
        }
    }
    Ok(parsed)
}

fn open_directory(path: &Path) -> Result<OwnedFd, Failure> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

fn layer(path: &Path, coherence: DirCoherence, read_only: bool) -> DirLayer {
    DirLayer { path: path.into(), read_only, coherence, ownership: Ownership::Native }
}

fn mount(mountpoint: &Path) -> Result<OwnedFd, Failure> {
    let device = rustix::fs::open(c"/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let data = CString::new(mount_options(device.as_raw_fd(), 0, 0))?;
    let target = CString::new(mountpoint.as_os_str().as_encoded_bytes())?;
    // SAFETY: every pointer is a NUL-terminated string that lives across the call.
    let done = unsafe {
        libc::mount(
            c"polytropo".as_ptr(),
            target.as_ptr(),
            c"fuse.polytropo".as_ptr(),
            libc::MS_NODEV,
            data.as_ptr().cast(),
        )
    };
    if done == 0 { Ok(device) } else { Err(std::io::Error::last_os_error().into()) }
}

fn main() -> Result<(), Failure> {
    let given = arguments()?;
    let top =
        Dir::new(open_directory(&given.source)?, &layer(&given.source, given.coherence, given.read_only))?;
    let stack: Arc<dyn Libservice> = match &given.lower {
        None => Arc::new(top),
        Some(path) => {
            let lower = Dir::new(open_directory(path)?, &layer(path, DirCoherence::Immutable, true))?;
            Arc::new(Union::new(vec![Arc::new(lower)], Some(Arc::new(top)))?)
        }
    };
    let mut doors = Vec::new();
    for (number, mountpoint) in given.mountpoints.iter().enumerate() {
        let device = mount(mountpoint)?;
        let id = DoorId(number as u32 + 1);
        let mut options = given.options.clone();
        if let Some(size_min_bytes) = given.passthrough {
            let registrar = Arc::new(OwnRegistrar::new(device.try_clone()?));
            options.passthrough = Some(Passthrough { registrar, size_min_bytes });
        }
        doors.push(FuseDoor::start(device, stack.clone(), options, id)?);
    }
    println!("ready");
    std::io::stdout().flush()?;
    for door in &doors {
        door.wait_ended();
        if given.statistics {
            println!("{:#?}", door.statistics());
        }
    }
    Ok(())
}
