//! The private path from end to end: a keeper, its worker, and programs that connect to them.
//!
//! The keeper looks at the mount table of the process that connects, so each test is a process of its own, in a mount namespace of its
//! own: this program runs itself once for each.

mod answers;
mod copies;
mod held;
mod hostile;
mod lookups;
mod modes;
mod posting;
mod reading;
mod sharing;
mod state;
mod support;
mod takeover;
mod threads;
mod writing;

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// Names the test that this process is to run.
const INSIDE: &str = "POLYTROPO_TEST_INSIDE";
const TEST_TIME_MAX: Duration = Duration::from_secs(60);
/// Of those that go through thousands of orders.
const WALK_TIME_MAX: Duration = Duration::from_secs(1800);

type Test = (&'static str, fn());

fn tests() -> Vec<Test> {
    let all = [
        reading::TESTS,
        writing::TESTS,
        posting::TESTS,
        held::TESTS,
        lookups::TESTS,
        answers::TESTS,
        hostile::TESTS,
        sharing::TESTS,
        threads::TESTS,
        state::TESTS,
        copies::TESTS,
        takeover::TESTS,
        modes::TESTS,
    ];
    all.concat()
}

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(INSIDE) {
        let found = tests().into_iter().find(|(known, _)| *known == name);
        let (_, test) = found.expect("a test of that name");
        support::own_mount_namespace();
        test();
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filter = arguments.iter().find(|argument| !argument.starts_with('-'));
    let chosen =
        tests().into_iter().filter(|(name, _)| filter.is_none_or(|part| name.contains(part.as_str())));
    if arguments.iter().any(|argument| argument == "--list") {
        chosen.for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if let Some(reason) = support::why_not() {
        println!("channel tests: skipped, {reason}");
        return ExitCode::SUCCESS;
    }
    let long = arguments.iter().any(|argument| argument == "--include-ignored");
    let (mut passed, mut failed) = (0, 0);
    for (name, _) in chosen {
        let good = run(name, long);
        println!("test channel::{name} ... {}", if good { "ok" } else { "FAILED" });
        if good { passed += 1 } else { failed += 1 }
    }
    println!("channel tests: {passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(name: &str, long: bool) -> bool {
    let own = std::env::current_exe().expect("find this program");
    let mut command = Command::new(own);
    if long && std::env::var_os(modes::LENGTH).is_none() {
        command.env(modes::LENGTH, "3");
    }
    let mut child = command.env(INSIDE, name).spawn().expect("run this program");
    let time_max = if name.starts_with("modes_of_") { WALK_TIME_MAX } else { TEST_TIME_MAX };
    let deadline = Instant::now() + time_max;
    loop {
        if let Some(status) = child.try_wait().expect("wait for a test") {
            return status.success();
        }
        if Instant::now() > deadline {
            eprintln!("{name} took longer than {time_max:?} and is killed");
            let _ = child.kill();
            let _ = child.wait();
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
