//! Requests of all kinds with any words, answered as by the door's threads: whatever a program asks, nothing panics, nothing is left
//! behind and nothing outside of the stack changes. `POLYTROPO_MODEL_CASES` asks for more.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use polytropo_libservices::stack::StackDocument;
use polytropo_libservices::{Caller, FsCapabilities};
use polytropo_wire::channel::{AREA_BYTES, SLOTS};
use polytropo_wire::message::{Operation, REPLY_WORDS, REQUEST_WORDS};
use proptest::prelude::*;
use rustix::event::EventfdFlags;

use super::client::{Client, Peer};
use super::memory::{ChannelMemory, Request};
use super::operations::{Desk, Work};
use super::walk::Failure;
use super::*;
use crate::slabs::SmallFiles;

const CASES: u32 = 48;
const REQUESTS_MAX: usize = 60;
const NAMES: &[&[u8]] = &[
    b"",
    b"a",
    b"b",
    b"d",
    b"d/a",
    b"d/../b",
    b"../outside",
    b"/",
    b"/a",
    b".",
    b"..",
    b"d/.",
    b"a/",
    b"link",
    b"link/x",
    b"loop",
    b"away",
    b"\xff\xfe",
    b"a\0b",
    b"d//a",
    b"large",
];
const VALUES: &[u64] = &[
    0,
    1,
    2,
    3,
    4,
    7,
    0o100,
    0o101,
    0o1102,
    0o644,
    0o777,
    4095,
    4096,
    65_535,
    65_536,
    65_537,
    65_538,
    131_071,
    131_072,
    131_073,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

#[derive(Clone, Debug)]
struct Asked {
    operation: u32,
    slot: usize,
    words: [u64; REQUEST_WORDS],
    /// Put into the area, one after the other; their lengths become words of the request if it is to make sense.
    names: [usize; 2],
    sensible: bool,
}

fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => prop::sample::select(VALUES),
        // Numbers of open files.
        4 => (1..4u64, 0..6u64).prop_map(|(times, index)| times << 16 | index),
        1 => any::<u64>(),
    ]
}

fn asked() -> impl Strategy<Value = Asked> {
    let operations = Operation::ALL.len() as u32 + 2;
    let names = prop::array::uniform2(0..NAMES.len());
    (0..operations, 0..SLOTS, prop::array::uniform10(word()), names, prop::bool::weighted(0.8)).prop_map(
        |(operation, slot, words, names, sensible)| Asked { operation, slot, words, names, sensible },
    )
}

/// The words that tell of paths, where the operation has any.
fn make_sense(asked: &mut Asked, lengths: [u64; 2]) {
    let operation = Operation::from_number(asked.operation);
    let by_file = matches!(
        operation,
        Some(
            Operation::Close
                | Operation::Read
                | Operation::FileStatus
                | Operation::Write
                | Operation::Truncate
                | Operation::Sync
                | Operation::ReadDirectory
                | Operation::Window
                | Operation::Allocate
                | Operation::Seek
                | Operation::FileSystemStatus
        )
    );
    if by_file {
        return;
    }
    if asked.words[0] % 4 != 0 {
        asked.words[0] = 0;
    }
    asked.words[1] = lengths[0];
    if matches!(operation, Some(Operation::Rename | Operation::Link)) {
        (asked.words[2], asked.words[3]) = (0, lengths[1]);
    }
    if operation == Some(Operation::SymbolicLink) {
        (asked.words[1], asked.words[2]) = (lengths[1], lengths[0]);
    }
}

struct Site {
    scratch: tempfile::TempDir,
    shared: Arc<Shared>,
}

fn open(path: &Path) -> OwnedFd {
    fs::File::open(path).unwrap().into()
}

