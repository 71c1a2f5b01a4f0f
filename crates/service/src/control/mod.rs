//! The control protocol: orders from persons, one JSON object a line each way.

mod server;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use server::{Orders, Server, peer_of};

/// One order, as it stands in a line.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub enum Order {
    Mount {
        stack: serde_json::Value,
        mountpoint: PathBuf,
    },
    Unmount {
        mountpoint: PathBuf,
        #[serde(default)]
        lazy: bool,
    },
    /// With `stacks` each mount comes with its document.
    List {
        #[serde(default)]
        stacks: bool,
    },
    Stats {},
    /// What programs have open through a mount, as the keeper's state area tells.
    #[serde(rename = "open_files")]
    OpenFiles {
        mount: u64,
    },
    Status {},
    Stop {
        #[serde(default)]
        force: bool,
    },
}

/// Why an order was refused: a whole sentence, and the error's name where there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    pub sentence: String,
    pub errno: Option<&'static str>,
}

impl Refusal {
    pub fn new(sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), errno: None }
    }

    pub fn with_errno(errno: rustix::io::Errno, sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), errno: Some(errno_name(errno)) }
    }

    /// "WHAT failed: WHY", for errors that need no advice.
    pub fn of(errno: rustix::io::Errno, what: impl std::fmt::Display) -> Self {
        Self::with_errno(errno, format!("{what}: {}", describe(errno)))
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.sentence)
    }
}

pub type Answer = Result<serde_json::Value, Refusal>;

/// What is sent back for an order.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Reply<'a> {
    Ok(&'a serde_json::Value),
    Error(&'a Refusal),
}

/// The system's text of an error, without its number.
pub fn describe(errno: rustix::io::Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// The symbolic name of an error, `EIO` for those that no order of ours can end with.
pub fn errno_name(errno: rustix::io::Errno) -> &'static str {
    use rustix::io::Errno as E;
    match errno {
        E::PERM => "EPERM",
        E::NOENT => "ENOENT",
        E::INTR => "EINTR",
        E::NXIO => "ENXIO",
        E::BADF => "EBADF",
        E::AGAIN => "EAGAIN",
        E::NOMEM => "ENOMEM",
        E::ACCESS => "EACCES",
        E::BUSY => "EBUSY",
        E::EXIST => "EEXIST",
        E::XDEV => "EXDEV",
        E::NODEV => "ENODEV",
        E::NOTDIR => "ENOTDIR",
        E::ISDIR => "EISDIR",
        E::INVAL => "EINVAL",
        E::NFILE => "ENFILE",
        E::MFILE => "EMFILE",
        E::NOSPC => "ENOSPC",
        E::ROFS => "EROFS",
        E::PIPE => "EPIPE",
        E::NAMETOOLONG => "ENAMETOOLONG",
        E::NOSYS => "ENOSYS",
        E::LOOP => "ELOOP",
        E::PROTO => "EPROTO",
        E::OVERFLOW => "EOVERFLOW",
        E::OPNOTSUPP => "EOPNOTSUPP",
        E::ADDRINUSE => "EADDRINUSE",
        E::CONNRESET => "ECONNRESET",
        E::CONNABORTED => "ECONNABORTED",
        E::NOTCONN => "ENOTCONN",
        E::TIMEDOUT => "ETIMEDOUT",
        E::STALE => "ESTALE",
        E::DQUOT => "EDQUOT",
        _ => "EIO",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_orders() {
        let read = |line: &str| serde_json::from_str::<Order>(line);
        assert!(matches!(read(r#"{"op":"list"}"#), Ok(Order::List { stacks: false })));
        assert!(matches!(read(r#"{"op":"stop"}"#), Ok(Order::Stop { force: false })));
        let unmount = read(r#"{"op":"unmount","mountpoint":"/m","lazy":true}"#);
        assert!(matches!(unmount, Ok(Order::Unmount { lazy: true, .. })));
        assert!(read(r#"{"op":"list","extra":1}"#).is_err());
        assert!(read(r#"{"op":"fly"}"#).is_err());
        assert!(read("[]").is_err());
    }

    #[test]
    fn errors_read_well() {
        let refusal = Refusal::of(rustix::io::Errno::ACCESS, "the directory /x cannot be opened");
        assert_eq!(refusal.sentence, "the directory /x cannot be opened: Permission denied");
        assert_eq!(refusal.errno, Some("EACCES"));
    }
}
