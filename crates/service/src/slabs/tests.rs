//! Slabs against a model of files that never change, and the layer over real directories.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use polytropo_libservices::stack::StackDocument;
use polytropo_libservices::{
    Caller, Entry, Errno, Error, Interner, Libservice, Name, NodeId, OpenFlags, Timestamp, build_with,
};
use polytropo_wire::window::BLOCK_BYTES;
use proptest::prelude::*;

use super::*;
use crate::windows::Use;

fn content(number: u64, size_bytes: u64) -> Content {
    let born = Timestamp { seconds: 7, nanoseconds: 0 };
    Content { id: ContentId { device: 1, ino: number, born }, size_bytes }
}

/// What the file of that number has at each place.
fn bytes_of(content: &Content) -> Vec<u8> {
    let seed = content.id.ino.wrapping_mul(0x9e37_79b9);
    (0..content.size_bytes).map(|at| (seed ^ (at * 31)) as u8).collect()
}

fn fill_from<'a>(content: &'a Content) -> impl FnOnce(&mut [u8]) -> Result<usize> + use<'a> {
    |buffer| {
        buffer.copy_from_slice(&bytes_of(content));
        Ok(buffer.len())
    }
}

fn slabs(blocks: u64) -> (Arc<Budget>, Arc<Slabs>) {
    let budget = Budget::new(blocks * BLOCK_BYTES);
    let slabs = Slabs::new(budget.clone()).expect("the cache is large enough");
    (budget, slabs)
}

fn reads(slabs: &Arc<Slabs>, content: &Content) -> Vec<u8> {
    let mut buffer = vec![0; content.size_bytes as usize + 9];
    let count = slabs.read_or_fill(content, 0, &mut buffer, fill_from(content)).unwrap().unwrap();
    buffer.truncate(count);
    buffer
}

/// Another who has blocks in the same budget.
#[derive(Default)]
struct Neighbour(Mutex<FxHashSet<u64>>);

impl Owner for Neighbour {
    fn number(&self) -> u64 {
        77
    }

    fn hide(&self, _block: u64) {}

    fn evict(&self, block: u64) {
        self.0.lock().remove(&block);
    }
}

