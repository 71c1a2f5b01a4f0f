//! Random operations on a union and on a plain directory with the same content: the same answers, the same tree.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::Config;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Write(String, u8),
    Append(String),
    Truncate(String, u64),
    Mkdir(String),
    Symlink(String),
    Link(String, String),
    Unlink(String),
    Rmdir(String),
    Rename(String, String, u32),
    Chmod(String, u32),
    Touch(String, i64),
    SetXattr(String, u8),
    RemoveXattr(String),
    Open(String, bool),
    ReadOpen(usize),
    WriteOpen(usize, u8, u8),
    PunchOpen(usize, u8, u8),
    Close(usize),
    Restart,
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c", "d"]), 1..4)
        .prop_map(|parts| parts.join("/"))
}

fn op() -> impl Strategy<Value = Op> {
    use Op::*;
    prop_oneof![
        3 => (path(), any::<u8>()).prop_map(|(p, n)| Write(p, n)),
        3 => path().prop_map(Append),
        1 => (path(), 0..9u64).prop_map(|(p, n)| Truncate(p, n)),
        3 => path().prop_map(Mkdir),
        1 => path().prop_map(Symlink),
        3 => (path(), path()).prop_map(|(p, q)| Link(p, q)),
        5 => path().prop_map(Unlink),
        4 => path().prop_map(Rmdir),
        8 => (path(), path(), prop::sample::select(vec![0, 0, 0, 1, 2]))
            .prop_map(|(p, q, flags)| Rename(p, q, flags)),
        2 => (path(), 0..0o1000u32).prop_map(|(p, mode)| Chmod(p, mode)),
        1 => (path(), 0..1_000_000i64).prop_map(|(p, at)| Touch(p, at)),
        1 => (path(), any::<u8>()).prop_map(|(p, n)| SetXattr(p, n)),
        1 => path().prop_map(RemoveXattr),
        2 => (path(), any::<bool>()).prop_map(|(p, write)| Open(p, write)),
        2 => any::<usize>().prop_map(ReadOpen),
        3 => (any::<usize>(), 0..60u8, 0..30u8).prop_map(|(n, at, length)| WriteOpen(n, at, length)),
        1 => (any::<usize>(), 0..60u8, 1..30u8).prop_map(|(n, at, length)| PunchOpen(n, at, length)),
        1 => any::<usize>().prop_map(Close),
        1 => Just(Restart),
    ]
}

/// Three layers with every kind of covering.
pub fn populate(rig: &Rig) {
    for (layer, path) in [
        (2, "a/a/a"),
        (2, "a/a/b"),
        (2, "a/b/c"),
        (2, "a/c"),
        (2, "b/a"),
        (2, "b/b"),
        (2, "b/c/d"),
        (2, "d/a/b"),
        (2, "d/b"),
        (2, "d/d/d"),
        (1, "a/a/c"),
        (1, "a/b/.wh.c"),
        (1, "a/b/d"),
        (1, "b/.wh..wh..opq"),
        (1, "b/d"),
        (1, ".wh.d"),
        (1, "c/a"),
        (1, "c/b/c"),
        (0, "d/c"),
        (0, "a/a/a"),
        (0, "c/.wh.a"),
        (0, "c/b/d"),
        (0, "c/d/d"),
    ] {
        rig.put(layer, path, &format!("{layer}:{path} ").repeat(5));
    }
    host::hard_link(rig.lower(2, "a/a/b"), rig.lower(2, "a/d")).unwrap();
    host::hard_link(rig.lower(1, "c/b/c"), rig.lower(1, "c/c")).unwrap();
    host::hard_link(rig.lower(1, "c/b/c"), rig.lower(1, "a/b/b")).unwrap();
    std::os::unix::fs::symlink("c", rig.lower(1, "a/b/a")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, rig.lower(0, "c/b/a"), rustix::fs::Mode::from_raw_mode(0o644))
        .unwrap();
}

/// Makes in `target` what `view` shows, hard links included.
fn flatten(view: &View, target: &Path) {
    let mut first: BTreeMap<u64, PathBuf> = BTreeMap::new();
    for (path, attr) in view.attrs() {
        let new = target.join(&path);
        if let Some(known) = first.get(&attr.ino) {
            host::hard_link(known, &new).unwrap();
            continue;
        }
        match attr.file_type() {
            libc::S_IFDIR => host::create_dir(&new).unwrap(),
            libc::S_IFREG => host::write(&new, view.read(&path).unwrap()).unwrap(),
            libc::S_IFLNK => std::os::unix::fs::symlink("c", &new).unwrap(),
            _ => {
                let mode = rustix::fs::Mode::from_raw_mode(0o644);
                rustix::fs::mkfifoat(rustix::fs::CWD, &new, mode).unwrap();
            }
        }
        if !attr.is_dir() {
            first.insert(attr.ino, new);
        }
    }
}

/// One side of the comparison.
struct Side {
    view: View,
    open: Vec<Option<HandleId>>,
}

