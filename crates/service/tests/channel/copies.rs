//! By what bytes are copied, and that what was copied is told.

use std::fs;
use std::path::Path;

use polytropo_client::{At, Channel};
use polytropo_copy::features::{Features, Processor};
use polytropo_copy::plan::Situation;
use polytropo_copy::variant::Variant;
use serde_json::{Value, json};

use crate::Test;
use crate::support::{Site, pattern};

pub const TESTS: &[Test] = &[
    ("every_engine_copies_rightly", every_engine_copies_rightly),
    ("a_plan_reaches_the_worker_and_programs", a_plan_reaches_the_worker_and_programs),
    ("a_plan_that_lies_is_ignored", a_plan_that_lies_is_ignored),
    ("copies_are_counted", copies_are_counted),
];

const SIZE_BYTES: usize = 3 << 20;

/// Reads at sizes of all kinds, by windows and carried.
fn read_all(channel: &Channel) {
    let large = channel.open(At::Root, b"large", libc::O_RDONLY as u32, 0, 0).unwrap().file;
    let small = channel.open(At::Root, b"small", libc::O_RDONLY as u32, 0, 0).unwrap().file;
    for size in [1, 63, 64, 100, 4096, 65_536, 70_000, 1 << 20, SIZE_BYTES] {
        let mut bytes = vec![0; size];
        let at = (SIZE_BYTES - size) as u64 / 2;
        assert_eq!(channel.pread(large, &mut bytes, at).unwrap(), size);
        assert!(bytes == pattern(1, at, size), "{size} bytes");
        let count = channel.pread(small, &mut bytes, 3).unwrap();
        assert!(bytes[..count] == pattern(2, 3, 4093)[..count] && count == size.min(4093), "{size} bytes");
    }
}

fn write_and_read(channel: &Channel, path: &Path) {
    let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
    let file = channel.open(At::Root, b"made", flags, 0o644, 0).unwrap().file;
    for (seed, size) in [(3, 1), (4, 64), (5, 4096), (6, 300_000)] {
        let bytes = pattern(seed, 0, size);
        assert_eq!(channel.pwrite(file, &bytes, 0).unwrap(), size);
        // The host sees what was posted a little later.
        channel.fsync(file, true).unwrap();
        assert!(fs::read(path).unwrap()[..size] == bytes, "{size} bytes");
        let mut back = vec![0; size];
        assert_eq!(channel.pread(file, &mut back, 0).unwrap(), size);
        assert!(back == bytes, "{size} bytes");
    }
}

fn fill(directory: &Path) {
    fs::write(directory.join("large"), pattern(1, 0, SIZE_BYTES)).unwrap();
    fs::write(directory.join("small"), pattern(2, 0, 4096)).unwrap();
}

fn every_engine_copies_rightly() {
    for engine in ["tuned", "libc", "kernel"] {
        let choice = format!("--copy-engine={engine}");
        let mut site = Site::start_with(&["--channel-writes", &choice]);
        fill(&site.directory("layer"));
        let layer = site.mount("layer", json!({"read_only": true, "coherence": "immutable"}));
        let plain = site.mount("plain", json!({"coherence": "exclusive"}));
        let channel = site.connect(&layer);
        // By memcpy(3) at first, then by the plan.
        read_all(&channel);
        assert!(!channel.follows_plan());
        (0..4).for_each(|_| read_all(&channel));
        assert!(channel.follows_plan());
        write_and_read(&site.connect(&plain), &site.scratch.join("plain/made"));
    }
}

/// Anonymous memory of the worker that can be executed, as lines of /proc/PID/maps; asserts that none can be written as well.
fn emitted_code(site: &mut Site) -> Vec<String> {
    let worker = site.order(&json!({"op": "stats"}))["worker_pid"].as_u64().unwrap();
    let maps = fs::read_to_string(format!("/proc/{worker}/maps")).unwrap();
    let executable = maps.lines().filter(|line| line.contains("xp ") && line.contains(" 00:00 0"));
    let emitted: Vec<_> =
        executable.filter(|line| !line.contains("[v")).map(|line| line.trim().to_owned()).collect();
    assert!(!maps.lines().any(|line| line.contains("wxp ")), "{maps}");
    emitted
}

