//! A program of some hundred bytes that waits to be killed: what it is running from, nobody may write.

use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const LOAD_ADDRESS: u64 = 0x40_0000;
const HEADERS_BYTES: u64 = 64 + 56;
/// `mov $34, %eax; syscall` (pause) for ever.
const CODE: [u8; 9] = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];

/// An ELF executable of x86-64, followed by bytes that tell their places apart, `size_bytes` in all.
pub fn image(size_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    bytes.resize(16, 0);
    let entry = LOAD_ADDRESS + HEADERS_BYTES;
    for (width, value) in [
        (2, 2u64), // executable
        (2, 62),   // x86-64
        (4, 1),
        (8, entry),
        (8, 64), // program headers at
        (8, 0),
        (4, 0),
        (2, 64),
        (2, 56),
        (2, 1),
        (6, 0),
        // The one program header: all of it is loaded, to be read and executed.
        (4, 1),
        (4, 5),
        (8, 0),
        (8, LOAD_ADDRESS),
        (8, LOAD_ADDRESS),
        (8, HEADERS_BYTES + CODE.len() as u64),
        (8, HEADERS_BYTES + CODE.len() as u64),
        (8, 4096),
    ] {
        bytes.extend_from_slice(&value.to_le_bytes()[..width]);
    }
    bytes.extend_from_slice(&CODE);
    let rest = (bytes.len()..size_bytes).map(|at| (at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) as u8);
    bytes.extend(rest.collect::<Vec<_>>());
    bytes
}

/// A program that runs until this is dropped.
pub struct Running(Child);

impl Running {
    pub fn start(path: &Path) -> io::Result<Self> {
        Command::new(path).stdin(Stdio::null()).spawn().map(Self)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().expect("kill a child");
        self.0.wait().expect("wait for a child");
    }
}
