//! What the door's own open files meet when a union copies a file up.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::support::on_union;

const LOWER: &[u8] = b"from the lower layer";

fn one_file(lower: &Path) {
    fs::write(lower.join("f"), LOWER).unwrap();
}

#[test]
fn a_reader_sees_what_is_written_after_copy_up() {
    on_union(one_file, |site| {
        let reader = File::open(site.path("f")).unwrap();
        let mut bytes = [0; 4];
        reader.read_exact_at(&mut bytes, 0).unwrap();
        let before = reader.metadata().unwrap();
        OpenOptions::new().write(true).open(site.path("f")).unwrap().write_all(b"NEW!").unwrap();
        reader.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"NEW!");
        assert_eq!(fs::read(site.path("f")).unwrap(), b"NEW! the lower layer");
        assert_eq!(fs::metadata(site.path("f")).unwrap().ino(), before.ino());
        assert_eq!(fs::read(site.source.join("f")).unwrap(), b"NEW! the lower layer");
    });
}

#[test]
fn opening_for_writing_alone_changes_nothing() {
    on_union(one_file, |site| {
        drop(OpenOptions::new().read(true).write(true).open(site.path("f")).unwrap());
        assert_eq!(fs::read(site.path("f")).unwrap(), LOWER);
    });
}

#[test]
fn truncating_appending_and_removing_leave_the_lower_as_it_was() {
    let lower = std::cell::OnceCell::new();
    let prepare = |path: &Path| {
        for name in ["f", "g", "h"] {
            fs::write(path.join(name), LOWER).unwrap();
        }
        lower.set(path.to_path_buf()).unwrap();
    };
    on_union(prepare, |site| {
        assert_eq!(fs::read(site.path("f")).unwrap(), LOWER);
        fs::write(site.path("f"), "anew").unwrap();
        OpenOptions::new().append(true).open(site.path("g")).unwrap().write_all(b", and more").unwrap();
        let kept = File::open(site.path("h")).unwrap();
        fs::remove_file(site.path("h")).unwrap();
        assert_eq!(fs::read(site.path("f")).unwrap(), b"anew");
        assert_eq!(fs::read(site.path("g")).unwrap(), [LOWER, b", and more"].concat());
        let mut bytes = vec![0; LOWER.len()];
        kept.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, LOWER);
        assert_eq!(fs::read_dir(&site.mount).unwrap().count(), 2);
        for name in ["f", "g", "h"] {
            assert_eq!(fs::read(lower.get().unwrap().join(name)).unwrap(), LOWER);
        }
    });
}
