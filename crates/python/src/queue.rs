//! An RCQB in shared memory.

use crate::errors::of_queue;
use polytropo_queue::bytes::{BytesHandle, BytesState};
use polytropo_queue::shm::{self, Mapping};
use polytropo_queue::{Config, Deadline, Error, Rcqb, identity};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

/// Counts the forks that this process came out of: a child is another participant than its parent.
static FORKS: AtomicU64 = AtomicU64::new(0);
static WATCH_FORKS: std::sync::Once = std::sync::Once::new();

/// How long a wait goes on without looking for signals (Ctrl-C).
const SLICE: Duration = Duration::from_millis(100);
const PARTICIPANTS: usize = 256;

extern "C" fn after_fork_in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// This process's part in a queue. In a child of fork it is the parent's, and is replaced at the first use.
struct Part {
    queue: Rcqb<Mapping>,
    /// What the threads' operations learn, for the next ones to begin with.
    learned: Mutex<Option<BytesState>>,
    forks: u64,
}

impl Part {
    fn of(queue: Rcqb<Mapping>) -> Self {
        // SAFETY: registers a function that only adds to an atomic, which is allowed after fork.
        WATCH_FORKS.call_once(|| unsafe {
            libc::pthread_atfork(None, None, Some(after_fork_in_child));
        });
        Self { queue, learned: Mutex::new(None), forks: FORKS.load(Ordering::Relaxed) }
    }

    fn handle(&self) -> BytesHandle<'_> {
        match self.learned.try_lock().ok().and_then(|mut learned| learned.take()) {
            Some(state) => self.queue.handle_with(state),
            None => self.queue.handle(),
        }
    }

    fn keep(&self, state: BytesState) {
        if let Ok(mut learned) = self.learned.try_lock() {
            *learned = Some(state);
        }
    }

    fn is_ours(&self) -> bool {
        self.forks == FORKS.load(Ordering::Relaxed)
    }
}

/// A queue of bytes in shared memory.
#[pyclass(module = "polytropo._native", frozen)]
pub struct Queue {
    part: RwLock<Option<Arc<Part>>>,
}

fn from_io(error: io::Error) -> PyErr {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(inner) => of_queue(*inner),
        None if error.kind() == io::ErrorKind::InvalidInput && error.raw_os_error().is_none() => {
            pyo3::exceptions::PyValueError::new_err(error.to_string())
        }
        None => error.into(),
    }
}

fn create(memory: Mapping, config: &Config) -> io::Result<Rcqb<Mapping>> {
    Rcqb::create(memory, config, identity::of_this_process()?).map_err(io::Error::other)
}

fn attach(memory: Mapping) -> io::Result<Rcqb<Mapping>> {
    Rcqb::attach(memory, identity::of_this_process()?).map_err(io::Error::other)
}

impl Queue {
    fn new(queue: Rcqb<Mapping>) -> Self {
        Self { part: RwLock::new(Some(Arc::new(Part::of(queue)))) }
    }

    /// Runs `action` on this process's part in the queue.
    fn with_part<R>(&self, action: impl FnOnce(&Part) -> PyResult<R>) -> PyResult<R> {
        // Not held during the action, which may wait: somebody else may release the queue meanwhile.
        let part = self.part.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        match part {
            None => Err(of_queue(Error::Closed)),
            Some(part) if part.is_ours() => action(&part),
            Some(parents) => {
                // The place among the participants is the parent's: it must not be given up from here.
                std::mem::forget(parents);
                self.join_after_fork()?;
                self.with_part(action)
            }
        }
    }

    fn with<R>(&self, action: impl FnOnce(&Rcqb<Mapping>) -> PyResult<R>) -> PyResult<R> {
        self.with_part(|part| action(&part.queue))
    }

    fn join_after_fork(&self) -> PyResult<()> {
        let mut part = self.part.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(parents) = part.take_if(|part| !part.is_ours()) {
            let descriptor = parents.queue.memory().descriptor().try_clone_to_owned()?;
            std::mem::forget(parents);
            *part = Some(Arc::new(Part::of(Mapping::of(descriptor).and_then(attach).map_err(from_io)?)));
        }
        Ok(())
    }
}

/// `timeout_s`: None waits for ever.
fn deadline(timeout_s: Option<f64>) -> PyResult<Deadline> {
    match timeout_s {
        None => Ok(Deadline::Never),
        Some(seconds) => {
            Duration::try_from_secs_f64(seconds.max(0.0)).map(Deadline::after).map_err(|error| {
                pyo3::exceptions::PyValueError::new_err(format!("a timeout of {seconds} s: {error}"))
            })
        }
    }
}

/// Waits in slices without the interpreter lock, and looks for signals between them.
fn in_slices<R: Send>(
    py: Python<'_>,
    deadline: Deadline,
    at_end: Error,
    mut step: impl FnMut(Deadline) -> Result<R, Error> + Send,
) -> PyResult<R> {
    loop {
        let slice = Deadline::after(SLICE).min(deadline);
        match py.detach(|| step(slice)) {
            Err(Error::TimedOut) if deadline.has_passed() => return Err(of_queue(at_end)),
            Err(Error::TimedOut) => py.check_signals()?,
            outcome => return outcome.map_err(of_queue),
        }
    }
}

#[pymethods]
impl Queue {
    /// Makes a queue that is found through its descriptor, or by `name` if there is one.
    #[staticmethod]
    fn create(capacity: usize, item_size: usize, lanes: usize, name: Option<&str>) -> PyResult<Self> {
        let config = Config { item_size, lanes, participants: PARTICIPANTS, ..Config::strict(capacity) };
        let size = Rcqb::<Mapping>::size_bytes(&config).map_err(of_queue)?;
        let queue = match name {
            Some(name) => shm::create_named(name, size, |memory| create(memory, &config)),
            None => Mapping::anonymous(size).and_then(|memory| create(memory, &config)),
        };
        queue.map(Self::new).map_err(from_io)
    }