/// Memory of the slabs that are there, and of no others; what is counted is right.
fn check(budget: &Budget, slabs: &Slabs, neighbour: &Neighbour, blocks: u64) {
    let told = budget.statistics();
    assert!(told.bytes <= blocks * BLOCK_BYTES, "{told:?}");
    let inner = slabs.inner.lock();
    let neighbours = neighbour.0.lock().len() as u64 * BLOCK_BYTES;
    let own = (inner.slabs.len() * SLAB_BYTES) as u64;
    assert_eq!(told.bytes, neighbours + own + told.held_bytes + told.answers_bytes);
    assert_eq!(inner.bytes, inner.files.values().map(|place| place.bytes as u64).sum::<u64>());
    assert!(inner.open.iter().all(|open| open.len() <= OPEN_MAX));
    assert!(inner.ghosts.order.len() <= GHOSTS_MIN.max(inner.files.len() + 1024));
    for (id, place) in &inner.files {
        let filled = &inner.slabs[&place.slab];
        assert!(filled.files.contains(id) && place.at + place.bytes <= filled.end);
    }
    for filled in inner.slabs.values() {
        assert!(filled.end <= filled.counted && filled.counted <= SLAB_BYTES);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Read { file: u64, offset: u64, count: usize },
    Neighbour(u64),
    Take,
    GiveBack,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..200u64, 0..70_000u64, 0..70_000usize).prop_map(|(file, offset, count)| Step::Read { file, offset: offset * (file % 2), count }),
        2 => (0..60u64).prop_map(Step::Neighbour),
        1 => Just(Step::Take),
        1 => Just(Step::GiveBack),
    ];
    proptest::collection::vec(step, 1..400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_read_is_what_the_file_has(steps in steps()) {
        let blocks = 24;
        let (budget, slabs) = slabs(blocks);
        let neighbour = Arc::<Neighbour>::default();
        let mut taken = 0;
        for step in steps {
            match step {
                Step::Read { file, offset, count } => {
                    // Empty ones, the largest that fit, and one byte more than that.
                    let size = [0, 1, 100, 5_000, 20_000, 33_000, FILE_BYTES_MAX, FILE_BYTES_MAX + 1][file as usize % 8];
                    let content = content(file, size);
                    let mut buffer = vec![0xaa; count];
                    let before = (slabs.contains(&content), slabs.statistics().fills);
                    let told = slabs.read_or_fill(&content, offset, &mut buffer, fill_from(&content)).unwrap();
                    let all = bytes_of(&content);
                    let from = (offset as usize).min(all.len());
                    let expected = &all[from..(from + count).min(all.len())];
                    let served = told.map(|count| &buffer[..count]);
                    prop_assert_eq!(served, (size <= FILE_BYTES_MAX).then_some(expected));
                    let filled = slabs.statistics().fills - before.1;
                    prop_assert_eq!(filled, u64::from(!before.0 && size <= FILE_BYTES_MAX));
                }
                Step::Neighbour(block) => {
                    let _reserved = budget.reserve(&neighbour, block, Admission::New);
                    neighbour.0.lock().insert(block);
                }
                Step::Take if budget.take(Use::Held, 3 * BLOCK_BYTES) => taken += 1,
                Step::GiveBack if taken > 0 => {
                    budget.give_back(Use::Held, 3 * BLOCK_BYTES);
                    taken -= 1;
                }
                _ => {}
            }
            check(&budget, &slabs, &neighbour, blocks);
        }
    }
}

#[test]
fn many_who_ask_at_once_have_it_filled_once() {
    let (_, slabs) = slabs(64);
    let (times, file) = (AtomicUsize::new(0), content(5, 30_000));
    let barrier = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let (slabs, times, file, barrier) = (&slabs, &times, &file, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let mut buffer = vec![0; 1000];
                let read = slabs.read_or_fill(file, thread * 1000, &mut buffer, |all| {
                    times.fetch_add(1, Relaxed);
                    // The others come while it is read.
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    fill_from(file)(all)
                });
                assert_eq!(read.unwrap(), Some(1000));
                assert_eq!(buffer, &bytes_of(file)[thread as usize * 1000..][..1000]);
            });
        }
    });
    let told = slabs.statistics();
    assert_eq!((times.load(Relaxed), told.fills, told.files), (1, 1, 1));
}

#[test]
fn what_cannot_be_read_is_not_kept() {
    let (_, slabs) = slabs(64);
    let file = content(5, 3_000);
    let mut buffer = vec![0; 3_000];
    let failed = slabs.read_or_fill(&file, 0, &mut buffer, |_| Err(Error::new(Errno::IO, "read a file")));
    assert!(failed.unwrap_err().is(Errno::IO));
    // It is shorter than was told.
    assert_eq!(slabs.read_or_fill(&file, 0, &mut buffer, |_| Ok(2_999)).unwrap(), None);
    assert!(!slabs.contains(&file) && slabs.inner.lock().filling.is_empty());
    assert_eq!(reads(&slabs, &file), bytes_of(&file));
    assert!(slabs.contains(&file));
}

#[test]
fn a_scan_does_not_flush_what_is_used() {
    let (_, slabs) = slabs(64);
    let working: Vec<_> = (0..300).map(|number| content(number, 4_000)).collect();
    for round in 0..20 {
        working.iter().for_each(|file| assert_eq!(reads(&slabs, file), bytes_of(file)));
        (0..200).for_each(|other| _ = reads(&slabs, &content(10_000 + round * 200 + other, 4_000)));
    }
    (0..20_000).for_each(|other| _ = reads(&slabs, &content(1_000_000 + other, 4_000)));
    let kept = working.iter().filter(|file| slabs.contains(file)).count();
    assert!(kept >= 280, "{kept} of {} files are left", working.len());
}