impl Site {
    fn new(union: bool) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        for name in ["lower", "upper", "windows", "windows/fuzz", "lower/d"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("outside"), "untouched").unwrap();
        for (name, bytes) in [("lower/a", 5), ("lower/d/a", 70_000), ("lower/large", 300_000)] {
            fs::write(at(name), vec![7; bytes]).unwrap();
        }
        for (target, name) in [("d", "link"), ("loop", "loop"), ("../outside", "away")] {
            std::os::unix::fs::symlink(target, at("lower").join(name)).unwrap();
        }
        let (document, roots) = if union {
            let text = r#"{"version":1,"root":{"kind":"union","lowers":[{"kind":"dir","path":"/l","read_only":true,
                "coherence":"immutable"}],"upper":{"kind":"dir","path":"/u","coherence":"exclusive"}}}"#;
            let document = StackDocument::parse(text).unwrap();
            let paths: Vec<_> = document.dirs().iter().map(|dir| dir.path.clone()).collect();
            let root =
                |path: &std::path::PathBuf| open(&at(if path.ends_with("l") { "lower" } else { "upper" }));
            let roots = paths.iter().map(root).collect();
            (document, roots)
        } else {
            let text = r#"{"version":1,"root":{"kind":"dir","path":"/l","coherence":"exclusive"}}"#;
            (StackDocument::parse(text).unwrap(), vec![open(&at("lower"))])
        };
        let stack = polytropo_libservices::build(&document, roots).unwrap();
        let store = Store::new(Some(open(&at("windows"))), 8 << 20);
        let slabs = store.slabs().expect("the cache is large enough").clone();
        let stack = SmallFiles::over(stack, slabs);
        let windows = WindowAccess { place: store.place("fuzz").unwrap(), store, shown: None };
        let options = ChannelOptions {
            modes: Modes::new(),
            kernel_tells: true,
            written_through: false,
            windows,
            settle: None,
            open_table: None,
            posting: None,
            custodian: None,
        };
        let shared = Shared::new(Epochs::over(stack), options, DoorId(7));
        Self { scratch, shared }
    }

    fn client(&self, caller: Caller) -> Arc<Client> {
        let event = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let peer = Peer {
            caller,
            read_only: false,
            is_root: true,
            covered: Vec::new(),
            device: 0,
            mount_id: 0,
            socket: event(),
            process: event(),
            mounts: event(),
        };
        let memory = ChannelMemory::new(Arc::default()).unwrap();
        Arc::new(Client::new((memory, None), event(), peer, self.shared.clone(), Default::default()))
    }

    fn answer(&self, client: &Arc<Client>, desk: &mut Desk, asked: &Asked) {
        let [first, second] = asked.names.map(|name| NAMES[name]);
        client.memory.put(asked.slot, 0, &[first, second].concat()).unwrap();
        let mut asked = asked.clone();
        if asked.sensible {
            make_sense(&mut asked, [first.len() as u64, second.len() as u64]);
        }
        let operation = Operation::from_number(asked.operation);
        let request = Request { slot: asked.slot, operation, words: asked.words };
        let reply = [0; REPLY_WORDS];
        let mut work = Work { door: &self.shared, client, desk, request, reply, notes: None, given: None };
        match work.run() {
            Err(Failure::Error(error)) => {
                let errno = error.errno().raw_os_error();
                assert!((1..4096).contains(&errno), "{asked:?}: {errno}");
                // What programs could not make of the kernel's own answers.
                assert_ne!(error.errno(), polytropo_libservices::Errno::STALE, "{asked:?}");
            }
            Err(Failure::Kernel) => {}
            Ok(()) => {
                let counted = matches!(
                    operation,
                    Some(Operation::Read | Operation::ReadDirectory | Operation::ReadLink | Operation::Write)
                );
                assert!(!counted || work.reply[0] <= AREA_BYTES as u64, "{asked:?}: {}", work.reply[0]);
            }
        }
        if let Some(given) = work.given.take() {
            work.read_ahead(&given);
        }
    }
}

fn run(union: bool, root: bool, requests: &[Asked]) {
    let site = Site::new(union);
    let caller = Caller { door: DoorId(7), ..Caller::service() };
    let other = Caller { uid: 1000, gid: 1000, capabilities: FsCapabilities::empty(), ..caller.clone() };
    let client = site.client(if root { caller } else { other });
    let mut desk = Desk::default();
    requests.iter().for_each(|asked| site.answer(&client, &mut desk, asked));
    drop(client);
    assert_eq!(fs::read(site.scratch.path().join("outside")).unwrap(), b"untouched");
    let mut names: Vec<_> =
        fs::read_dir(site.scratch.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["lower", "outside", "upper", "windows"]);
    // Nobody has anything open any more.
    assert_eq!(Arc::strong_count(&site.shared), 1);
}

#[test]
fn any_request_is_answered() {
    let given = std::env::var("POLYTROPO_MODEL_CASES").ok();
    let cases = given.map_or(CASES, |text| text.parse().expect("POLYTROPO_MODEL_CASES is a number"));
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) };
    let requests = prop::collection::vec(asked(), 1..REQUESTS_MAX);
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    runner
        .run(&(any::<bool>(), any::<bool>(), requests), |(union, root, requests)| {
            run(union, root, &requests);
            Ok(())
        })
        .unwrap();
}
