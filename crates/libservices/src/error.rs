//! The error of every storage operation: an errno and what was attempted.

use std::borrow::Cow;
use std::fmt;

pub use rustix::io::Errno;

/// A failed operation. `errno` is what the program sees, `attempt` is what the log says.
///
/// Making one must stay cheap: a missing name is an error too, and programs look for
/// missing names all day.
#[derive(Clone, Debug)]
pub struct Error {
    errno: Errno,
    attempt: Cow<'static, str>,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(errno: Errno, attempt: impl Into<Cow<'static, str>>) -> Self {
        Self { errno, attempt: attempt.into() }
    }

    pub fn errno(&self) -> Errno {
        self.errno
    }

    pub fn attempt(&self) -> &str {
        &self.attempt
    }

    pub fn is(&self, errno: Errno) -> bool {
        self.errno == errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.attempt, self.errno)
    }
}

impl std::error::Error for Error {}

/// Adds what was attempted to a bare errno: `openat2(..).attempt("open the parent")?`.
pub trait Attempt<T> {
    fn attempt(self, attempt: &'static str) -> Result<T>;
}

impl<T> Attempt<T> for std::result::Result<T, Errno> {
    fn attempt(self, attempt: &'static str) -> Result<T> {
        self.map_err(|errno| Error::new(errno, attempt))
    }
}
