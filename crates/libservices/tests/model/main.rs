//! A model in memory held against stacks under random operations, without a mount.
//!
//! A case is a tree made through a plain directory layer, then operations on the stack that stands on it; after each, the
//! whole tree is compared: names, attributes, bytes, links, extended attributes, inode numbers. The cases are the
//! same in every run; `POLYTROPO_MODEL_CASES` asks for more of them.

mod compare;
mod interrupted;
mod model;
mod operations;
mod subject;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use polytropo_libservices::dir::Dir;
use polytropo_libservices::owners::Owners;
use polytropo_libservices::stack::{DirCoherence, DirLayer, Ownership};
use polytropo_libservices::union::{BlockSizes, Union};
use polytropo_libservices::*;
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use compare::{Numbers, compare};
use model::Model;
use operations::{Operation, beginnings, operations};
use subject::Subject;

const CASES: u32 = 100;

fn dir(path: &Path, coherence: DirCoherence, ownership: Ownership, read_only: bool) -> Arc<dyn Libservice> {
    let root = OwnedFd::from(std::fs::File::open(path).unwrap());
    let config = DirLayer { path: path.to_owned(), read_only, coherence, ownership };
    let dir = Arc::new(Dir::new(root, &config).unwrap());
    match ownership {
        Ownership::Native => dir,
        Ownership::Xattr => Arc::new(Owners::new(dir)),
    }
}

/// Where a stack's layers lie: the tree of the beginning and room for an upper.
struct Place {
    _temp: tempfile::TempDir,
    seed: std::path::PathBuf,
    upper: std::path::PathBuf,
}

impl Place {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let (seed, upper) = (temp.path().join("seed"), temp.path().join("upper"));
        std::fs::create_dir(&seed).unwrap();
        std::fs::create_dir(&upper).unwrap();
        Self { _temp: temp, seed, upper }
    }
}

fn one_case(
    ownership: Ownership,
    build: &dyn Fn(&Place) -> Arc<dyn Libservice>,
    beginning: &[Operation],
    operations: &[Operation],
) {
    let place = Place::new();
    let mut model = Model::new();
    let mut plain = Subject::new(dir(&place.seed, DirCoherence::Exclusive, ownership, false));
    for operation in beginning {
        if !model.has_no_sense(operation) {
            assert_eq!(plain.run(operation), model.run(operation), "{operation:?}");
        }
    }
    drop(plain);
    let mut subject = Subject::new(build(&place));
    let mut numbers = Numbers::new();
    compare(&model, &*subject.service, &mut numbers);
    for operation in operations {
        if model.has_no_sense(operation) {
            continue;
        }
        if matches!(operation, Operation::Restart) {
            subject.close_all();
            drop(subject);
            subject = Subject::new(build(&place));
            model.run(operation).unwrap();
        } else {
            assert_eq!(subject.run(operation), model.run(operation), "{operation:?}");
        }
        compare(&model, &*subject.service, &mut numbers);
    }
}

/// Holds the stacks that `build` makes against the model.
fn hold(ownership: Ownership, build: impl Fn(&Place) -> Arc<dyn Libservice>) {
    if skipped(ownership) {
        return;
    }
    run_cases(&(beginnings(), operations()), |(beginning, operations)| {
        one_case(ownership, &build, &beginning, &operations);
    });
}

fn skipped(ownership: Ownership) -> bool {
    let plain = dir(&Place::new().seed, DirCoherence::Exclusive, ownership, false);
    let skipped = !plain.capabilities().contains(Capabilities::OWNERS);
    if skipped {
        eprintln!("skipped: this user may not make files of others");
    }
    skipped
}

/// The same cases in every run.
fn run_cases<S: Strategy>(cases: &S, run: impl Fn(S::Value)) {
    let given = std::env::var("POLYTROPO_MODEL_CASES").ok();
    let count = given.map_or(CASES, |text| text.parse().expect("POLYTROPO_MODEL_CASES is a number"));
    let config =
        Config { cases: count, failure_persistence: None, max_shrink_iters: 3000, ..Config::default() };
    let dice = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let result = TestRunner::new_with_rng(config, dice).run(cases, |case| {
        run(case);
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
}

#[test]
fn native_directory() {
    hold(Ownership::Native, |place| dir(&place.seed, DirCoherence::Exclusive, Ownership::Native, false));
}

#[test]
fn native_directory_that_others_change_too() {
    hold(Ownership::Native, |place| dir(&place.seed, DirCoherence::Shared, Ownership::Native, false));
}

#[test]
fn directory_with_owners_in_attributes() {
    hold(Ownership::Xattr, |place| dir(&place.seed, DirCoherence::Exclusive, Ownership::Xattr, false));
}

/// So small that files of the test have many blocks, and none is copied whole.
const SMALL_BLOCKS: BlockSizes = BlockSizes { block_bytes: 512, whole_max_bytes: 0 };

fn union(place: &Place, ownership: Ownership) -> Arc<dyn Libservice> {
    union_by(place, ownership, BlockSizes::default())
}

/// The tree of the beginning below, all changes above.
fn union_by(place: &Place, ownership: Ownership, sizes: BlockSizes) -> Arc<dyn Libservice> {
    let lower = dir(&place.seed, DirCoherence::Immutable, ownership, true);
    let upper = dir(&place.upper, DirCoherence::Exclusive, ownership, false);
    Arc::new(Union::with_sizes(vec![lower], Some(upper), sizes).unwrap())
}

#[test]
fn union_of_two_directories() {
    hold(Ownership::Native, |place| union(place, Ownership::Native));
}

#[test]
fn union_with_owners_in_attributes() {
    hold(Ownership::Xattr, |place| union(place, Ownership::Xattr));
}

#[test]
fn union_that_copies_blocks() {
    hold(Ownership::Native, |place| union_by(place, Ownership::Native, SMALL_BLOCKS));
}

#[test]
fn union_that_copies_blocks_with_owners_in_attributes() {
    hold(Ownership::Xattr, |place| union_by(place, Ownership::Xattr, SMALL_BLOCKS));
}