#[test]
fn readers_and_evictions_at_once() {
    let (budget, slabs) = slabs(20);
    let neighbour = Arc::<Neighbour>::default();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let slabs = &slabs;
            scope.spawn(move || {
                for n in 0..4_000u64 {
                    let number = (n * 7 + thread * 13) % 150;
                    let file = content(number, number * 400 % 60_000);
                    assert_eq!(reads(slabs, &file), bytes_of(&file));
                }
            });
        }
        let (budget, neighbour) = (&budget, &neighbour);
        scope.spawn(move || {
            for block in 0..3_000 {
                let _reserved = budget.reserve(neighbour, block % 40, Admission::New);
                neighbour.0.lock().insert(block % 40);
            }
        });
    });
    assert!(budget.statistics().bytes <= 20 * BLOCK_BYTES);
    assert!(slabs.inner.lock().filling.is_empty());
}

#[test]
fn a_small_cache_has_none() {
    assert!(Slabs::new(Budget::new(BUDGET_BYTES_MIN - 1)).is_none());
    assert!(Slabs::new(Budget::new(0)).is_none());
}

/// A union with an upper of its own over an image in `directory`.
fn container(directory: &Path, upper: &str, slabs: &Arc<Slabs>) -> Arc<dyn Libservice> {
    let upper = directory.join(upper);
    std::fs::create_dir_all(&upper).unwrap();
    let document = serde_json::json!({"version": 1, "root": {"kind": "union",
        "lowers": [{"kind": "dir", "path": directory.join("image"), "read_only": true, "coherence": "immutable"}],
        "upper": {"kind": "dir", "path": upper, "coherence": "exclusive"}}});
    let document = StackDocument::parse(&document.to_string()).unwrap();
    let roots = document.dirs().into_iter().map(|dir| OwnedFd::from(std::fs::File::open(&dir.path).unwrap()));
    let stack = build_with(&document, roots.collect(), &Interner::default()).unwrap();
    SmallFiles::over(stack, slabs.clone())
}

fn look_up(stack: &dyn Libservice, name: &str) -> Entry {
    stack.lookup(&Caller::service(), NodeId::ROOT, Name::new(name.as_bytes()).unwrap()).unwrap()
}

fn read_all(stack: &dyn Libservice, node: NodeId, handle: polytropo_libservices::HandleId) -> Vec<u8> {
    let mut buffer = vec![0; 70_000];
    let count = stack.read(&Caller::service(), node, handle, 0, &mut buffer).unwrap();
    buffer.truncate(count);
    buffer
}

fn image() -> (tempfile::TempDir, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let bytes = bytes_of(&content(3, 5_000));
    std::fs::create_dir(directory.path().join("image")).unwrap();
    std::fs::write(directory.path().join("image/small"), &bytes).unwrap();
    std::fs::write(directory.path().join("image/large"), vec![1; FILE_BYTES_MAX as usize + 1]).unwrap();
    (directory, bytes)
}

