//! Every interleaving of small cases of the window protocol. Run with `RUSTFLAGS="--cfg modeled --cfg loom"`, as `make loom` does; otherwise
//! this file is empty.
//!
//! The file in the layer below is a version and a size under a lock; a block's words all say the version. A reader that begins
//! after a change was acknowledged must not see what was before it, and no reader may see a torn block.
#![cfg(loom)]

use loom::sync::{Arc, Mutex};
use loom::thread;
use polytropo_wire::sync::{AtomicU32, AtomicU64, Fault, Relaxed, plant};
use polytropo_wire::window::{BLOCK_BYTES, Changes, Found, Header, MAGIC, SIZE_UNKNOWN, View};

/// What a block holds whose memory was given back.
const PUNCHED: u64 = 999;
/// Words that stand for a block's bytes.
const WORDS: usize = 2;
const SIZE: u64 = 8;
/// The version that has no bytes.
const EMPTY: u64 = 9;

/// The layer's file: its version and its size.
#[derive(Clone, Copy)]
struct File {
    version: u64,
    size: u64,
}

/// A window of one block, with the layer's file below.
struct Model {
    file: Mutex<File>,
    /// The version that the layer's file has not got yet.
    held: Mutex<Option<u64>>,
    header: Header,
    words: [AtomicU64; 1],
    bytes: [AtomicU64; WORDS],
    changes: Mutex<Changes>,
    /// The last version that a writer was told is in place.
    acknowledged: AtomicU64,
}

impl Model {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            file: Mutex::new(File { version: 1, size: SIZE }),
            held: Mutex::new(None),
            header: Header {
                magic: AtomicU64::new(MAGIC),
                version: AtomicU32::new(polytropo_wire::VERSION),
                retired: AtomicU32::new(0),
                capacity_bytes: AtomicU64::new(BLOCK_BYTES),
                size_bytes: AtomicU64::new(SIZE_UNKNOWN),
            },
            words: [AtomicU64::new(0)],
            bytes: [AtomicU64::new(PUNCHED), AtomicU64::new(PUNCHED)],
            changes: Mutex::new(Changes::default()),
            acknowledged: AtomicU64::new(1),
        })
    }

    fn view(&self) -> View<'_> {
        View::new(&self.header, &self.words)
    }

    /// As `Windows::fetch` does.
    fn fetch(&self) {
        let seen = self.changes.lock().unwrap().count();
        if self.view().size_bytes().is_none() {
            let size = self.file.lock().unwrap().size;
            self.view().set_size(&self.changes.lock().unwrap(), seen, size);
        }
        let seen = self.changes.lock().unwrap().count();
        let version = self.current();
        let changes = self.changes.lock().unwrap();
        let put = || {
            self.bytes.iter().for_each(|word| word.store(version, Relaxed));
            Ok::<(), ()>(())
        };
        self.view().fill(&changes, seen, 0, put).unwrap();
    }

    /// What a read through the service finds: what is held, else the layer's; nothing is written back in between.
    fn current(&self) -> u64 {
        let held = self.held.lock().unwrap();
        let below = self.file.lock().unwrap().version;
        held.unwrap_or(below)
    }

    /// A posted write that is held, as `Putting` and `Window::change` do it.
    fn hold(&self, version: u64) {
        let mut held = self.held.lock().unwrap();
        *held = Some(version);
        let put = |_, _| self.bytes.iter().for_each(|word| word.store(version, Relaxed));
        self.view().change(&mut self.changes.lock().unwrap(), (0, SIZE), SIZE, put);
        drop(held);
        self.acknowledged.store(version, polytropo_wire::sync::Release);
    }

    /// The layer gets what is held, which stays where it is meanwhile.
    fn write_back(&self) {
        let Some(version) = *self.held.lock().unwrap() else { return };
        self.file.lock().unwrap().version = version;
        let mut held = self.held.lock().unwrap();
        if *held == Some(version) {
            *held = None;
        }
    }

    fn change(&self, version: u64, size: u64) {
        *self.file.lock().unwrap() = File { version, size };
        self.view().forget(&mut self.changes.lock().unwrap());
        self.acknowledged.store(version, polytropo_wire::sync::Release);
    }

    fn evict(&self) {
        let changes = self.changes.lock().unwrap();
        self.view().take_back(&changes, 0);
        self.bytes.iter().for_each(|word| word.store(PUNCHED, Relaxed));
    }

    fn hide(&self) {
        self.view().hide(&self.changes.lock().unwrap(), 0);
    }

    /// A reader asks for a block that may be hidden.
    fn show_again(&self) {
        self.view().show_again(&self.changes.lock().unwrap(), 0);
    }

    /// Reads all; the version that was found.
    fn read(&self) -> (Found, u64) {
        let since = self.acknowledged.load(polytropo_wire::sync::Acquire);
        let mut words = [0; WORDS];
        let copy = |_: usize, _: u64, _: usize| {
            for (word, place) in words.iter_mut().zip(&self.bytes) {
                *word = place.load(Relaxed);
            }
        };
        let found = self.view().read(SIZE as usize, 0, copy);
        if let Found::Bytes(count) = found {
            let version = if count == 0 { EMPTY } else { words[0] };
            assert_eq!(count == 0, version == EMPTY, "bytes of one version, size of another");
            assert!(count == 0 || words.iter().all(|word| *word == version), "torn: {words:?}");
            assert_ne!(version, PUNCHED, "nobody's bytes");
            assert!(version >= since, "{version} was gone when {since} was acknowledged");
            return (found, version);
        }
        (found, 0)
    }
}

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 20_000;
    builder.check(model);
}

