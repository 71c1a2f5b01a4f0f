//! The behaviour suite: many small checks, each on every stack whose capabilities declare what it is about.
//!
//! To hold a new libservice to it, write a function that makes one (`stacks.rs`) and a test that calls
//! [`suite::run`] with it.

mod attributes;
mod files;
mod identities;
mod links;
mod listing;
mod names;
mod stacks;
mod suite;
mod xattrs;

use polytropo_libservices::stack::{DirCoherence, Ownership};
use polytropo_libservices::union::BlockSizes;

#[test]
fn native_directory() {
    suite::run(|| stacks::directory(DirCoherence::Exclusive, Ownership::Native));
}

#[test]
fn native_directory_that_others_change_too() {
    suite::run(|| stacks::directory(DirCoherence::Shared, Ownership::Native));
}

#[test]
fn directory_with_owners_in_attributes() {
    suite::run(|| stacks::directory(DirCoherence::Exclusive, Ownership::Xattr));
}

#[test]
fn directory_with_owners_in_attributes_that_others_change_too() {
    suite::run(|| stacks::directory(DirCoherence::Shared, Ownership::Xattr));
}

#[test]
fn directory_built_from_a_document() {
    suite::run(stacks::built);
}

#[test]
fn faults_that_never_strike() {
    suite::run(stacks::faultless);
}

#[test]
fn union_of_directories() {
    if skipped_for_want_of_chown() {
        return;
    }
    suite::run(|| stacks::union(DirCoherence::Immutable, Ownership::Native));
}

#[test]
fn union_of_directories_that_others_change_too() {
    if skipped_for_want_of_chown() {
        return;
    }
    suite::run(|| stacks::union(DirCoherence::Shared, Ownership::Native));
}

/// Blocks so small that every file has some.
#[test]
fn union_that_copies_blocks() {
    if skipped_for_want_of_chown() {
        return;
    }
    let sizes = BlockSizes { block_bytes: 4, whole_max_bytes: 0 };
    suite::run(|| stacks::union_by(DirCoherence::Immutable, Ownership::Native, sizes));
}

#[test]
fn union_with_owners_in_attributes() {
    suite::run(|| stacks::union(DirCoherence::Immutable, Ownership::Xattr));
}

fn skipped_for_want_of_chown() -> bool {
    let skipped = !stacks::may_chown();
    if skipped {
        eprintln!("skipped: this user may not make files of others, and records of a union are root's");
    }
    skipped
}
