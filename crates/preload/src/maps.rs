//! What is mapped into this process, as `/proc/self/maps` tells it.

use crate::sys;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping<'a> {
    pub start: usize,
    pub end: usize,
    pub readable: bool,
    pub writable: bool,
    pub executable: bool,
    pub path: &'a [u8],
}

impl<'a> Mapping<'a> {
    /// The last component of the path.
    pub fn name(&self) -> &'a [u8] {
        let after = self.path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
        &self.path[after..]
    }
}

/// One line, without its end.
pub fn parse_line(line: &[u8]) -> Option<Mapping<'_>> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut range = fields.next()?.split(|byte| *byte == b'-');
    let start = hexadecimal(range.next()?)?;
    let end = hexadecimal(range.next()?)?;
    let rights = fields.next()?;
    // Offset, device and inode.
    fields.next()?;
    fields.next()?;
    fields.next()?;
    let path = fields.next().unwrap_or(&[]).trim_ascii_start();
    if start >= end {
        return None;
    }
    Some(Mapping {
        start,
        end,
        readable: rights.first() == Some(&b'r'),
        writable: rights.get(1) == Some(&b'w'),
        executable: rights.get(2) == Some(&b'x'),
        path,
    })
}

fn hexadecimal(digits: &[u8]) -> Option<usize> {
    if digits.is_empty() || digits.len() > 16 {
        return None;
    }
    digits.iter().try_fold(0_usize, |value, digit| {
        let digit = (*digit as char).to_digit(16)?;
        Some(value << 4 | digit as usize)
    })
}

/// Longer than any line: the kernel writes them a page at a time.
const BUFFER_BYTES: usize = 8 << 10;
/// The kernel allows 65,530 mappings by default; what has more is not a program at its start.
const LINES_MAX: usize = 1 << 17;

/// Shows each mapping, lowest first. False if the list could not be read whole.
pub fn each(mut visit: impl FnMut(&Mapping<'_>)) -> bool {
    let descriptor = sys::open(b"/proc/self/maps\0", 0, 0);
    if descriptor < 0 {
        return false;
    }
    let mut buffer = [0; BUFFER_BYTES];
    let whole = read_lines(descriptor as i32, &mut buffer, &mut visit);
    sys::close(descriptor as i32);
    whole
}

fn read_lines(descriptor: i32, buffer: &mut [u8], visit: &mut impl FnMut(&Mapping<'_>)) -> bool {
    let mut filled = 0;
    let mut lines = 0;
    loop {
        let got = sys::read(descriptor, &mut buffer[filled..]);
        if got <= 0 {
            return got == 0 && filled == 0;
        }
        filled += got as usize;
        let mut from = 0;
        while let Some(length) = buffer[from..filled].iter().position(|byte| *byte == b'\n') {
            let Some(mapping) = parse_line(&buffer[from..from + length]) else { return false };
            visit(&mapping);
            from += length + 1;
            lines += 1;
        }
        if lines > LINES_MAX || (from == 0 && filled == buffer.len()) {
            return false;
        }
        buffer.copy_within(from..filled, 0);
        filled -= from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        let line = b"7f12a4600000-7f12a4626000 r-xp 00026000 08:01 1234                       /usr/lib/a b/libc.so.6";
        let mapping = parse_line(line).unwrap();
        assert_eq!((mapping.start, mapping.end), (0x7f12_a460_0000, 0x7f12_a462_6000));
        assert!(mapping.readable && mapping.executable && !mapping.writable);
        assert_eq!(mapping.name(), b"libc.so.6");
        let nameless = parse_line(b"7ffc0-7ffd0 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!(nameless.path, b"");
        for bad in [&b""[..], b"7f-6f r-xp 0 0 0 x", b"xyz-7f r 0 0 0", b"7f", b"11112222333344445-2 r 0 0 0"]
        {
            assert_eq!(parse_line(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn our_own() {
        let here = our_own as *const () as usize;
        let mut found = false;
        assert!(each(|mapping| found |= mapping.executable && (mapping.start..mapping.end).contains(&here)));
        assert!(found);
    }
}
