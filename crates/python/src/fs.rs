//! A channel to a service, for `polytropo.fs`.

use std::sync::{Arc, RwLock};

use polytropo_client::{Amid, At, Attributes, Channel as Connection, Error, File, Refused, Time};
use pyo3::buffer::PyBuffer;
use pyo3::create_exception;
use pyo3::exceptions::{PyBufferError, PyException, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

create_exception!(polytropo._native, AskKernel, PyException, "The operation is the kernel's business.");
create_exception!(
    polytropo._native,
    Gone,
    PyException,
    "The channel is no more: the service or the mounts changed."
);
create_exception!(
    polytropo._native,
    GoneAmid,
    Gone,
    "The channel is no more, and the service may have done what it was asked for."
);
create_exception!(polytropo._native, NoChannel, PyException, "The service gives this process no channel.");

/// Longest read in one piece.
const READ_MAX_BYTES: usize = 1 << 30;

/// What stat tells: mode, ino, nlink, uid, gid, size, atime, mtime, ctime in nanoseconds, blocks, block size, rdev.
type Status = (u32, u64, u32, u32, u32, u64, i128, i128, i128, u64, u32, u64);

fn raised(error: Error) -> PyErr {
    match error {
        Error::Errno(errno) => {
            PyOSError::new_err((errno, std::io::Error::from_raw_os_error(errno).to_string()))
        }
        Error::Kernel => AskKernel::new_err("the operation is the kernel's business"),
        // When it was begun, and what it made if it is done.
        Error::GoneAmid(amid) => {
            let (at_ns, inode) = match amid {
                Amid::Begun { at_ns } => (at_ns, None),
                Amid::Done { inode } => (0, Some(inode)),
            };
            GoneAmid::new_err(("the channel is no more, and it may be done", at_ns, inode))
        }
        Error::Gone => Gone::new_err("the channel is no more"),
    }
}

fn status(found: &Attributes) -> Status {
    let ns = |seconds: i64, nanoseconds: u32| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    (
        found.mode,
        found.ino,
        found.nlink,
        found.uid,
        found.gid,
        found.size_bytes,
        ns(found.atime_s, found.atime_ns),
        ns(found.mtime_s, found.mtime_ns),
        ns(found.ctime_s, found.ctime_ns),
        found.blocks_512,
        found.blksize_bytes,
        found.rdev,
    )
}

/// One process's channel. A forked child has none: it gets `Gone`.
#[pyclass(module = "polytropo._native", frozen)]
pub struct Channel {
    connection: RwLock<Option<Arc<Connection>>>,
    process: u32,
}

impl Channel {
    /// Runs an operation without the interpreter's lock.
    fn run<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&Connection) -> Result<T, Error> + Send,
    ) -> PyResult<T> {
        let connection = match self.connection.read() {
            Ok(held) if self.process == std::process::id() => held.clone(),
            _ => None,
        };
        let connection = connection.ok_or_else(|| raised(Error::Gone))?;
        py.detach(|| work(&connection)).map_err(raised)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // In a forked child the memory is not there.
        if self.process != std::process::id()
            && let Ok(held) = self.connection.get_mut()
            && let Some(connection) = held.take().and_then(Arc::into_inner)
        {
            connection.forget_in_child();
        }
    }
}

#[pymethods]
impl Channel {
    /// Connects at `socket` for the mount whose root the descriptor is.
    #[staticmethod]
    fn connect(py: Python<'_>, socket: &[u8], mount_root: i32) -> PyResult<Self> {
        let connection = py.detach(|| Connection::connect(socket, mount_root)).map_err(|why| match why {
            Refused::Errno(errno) => raised(Error::Errno(errno)),
            Refused::Verdict(verdict) => NoChannel::new_err(verdict.sentence()),
            Refused::Protocol => NoChannel::new_err("what answers is no service of this version"),
        })?;
        let connection = RwLock::new(Some(Arc::new(connection)));
        Ok(Self { connection, process: std::process::id() })
    }

    fn open(
        &self,
        py: Python<'_>,
        path: &[u8],
        flags: u32,
        mode: u32,
        umask: u32,
    ) -> PyResult<(u64, Status)> {
        let opened = self.run(py, |c| c.open(At::Root, path, flags, mode, umask))?;
        Ok((opened.file.to_number(), status(&opened.attributes)))
    }

    fn close(&self, py: Python<'_>, file: u64) -> PyResult<()> {
        self.run(py, |c| c.close(File::from_number(file)))
    }

