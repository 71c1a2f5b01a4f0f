//! What the keeper knows of open files when a worker dies.

use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use polytropo_client::{At, Channel, Error};
use rustix::mm::{MapFlags, ProtFlags};
use serde_json::{Value, json};

use crate::Test;
use crate::support::{Forked, Site, fork_child};

pub const TESTS: &[Test] = &[
    ("the_keeper_lists_what_is_open", the_keeper_lists_what_is_open),
    (
        "the_list_of_a_killed_worker_is_what_programs_had_open",
        the_list_of_a_killed_worker_is_what_programs_had_open,
    ),
];

const RDWR: u32 = libc::O_RDWR as u32;
const RDONLY: u32 = libc::O_RDONLY as u32;
const OPEN_MAX: usize = 24;
const CHILDREN: usize = 3;

fn listed(site: &mut Site) -> Vec<Value> {
    let told = site.order(&json!({"op": "open_files", "mount": 1}));
    assert_eq!((told["untold"].as_u64(), told["damaged"].as_u64()), (Some(0), Some(0)), "{told}");
    let files = told["open_files"].as_array().unwrap().clone();
    assert_eq!(told["count"].as_u64(), Some(files.len() as u64));
    files
}

fn through(files: &[Value], door: &str) -> Vec<Value> {
    files.iter().filter(|file| file["through"] == door).cloned().collect()
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "it never happens");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn the_keeper_lists_what_is_open() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let data = site.directory("data");
    fs::write(data.join("file"), "content").unwrap();
    fs::create_dir(data.join("d")).unwrap();
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    assert_eq!(listed(&mut site), [] as [Value; 0]);
    let channel = site.connect(&mnt);
    let file = channel.open(At::Root, b"file", RDONLY, 0, 0).unwrap().file;
    let directory = channel.open(At::Root, b"d", RDONLY, 0, 0).unwrap().file;
    let kernels =
        fs::OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(mnt.join("file")).unwrap();
    let files = listed(&mut site);
    let [fuse] = &through(&files, "fuse")[..] else { panic!("{files:?}") };
    assert_eq!((&fuse["kind"], &fuse["uid"], &fuse["bytes"]), (&json!("file"), &json!(0), &json!("cached")));
    let of_host = fs::metadata(data.join("file")).unwrap().ino();
    assert_eq!(fuse["ino"].as_u64(), Some(of_host));
    let channels = through(&files, "channel");
    assert_eq!(channels.len(), 2);
    let of_file = channels.iter().find(|found| found["kind"] == "file").unwrap();
    assert_eq!(of_file["ino"].as_u64(), Some(of_host));
    assert_eq!(of_file["pid"].as_u64(), Some(std::process::id().into()));
    assert_eq!(of_file["node"], fuse["node"]);
    assert!(channels.iter().any(|found| found["kind"] == "directory"));
    channel.close(file).unwrap();
    channel.close(directory).unwrap();
    drop(kernels);
    // The kernel says so a moment later.
    wait_until(|| listed(&mut site).is_empty());
}

/// What one child has open, in memory shared with its parent.
#[derive(Default)]
#[repr(C)]
struct Diary {
    /// Numbers of open files of the channel; 0 for none.
    numbers: [AtomicU64; OPEN_MAX],
    /// Inodes of the host's that are open through the kernel, plus one.
    inodes: [AtomicU64; OPEN_MAX],
    stop: AtomicU32,
}

fn diaries() -> &'static [Diary; CHILDREN] {
    let bytes = size_of::<[Diary; CHILDREN]>();
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a new mapping, never unmapped, of zeroes, which are good atomics.
    unsafe { &*rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags).unwrap().cast() }
}

