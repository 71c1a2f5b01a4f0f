//! The union killed, or refused by its upper, after every single step of every kind of change: afterwards it shows the
//! old state or the new one.

use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

use super::model::populate;
use super::*;

/// An upper that fails after a number of changes: that one only, or all from there on (as if the union had been killed).
struct Failing {
    below: Arc<dyn Libservice>,
    left: AtomicI64,
    for_good: bool,
}

impl Failing {
    fn step(&self) -> Result<()> {
        let left = self.left.fetch_sub(1, SeqCst);
        if left == 0 || left < 0 && self.for_good {
            return Err(Error::new(Errno::IO, "fail a test"));
        }
        Ok(())
    }
}

/// Passes an operation on after counting it.
macro_rules! counted {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $answer:ty;)*) => {
        $(fn $name(&self, caller: &Caller, $($argument: $kind),*) -> Result<$answer> {
            self.step()?;
            self.below.$name(caller, $($argument),*)
        })*
    };
}

impl Libservice for Failing {
    fn below(&self) -> Option<&dyn Libservice> {
        Some(&*self.below)
    }

    fn kind(&self) -> &'static str {
        "failing"
    }

    counted! {
        setattr(node: NodeId, handle: Option<HandleId>, changes: &SetAttr) -> Attr;
        mknod(parent: NodeId, name: &Name, mode: u32, rdev: u64) -> Entry;
        mkdir(parent: NodeId, name: &Name, mode: u32) -> Entry;
        symlink(parent: NodeId, name: &Name, target: &[u8]) -> Entry;
        link(node: NodeId, new_parent: NodeId, new_name: &Name) -> Entry;
        unlink(parent: NodeId, name: &Name) -> ();
        rmdir(parent: NodeId, name: &Name) -> ();
        rename(parent: NodeId, name: &Name, new_parent: NodeId, new_name: &Name, flags: RenameFlags) -> ();
        create(parent: NodeId, name: &Name, mode: u32, flags: OpenFlags) -> (Entry, Opened);
        write(node: NodeId, handle: HandleId, offset: u64, data: &[u8]) -> usize;
        fsync(node: NodeId, handle: HandleId, data_only: bool) -> ();
        fallocate(node: NodeId, handle: HandleId, mode: FallocateMode, offset: u64, length: u64) -> ();
        setxattr(node: NodeId, name: &[u8], value: &[u8], flags: XattrFlags) -> ();
        removexattr(node: NodeId, name: &[u8]) -> ();
    }
}

type Change = fn(&View) -> Result<()>;

