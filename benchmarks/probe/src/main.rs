//! Times file operations through plain system calls, for the benchmarks: Python's own cost of a call would hide
//! what is measured. Prints one JSON object: nanoseconds a unit of work and how much work was done.

mod measure;
mod together;
mod work;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

/// Time one kind of file operation and print JSON.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    work: Work,
}

#[derive(Subcommand)]
enum Work {
    /// lstat every entry below DIRECTORY.
    Walk { directory: PathBuf },
    /// Read every regular file below DIRECTORY.
    ReadTree { directory: PathBuf },
    /// Read FILE from the beginning to the end, several times.
    ReadSequential {
        file: PathBuf,
        #[arg(long, default_value_t = 1 << 20)]
        block_bytes: usize,
        #[arg(long, default_value_t = 1)]
        rounds: usize,
    },
    /// Read random blocks of FILE.
    ReadRandom {
        file: PathBuf,
        #[arg(long, default_value_t = 4096)]
        block_bytes: usize,
        #[arg(long, default_value_t = 20_000)]
        count: usize,
    },
    /// Write FILE anew from the beginning to SIZE, fsync included.
    WriteSequential {
        file: PathBuf,
        #[arg(long)]
        size_bytes: u64,
        #[arg(long, default_value_t = 1 << 20)]
        block_bytes: usize,
    },
    /// Overwrite random blocks of FILE in place, fsync included.
    WriteRandom {
        file: PathBuf,
        #[arg(long, default_value_t = 4096)]
        block_bytes: usize,
        #[arg(long, default_value_t = 20_000)]
        count: usize,
    },
    /// Create COUNT files of 1 KiB in DIRECTORY, stat each, unlink each: three figures.
    CreateStatUnlink {
        directory: PathBuf,
        #[arg(long, default_value_t = 5000)]
        count: usize,
    },
    /// Read random blocks of FILE past the cache, then create, stat and unlink files in DIRECTORY, by several threads: two figures.
    Together {
        file: PathBuf,
        directory: PathBuf,
        #[arg(long, default_value_t = 2)]
        threads: usize,
        #[arg(long, default_value_t = 400)]
        duration_ms: u64,
    },
    /// Open FILE for writing and change one block in its middle.
    FirstWrite { file: PathBuf },
}

fn main() {
    let outcome = match Arguments::parse().work {
        Work::Walk { directory } => work::walk(&directory),
        Work::ReadTree { directory } => work::read_tree(&directory),
        Work::ReadSequential { file, block_bytes, rounds } => {
            work::read_sequential(&file, block_bytes, rounds)
        }
        Work::ReadRandom { file, block_bytes, count } => work::read_random(&file, block_bytes, count),
        Work::WriteSequential { file, size_bytes, block_bytes } => {
            work::write_sequential(&file, size_bytes, block_bytes)
        }
        Work::WriteRandom { file, block_bytes, count } => work::write_random(&file, block_bytes, count),
        Work::CreateStatUnlink { directory, count } => work::create_stat_unlink(&directory, count),
        Work::Together { file, directory, threads, duration_ms } => {
            together::both(&file, &directory, threads, Duration::from_millis(duration_ms))
        }
        Work::FirstWrite { file } => work::first_write(&file),
    };
    match outcome {
        Ok(figures) => println!("{}", measure::to_json(&figures)),
        Err(problem) => {
            eprintln!("probe: {problem}");
            std::process::exit(1);
        }
    }
}