    #[staticmethod]
    fn attach(name: &str) -> PyResult<Self> {
        shm::open_named(name).and_then(attach).map(Self::new).map_err(from_io)
    }

    /// Takes part in the queue of a descriptor, which stays the caller's. `sealed_only` refuses memory that can shrink.
    #[staticmethod]
    fn from_descriptor(descriptor: i32, sealed_only: bool) -> PyResult<Self> {
        if descriptor < 0 {
            return Err(pyo3::exceptions::PyValueError::new_err("a descriptor is not negative"));
        }
        // SAFETY: borrowed for the time of the duplication only; a number that is not open makes that fail.
        let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) }.try_clone_to_owned()?;
        let memory = Mapping::of(descriptor)?;
        if sealed_only && !memory.is_sealed() {
            let sentence =
                "the descriptor's memory is not sealed against shrinking; attach to named queues by name";
            return Err(pyo3::exceptions::PyValueError::new_err(sentence));
        }
        attach(memory).map(Self::new).map_err(from_io)
    }

    #[staticmethod]
    fn unlink(name: &str) -> PyResult<()> {
        shm::unlink_named(name).map_err(from_io)
    }

    /// Waits until there is room; `timeout_s` 0 does not wait, None waits for ever.
    fn put(&self, py: Python<'_>, item: &Bound<'_, PyAny>, timeout_s: Option<f64>) -> PyResult<()> {
        if let Ok(bytes) = item.cast::<PyBytes>() {
            return self.put_slice(py, bytes.as_bytes(), timeout_s);
        }
        let buffer = PyBuffer::<u8>::get(item)?;
        let copy = buffer.to_vec(py)?;
        self.put_slice(py, &copy, timeout_s)
    }

    /// Waits until there is an item; `timeout_s` 0 does not wait, None waits for ever.
    fn get<'py>(&self, py: Python<'py>, timeout_s: Option<f64>) -> PyResult<Bound<'py, PyBytes>> {
        self.with_part(|part| {
            let mut handle = part.handle();
            // SAFETY: while the item is read it is at that address and that long; others that scribble there change bytes only, of
            // which no reference is made.
            let bytes = |item: *const u8, length| unsafe { PyBytes::from_ptr(py, item, length) };
            match handle.try_get_with(bytes) {
                Err(Error::Empty) if timeout_s != Some(0.0) => {}
                outcome => {
                    part.keep(handle.state());
                    return outcome.map_err(of_queue);
                }
            }
            // The interpreter lock is not held while waiting, so that what arrives is kept in a vector first.
            let copy = |item: *const u8, length| {
                let mut copy = Vec::with_capacity(length);
                // SAFETY: as above; the vector has that capacity and is as long as what was copied into it.
                unsafe {
                    std::ptr::copy_nonoverlapping(item, copy.as_mut_ptr(), length);
                    copy.set_len(length);
                }
                copy
            };
            let until = deadline(timeout_s)?;
            let item = in_slices(py, until, Error::Empty, |slice| handle.get_with(slice, copy));
            part.keep(handle.state());
            Ok(PyBytes::new(py, &item?))
        })
    }

    fn close(&self) -> PyResult<()> {
        self.with(|queue| {
            queue.close();
            Ok(())
        })
    }

    /// Ends this process's part in the queue.
    fn release(&self) {
        let part = self.part.write().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if part.as_ref().is_some_and(|part| !part.is_ours()) {
            std::mem::forget(part);
        }
    }

    fn is_closed(&self) -> PyResult<bool> {
        self.with(|queue| Ok(queue.is_closed()))
    }

    /// Looks for processes that died, and repairs what they left: the numbers of processes, of items whose put was not
    /// done, of items lost with their reader, and of items delivered for the dead.
    fn reap<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let reaped = self.with(|queue| Ok(queue.reap()))?;
        let numbers =
            [reaped.participants as u64, reaped.lost_enqueues, reaped.lost_dequeues, reaped.rescued];
        PyTuple::new(py, numbers)
    }

    /// Items put and taken so far, sleeps, wake-ups, items whose put was not done, items lost, items delivered for the dead.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let stats = self.with(|queue| Ok(queue.stats()))?;
        let numbers = [
            stats.enqueued,
            stats.dequeued,
            stats.sleeps,
            stats.wakes,
            stats.lost_enqueues,
            stats.lost_dequeues,
            stats.rescued,
        ];
        PyTuple::new(py, numbers)
    }

    fn __len__(&self) -> PyResult<usize> {
        self.with(|queue| Ok(queue.len()))
    }

    #[getter]
    fn capacity(&self) -> PyResult<usize> {
        self.with(|queue| Ok(queue.capacity()))
    }

    #[getter]
    fn item_size(&self) -> PyResult<usize> {
        self.with(|queue| Ok(queue.item_size()))
    }

    fn fileno(&self) -> PyResult<i32> {
        self.with(|queue| Ok(queue.memory().descriptor().as_raw_fd()))
    }
}

impl Queue {
    fn put_slice(&self, py: Python<'_>, item: &[u8], timeout_s: Option<f64>) -> PyResult<()> {
        self.with_part(|part| {
            let mut handle = part.handle();
            match handle.try_put(item) {
                Err(Error::Full) if timeout_s != Some(0.0) => {}
                outcome => {
                    part.keep(handle.state());
                    return outcome.map_err(of_queue);
                }
            }
            let outcome = in_slices(py, deadline(timeout_s)?, Error::Full, |slice| handle.put(item, slice));
            part.keep(handle.state());
            outcome
        })
    }
}
