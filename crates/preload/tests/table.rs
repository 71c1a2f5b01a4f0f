//! The table of system calls against the kernel's own list.

use std::collections::BTreeMap;

use polytropo_preload::table::{Disposition, NUMBERS, ROWS, SEEN, find, names_path};

const HEADER: &str = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h";

#[test]
fn no_call_is_missing() {
    let header = std::fs::read_to_string(HEADER).expect("the kernel's headers (linux-libc-dev)");
    let kernel: BTreeMap<usize, &str> = header
        .lines()
        .filter_map(|line| {
            let (name, number) = line.strip_prefix("#define __NR_")?.split_once(' ')?;
            Some((number.trim().parse().ok()?, name))
        })
        .collect();
    assert!(kernel.len() > 300, "{HEADER} has only {} calls", kernel.len());
    for (number, name) in kernel {
        let row = find(number).unwrap_or_else(|| panic!("{name} ({number}) is missing in the table"));
        assert_eq!(row.name, name);
    }
}

#[test]
fn rows_are_ordered_and_consistent() {
    assert!(ROWS.windows(2).all(|pair| pair[0].number < pair[1].number));
    for row in ROWS {
        let number = usize::from(row.number);
        assert!(number < NUMBERS && !row.reason.is_empty() && row.descriptors.iter().all(|at| *at < 6));
        let passed = row.disposition == Disposition::Passed;
        // The files that have no name in the kernel yet get theirs before it walks a path.
        assert!(SEEN[number] == 0 || !passed || names_path(number), "{} is looked at", row.name);
        assert!(!passed || row.descriptors.is_empty(), "{} names descriptors", row.name);
    }
}

/// The kernel would refuse a descriptor that only names a file.
#[test]
fn what_needs_an_open_file_is_looked_at() {
    const BY_NAME_ALONE: [&str; 5] =
        ["fstatfs", "open_tree_attr", "fspick", "mount_setattr", "landlock_add_rule"];
    for row in ROWS.iter().filter(|row| row.disposition == Disposition::UpgradeFirst) {
        let looked_at = SEEN[usize::from(row.number)] != 0;
        assert_ne!(looked_at, BY_NAME_ALONE.contains(&row.name), "{}", row.name);
    }
    for name in ["read", "pwritev2", "io_setup", "io_uring_setup", "fcntl", "close", "execveat"] {
        let row = ROWS.iter().find(|row| row.name == name).expect("a row");
        assert_ne!(SEEN[usize::from(row.number)], 0, "{name}");
    }
}