impl Side {
    /// What an operation answers, comparable between the sides.
    fn apply(&mut self, op: &Op) -> String {
        use Op::*;
        let view = &self.view;
        let (service, caller) = (view.union.clone(), view.caller.clone());
        let done = match op {
            Write(path, n) => view.write(path, &"x".repeat(usize::from(*n))),
            Append(path) => view.append(path, "+"),
            Truncate(path, size) => {
                view.setattr(path, &SetAttr { size_bytes: Some(*size), ..SetAttr::default() }).map(drop)
            }
            Mkdir(path) => view.mkdir(path).map(drop),
            Symlink(path) => view.symlink(path, "c").map(drop),
            Link(path, new) => view.link(path, new).map(drop),
            Unlink(path) => view.unlink(path),
            Rmdir(path) => view.rmdir(path),
            Rename(from, to, flags) => view.rename_with(from, to, RenameFlags::from_bits_retain(*flags)),
            Chmod(path, mode) => view.at(path, |entry| match entry.attr.file_type() {
                libc::S_IFLNK => Ok(()),
                _ => {
                    let changes = SetAttr { mode: Some(*mode), ..SetAttr::default() };
                    service.setattr(&caller, entry.node, None, &changes).map(drop)
                }
            }),
            Touch(path, at) => {
                let at = Some(SetTime::At(Timestamp { seconds: *at, nanoseconds: 5 }));
                view.setattr(path, &SetAttr { mtime: at, ..SetAttr::default() }).map(drop)
            }
            SetXattr(path, n) => view.at(path, |entry| {
                service.setxattr(&caller, entry.node, b"user.test", &[*n], XattrFlags::empty())
            }),
            RemoveXattr(path) => {
                view.at(path, |entry| service.removexattr(&caller, entry.node, b"user.test"))
            }
            Open(path, write) => {
                let flags = if *write { OpenFlags::READ | OpenFlags::WRITE } else { OpenFlags::READ };
                let opened = view.open(path, flags);
                self.open.push(opened.as_ref().ok().copied());
                opened.map(drop)
            }
            ReadOpen(n) => {
                return self.pick(*n).map(|handle| self.view.read_handle(handle)).unwrap_or_default();
            }
            WriteOpen(n, at, length) => match self.pick(*n) {
                Some(handle) => {
                    let bytes = vec![b'a' + at % 26; usize::from(*length)];
                    service.write(&caller, NodeId::ROOT, handle, u64::from(*at), &bytes).map(drop)
                }
                None => Ok(()),
            },
            PunchOpen(n, at, length) => match self.pick(*n) {
                Some(handle) => {
                    let mode = FallocateMode::PUNCH_HOLE | FallocateMode::KEEP_SIZE;
                    let (at, length) = (u64::from(*at), u64::from(*length));
                    service.fallocate(&caller, NodeId::ROOT, handle, mode, at, length)
                }
                None => Ok(()),
            },
            Close(n) => {
                if let Some(handle) = self.pick(*n) {
                    service.release(NodeId::ROOT, handle);
                    let open = self.open.iter_mut().find(|open| **open == Some(handle));
                    *open.unwrap() = None;
                }
                Ok(())
            }
            Restart => Ok(()),
        };
        match done {
            Ok(()) => "done".into(),
            Err(e) => format!("{:?}", e.errno()),
        }
    }

    fn pick(&self, n: usize) -> Option<HandleId> {
        if self.open.is_empty() { None } else { self.open[n % self.open.len()] }
    }

    fn close_all(&mut self) {
        for handle in self.open.drain(..).flatten() {
            self.view.close(handle);
        }
    }
}

fn compare(ops: &[Op], sizes: BlockSizes) {
    let rig = Rig::quick(3).with_sizes(sizes);
    populate(&rig);
    let plain = quick_tempdir();
    flatten(&rig.read_only(), plain.path());
    let mut union = Side { view: rig.union(), open: Vec::new() };
    let reference = View::new(dir_layer(plain.path(), false, DirCoherence::Exclusive));
    let mut reference = Side { view: reference, open: Vec::new() };
    for (view, way) in [(&union.view, "union"), (&reference.view, "plain")] {
        // Modes of what the tests made differ by the umask only.
        for (path, attr) in view.attrs().iter().filter(|(_, attr)| attr.file_type() != libc::S_IFLNK) {
            let mode = if attr.is_dir() { 0o755 } else { 0o644 };
            assert_eq!(attr.mode & 0o777, mode, "{path} of the {way}");
        }
    }
    for (step, op) in ops.iter().enumerate() {
        if matches!(op, Op::Restart) {
            union.close_all();
            reference.close_all();
            let before = union.view.inos();
            union.view.assert_nothing_held();
            union.view = View::new(dir_layer(plain.path(), false, DirCoherence::Exclusive));
            union.view = rig.union();
            assert_eq!(union.view.inos(), before, "numbers after a restart, step {step}");
        }
        let (ours, theirs) = (union.apply(op), reference.apply(op));
        assert_eq!(ours, theirs, "step {step}: {op:?}");
        assert_eq!(union.view.state(true), reference.view.state(true), "after step {step}: {op:?}");
    }
    union.close_all();
    union.view.assert_nothing_held();
    let tmp = host::read_dir(rig.upper(".wh..wh.polytropo/work")).unwrap();
    assert_eq!(tmp.count(), 0, "left in the work area");
}

/// Few in each run of the tests; `PROPTEST_CASES` asks for more.
fn config() -> Config {
    let mut config = Config { failure_persistence: None, max_shrink_iters: 400, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 24;
    }
    config
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_union_behaves_as_a_plain_directory(ops in prop::collection::vec(op(), 1..60)) {
        compare(&ops, BlockSizes::default());
    }

    #[test]
    fn a_union_that_copies_a_few_bytes_at_a_time_does_too(ops in prop::collection::vec(op(), 1..60)) {
        compare(&ops, TINY);
    }
}