/// What is done first, without failures, and then with them.
const CHANGES: &[(&str, Change, Change)] = &[
    ("append to a lower file", nothing, |view| view.append("a/a/a", "+")),
    ("write inside a lower file", nothing, |view| write_at(view, "a/a/a", 6, "new bytes")),
    ("write in a file of which a part was copied", in_part, |view| write_at(view, "a/a/a", 3, "new bytes")),
    ("write the rest of such a file", in_part, |view| write_at(view, "a/a/a", 0, &"n".repeat(40))),
    ("write blocks that were not copied", in_part, |view| write_at(view, "a/a/a", 20, "new bytes")),
    ("punch a lower file", nothing, |view| punch(view, "a/a/a", (5, 10))),
    ("cut a file of which a part was copied", in_part, |view| {
        view.setattr("a/a/a", &SetAttr { size_bytes: Some(10), ..SetAttr::default() }).map(drop)
    }),
    ("change the mode of a lower file", nothing, |view| {
        view.setattr("a/a/a", &SetAttr { mode: Some(0o600), ..SetAttr::default() }).map(drop)
    }),
    ("write blocks again", in_part, |view| write_at(view, "a/a/a", 10, "again")),
    ("rename a file of which a part was copied", in_part, |view| view.rename("a/a/a", "d/e")),
    ("append to a file of several names", nothing, |view| view.append("a/a/b", "+")),
    ("change a lower directory", nothing, |view| {
        view.setattr("a/b", &SetAttr { mode: Some(0o700), ..SetAttr::default() }).map(drop)
    }),
    ("cut a lower file", nothing, |view| {
        view.setattr("a/c", &SetAttr { size_bytes: Some(1), ..SetAttr::default() }).map(drop)
    }),
    ("unlink a lower file", nothing, |view| view.unlink("a/a/a")),
    ("unlink a name of several", nothing, |view| view.unlink("c/c")),
    ("unlink a name of several, copied", |view| view.append("c/c", "+"), |view| view.unlink("c/b/c")),
    (
        "unlink the last of several",
        |view| view.append("a/d", "+").and_then(|()| view.unlink("a/d")),
        |view| view.unlink("a/a/b"),
    ),
    ("unlink a copied file", |view| view.append("a/a/a", "+"), |view| view.unlink("a/a/a")),
    ("link a lower file", nothing, |view| view.link("a/a/a", "d/new").map(drop)),
    ("make a directory", nothing, |view| view.mkdir("a/b/new").map(drop)),
    ("make a directory over a whiteout", empty_d, |view| {
        view.rmdir("c/d")?;
        view.mkdir("c/d").map(drop)
    }),
    ("make a link over a whiteout", |view| view.unlink("a/c"), |view| view.symlink("a/c", "x").map(drop)),
    ("remove a merged directory", empty_d, |view| view.rmdir("c/d")),
    ("remove an upper directory", |view| view.mkdir("a/new").map(drop), |view| view.rmdir("a/new")),
    ("rename a lower file", nothing, |view| view.rename("a/a/a", "d/e")),
    ("rename a file over another", nothing, |view| view.rename("a/a/a", "a/a/b")),
    ("rename a copied name", |view| view.append("a/d", "+"), |view| view.rename("a/a/b", "a/a/e")),
    ("rename a symbolic link", nothing, |view| view.rename("a/b/a", "d/l")),
    ("rename a merged directory", nothing, |view| view.rename("a/a", "d/moved")),
    ("rename it again", |view| view.rename("a/a", "d/moved"), |view| view.rename("d/moved", "a/a")),
    ("rename a directory over an empty one", empty_d, |view| view.rename("a/a", "c/d")),
    (
        "rename a new directory over an empty one",
        |view| view.mkdir("new").and(empty_d(view)),
        |view| view.rename("new", "c/d"),
    ),
    (
        "rename a new directory to a hidden name",
        |view| view.mkdir("new").and(view.rename("a", "e")),
        |view| view.rename("new", "a"),
    ),
    ("exchange directories", nothing, |view| view.rename_with("a/a", "c", RenameFlags::EXCHANGE)),
    ("exchange a directory and a file", nothing, |view| {
        view.rename_with("a/b", "a/c", RenameFlags::EXCHANGE)
    }),
];

/// How far changes come that are made of several.
const STEPS: &[(&str, Change, Change)] = &[
    ("make a directory over a whiteout", empty_d, |view| view.rmdir("c/d")),
    // Blocks of one kind at a time; write(2) says then how much was written.
    ("write in a file of which a part was copied", in_part, |view| write_at(view, "a/a/a", 3, "new b")),
    ("write the rest of such a file", in_part, |view| write_at(view, "a/a/a", 0, &"n".repeat(8))),
    ("write the rest of such a file", in_part, |view| write_at(view, "a/a/a", 0, &"n".repeat(16))),
];

fn nothing(_: &View) -> Result<()> {
    Ok(())
}

fn in_part(view: &View) -> Result<()> {
    write_at(view, "a/a/a", 9, "12345")
}

fn with_file(view: &View, path: &str, change: impl FnOnce(HandleId) -> Result<()>) -> Result<()> {
    let handle = view.open(path, OpenFlags::READ | OpenFlags::WRITE)?;
    let done = change(handle);
    view.close(handle);
    done
}

