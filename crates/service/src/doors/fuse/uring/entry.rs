//! Memory of one entry of a queue: where the kernel puts a request, and we its answer.

use std::io;
use std::ops::Range;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::doors::fuse::abi::{InHeader, OutHeader};
use crate::doors::fuse::device::Pages;

/// `struct fuse_uring_ent_in_out`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct InOut {
    flags: u64,
    commit_id: u64,
    payload_bytes: u32,
    padding: u32,
    reserved: u64,
}

/// `struct fuse_uring_req_header`: the header of a request or an answer, what is the operation's own, and how to go on.
const HEADER: usize = 0;
const OPERATION: usize = 128;
const OPERATION_BYTES_MAX: usize = 128;
const IN_OUT: usize = 256;
const HEADERS_BYTES: usize = IN_OUT + size_of::<InOut>();
/// Behind them, ours: the two `iovec`s that tell the kernel where all this is.
const PARTS: usize = 512;
const PAYLOAD: usize = 4096;

/// One entry.
pub struct Entry {
    /// The headers' page and the payload, which begins with a page.
    memory: Pages,
    pub queue: u16,
}

/// A request as it lies in an entry.
#[derive(Clone, Copy, Debug)]
pub struct Arrived {
    pub header: InHeader,
    /// Of the operation's own structure.
    operation_bytes: usize,
    payload_bytes: usize,
}

impl Entry {
    pub fn new(queue: u16, payload_bytes: usize) -> io::Result<Self> {
        let mut memory = Pages::new(PAYLOAD + payload_bytes)?;
        let start = memory.as_mut_ptr();
        let parts = [
            libc::iovec { iov_base: start.cast(), iov_len: HEADERS_BYTES },
            libc::iovec { iov_base: start.wrapping_add(PAYLOAD).cast(), iov_len: payload_bytes },
        ];
        // SAFETY: inside the first page, aligned, and nothing else is there.
        unsafe { start.add(PARTS).cast::<[libc::iovec; 2]>().write(parts) };
        Ok(Self { memory, queue })
    }

    pub fn parts(&self) -> *const [libc::iovec; 2] {
        self.memory.as_ptr().wrapping_add(PARTS).cast()
    }

    /// The request that the kernel has put here; `None` if its lengths contradict each other.
    pub fn arrived(&self) -> Option<Arrived> {
        let (header, _) = InHeader::read_from_prefix(&self.memory[HEADER..OPERATION]).ok()?;
        let (in_out, _) = InOut::read_from_prefix(&self.memory[IN_OUT..PARTS]).ok()?;
        let payload_bytes = in_out.payload_bytes as usize;
        let arguments = (header.len as usize).checked_sub(size_of::<InHeader>())?;
        let operation_bytes = arguments.checked_sub(payload_bytes)?;
        let fits = operation_bytes <= OPERATION_BYTES_MAX && payload_bytes <= self.memory.len() - PAYLOAD;
        fits.then_some(Arrived { header, operation_bytes, payload_bytes })
    }

    /// The operation's own structure, and the payload's whole room.
    pub fn split(&mut self, arrived: &Arrived) -> (&[u8], &mut [u8]) {
        let (headers, payload) = self.memory.split_at_mut(PAYLOAD);
        (&headers[OPERATION..][..arrived.operation_bytes], payload)
    }

    /// The commit that has to name the request, even where it cannot be understood.
    pub fn commit_id(&self) -> u64 {
        InOut::read_from_prefix(&self.memory[IN_OUT..PARTS]).map_or(0, |(in_out, _)| in_out.commit_id)
    }

    /// Puts the answer's headers; the payload is there already.
    pub fn answer(&mut self, unique: u64, error: i32, payload_bytes: usize) {
        let len = (size_of::<OutHeader>() + payload_bytes) as u32;
        put(&mut self.memory[HEADER..OPERATION], &OutHeader { len, error, unique });
        let commit_id = self.commit_id();
        let in_out = InOut { commit_id, payload_bytes: payload_bytes as u32, ..InOut::default() };
        put(&mut self.memory[IN_OUT..PARTS], &in_out);
    }

    /// Puts a short payload.
    pub fn put_payload(&mut self, bytes: &[u8]) {
        self.memory[PAYLOAD..][..bytes.len()].copy_from_slice(bytes);
    }
}

impl Arrived {
    pub fn payload(&self) -> Range<usize> {
        0..self.payload_bytes
    }
}

fn put<T: IntoBytes + Immutable>(room: &mut [u8], value: &T) {
    let bytes = value.as_bytes();
    room[..bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(len: usize, payload_bytes: u32) -> Entry {
        let mut entry = Entry::new(0, 8192).unwrap();
        let mut header = InHeader::read_from_bytes(&[0; size_of::<InHeader>()]).unwrap();
        header.len = len as u32;
        put(&mut entry.memory[HEADER..OPERATION], &header);
        put(&mut entry.memory[IN_OUT..PARTS], &InOut { commit_id: 9, payload_bytes, ..InOut::default() });
        entry
    }

    #[test]
    fn lengths_that_contradict_each_other_are_no_request() {
        const HEADER_BYTES: usize = size_of::<InHeader>();
        assert!(entry(HEADER_BYTES + 128 + 8192, 8192).arrived().is_some());
        assert!(entry(HEADER_BYTES, 0).arrived().is_some());
        for (len, payload_bytes) in [
            (HEADER_BYTES - 1, 0),
            (HEADER_BYTES, 1),
            (HEADER_BYTES + 129, 0),
            (HEADER_BYTES + 8193, 8193),
            (0, u32::MAX),
        ] {
            assert!(entry(len, payload_bytes).arrived().is_none(), "{len} {payload_bytes}");
        }
    }

    #[test]
    fn an_answer_keeps_the_number_to_commit() {
        let mut entry = entry(size_of::<InHeader>(), 0);
        entry.answer(9, -2, 0);
        assert_eq!(entry.commit_id(), 9);
        let (out, _) = OutHeader::read_from_prefix(&entry.memory).unwrap();
        assert_eq!((out.len as usize, out.error, out.unique), (size_of::<OutHeader>(), -2, 9));
    }
}
