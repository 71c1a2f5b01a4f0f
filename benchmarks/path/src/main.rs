//! Times single file operations, each the same way: through the kernel, or through a channel to a service. Prints one JSON object:
//! nanoseconds a call, the median of several batches.

mod sides;
mod throughput;

use std::io::Read;
use std::path::PathBuf;
use std::sync::{Barrier, OnceLock};
use std::time::Instant;

use clap::Parser;
use sides::{Outcome, Side};

/// Time file operations in DIRECTORY and print JSON.
#[derive(Parser)]
struct Arguments {
    /// Holds `large` (64 MiB), `small` (4 KiB) and `names` (1,000 files); the root of a mount if there is a socket.
    directory: PathBuf,
    /// Go through a channel: the service's socket.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Change files too.
    #[arg(long)]
    write: bool,
    /// Nothing but names that are made, removed and renamed.
    #[arg(long)]
    changes: bool,
    /// Nothing but bytes read and written.
    #[arg(long)]
    throughput: bool,
    /// Only calls whose name contains this.
    #[arg(long, default_value = "")]
    matching: String,
    /// Milliseconds for each figure.
    #[arg(long, default_value_t = 200)]
    time_ms: u64,
}

const LARGE_BYTES: u64 = 64 << 20;
const BATCHES: usize = 9;
const APPENDS: u64 = 4096;

fn main() {
    let arguments = Arguments::parse();
    // It was empty.
    let _ = MATCHING.set(arguments.matching.clone());
    let measured = match &arguments.socket {
        Some(socket) => sides::Channelled::connect(socket, &arguments.directory)
            .and_then(|side| measure(&side, &arguments)),
        None => sides::Kernel::at(&arguments.directory).and_then(|side| measure(&side, &arguments)),
    };
    match measured {
        Ok(figures) => println!("{}", serde_json::Value::Object(figures)),
        Err(problem) => {
            eprintln!("path probe: {problem}");
            std::process::exit(1);
        }
    }
}

type Figures = serde_json::Map<String, serde_json::Value>;

/// What the names of calls that are measured contain.
static MATCHING: OnceLock<String> = OnceLock::new();

fn is_wanted(name: &str) -> bool {
    MATCHING.get().is_none_or(|matching| name.contains(matching.as_str()))
}

/// The median of batches that last about as long as they are told together.
fn time(
    figures: &mut Figures,
    name: &str,
    time_ms: u64,
    mut work: impl FnMut() -> Outcome<()>,
) -> Outcome<()> {
    if !is_wanted(name) {
        return Ok(());
    }
    let begun = Instant::now();
    let mut count = 0u64;
    // Warms up, and tells how much there is room for.
    while begun.elapsed().as_millis() < u128::from(time_ms / 5).max(1) {
        work()?;
        count += 1;
    }
    let batch = (count * 5 / BATCHES as u64).max(1);
    let mut each = Vec::new();
    for _ in 0..BATCHES {
        let begun = Instant::now();
        for _ in 0..batch {
            work()?;
        }
        each.push(begun.elapsed().as_nanos() as f64 / batch as f64);
    }
    each.sort_by(f64::total_cmp);
    figures.insert(name.into(), each[BATCHES / 2].into());
    Ok(())
}

fn measure<S: Side>(side: &S, arguments: &Arguments) -> Outcome<Figures> {
    let mut figures = Figures::new();
    let ms = arguments.time_ms;
    if arguments.throughput {
        throughput::throughput(side, &mut figures, ms)?;
        return Ok(figures);
    }
    if side.ask().is_some() {
        time(&mut figures, "request that does nothing", ms, || side.ask().unwrap_or(Ok(())))?;
    }
    if arguments.changes {
        change(side, &mut figures, ms)?;
        return Ok(figures);
    }
    read(side, &mut figures, ms)?;
    look(side, &mut figures, ms)?;
    if arguments.write {
        write(side, &mut figures, ms)?;
        change(side, &mut figures, ms)?;
    }
    by_two(side, &mut figures, arguments)?;
    if arguments.socket.is_none() {
        foreign(&mut figures, ms)?;
    }
    Ok(figures)
}

/// A generator that costs next to nothing.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 20
}