/// Opens and closes until the service is gone. Writes down what is open after it was opened, and strikes it out before it is closed.
fn open_and_close(mnt: &Path, channel: &Channel, diary: &Diary, seed: u64) {
    let mut files: [Option<fs::File>; OPEN_MAX] = [const { None }; OPEN_MAX];
    let mut state = seed * 7919 + 1;
    while diary.stop.load(SeqCst) == 0 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (place, name) = ((state >> 33) as usize % OPEN_MAX, format!("file-{}", (state >> 50) % 8));
        if state >> 62 == 0 {
            diary.inodes[place].store(0, SeqCst);
            files[place] = None;
            let Ok(file) = fs::File::open(mnt.join(name)) else { break };
            let Ok(found) = file.metadata() else { break };
            diary.inodes[place].store(found.ino() + 1, SeqCst);
            files[place] = Some(file);
            continue;
        }
        let number = diary.numbers[place].swap(0, SeqCst);
        if number != 0 {
            // Gone: what was open stays in the list, which may tell more than is open.
            let _ = channel.close(polytropo_client::File::from_number(number));
        }
        match channel.open(At::Root, name.as_bytes(), if state & 1 == 0 { RDWR } else { RDONLY }, 0, 0) {
            Ok(opened) => diary.numbers[place].store(opened.file.to_number(), SeqCst),
            Err(Error::Kernel) => {}
            Err(_) => break,
        }
    }
    // Held open until the parent has compared.
    while diary.stop.load(SeqCst) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn kill_in_the_middle(round: u64) {
    // The list stays that of the dead: no other worker takes over.
    let mut site = Site::start_with(&["--channel-writes", "--restarts=0"]);
    let data = site.directory("data");
    (0..8).for_each(|number| fs::write(data.join(format!("file-{number}")), "content").unwrap());
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    let diaries = diaries();
    let children: Vec<Forked> = (0..CHILDREN)
        .map(|child| {
            fork_child(|| {
                let seed = round * 31 + child as u64;
                open_and_close(&mnt, &site.connect(&mnt), &diaries[child], seed);
            })
        })
        .collect();
    let busy = |diary: &Diary| diary.numbers.iter().filter(|number| number.load(SeqCst) != 0).count() > 4;
    wait_until(|| diaries.iter().all(busy));
    std::thread::sleep(Duration::from_micros(round * 1_700));
    let worker = site.order(&json!({"op": "status"}))["worker_pid"].as_i64().unwrap();
    let worker = rustix::process::Pid::from_raw(worker as i32).unwrap();
    rustix::process::kill_process(worker, rustix::process::Signal::KILL).unwrap();
    wait_until(|| site.order(&json!({"op": "list"}))["mounts"][0]["dead"] == true);
    // The programs notice; their diaries stand still.
    let snapshot = || -> Vec<u64> {
        let words = diaries.iter().flat_map(|diary| diary.numbers.iter().chain(&diary.inodes));
        words.map(|word| word.load(SeqCst)).collect()
    };
    let mut before = Vec::new();
    wait_until(|| {
        std::thread::sleep(Duration::from_millis(150));
        let now = snapshot();
        std::mem::replace(&mut before, now.clone()) == now
    });
    let files = listed(&mut site);
    let found = through(&files, "channel");
    let mut expected = 0;
    for (diary, child) in diaries.iter().zip(&children) {
        let own: Vec<_> = found.iter().filter(|file| file["pid"] == child.pid()).collect();
        for number in diary.numbers.iter().map(|number| number.load(SeqCst)).filter(|number| *number != 0) {
            expected += 1;
            assert!(own.iter().any(|file| file["number"] == number), "{number:#x} is not listed: {own:?}");
        }
    }
    // More stands there only of what was under way: an open that was not answered, closes that were posted.
    let spare = CHILDREN * (1 + polytropo_wire::channel::SLOTS);
    assert!(found.len() <= expected + spare, "{} are listed, {expected} were open", found.len());
    let fuse = through(&files, "fuse");
    for inode in diaries.iter().flat_map(|diary| &diary.inodes).map(|inode| inode.load(SeqCst)) {
        assert!(
            inode == 0 || fuse.iter().any(|file| file["ino"] == inode - 1),
            "{inode} is not listed: {fuse:?}"
        );
    }
    diaries.iter().for_each(|diary| diary.stop.store(1, SeqCst));
    children.into_iter().for_each(|child| assert!(child.wait()));
}

fn the_list_of_a_killed_worker_is_what_programs_had_open() {
    (0..8).for_each(kill_in_the_middle);
}
