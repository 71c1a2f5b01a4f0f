//! A message from the kernel, taken apart with every bound checked.

use zerocopy::{FromBytes, Immutable, KnownLayout};

use polytropo_libservices::{Errno, Error, Name, NodeId, Result};

use super::abi::InHeader;
use super::numbers::Numbers;

/// The header of a message and what follows it.
pub struct Request<'a> {
    pub header: InHeader,
    pub arguments: Arguments<'a>,
}

impl<'a> Request<'a> {
    /// `None` when there is not even a whole header, or the length in it is not the message's.
    pub fn parse(message: &'a [u8]) -> Option<Self> {
        let (header, rest) = InHeader::read_from_prefix(message).ok()?;
        if header.len as usize != message.len() {
            return None;
        }
        let extensions = usize::from(header.total_extlen) * 8;
        let body = rest.len().checked_sub(extensions)?;
        Some(Self { header, arguments: Arguments { operation: &[], rest: &rest[..body] } })
    }

    /// From a ring: the operation's own structure and the rest come apart. Their lengths have been compared with the header's.
    pub fn of_parts(header: InHeader, operation: &'a [u8], rest: &'a [u8]) -> Self {
        let extensions = usize::from(header.total_extlen) * 8;
        let body = rest.len().saturating_sub(extensions);
        Self { header, arguments: Arguments { operation, rest: &rest[..body] } }
    }
}

/// EINVAL for the number that names no node, ESTALE for one that is no longer known.
pub fn checked_node(numbers: &Numbers, nodeid: u64) -> Result<NodeId> {
    if nodeid == 0 {
        return Err(malformed());
    }
    numbers.node(nodeid).ok_or_else(|| Error::new(Errno::STALE, "use a node that was lost with its worker"))
}

/// The arguments of a request, taken from the front.
pub struct Arguments<'a> {
    /// What comes first, if it lies apart.
    operation: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Arguments<'a> {
    pub fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T> {
        let from = if self.operation.is_empty() { &mut self.rest } else { &mut self.operation };
        let (value, rest) = T::read_from_prefix(from).map_err(|_| malformed())?;
        *from = rest;
        Ok(value)
    }

    /// Bytes up to a NUL, which is taken too.
    pub fn take_string(&mut self) -> Result<&'a [u8]> {
        let end = self.rest.iter().position(|&b| b == 0).ok_or_else(malformed)?;
        let string = &self.rest[..end];
        self.rest = &self.rest[end + 1..];
        Ok(string)
    }

    pub fn take_name(&mut self) -> Result<&'a Name> {
        Name::new(self.take_string()?)
    }

    pub fn take_bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or_else(malformed)?;
        self.rest = rest;
        Ok(bytes)
    }
}

fn malformed() -> Error {
    Error::new(Errno::INVAL, "take apart a message of the kernel")
}