    fn pread<'py>(
        &self,
        py: Python<'py>,
        file: u64,
        count: usize,
        offset: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        if count > READ_MAX_BYTES {
            return Err(PyValueError::new_err("read at most 1 GiB at once"));
        }
        let bytes = self.run(py, |c| {
            let mut bytes = vec![0; count];
            let done = c.pread(File::from_number(file), &mut bytes, offset)?;
            bytes.truncate(done);
            Ok(bytes)
        })?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Reads into a buffer that lies in one piece.
    fn pread_into(&self, py: Python<'_>, file: u64, to: &Bound<'_, PyAny>, offset: u64) -> PyResult<usize> {
        let buffer = PyBuffer::<u8>::get(to)?;
        if buffer.readonly() || !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("the buffer has to be writable and to lie in one piece"));
        }
        let (place, count) = (buffer.buf_ptr() as usize, buffer.len_bytes());
        // SAFETY: Python keeps the buffer's memory in place while `buffer` is held; what other threads of the program do to its bytes
        // meanwhile is theirs.
        self.run(py, |c| unsafe { c.pread_raw(File::from_number(file), place as *mut u8, count, offset) })
    }

    fn pwrite(&self, py: Python<'_>, file: u64, bytes: &Bound<'_, PyAny>, offset: u64) -> PyResult<usize> {
        if let Ok(bytes) = bytes.cast::<PyBytes>() {
            let bytes = bytes.as_bytes();
            return self.run(py, |c| c.pwrite(File::from_number(file), bytes, offset));
        }
        let copy = PyBuffer::<u8>::get(bytes)?.to_vec(py)?;
        self.run(py, |c| c.pwrite(File::from_number(file), &copy, offset))
    }

    fn fstat(&self, py: Python<'_>, file: u64) -> PyResult<Status> {
        self.run(py, |c| c.fstat(File::from_number(file))).map(|found| status(&found))
    }

    fn ftruncate(&self, py: Python<'_>, file: u64, size_bytes: u64) -> PyResult<()> {
        self.run(py, |c| c.ftruncate(File::from_number(file), size_bytes))
    }

    fn fsync(&self, py: Python<'_>, file: u64, data_only: bool) -> PyResult<()> {
        self.run(py, |c| c.fsync(File::from_number(file), data_only))
    }

    fn stat(&self, py: Python<'_>, path: &[u8], flags: u32) -> PyResult<Status> {
        self.run(py, |c| c.stat(At::Root, path, flags)).map(|found| status(&found))
    }

    fn access(&self, py: Python<'_>, path: &[u8], mode: u32) -> PyResult<()> {
        self.run(py, |c| c.access(At::Root, path, mode, 0))
    }

    /// Names and types (of `st_mode`) of an open directory, without `.` and `..`.
    fn list(&self, py: Python<'_>, directory: u64) -> PyResult<Vec<(Vec<u8>, u32)>> {
        self.run(py, |c| {
            let mut names = Vec::new();
            let mut buffer = vec![0; 64 << 10];
            let mut position = 0;
            loop {
                let (count, next) = c.read_directory(File::from_number(directory), &mut buffer, position)?;
                if count == 0 {
                    return Ok(names);
                }
                take_entries(&buffer[..count], &mut names);
                position = next;
            }
        })
    }

    fn readlink<'py>(&self, py: Python<'py>, path: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
        let text = self.run(py, |c| {
            let mut text = vec![0; 4096];
            let count = c.read_link(At::Root, path, &mut text)?;
            text.truncate(count);
            Ok(text)
        })?;
        Ok(PyBytes::new(py, &text))
    }

    fn mkdir(&self, py: Python<'_>, path: &[u8], mode: u32, umask: u32) -> PyResult<()> {
        self.run(py, |c| c.mkdir(At::Root, path, mode, umask))
    }

    fn unlink(&self, py: Python<'_>, path: &[u8], flags: u32) -> PyResult<()> {
        self.run(py, |c| c.unlink(At::Root, path, flags))
    }

    fn rename(&self, py: Python<'_>, path: &[u8], new_path: &[u8]) -> PyResult<()> {
        self.run(py, |c| c.rename(At::Root, path, At::Root, new_path, 0))
    }

    fn symlink(&self, py: Python<'_>, target: &[u8], path: &[u8]) -> PyResult<()> {
        self.run(py, |c| c.symlink(target, At::Root, path))
    }

    fn link(&self, py: Python<'_>, path: &[u8], new_path: &[u8]) -> PyResult<()> {
        self.run(py, |c| c.link(At::Root, path, At::Root, new_path, 0))
    }

    fn chmod(&self, py: Python<'_>, path: &[u8], mode: u32) -> PyResult<()> {
        self.run(py, |c| c.chmod(At::Root, path, mode, 0))
    }

    fn utime(&self, py: Python<'_>, path: &[u8], atime_ns: i64, mtime_ns: i64) -> PyResult<()> {
        let time = |ns: i64| Time {
            seconds: ns.div_euclid(1_000_000_000),
            nanoseconds: ns.rem_euclid(1_000_000_000),
        };
        self.run(py, |c| c.change_times(At::Root, path, time(atime_ns), time(mtime_ns), 0))
    }

    fn truncate(&self, py: Python<'_>, path: &[u8], size_bytes: u64) -> PyResult<()> {
        self.run(py, |c| c.truncate(At::Root, path, size_bytes))
    }

    fn has_ended(&self) -> bool {
        let held = self.connection.read().ok().and_then(|held| held.clone());
        self.process != std::process::id() || held.is_none_or(|connection| connection.has_ended())
    }

    /// Gives the channel up. Operations that are under way finish.
    fn disconnect(&self) {
        if self.process == std::process::id()
            && let Ok(mut held) = self.connection.write()
        {
            held.take();
        }
    }
}

/// Takes entries apart as getdents64(2) writes them.
fn take_entries(mut bytes: &[u8], names: &mut Vec<(Vec<u8>, u32)>) {
    while let (Some(&low), Some(&high)) = (bytes.get(16), bytes.get(17)) {
        let length = usize::from(u16::from_ne_bytes([low, high]));
        let Some(record) = bytes.get(..length).filter(|record| record.len() > 19) else { return };
        let name = record[19..].split(|byte| *byte == 0).next().unwrap_or_default();
        if !matches!(name, b"." | b"..") {
            names.push((name.to_vec(), u32::from(record[18]) << 12));
        }
        bytes = &bytes[length..];
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add_class::<Channel>()?;
    module.add("AskKernel", py.get_type::<AskKernel>())?;
    module.add("Gone", py.get_type::<Gone>())?;
    module.add("GoneAmid", py.get_type::<GoneAmid>())?;
    module.add("NoChannel", py.get_type::<NoChannel>())
}
