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
        setxattr(node: NodeId, name: &[u8], value: &[u8], flags: XattrFlags) -> ();
        removexattr(node: NodeId, name: &[u8]) -> ();
    }
}

type Change = fn(&View) -> Result<()>;

/// What is done first, without failures, and then with them.
const CHANGES: &[(&str, Change, Change)] = &[
    ("append to a lower file", nothing, |view| view.append("a/a/a", "+")),
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

fn nothing(_: &View) -> Result<()> {
    Ok(())
}

fn empty_d(view: &View) -> Result<()> {
    view.unlink("c/d/d")
}

fn prepared(prepare: Change) -> Rig {
    let rig = Rig::quick(3);
    populate(&rig);
    prepare(&rig.union()).unwrap();
    rig
}

/// The states that a change may leave: more than two where it is made of several calls.
fn states(prepare: Change, change: Change) -> Vec<Vec<String>> {
    let rig = prepared(prepare);
    let view = rig.union();
    let mut states = vec![view.state(false)];
    change(&view).unwrap();
    states.push(view.state(false));
    states
}

fn interrupt(what: &str, prepare: Change, change: Change, for_good: bool) {
    let mut expected = states(prepare, change);
    if what == "make a directory over a whiteout" {
        expected.push(states(empty_d, |view| view.rmdir("c/d")).pop().unwrap());
    }
    for after in 0.. {
        let rig = prepared(prepare);
        let below = dir_layer(&rig.upper(""), false, DirCoherence::Exclusive);
        let failing = Arc::new(Failing { below, left: AtomicI64::new(i64::MAX), for_good });
        let view = View::of_union(Union::new(rig.lowers(), Some(failing.clone())).unwrap());
        failing.left.store(after, SeqCst);
        let done = change(&view);
        let reached = failing.left.swap(i64::MAX, SeqCst) < 0;
        let say = format!("{what}, failed after {after} steps, for good: {for_good}, answer {done:?}");
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
        let left = host::read_dir(rig.upper(".wh..wh.polytropo/tmp")).unwrap().count();
        assert_eq!(left, 0, "{say}: left in the work area");
        if !reached {
            assert!(done.is_ok(), "{say}");
            assert_eq!(&state, &expected[1], "{say}");
            return;
        }
    }
}

#[test]
fn killed_after_any_step_the_old_state_shows_or_the_new() {
    for (what, prepare, change) in CHANGES {
        interrupt(what, *prepare, *change, true);
    }
}

#[test]
fn refused_at_any_step_the_old_state_shows_or_the_new() {
    for (what, prepare, change) in CHANGES {
        interrupt(what, *prepare, *change, false);
    }
}