#[test]
fn two_containers_of_an_image_fill_once() {
    let (directory, bytes) = image();
    let (_, slabs) = slabs(64);
    let caller = Caller::service();
    for (times, upper) in ["one", "two"].into_iter().enumerate() {
        let stack = container(directory.path(), upper, &slabs);
        let node = look_up(&*stack, "small").node;
        let opened = stack.open(&caller, node, OpenFlags::READ).unwrap();
        assert_eq!(read_all(&*stack, node, opened.handle), bytes);
        let own = super::layer::is_from_slab(opened.handle);
        assert_eq!(own, times == 1, "the second one opens nothing on the host");
        // As of a file that is open on the host.
        let told = stack.getattr(&caller, node, Some(opened.handle)).unwrap();
        assert_eq!((told.size_bytes, stack.flush(&caller, node, opened.handle).is_ok()), (5_000, true));
        assert_eq!(stack.host_inode(opened.handle).unwrap().ino, told.ino & ((1 << 54) - 1));
        assert!(stack.content(opened.handle).is_some());
        stack.release(node, opened.handle);
        assert!(!own || stack.read(&caller, node, opened.handle, 0, &mut [0]).is_err());
        let large = look_up(&*stack, "large").node;
        let opened = stack.open(&caller, large, OpenFlags::READ).unwrap();
        assert_eq!(read_all(&*stack, large, opened.handle).len() as u64, FILE_BYTES_MAX + 1);
        stack.release(large, opened.handle);
    }
    let told = slabs.statistics();
    assert_eq!((told.fills, told.hits, told.files), (1, 1, 1));
}

#[test]
fn a_file_that_was_copied_up_is_not_read_from_a_slab() {
    let (directory, bytes) = image();
    let (_, slabs) = slabs(64);
    let caller = Caller::service();
    let stack = container(directory.path(), "one", &slabs);
    let node = look_up(&*stack, "small").node;
    // One that the layers opened, one from a slab, and one from a slab that is used first afterwards.
    let opened: Vec<_> = (0..3)
        .map(|times| {
            let handle = stack.open(&caller, node, OpenFlags::READ).unwrap().handle;
            assert_eq!(super::layer::is_from_slab(handle), times > 0);
            if times < 2 {
                assert_eq!(read_all(&*stack, node, handle), bytes);
            }
            handle
        })
        .collect();
    let writer = stack.open(&caller, node, OpenFlags::WRITE).unwrap().handle;
    stack.write(&caller, node, writer, 10, b"changed").unwrap();
    let changed = [&bytes[..10], b"changed", &bytes[17..]].concat();
    for handle in &opened {
        assert_eq!(read_all(&*stack, node, *handle), changed);
    }
    // Others see the image.
    let other = container(directory.path(), "two", &slabs);
    let there = look_up(&*other, "small").node;
    let handle = other.open(&caller, there, OpenFlags::READ).unwrap().handle;
    assert_eq!(read_all(&*other, there, handle), bytes);
    stack.unlink(&caller, NodeId::ROOT, Name::new(b"small").unwrap()).unwrap();
    for handle in opened {
        assert_eq!(read_all(&*stack, node, handle), changed);
        assert_eq!(stack.getattr(&caller, node, Some(handle)).unwrap().size_bytes, 5_000);
        stack.release(node, handle);
    }
}

#[test]
fn a_removed_file_is_read_on() {
    let (directory, bytes) = image();
    let (budget, slabs) = slabs(64);
    let caller = Caller::service();
    let stack = container(directory.path(), "one", &slabs);
    let node = look_up(&*stack, "small").node;
    let first = stack.open(&caller, node, OpenFlags::READ).unwrap().handle;
    assert_eq!(read_all(&*stack, node, first), bytes);
    let second = stack.open(&caller, node, OpenFlags::READ).unwrap().handle;
    assert!(super::layer::is_from_slab(second));
    stack.unlink(&caller, NodeId::ROOT, Name::new(b"small").unwrap()).unwrap();
    assert_eq!(read_all(&*stack, node, second), bytes);
    // Also when the slab is gone: then the layers open it.
    let numbers: Vec<u64> = slabs.inner.lock().slabs.keys().copied().collect();
    numbers.iter().for_each(|number| {
        budget.drop_block(SLABS_NUMBER, *number);
        slabs.evict(*number);
    });
    assert_eq!((slabs.statistics().slab_bytes, slabs.statistics().files), (0, 0));
    assert_eq!(read_all(&*stack, node, second), bytes);
    assert!(stack.immutable_file(second).is_some());
    stack.release(node, second);
    stack.release(node, first);
}