fn write_at(view: &View, path: &str, at: u64, text: &str) -> Result<()> {
    with_file(view, path, |handle| {
        view.union.write(&view.caller, NodeId::ROOT, handle, at, text.as_bytes()).map(drop)
    })
}

fn punch(view: &View, path: &str, (at, length): (u64, u64)) -> Result<()> {
    let mode = FallocateMode::PUNCH_HOLE | FallocateMode::KEEP_SIZE;
    with_file(view, path, |handle| view.union.fallocate(&view.caller, NodeId::ROOT, handle, mode, at, length))
}

fn empty_d(view: &View) -> Result<()> {
    view.unlink("c/d/d")
}

fn prepared(prepare: Change, sizes: BlockSizes) -> Rig {
    let rig = Rig::quick(3).with_sizes(sizes);
    populate(&rig);
    prepare(&rig.union()).unwrap();
    rig
}

/// The states that a change may leave: more than two where it is made of several calls.
fn states(prepare: Change, change: Change, sizes: BlockSizes) -> Vec<Vec<String>> {
    let rig = prepared(prepare, sizes);
    let view = rig.union();
    let mut states = vec![view.state(false)];
    change(&view).unwrap();
    states.push(view.state(false));
    states
}

fn interrupt((what, prepare, change): (&str, Change, Change), for_good: bool, sizes: BlockSizes) {
    let mut expected = states(prepare, change, sizes);
    for (_, prepare, step) in STEPS.iter().filter(|(of, ..)| *of == what) {
        expected.push(states(*prepare, *step, sizes).pop().unwrap());
    }
    for after in 0.. {
        let rig = prepared(prepare, sizes);
        let below = dir_layer(&rig.upper(""), false, DirCoherence::Exclusive);
        let failing = Arc::new(Failing { below, left: AtomicI64::new(i64::MAX), for_good });
        let view = View::of_union(Union::with_sizes(rig.lowers(), Some(failing.clone()), sizes).unwrap());
        failing.left.store(after, SeqCst);
        let done = change(&view);
        let reached = failing.left.swap(i64::MAX, SeqCst) < 0;
        let say =
            format!("{what}, {sizes:?}, failed after {after} steps, for good: {for_good}, answer {done:?}");
        if !for_good {
            let state = view.state(false);
            assert!(expected.contains(&state), "{say}, live:\n{state:#?}");
        }
        view.assert_nothing_held();
        drop(view);
        let again = rig.union();
        let state = again.state(false);
        assert!(expected.contains(&state), "{say}:\n{state:#?}");
        let attrs = again.attrs();
        for (path, attr) in &attrs {
            let names = attrs.iter().filter(|(_, other)| other.ino == attr.ino).count();
            assert!(attr.is_dir() || attr.nlink as usize >= names, "{say}: {path} has {} names", attr.nlink);
        }
        let left = host::read_dir(rig.upper(".wh..wh.polytropo/work")).unwrap().count();
        assert_eq!(left, 0, "{say}: left in the work area");
        if !reached {
            assert!(done.is_ok(), "{say}");
            assert_eq!(&state, &expected[1], "{say}");
            return;
        }
    }
}

fn interrupt_all(for_good: bool, sizes: BlockSizes) {
    for change in CHANGES {
        interrupt(*change, for_good, sizes);
    }
}

#[test]
fn killed_after_any_step_the_old_state_shows_or_the_new() {
    interrupt_all(true, BlockSizes::default());
}

#[test]
fn refused_at_any_step_the_old_state_shows_or_the_new() {
    interrupt_all(false, BlockSizes::default());
}

#[test]
fn killed_while_some_bytes_are_copied_the_old_state_shows_or_the_new() {
    interrupt_all(true, TINY);
}

#[test]
fn refused_while_some_bytes_are_copied_the_old_state_shows_or_the_new() {
    interrupt_all(false, TINY);
}