fn read<S: Side>(side: &S, figures: &mut Figures, ms: u64) -> Outcome<()> {
    let file = side.open("large", libc::O_RDONLY)?;
    let mut buffer = vec![0; 1 << 20];
    for at in (0..LARGE_BYTES).step_by(1 << 20) {
        side.pread(&file, &mut buffer, at)?;
    }
    for (name, bytes) in
        [("pread 1 B", 1), ("pread 4 KiB", 4096), ("pread 64 KiB", 64 << 10), ("pread 1 MiB", 1 << 20)]
    {
        let places = LARGE_BYTES / bytes.max(4096) as u64;
        let mut state = 1;
        time(figures, name, ms, || {
            let at = next(&mut state) % places * bytes.max(4096) as u64;
            side.pread(&file, &mut buffer[..bytes], at)
        })?;
        let mut at = 0;
        time(figures, &format!("{name}, in sequence"), ms, || {
            at = (at + bytes as u64) % (LARGE_BYTES - (1 << 20));
            side.pread(&file, &mut buffer[..bytes], at)
        })?;
    }
    side.close(file)
}

fn look<S: Side>(side: &S, figures: &mut Figures, ms: u64) -> Outcome<()> {
    time(figures, "stat", ms, || side.stat("names/0500"))?;
    time(figures, "stat missing", ms, || side.stat_missing("names/none"))?;
    time(figures, "access", ms, || side.access("names/0501"))?;
    let file = side.open("small", libc::O_RDONLY)?;
    time(figures, "fstat", ms, || side.fstat(&file))?;
    side.close(file)?;
    time(figures, "open+close", ms, || side.close(side.open("small", libc::O_RDONLY)?))?;
    let mut buffer = vec![0; 4096];
    time(figures, "open+read+close 4 KiB", ms, || {
        let file = side.open("small", libc::O_RDONLY)?;
        side.pread(&file, &mut buffer, 0)?;
        side.close(file)
    })?;
    time(figures, "readdir 1,000 names", ms, || side.list("names"))
}

fn write<S: Side>(side: &S, figures: &mut Figures, ms: u64) -> Outcome<()> {
    let bytes = vec![7; 4096];
    let file = side.open("scratch", CREATE)?;
    for block in 0..256 {
        side.pwrite(&file, &bytes, block * 4096)?;
    }
    let mut state = 1;
    time(figures, "pwrite 4 KiB", ms, || side.pwrite(&file, &bytes, next(&mut state) % 256 * 4096))?;
    side.close(file)?;
    let mut log = Log::begin(side, "appended")?;
    time(figures, "append 4 KiB", ms, || log.append(&bytes))?;
    log.end()?;
    side.unlink("scratch")
}

/// Names that come, go and move.
fn change<S: Side>(side: &S, figures: &mut Figures, ms: u64) -> Outcome<()> {
    let bytes = vec![7; 4096];
    side.close(side.open("scratch", CREATE)?)?;
    time(figures, "create+unlink", ms, || {
        side.close(side.open("new", CREATE)?)?;
        side.unlink("new")
    })?;
    time(figures, "create+write 4 KiB+close, unlink", ms, || {
        let file = side.open("new", CREATE)?;
        side.pwrite(&file, &bytes, 0)?;
        side.close(file)?;
        side.unlink("new")
    })?;
    let mut names = ["moved", "scratch"];
    time(figures, "rename", ms, || {
        names.swap(0, 1);
        side.rename(names[0], names[1])
    })?;
    side.unlink(names[1])
}

const CREATE: i32 = libc::O_RDWR | libc::O_CREAT;

/// A file that grows, begun anew now and then, since the disk is small.
struct Log<'a, S: Side> {
    side: &'a S,
    name: String,
    file: Option<S::Handle>,
    appended: u64,
}

impl<'a, S: Side> Log<'a, S> {
    const FLAGS: i32 = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_TRUNC;

    fn begin(side: &'a S, name: &str) -> Outcome<Self> {
        let file = Some(side.open(name, Self::FLAGS)?);
        Ok(Self { side, name: name.to_owned(), file, appended: 0 })
    }

    fn append(&mut self, bytes: &[u8]) -> Outcome<()> {
        self.appended += 1;
        if self.appended % APPENDS == 0 {
            self.file.take().map_or(Ok(()), |full| self.side.close(full))?;
            self.file = Some(self.side.open(&self.name, Self::FLAGS)?);
        }
        self.file.as_ref().map_or(Ok(()), |file| self.side.pwrite(file, bytes, 0))
    }

