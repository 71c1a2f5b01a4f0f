//! What a worker says, its log and its sentences: bounded, and fit to be shown.

use std::io::{BufRead, BufReader, Read, Write};
use std::time::{Duration, Instant};

use log::{error, warn};

/// A worker may log so much in a period; more is dropped.
const LOG_BURST_BYTES: usize = 64 << 10;
const LOG_PERIOD: Duration = Duration::from_secs(10);
const LOG_LINE_MAX_BYTES: u64 = 4096;
const SENTENCE_MAX_CHARS: usize = 500;

/// Copies what the worker logs into the keeper's log, on a thread of its own: the worker has no file of the host open, and
/// one that runs wild cannot fill the disk with it.
pub fn relay_log(pipe: std::process::ChildStderr) {
    let relay = move || {
        let mut budget = LOG_BURST_BYTES;
        let mut since = Instant::now();
        let mut reader = BufReader::new(pipe);
        loop {
            let mut line = Vec::new();
            match (&mut reader).take(LOG_LINE_MAX_BYTES).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            if since.elapsed() >= LOG_PERIOD {
                if budget == 0 {
                    warn!("the worker's log was too long and is cut");
                }
                (budget, since) = (LOG_BURST_BYTES, Instant::now());
            }
            if let Some(left) = budget.checked_sub(line.len()) {
                budget = left;
                // There is nobody to tell that the log cannot be written.
                let _ = std::io::stderr().write_all(&printable_line(&line));
            } else {
                budget = 0;
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("worker-log".into()).spawn(relay) {
        error!("the worker's log cannot be read: {error}");
    }
}

/// A sentence of a worker, fit to be shown: no terminal sequences, not too long.
pub fn presentable(sentence: &str) -> String {
    sentence.chars().take(SENTENCE_MAX_CHARS).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A hostile worker's line: no terminal sequences, one end.
fn printable_line(line: &[u8]) -> Vec<u8> {
    let keep = |byte: &u8| if byte.is_ascii_control() && *byte != b'\t' { b'?' } else { *byte };
    let text = line.strip_suffix(b"\n").unwrap_or(line);
    text.iter().map(keep).chain([b'\n']).collect()
}