fn reader_and_writer() {
    explore(|| {
        let model = Model::new();
        model.fetch();
        let writer = {
            let model = model.clone();
            thread::spawn(move || {
                model.change(2, SIZE);
                model.fetch();
            })
        };
        model.read();
        writer.join().unwrap();
        assert_eq!(model.read(), (Found::Bytes(SIZE as usize), 2));
    });
}

fn reader_and_evictor() {
    explore(|| {
        let model = Model::new();
        model.fetch();
        let evictor = {
            let model = model.clone();
            thread::spawn(move || {
                model.evict();
                model.fetch();
            })
        };
        model.read();
        evictor.join().unwrap();
        assert_eq!(model.read(), (Found::Bytes(SIZE as usize), 1));
    });
}

/// The service changes the file on one thread and fills the window on another, for a reader that missed.
fn filler_and_writer() {
    explore(|| {
        let model = Model::new();
        let filler = {
            let model = model.clone();
            thread::spawn(move || model.fetch())
        };
        model.change(2, SIZE);
        model.fetch();
        model.read();
        filler.join().unwrap();
        model.read();
    });
}

fn filler_evictor_and_reader() {
    explore(|| {
        let model = Model::new();
        model.fetch();
        let threads = [
            thread::spawn({
                let model = model.clone();
                move || model.fetch()
            }),
            thread::spawn({
                let model = model.clone();
                move || model.evict()
            }),
        ];
        model.read();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        model.read();
    });
}

/// A file is cut to nothing; later bytes of it are another version's.
fn reader_and_truncation() {
    explore(|| {
        let model = Model::new();
        model.fetch();
        let cutter = {
            let model = model.clone();
            thread::spawn(move || {
                model.change(EMPTY, 0);
                model.fetch();
            })
        };
        model.read();
        cutter.join().unwrap();
        assert_eq!(model.read(), (Found::Bytes(0), EMPTY));
    });
}

/// The size is asked for while the file is cut.
fn filler_and_truncation() {
    explore(|| {
        let model = Model::new();
        let filler = {
            let model = model.clone();
            thread::spawn(move || model.fetch())
        };
        model.change(EMPTY, 0);
        model.fetch();
        model.read();
        filler.join().unwrap();
        model.read();
    });
}

fn reader_and_retirement() {
    explore(|| {
        let model = Model::new();
        model.fetch();
        let retirer = {
            let model = model.clone();
            thread::spawn(move || {
                // The file is somewhere else from here on, as when a layer above has its own copy of it.
                model.view().retire(&mut model.changes.lock().unwrap());
                model.acknowledged.store(2, polytropo_wire::sync::Release);
                // Another door may still fill it.
                model.fetch();
            })
        };
        model.read();
        retirer.join().unwrap();
        assert_eq!(model.read().0, Found::Retired);
    });
}

fn hider_and_writer() {
    explore(|| {
        let model = Model::new();
        model.fetch();
        let hider = {
            let model = model.clone();
            thread::spawn(move || {
                model.hide();
                model.show_again();
            })
        };
        model.change(2, SIZE);
        let size = model.file.lock().unwrap().size;
        model.view().set_size(&model.changes.lock().unwrap(), 1, size);
        model.read();
        hider.join().unwrap();
        model.read();
    });
}

