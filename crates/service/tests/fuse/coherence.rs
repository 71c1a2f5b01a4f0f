//! What one way in changes, the others see.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::support::{TWO_DOORS, eventually, on_mount};

#[test]
fn changes_of_the_host_show_in_a_shared_directory() {
    on_mount(&["--coherence", "shared"], |site| {
        assert!(fs::metadata(site.path("f")).is_err());
        fs::write(site.source.join("f"), "first").unwrap();
        assert_eq!(fs::read(site.path("f")).unwrap(), b"first");
        fs::write(site.source.join("f"), "second, longer").unwrap();
        assert_eq!(fs::read(site.path("f")).unwrap(), b"second, longer");
        assert_eq!(fs::metadata(site.path("f")).unwrap().len(), 14);
        fs::rename(site.source.join("f"), site.source.join("g")).unwrap();
        assert!(fs::metadata(site.path("f")).is_err());
        assert_eq!(fs::read_dir(&site.mount).unwrap().count(), 1);
    });
}

#[test]
fn two_superblocks_of_one_stack_agree() {
    on_mount(TWO_DOORS, |site| {
        let other = |name: &str| site.other.join(name);
        // A missing name, attributes, bytes and a listing are cached first, then changed through the other one.
        assert!(fs::metadata(other("f")).is_err());
        assert_eq!(fs::read_dir(&site.other).unwrap().count(), 0);
        fs::write(site.path("f"), "one").unwrap();
        eventually("a new name shows", || fs::read(other("f")).is_ok_and(|bytes| bytes == b"one"));
        eventually("a new name is listed", || fs::read_dir(&site.other).unwrap().count() == 1);
        fs::write(site.path("f"), "twice as long").unwrap();
        eventually("a new size shows", || fs::metadata(other("f")).unwrap().len() == 13);
        eventually("new bytes show", || fs::read(other("f")).unwrap() == b"twice as long");
        let reader = File::open(other("f")).unwrap();
        let writer = OpenOptions::new().write(true).open(site.path("f")).unwrap();
        let mut bytes = [0; 5];
        reader.read_exact_at(&mut bytes, 0).unwrap();
        writer.write_all_at(b"THRICE", 0).unwrap();
        eventually("new bytes show in an open file", || {
            let mut bytes = [0; 6];
            reader.read_exact_at(&mut bytes, 0).unwrap();
            &bytes == b"THRICE"
        });
        fs::hard_link(site.path("f"), site.path("g")).unwrap();
        eventually("a new link counts", || fs::metadata(other("f")).unwrap().nlink() == 2);
        fs::remove_file(site.path("f")).unwrap();
        eventually("a removed name is gone", || fs::metadata(other("f")).is_err());
        fs::rename(site.path("g"), site.path("h")).unwrap();
        eventually("a moved name shows", || {
            fs::metadata(other("h")).is_ok() && fs::metadata(other("g")).is_err()
        });
    });
}

/// The kernel waits for answers with locks that notices need. Two superblocks that notify each other about one
/// directory, under load, come to rest only if no answer waits for a notice.
#[test]
fn notices_do_not_deadlock_with_requests() {
    on_mount(TWO_DOORS, |site| {
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let root = if worker % 2 == 0 { &site.mount } else { &site.other };
                scope.spawn(move || {
                    for round in 0..400 {
                        let name = root.join(format!("f{}", (worker + round) % 5));
                        // Any of these may meet the others' work; what counts is that each of them ends.
                        let _ = fs::write(&name, "x");
                        let _ = fs::rename(&name, root.join(format!("f{}", round % 5)));
                        let _ = fs::read_dir(root).map(Iterator::count);
                        let _ = fs::remove_file(&name);
                    }
                });
            }
        });
        fs::write(site.path("end"), "reached").unwrap();
        eventually("both agree at the end", || {
            let names =
                |path| fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
            let (mut one, mut two) = (names(&site.mount), names(&site.other));
            one.sort();
            two.sort();
            one == two
        });
    });
}
