//! One component of a path: the only way a name reaches a libservice.

use crate::error::{Errno, Error, Result};

/// Longest name that any layer accepts (`NAME_MAX`).
pub const NAME_LEN_MAX: usize = 255;

/// A file name: 1 to 255 bytes, no slash, no NUL, neither `.` nor `..`. Any other byte may
/// occur: names are not text.
#[derive(PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Name([u8]);

impl Name {
    /// Checks `bytes`. ENAMETOOLONG above 255 bytes, ENOENT when empty, EINVAL otherwise.
    pub fn new(bytes: &[u8]) -> Result<&Name> {
        if bytes.len() > NAME_LEN_MAX {
            return Err(Error::new(Errno::NAMETOOLONG, "check a file name"));
        }
        if bytes.is_empty() {
            return Err(Error::new(Errno::NOENT, "check a file name"));
        }
        if bytes == b"." || bytes == b".." || bytes.iter().any(|b| matches!(b, 0 | b'/')) {
            return Err(Error::new(Errno::INVAL, "check a file name"));
        }
        // SAFETY: Name is a transparent wrapper of [u8], so the layouts agree.
        Ok(unsafe { &*(bytes as *const [u8] as *const Name) })
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn to_boxed(&self) -> Box<Name> {
        let bytes: Box<[u8]> = self.0.into();
        // SAFETY: as in `new`; the box keeps its allocation and its length.
        unsafe { Box::from_raw(Box::into_raw(bytes) as *mut Name) }
    }
}

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl Clone for Box<Name> {
    fn clone(&self) -> Self {
        self.to_boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_any_bytes_but_separators() {
        assert_eq!(Name::new(b"a\xff\n ").unwrap().as_bytes(), b"a\xff\n ");
        assert!(Name::new(&[b'x'; 255]).is_ok());
    }

    #[test]
    fn refuses_what_is_not_one_component() {
        for (bytes, errno) in [
            (&b""[..], Errno::NOENT),
            (b".", Errno::INVAL),
            (b"..", Errno::INVAL),
            (b"a/b", Errno::INVAL),
            (b"a\0", Errno::INVAL),
            (&[b'x'; 256], Errno::NAMETOOLONG),
        ] {
            assert_eq!(Name::new(bytes).unwrap_err().errno(), errno);
        }
    }
}
