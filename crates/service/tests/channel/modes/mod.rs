//! Orders of two and three things that programs do to one file (`events`), each on a file of its own: on a mount, and on a directory of the
//! host beside it. After each the errors are the same, whoever holds the file sees the same bytes as there (or, of a file that the kernel
//! passes through, the image's: `rules` say who), and the service has decided as the rules say.

mod events;
mod holders;
mod program;
mod rules;
mod walk;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::json;

use crate::Test;
use crate::support::Site;
use events::{EVENTS, Event, SIZE_MIN_BYTES};
use walk::{Ground, walk};

pub const TESTS: &[Test] = &[
    ("modes_of_an_image_passed_through", || every_order_on(PASSED_THROUGH)),
    ("modes_of_an_image_with_channels", || every_order_on(WITH_CHANNELS)),
    ("modes_of_an_image", || every_order_on(PLAIN)),
    ("modes_of_a_directory_with_channels", || every_order_on(DIRECTORY_WITH_CHANNELS)),
    ("modes_of_a_directory", || every_order_on(DIRECTORY)),
    ("modes_of_an_image_over_rings", modes_of_an_image_over_rings),
];

/// Of the orders that are gone through; all of three in the long form of the tests.
pub const LENGTH: &str = "POLYTROPO_WALK_LENGTH";

/// How many walks may fail before the others are not tried any more.
const FAILURES_TOLD_MAX: u32 = 40;

/// A mount to walk on.
#[derive(Clone, Copy, Debug)]
struct Setting {
    /// A lower directory has the files; else they are the mount's own.
    image: bool,
    passthrough: bool,
    channels: bool,
    over_rings: bool,
    size_bytes: usize,
}

/// Travels in the reply to open.
const SMALL: usize = SIZE_MIN_BYTES;
/// Has a window.
const LARGE: usize = 70_000;

const PASSED_THROUGH: Setting =
    Setting { image: true, passthrough: true, channels: true, over_rings: false, size_bytes: LARGE };
const WITH_CHANNELS: Setting =
    Setting { image: true, passthrough: false, channels: true, over_rings: false, size_bytes: SMALL };
const PLAIN: Setting =
    Setting { image: true, passthrough: false, channels: false, over_rings: false, size_bytes: SMALL };
const DIRECTORY_WITH_CHANNELS: Setting =
    Setting { image: false, passthrough: false, channels: true, over_rings: false, size_bytes: LARGE };
const DIRECTORY: Setting =
    Setting { image: false, passthrough: false, channels: false, over_rings: false, size_bytes: LARGE };

/// All that mean something.
fn orders(length: usize, setting: Setting) -> Vec<Vec<Event>> {
    let mut orders = vec![vec![]];
    for _ in 0..length {
        let longer = orders.iter().flat_map(|order| {
            let fits = |event: &&Event| {
                let holds = order.iter().any(|event: &Event| !event.wants_holder());
                (holds || !event.wants_holder()) && (setting.channels || !event.is_of_channel())
            };
            EVENTS.iter().filter(fits).map(|event| [order.as_slice(), &[*event]].concat())
        });
        orders = longer.collect();
    }
    orders
}

fn make(directory: &Path, name: &str, bytes: &[u8]) {
    let path = directory.join(name);
    fs::write(&path, bytes).expect("make a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
}

/// All orders of two, and one of each sixteen of three; or all of as many as POLYTROPO_WALK_LENGTH says.
fn walks(setting: Setting) -> Vec<Vec<Event>> {
    match std::env::var(LENGTH) {
        Ok(length) => orders(length.parse().expect("a number"), setting),
        Err(_) => {
            let some = orders(3, setting).into_iter().step_by(16);
            orders(2, setting).into_iter().chain(some).collect()
        }
    }
}

fn every_order_on(setting: Setting) {
    let orders = walks(setting);
    let scratch = tempfile::tempdir().expect("make a directory");
    let [files, mirror, upper] = ["files", "mirror", "upper"].map(|name| scratch.path().join(name));
    for directory in [&files, &mirror, &upper] {
        fs::create_dir(directory).expect("make a directory");
    }
    let image = program::image(setting.size_bytes);
    for number in 0..orders.len() {
        make(&files, &number.to_string(), &image);
        make(&mirror, &number.to_string(), &image);
    }
    let root = if setting.image {
        let lower = json!({"kind": "dir", "path": files, "read_only": true, "coherence": "immutable"});
        let upper = json!({"kind": "dir", "path": upper, "coherence": "exclusive"});
        json!({"kind": "union", "lowers": [lower], "upper": upper})
    } else {
        json!({"kind": "dir", "path": files, "coherence": "exclusive"})
    };
    let mut stack = json!({"version": 1, "root": root});
    if setting.passthrough {
        stack["passthrough"] = json!(true);
        stack["passthrough_min_bytes"] = json!(0);
    }
    let mut arguments = vec!["--fuse-transport", if setting.over_rings { "uring" } else { "device" }];
    if setting.channels {
        arguments.push("--channel-writes");
    }
    let mut site = Site::start_with(&arguments);
    let mnt = site.mount_document("walks", &stack);
    let channel = setting.channels.then(|| site.connect(&mnt));
    let began = std::time::Instant::now();
    let ground = Ground { setting, image: &image, mnt: &mnt, mirror: &mirror, channel: channel.as_ref() };
    let mut failures = 0;
    for (number, order) in orders.iter().enumerate() {
        let number = number.to_string();
        let done = catch_unwind(AssertUnwindSafe(|| {
            walk(&mut site, &ground, &number, order);
            if setting.image {
                let below = fs::read(files.join(&number)).expect("read the image's file");
                assert!(below == image, "{order:?}: the image's file has changed");
            }
        }));
        failures += u32::from(done.is_err());
        assert!(failures < FAILURES_TOLD_MAX, "too many failures");
    }
    assert_eq!(failures, 0, "walks that failed");
    println!("{} orders in {:?}, with {setting:?}", orders.len(), began.elapsed());
}

/// FUSE over io_uring, with the kernel's switch on while the connection begins. Others who turn it wait.
fn modes_of_an_image_over_rings() {
    const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
    let Ok(before) = fs::read(SWITCH) else {
        println!("skipped: this kernel has no FUSE over io_uring");
        return;
    };
    let lock = fs::File::create("/tmp/polytropo-enable-uring.lock").expect("make the lock of the switch");
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).expect("lock the switch");
    if let Err(error) = fs::write(SWITCH, "Y") {
        println!("skipped: {SWITCH} cannot be set: {error}");
        return;
    }
    let done = catch_unwind(|| every_order_on(Setting { over_rings: true, ..PASSED_THROUGH }));
    fs::write(SWITCH, before).expect("put the switch back");
    done.unwrap_or_else(|cause| std::panic::resume_unwind(cause));
}