/// A plan of this machine with one more line, in a directory of plans.
fn plans_with(site_of: &Path, line: &str) {
    let mut text = String::new();
    let (text_of, problem) = polytropo_service::copies::read(Default::default(), None);
    assert!(problem.is_none());
    text.push_str(&text_of.unwrap());
    let here = polytropo_service::copies::surroundings();
    let told = format!("microcode {:#x}\n", here.microcode);
    text = text.replace("microcode 0x0\n", &told);
    let [l1, l2, l3] = here.caches_bytes;
    text = text.replace("caches 0 0 0\n", &format!("caches {l1} {l2} {l3}\n"));
    let p = Processor::detect();
    let name = format!("{}-{}-{}-{}.plan", p.vendor_str(), p.family, p.model, p.stepping);
    fs::write(site_of.join(name), text.replace("end\n", &format!("{line}\nend\n"))).unwrap();
}

fn a_plan_reaches_the_worker_and_programs() {
    let plans = tempfile::tempdir().unwrap();
    plans_with(plans.path(), "plain hot 4096 v16.b256.dst");
    let place = format!("--tuning-dir={}", plans.path().display());
    let mut site = Site::start_with(&[&place]);
    fill(&site.directory("layer"));
    let layer = site.mount("layer", json!({"read_only": true, "coherence": "immutable"}));
    let channel = site.connect(&layer);
    let searched = Variant::parse("v16.b256.dst").filter(|v| v.runs_on(Features::detect())).unwrap();
    assert_eq!(channel.variant(4096, Situation::Hot), Some(searched));
    assert_eq!(channel.variant(2048, Situation::Hot), Some(Variant::LIBRARY));
    (0..5).for_each(|_| read_all(&channel));
    assert_eq!(emitted_code(&mut site).len(), 1);
    drop(site);
    let mut site = Site::start_with(&["--copy-engine=libc", &place]);
    let layer = site.mount("layer", json!({"read_only": true, "coherence": "immutable"}));
    assert_eq!(site.connect(&layer).variant(4096, Situation::Hot), Some(Variant::LIBRARY));
    assert_eq!(emitted_code(&mut site), Vec::<String>::new());
}

fn a_plan_that_lies_is_ignored() {
    for line in ["plain hot 4096 v16.b257", "plain hot 4096 v64.b64.nt", "keep hot 64 v16.b64", "rm -rf /"] {
        let plans = tempfile::tempdir().unwrap();
        plans_with(plans.path(), line);
        let mut site = Site::start_with(&[&format!("--tuning-dir={}", plans.path().display())]);
        fill(&site.directory("layer"));
        let layer = site.mount("layer", json!({"read_only": true, "coherence": "immutable"}));
        let channel = site.connect(&layer);
        assert_eq!(channel.variant(4096, Situation::Hot), Some(Variant::LIBRARY));
        read_all(&channel);
    }
}

fn count(stats: &Value, situation: &str, size: &str) -> u64 {
    stats["mounts"][0]["copies"][situation][size].as_u64().unwrap_or_default()
}

fn copies_are_counted() {
    let mut site = Site::start();
    fill(&site.directory("layer"));
    let layer = site.mount("layer", json!({"read_only": true, "coherence": "immutable"}));
    let channel = site.connect(&layer);
    let large = channel.open(At::Root, b"large", libc::O_RDONLY as u32, 0, 0).unwrap().file;
    let mut bytes = vec![0; 5000];
    for _ in 0..100 {
        assert_eq!(channel.pread(large, &mut bytes, 0), Ok(5000));
    }
    let stats = site.order(&json!({"op": "stats"}));
    // Each read, and perhaps the look that finds nothing.
    assert!((100..=101).contains(&count(&stats, "read", "4096")), "{stats}");
    // The fill of the block.
    assert!(count(&stats, "handed", "65536") >= 1, "{stats}");
    // What a program counted stays when it is gone.
    drop(channel);
    let last = site.order(&json!({"op": "stats"}));
    assert_eq!(count(&last, "read", "4096"), count(&stats, "read", "4096"), "{last}");
}