fn hider_evictor_and_reader() {
    explore(|| {
        let model = Model::new();
        model.fetch();
        let threads = [
            thread::spawn({
                let model = model.clone();
                move || {
                    model.hide();
                    model.evict();
                }
            }),
            thread::spawn({
                let model = model.clone();
                move || model.show_again()
            }),
        ];
        model.read();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        model.read();
    });
}

fn holder_and_reader() {
    explore(|| {
        let model = Model::new();
        model.fetch();
        let holder = {
            let model = model.clone();
            thread::spawn(move || model.hold(2))
        };
        model.read();
        holder.join().unwrap();
        assert_eq!(model.read(), (Found::Bytes(SIZE as usize), 2));
    });
}

/// A block is filled while a write to it is held, and written back.
fn holder_and_filler() {
    explore(|| {
        let model = Model::new();
        let filler = {
            let model = model.clone();
            thread::spawn(move || model.fetch())
        };
        model.hold(2);
        model.write_back();
        model.read();
        filler.join().unwrap();
        model.read();
        model.fetch();
        assert_eq!(model.read(), (Found::Bytes(SIZE as usize), 2));
    });
}

/// Bytes that are held leave the window, and come again, while they go to the layer.
fn holder_evictor_and_write_back() {
    explore(|| {
        let model = Model::new();
        model.fetch();
        model.hold(2);
        let threads = [
            thread::spawn({
                let model = model.clone();
                move || {
                    model.evict();
                    model.fetch();
                }
            }),
            thread::spawn({
                let model = model.clone();
                move || model.write_back()
            }),
        ];
        model.read();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        model.read();
        // Whoever comes by another door finds it there.
        assert_eq!(model.file.lock().unwrap().version, 2);
    });
}

/// A write comes while the one before it goes to the layer, which then has an older one; it is not forgotten.
fn holder_and_write_back() {
    explore(|| {
        let model = Model::new();
        model.hold(2);
        let writer = {
            let model = model.clone();
            thread::spawn(move || model.write_back())
        };
        model.hold(3);
        writer.join().unwrap();
        assert_eq!(model.current(), 3);
        model.write_back();
        assert_eq!(model.file.lock().unwrap().version, 3);
    });
}

const CASES: &[(&str, fn())] = &[
    ("reader and writer", reader_and_writer),
    ("reader and evictor", reader_and_evictor),
    ("filler and writer", filler_and_writer),
    ("filler, evictor and reader", filler_evictor_and_reader),
    ("reader and truncation", reader_and_truncation),
    ("filler and truncation", filler_and_truncation),
    ("reader and retirement", reader_and_retirement),
    ("hider and writer", hider_and_writer),
    ("hider, evictor and reader", hider_evictor_and_reader),
    ("holder and reader", holder_and_reader),
    ("holder and filler", holder_and_filler),
    ("holder, evictor and write-back", holder_evictor_and_write_back),
    ("holder and write-back", holder_and_write_back),
];

#[test]
fn nobody_reads_what_is_not_there() {
    plant(None);
    for (name, case) in CASES {
        println!("{name}");
        case();
    }
}

/// The model would be worth nothing if it passed whatever the code does.
#[test]
fn each_fault_is_found() {
    let faults = [
        Fault::ReaderLooksOnce,
        Fault::ReaderWithoutFence,
        Fault::ReaderForgetsSize,
        Fault::WordWithoutFence,
        Fault::SameGeneration,
        Fault::WordBeforeBytes,
        Fault::FillAfterChange,
        Fault::SizeAfterChange,
        Fault::SizeKept,
        Fault::BlocksKept,
        Fault::HiddenKept,
        Fault::ChangeUncounted,
    ];
    let missed: Vec<_> = faults.into_iter().filter(|fault| !is_found(*fault)).collect();
    plant(None);
    assert_eq!(missed, [], "planted, and not found");
}

fn is_found(fault: Fault) -> bool {
    CASES.iter().any(|(name, case)| {
        let found = std::panic::catch_unwind(|| {
            plant(Some(fault));
            case();
        })
        .is_err();
        if found {
            println!("{fault:?}: found by {name}");
        }
        found
    })
}
