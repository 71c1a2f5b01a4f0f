//! Bytes read and written by one thread, where copies are most of the time.

use crate::sides::{Outcome, Side};
use crate::{Figures, LARGE_BYTES, next, time};

const PIECE_BYTES: usize = 1 << 20;

pub fn throughput<S: Side>(side: &S, figures: &mut Figures, time_ms: u64) -> Outcome<()> {
    let mut buffer = vec![0x5a; PIECE_BYTES];
    let file = side.open("large", libc::O_RDONLY)?;
    for at in (0..LARGE_BYTES).step_by(PIECE_BYTES) {
        side.pread(&file, &mut buffer, at)?;
    }
    for (name, bytes) in [("read 4 KiB", 4096), ("read 64 KiB", 64 << 10)] {
        let mut state = 1;
        time(figures, name, time_ms, || {
            let at = next(&mut state) % (LARGE_BYTES / bytes as u64) * bytes as u64;
            side.pread(&file, &mut buffer[..bytes], at)
        })?;
    }
    let mut at = 0;
    time(figures, "read in order, per MiB", time_ms, || {
        at = (at + PIECE_BYTES as u64) % LARGE_BYTES;
        side.pread(&file, &mut buffer, at)
    })?;
    side.close(file)?;
    let file = side.open("written", libc::O_RDWR | libc::O_CREAT)?;
    for (name, bytes) in
        [("write 4 KiB", 4096), ("write 64 KiB", 64 << 10), ("write in order, per MiB", PIECE_BYTES)]
    {
        let mut at = 0;
        time(figures, name, time_ms, || {
            at = (at + bytes as u64) % LARGE_BYTES;
            side.pwrite(&file, &buffer[..bytes], at)
        })?;
    }
    side.close(file)?;
    let (from, to) = (side.open("large", libc::O_RDONLY)?, side.open("written", libc::O_RDWR)?);
    let (mut at, piece) = (0, PIECE_BYTES / 8);
    // Pieces as cp(1) and cat(1) take them; a MiB each time.
    time(figures, "copy a file, per MiB", time_ms, || {
        for _ in 0..8 {
            at = (at + piece as u64) % LARGE_BYTES;
            side.pread(&from, &mut buffer[..piece], at)?;
            side.pwrite(&to, &buffer[..piece], at)?;
        }
        Ok(())
    })?;
    side.close(from)?;
    side.close(to)
}
