//! Programs that ask for what takes long, or for very much, and others beside them.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use polytropo_client::{At, Channel, Error};
use serde_json::{Value, json};

use crate::Test;
use crate::support::{Site, fork_child};

pub const TESTS: &[Test] = &[
    ("a_slow_fsync_holds_up_nobody", a_slow_fsync_holds_up_nobody),
    ("what_turns_out_slow_holds_up_its_own_channel_only", what_turns_out_slow_holds_up_its_own_channel_only),
    ("more_slow_requests_than_threads_are_all_answered", more_slow_requests_than_threads_are_all_answered),
    ("who_watches_waits_for_changes_under_way", who_watches_waits_for_changes_under_way),
    ("who_floods_does_not_starve_others", who_floods_does_not_starve_others),
];

const RDWR: u32 = libc::O_RDWR as u32;
const RDONLY: u32 = libc::O_RDONLY as u32;
/// Longer than any test: what is delayed so long is under way when the test ends.
const FOREVER_MS: u64 = 600_000;

fn faulty(site: &mut Site, operation: &str, delay_ms: u64) -> std::path::PathBuf {
    let data = site.directory("data");
    fs::write(data.join("file"), "content").unwrap();
    let below = json!({"kind": "dir", "path": data, "coherence": "shared"});
    let rules = json!([{"operation": operation, "delay_ms": delay_ms}]);
    site.mount_stack("faulty", &json!({"kind": "fault", "below": below, "rules": rules}))
}

fn told(site: &mut Site, what: &str) -> u64 {
    let stats: Value = site.order(&json!({"op": "stats"}));
    stats["mounts"][0]["channels"][what].as_u64().unwrap()
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "it never happens");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn stats_go_on(channel: &Channel) {
    for _ in 0..500 {
        assert_eq!(channel.stat(At::Root, b"file", 0).unwrap().size_bytes, 7);
    }
}

fn a_slow_fsync_holds_up_nobody() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let mnt = faulty(&mut site, "fsync", FOREVER_MS);
    let child = fork_child(|| {
        let channel = site.connect(&mnt);
        let file = channel.open(At::Root, b"file", RDWR, 0, 0).unwrap().file;
        let _ = channel.fsync(file, false);
    });
    wait_until(|| told(&mut site, "slow") == 1);
    let channel = Arc::new(site.connect(&mnt));
    stats_go_on(&channel);
    // Nor does a thread's hold up another thread of the same program.
    let other = channel.clone();
    std::thread::spawn(move || {
        let file = other.open(At::Root, b"file", RDWR, 0, 0).unwrap().file;
        let _ = other.fsync(file, false);
    });
    wait_until(|| told(&mut site, "slow") == 2);
    stats_go_on(&channel);
    child.kill();
    assert!(!child.wait(), "the fsync ended before its time");
}

fn what_turns_out_slow_holds_up_its_own_channel_only() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let mnt = faulty(&mut site, "open", FOREVER_MS);
    let requests = told(&mut site, "requests");
    let children: Vec<_> = (0..3)
        .map(|_| {
            fork_child(|| {
                let _ = site.connect(&mnt).open(At::Root, b"file", RDONLY, 0, 0);
            })
        })
        .collect();
    wait_until(|| told(&mut site, "requests") == requests + 3);
    stats_go_on(&site.connect(&mnt));
    children.iter().for_each(|child| child.kill());
    children.into_iter().for_each(|child| assert!(!child.wait(), "the open ended before its time"));
}

fn more_slow_requests_than_threads_are_all_answered() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let mnt = faulty(&mut site, "fsync", 300);
    let channel = Arc::new(site.connect(&mnt));
    let file = channel.open(At::Root, b"file", RDWR, 0, 0).unwrap().file;
    let done = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..20)
        .map(|_| {
            let (channel, done) = (channel.clone(), done.clone());
            std::thread::spawn(move || {
                channel.fsync(file, false).unwrap();
                done.fetch_add(1, SeqCst);
            })
        })
        .collect();
    // Somebody has time for others in between.
    stats_go_on(&site.connect(&mnt));
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(done.load(SeqCst), 20);
    assert!(told(&mut site, "threads") <= 8);
    stats_go_on(&channel);
}

/// Of what changes after `watch` has returned the kernel tells; what was let through before is done by then.
fn who_watches_waits_for_changes_under_way() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let mnt = faulty(&mut site, "mkdir", 1500);
    let requests = told(&mut site, "requests");
    let child = fork_child(|| assert_eq!(site.connect(&mnt).mkdir(At::Root, b"made", 0o755, 0), Ok(())));
    wait_until(|| told(&mut site, "requests") == requests + 1);
    let channel = site.connect(&mnt);
    channel.watch().unwrap();
    assert!(site.scratch.join("data/made").exists(), "a change that was under way is seen by nobody");
    assert_eq!(channel.mkdir(At::Root, b"more", 0o755, 0), Err(Error::Kernel));
    assert!(child.wait());
}

fn flood(channel: &Channel) {
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let file = channel.open(At::Root, b"file", RDONLY, 0, 0).unwrap().file;
                    channel.close(file).unwrap();
                }
            });
        }
    });
}

fn who_floods_does_not_starve_others() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let data = site.directory("data");
    fs::write(data.join("file"), "content").unwrap();
    let mnt: &Path = &site.mount("data", json!({"coherence": "shared"}));
    let floods: Vec<_> = (0..3).map(|_| fork_child(|| flood(&site.connect(mnt)))).collect();
    let quiet = told(&mut site, "requests");
    wait_until(|| told(&mut site, "requests") > quiet + 10_000);
    stats_go_on(&site.connect(mnt));
    floods.iter().for_each(|flood| flood.kill());
    floods.into_iter().for_each(|flood| assert!(!flood.wait()));
    wait_until(|| told(&mut site, "channels") == 0);
}