    fn end(mut self) -> Outcome<()> {
        self.file.take().map_or(Ok(()), |file| self.side.close(file))?;
        self.side.unlink(&self.name)
    }
}

/// The same by two threads at once, each on a file of its own where files are changed: nanoseconds that a call of one takes.
fn by_two<S: Side>(side: &S, figures: &mut Figures, arguments: &Arguments) -> Outcome<()> {
    let ms = arguments.time_ms;
    pair(figures, "pread 4 KiB", ms, |thread| {
        let file = side.open("large", libc::O_RDONLY)?;
        let (mut buffer, mut state) = (vec![0; 4096], thread as u64 + 1);
        let places = LARGE_BYTES / 4096;
        Ok(move || side.pread(&file, &mut buffer, next(&mut state) % places * 4096))
    })?;
    pair(figures, "stat", ms, |thread| Ok(move || side.stat(["names/0500", "names/0600"][thread])))?;
    pair(figures, "open+read+close 4 KiB", ms, |_| {
        let mut buffer = vec![0; 4096];
        Ok(move || {
            let file = side.open("small", libc::O_RDONLY)?;
            side.pread(&file, &mut buffer, 0)?;
            side.close(file)
        })
    })?;
    if !arguments.write {
        return Ok(());
    }
    let bytes = [7; 4096];
    pair(figures, "pwrite 4 KiB", ms, |thread| {
        let file = side.open(&format!("pair{thread}"), CREATE)?;
        for block in 0..256 {
            side.pwrite(&file, &bytes, block * 4096)?;
        }
        let mut state = 1;
        Ok(move || side.pwrite(&file, &bytes, next(&mut state) % 256 * 4096))
    })?;
    pair(figures, "append 4 KiB", ms, |thread| {
        let mut log = Log::begin(side, &format!("log{thread}"))?;
        Ok(move || log.append(&bytes))
    })?;
    pair(figures, "create+unlink", ms, |thread| {
        let name = format!("new{thread}");
        Ok(move || {
            side.close(side.open(&name, CREATE)?)?;
            side.unlink(&name)
        })
    })?;
    for (call, names) in [("pwrite", ["pair0", "pair1"]), ("append", ["log0", "log1"])] {
        if is_wanted(&format!("{call} 4 KiB, two threads")) {
            names.iter().try_for_each(|name| side.unlink(name))?;
        }
    }
    Ok(())
}

fn pair<W: FnMut() -> Outcome<()>>(
    figures: &mut Figures,
    name: &str,
    ms: u64,
    make: impl Fn(usize) -> Outcome<W> + Sync,
) -> Outcome<()> {
    let name = format!("{name}, two threads");
    if !is_wanted(&name) {
        return Ok(());
    }
    let start = Barrier::new(2);
    let run = |thread| -> Outcome<f64> {
        let made = make(thread);
        start.wait();
        let mut work = made?;
        let begun = Instant::now();
        let mut count = 0u64;
        while count % 16 != 0 || begun.elapsed().as_millis() < u128::from(ms) {
            work()?;
            count += 1;
        }
        Ok(begun.elapsed().as_nanos() as f64 / count.max(1) as f64)
    };
    let [one, two] = std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        let own = run(0);
        [own, other.join().unwrap_or_else(|_| Err("a thread panicked".into()))]
    });
    figures.insert(name, ((one? + two?) / 2.0).into());
    Ok(())
}

/// Calls that are not about files of ours: what looking at them costs.
fn foreign(figures: &mut Figures, ms: u64) -> Outcome<()> {
    time(figures, "close of no descriptor", ms, || {
        // SAFETY: there is no such descriptor.
        let closed = unsafe { libc::close(-1) };
        if closed < 0 { Ok(()) } else { Err("it was there".into()) }
    })?;
    let zero = std::fs::File::open("/dev/zero").map_err(|error| error.to_string())?;
    let mut byte = [0; 1];
    time(figures, "read 1 B of /dev/zero", ms, || {
        (&zero).read_exact(&mut byte).map_err(|error| error.to_string())
    })
}
