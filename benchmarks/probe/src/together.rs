//! The same work by several threads at once, for a given time.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use crate::measure::Figure;
use crate::work::Dice;

const BLOCK_BYTES: usize = 4096;

/// O_DIRECT wants memory that begins on a page.
#[repr(align(4096))]
struct Page([u8; BLOCK_BYTES]);

pub fn both(file: &Path, directory: &Path, threads: usize, duration: Duration) -> io::Result<Vec<Figure>> {
    let reads = together("direct_reads", threads, duration, |number| {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
            .open(file)?;
        let blocks = file.metadata()?.len() / BLOCK_BYTES as u64;
        let (mut page, mut dice) = (Box::new(Page([0; BLOCK_BYTES])), Dice::new(number));
        Ok(move || file.read_exact_at(&mut page.0, dice.below(blocks) * BLOCK_BYTES as u64))
    })?;
    let made = together("made_files", threads, duration, |number| {
        let own = directory.join(number.to_string());
        fs::create_dir(&own)?;
        let path = own.join("file");
        Ok(move || {
            File::create(&path)?;
            fs::metadata(&path)?;
            fs::remove_file(&path)
        })
    })?;
    Ok(vec![reads, made])
}

/// How often all threads together do what `prepare` makes for each of them.
fn together<W>(
    name: &'static str,
    threads: usize,
    duration: Duration,
    prepare: impl Fn(u64) -> io::Result<W> + Sync,
) -> io::Result<Figure>
where
    W: FnMut() -> io::Result<()>,
{
    let begin = Barrier::new(threads);
    let one = |number: usize| {
        let prepared = prepare(number as u64);
        begin.wait();
        let (mut work, start, mut units) = (prepared?, Instant::now(), 0);
        while start.elapsed() < duration {
            work()?;
            units += 1;
        }
        Ok::<u64, io::Error>(units)
    };
    let units: u64 = std::thread::scope(|scope| {
        let one = &one;
        let all: Vec<_> = (0..threads).map(|number| scope.spawn(move || one(number))).collect();
        all.into_iter().map(|thread| thread.join().expect("a thread ends")).sum::<io::Result<u64>>()
    })?;
    Ok(Figure { name, units, elapsed_ns: u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX) })
}
