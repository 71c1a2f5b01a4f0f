//! Errors of the crates as exceptions: the one place where they are translated.

use polytropo_queue::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyMemoryError, PyOSError, PyValueError};
use pyo3::prelude::*;

create_exception!(polytropo._native, Full, PyException, "There is no room in the queue.");
create_exception!(polytropo._native, Empty, PyException, "There is nothing in the queue.");
create_exception!(polytropo._native, Closed, PyException, "The queue is closed.");
create_exception!(polytropo._native, Damaged, PyException, "The queue's memory is damaged.");

pub fn of_queue(error: Error) -> PyErr {
    let sentence = error.to_string();
    match error {
        Error::Full => Full::new_err(sentence),
        Error::Empty => Empty::new_err(sentence),
        Error::Closed => Closed::new_err(sentence),
        Error::Corrupt => Damaged::new_err(sentence),
        Error::NoMemory => PyMemoryError::new_err(sentence),
        Error::TimedOut | Error::TooLarge | Error::Invalid | Error::NotAQueue | Error::OtherVersion => {
            PyValueError::new_err(sentence)
        }
        Error::Unsupported | Error::TooManyParticipants => PyOSError::new_err(sentence),
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("Full", py.get_type::<Full>())?;
    module.add("Empty", py.get_type::<Empty>())?;
    module.add("Closed", py.get_type::<Closed>())?;
    module.add("Damaged", py.get_type::<Damaged>())
}
