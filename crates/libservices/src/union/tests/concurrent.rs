//! Many threads on one union.

use std::sync::Barrier;
use std::sync::atomic::Ordering::SeqCst;

use super::counting::Counted;
use super::model::populate;
use super::*;

/// A small generator of numbers: the threads' choices must not depend on each other.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn path(&mut self) -> String {
        let depth = 1 + self.roll(3);
        let parts: Vec<_> = (0..depth).map(|_| ["a", "b", "c", "d"][self.roll(4) as usize]).collect();
        parts.join("/")
    }
}

/// Answers that a change may get when others change the same names.
fn expected(errno: Errno) -> bool {
    [
        Errno::NOENT,
        Errno::EXIST,
        Errno::NOTDIR,
        Errno::ISDIR,
        Errno::NOTEMPTY,
        Errno::INVAL,
        Errno::PERM,
        Errno::LOOP,
        Errno::NXIO,
        Errno::STALE,
    ]
    .contains(&errno)
}

fn act(view: &View, dice: &mut Dice) {
    let (path, other) = (dice.path(), dice.path());
    let done = match dice.roll(12) {
        0 => view.write(&path, "xx"),
        1 | 2 => view.append(&path, "+"),
        3 => view.mkdir(&path).map(drop),
        4 => view.link(&path, &other).map(drop),
        5 => view.unlink(&path),
        6 => view.rmdir(&path),
        7 | 8 => view.rename(&path, &other),
        9 => view.rename_with(&path, &other, RenameFlags::EXCHANGE),
        10 => view.setattr(&path, &SetAttr { size_bytes: Some(3), ..SetAttr::default() }).map(drop),
        _ => list(view, &path),
    };
    if let Err(e) = done {
        assert!(expected(e.errno()), "{e}");
    }
}

fn list(view: &View, path: &str) -> Result<()> {
    view.at(path, |entry| {
        let handle = view.union.opendir(&view.caller, entry.node)?;
        let mut nodes = Vec::new();
        let done = view.union.readdir_plus(&view.caller, entry.node, handle, 0, &mut |_, found| {
            nodes.extend(found.map(|found| found.node));
            true
        });
        nodes.into_iter().for_each(|node| view.union.forget(node, 1));
        view.union.releasedir(entry.node, handle);
        done
    })
}

/// `UNION_STORMS` asks for more rounds.
fn storms(coherence: DirCoherence) {
    let rounds = std::env::var("UNION_STORMS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    (0..rounds).for_each(|round| storm(coherence, round * 100));
}

fn storm(coherence: DirCoherence, first_seed: u64) {
    let mut rig = Rig::quick(3);
    rig.coherence = coherence;
    populate(&rig);
    let (counted, view) = Counted::of(&rig);
    let start = Barrier::new(6);
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let (view, start) = (&view, &start);
            scope.spawn(move || {
                let mut dice = Dice(first_seed + seed);
                start.wait();
                for _ in 0..400 {
                    act(view, &mut dice);
                }
            });
        }
    });
    view.assert_nothing_held();
    counted.assert_nothing_held();
    let (state, inos) = (view.state(false), view.inos());
    drop(view);
    let again = rig.union();
    assert_eq!(again.state(false), state);
    assert_eq!(again.inos(), inos);
}

#[test]
fn threads_leave_a_tree_that_a_restart_shows_again() {
    storms(DirCoherence::Immutable);
}

#[test]
fn threads_over_layers_that_others_may_change() {
    storms(DirCoherence::Shared);
}

#[test]
fn a_union_that_ends_gives_back_what_nobody_forgot() {
    let rig = Rig::quick(3);
    populate(&rig);
    let (counted, view) = Counted::of(&rig);
    for path in ["a", "a/a", "a/a/a", "c/b", "d/c"] {
        view.at(path, |entry| {
            let parent = entry.node;
            view.union.lookup(&view.caller, NodeId::ROOT, name("a"))?;
            if entry.attr.is_dir() { view.union.opendir(&view.caller, parent).map(drop) } else { Ok(()) }
        })
        .unwrap();
    }
    view.append("a/a/a", "+").unwrap();
    view.open("a/a/a", OpenFlags::READ).unwrap();
    view.open("a/a/b", OpenFlags::READ).unwrap();
    drop(view);
    for layer in counted.lowers.iter().chain([&counted.upper]) {
        assert_eq!(layer.held(), (0, 0));
    }
}

#[test]
fn two_who_write_one_file_copy_it_once() {
    let rig = Rig::quick(1);
    host::create_dir(rig.lower(0, "d")).unwrap();
    host::write(rig.lower(0, "d/big"), vec![7; 4 << 20]).unwrap();
    let (counted, view) = Counted::of(&rig);
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                start.wait();
                view.append("d/big", "+").unwrap();
            });
        }
    });
    assert_eq!(counted.upper.creates.load(SeqCst), 1);
    assert_eq!(view.attr("d/big").unwrap().size_bytes, (4 << 20) + 4);
    view.assert_nothing_held();
    counted.assert_nothing_held();
}

#[test]
fn a_directory_of_one_layer_costs_one_look_up_a_name() {
    let rig = Rig::quick(3);
    for i in 0..20 {
        rig.put(2, &format!("only/{i}"), "x");
        rig.put(i % 3, &format!("all/{i}"), "x");
    }
    let (counted, view) = Counted::of(&rig);
    let asked = || -> usize {
        let lowers: usize = counted.lowers.iter().map(|lower| lower.lookups.load(SeqCst)).sum();
        lowers + counted.upper.lookups.load(SeqCst)
    };
    let cost = |parent: NodeId, text: &str| {
        let before = asked();
        match view.union.lookup(&view.caller, parent, name(text)) {
            Ok(entry) => view.union.forget(entry.node, 1),
            Err(e) => assert!(e.is(Errno::NOENT)),
        }
        asked() - before
    };
    view.at("only", |only| {
        for i in 0..20 {
            assert_eq!(cost(only.node, &i.to_string()), 1);
            assert_eq!(cost(only.node, "absent"), 1);
        }
        Ok(())
    })
    .unwrap();
    view.at("all", |all| {
        for i in 0..20 {
            // Once the names are known, only the layer that has one is asked.
            let costs = (cost(all.node, &i.to_string()), cost(all.node, "absent"));
            assert!(i < 4 || costs == (1, 0), "{i}: {costs:?}");
        }
        Ok(())
    })
    .unwrap();
    view.assert_nothing_held();
    counted.assert_nothing_held();
}
