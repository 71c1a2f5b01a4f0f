//! Times the queues and their rivals, and writes what came out as JSON.

mod rivals;
mod run;
mod waited;

use clap::Parser;
use rivals::{bbq, crossbeam, michael_scott, ours, scq, spsc};
use run::{Machine, Method, Outcome, run};
use serde::Serialize;
use std::time::Duration;
use waited::Waited;

#[derive(Parser)]
struct Arguments {
    /// Where the JSON goes.
    #[arg(long)]
    output: std::path::PathBuf,
    /// Milliseconds of one run.
    #[arg(long, default_value_t = 120)]
    run_ms: u64,
    /// Runs of every combination; the rivals take turns.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Nanoseconds of work after each operation, on average; each takes between half and one and a half of it.
    #[arg(long, default_value_t = 100)]
    work_ns: u32,
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 32, 64])]
    threads: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_values_t = [8, 64, 4096])]
    sizes: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_values_t = [String::from("pairs"), String::from("split")])]
    methods: Vec<String>,
    /// Only queues whose name contains one of these.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

type Run = fn(Method, usize, Duration, &Machine) -> Outcome;

#[derive(Serialize)]
struct Measured {
    queue: &'static str,
    method: Method,
    threads: usize,
    item_bytes: usize,
    runs: Vec<Outcome>,
}

/// The rivals that take items of any size.
macro_rules! of_any_size {
    ($words:literal) => {{
        type T = [u64; $words];
        let queues: Vec<(&'static str, Run)> = vec![
            ("crossbeam ArrayQueue", run::<T, Waited<crossbeam::Array<T>>>),
            ("crossbeam channel", run::<T, Waited<crossbeam::Channel<T>>>),
            ("Michael-Scott", run::<T, Waited<michael_scott::MichaelScott<T>>>),
            ("SCQ", run::<T, Waited<scq::Scq<T>>>),
            ("BBQ", run::<T, Waited<bbq::Bbq<T>>>),
            ("SPSC + doorbell", run::<T, Waited<spsc::Spsc<T>>>),
            #[cfg(feature = "cpp")]
            ("moodycamel", run::<T, Waited<rivals::cpp::Moodycamel<T>>>),
            #[cfg(feature = "cpp")]
            ("Boost lockfree", run::<T, Waited<rivals::cpp::Boost<T>>>),
            ("RCQB", run::<T, ours::Bytes<2>>),
            ("RCQB, one lane", run::<T, ours::Bytes<1>>),
        ];
        queues
    }};
}

fn queues(size: usize) -> Vec<(&'static str, Run)> {
    match size {
        8 => {
            let mut queues = of_any_size!(1);
            queues.extend([
                ("RCQS", run::<[u64; 1], ours::Single<2>> as Run),
                ("RCQS, free lanes", run::<[u64; 1], ours::Single<2, { ours::FREE }>>),
                ("RCQS, one lane", run::<[u64; 1], ours::Single<1>>),
                ("RCQS, skew 64", run::<[u64; 1], ours::Single<2, 64>>),
                ("RCQS, one lane, own lines", run::<[u64; 1], ours::Single<1, 1, false>>),
                ("RCQD", run::<[u64; 1], ours::Double<2>>),
                ("RCQD, one lane", run::<[u64; 1], ours::Double<1>>),
            ]);
            queues
        }
        64 => of_any_size!(8),
        4096 => of_any_size!(512),
        _ => panic!("items of {size} bytes are not among those that were compiled: 8, 64, 4096"),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments = Arguments::parse();
    let machine = Machine::measure(arguments.work_ns);
    let time = Duration::from_millis(arguments.run_ms);
    let mut all = Vec::new();
    for &size in &arguments.sizes {
        let wanted =
            |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|part| name.contains(part));
        let queues: Vec<_> = queues(size).into_iter().filter(|(name, _)| wanted(name)).collect();
        for method in &arguments.methods {
            let method = if method == "pairs" { Method::Pairs } else { Method::Split };
            for &threads in &arguments.threads {
                if method == Method::Split && threads < 2 {
                    continue;
                }
                let mut runs = vec![Vec::new(); queues.len()];
                for _ in 0..arguments.repeats {
                    for ((_, run), outcomes) in queues.iter().zip(&mut runs) {
                        outcomes.push(run(method, threads, time, &machine));
                    }
                }
                for ((queue, _), runs) in queues.iter().zip(runs) {
                    show(queue, method, threads, size, &runs);
                    all.push(Measured { queue, method, threads, item_bytes: size, runs });
                }
            }
        }
    }
    std::fs::write(&arguments.output, serde_json::to_string(&all)?)?;
    Ok(())
}

fn show(queue: &str, method: Method, threads: usize, size: usize, runs: &[Outcome]) {
    let median = |of: fn(&Outcome) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    };
    eprintln!(
        "{size:5} B {method:?} {threads:3} threads {queue:22} {:7.3} M/s {:8.1} cpu ns/item; median ns: put {:7.1} get {:7.1} transfer {:9.1}; sleeps {:.4} wakes {:.4}",
        median(|outcome| outcome.items_per_s) / 1e6,
        median(|outcome| outcome.cpu_ns_per_item),
        median(|outcome| outcome.put.median_ns),
        median(|outcome| outcome.get.median_ns),
        median(|outcome| outcome.transfer.median_ns),
        median(|outcome| outcome.sleeps_per_item),
        median(|outcome| outcome.wakes_per_item),
    );
}
