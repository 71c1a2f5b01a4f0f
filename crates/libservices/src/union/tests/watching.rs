//! What observers are told, and what others change below.

use super::*;
use crate::libservice::Change;

#[derive(Default)]
struct Seen(Mutex<Vec<(String, DoorId)>>);

impl Observer for Seen {
    fn changed(&self, change: Change<'_>, origin: DoorId) {
        let text = match change {
            Change::Inode { node } | Change::Bytes { node, .. } => format!("inode {}", node.0),
            Change::Entry { parent, name } => format!("entry {} {name:?}", parent.0),
            Change::Elsewhere => "elsewhere".to_owned(),
        };
        self.0.lock().push((text, origin));
    }
}

impl Seen {
    fn take(&self) -> Vec<(String, DoorId)> {
        std::mem::take(&mut self.0.lock())
    }
}

#[test]
fn changes_are_told_by_the_unions_numbers_and_the_callers_door() {
    for coherence in [DirCoherence::Immutable, DirCoherence::Shared] {
        let mut rig = Rig::quick(2);
        rig.coherence = coherence;
        rig.put(1, "d/f", "base");
        rig.put(0, "d/g", "base");
        let mut view = rig.union();
        view.caller.door = DoorId(7);
        let seen = Arc::new(Seen::default());
        view.union.observe(seen.clone());
        let directory = view.union.lookup(&view.caller, NodeId::ROOT, name("d")).unwrap();
        let file = view.union.lookup(&view.caller, directory.node, name("f")).unwrap();
        let (d, f) = (directory.node, file.node.0);
        assert_eq!(seen.take(), []);
        let mode = SetAttr { mode: Some(0o600), ..SetAttr::default() };
        view.union.setattr(&view.caller, file.node, None, &mode).unwrap();
        assert_eq!(seen.take(), [(format!("inode {f}"), DoorId(7))], "a copy-up is no change");
        view.union.unlink(&view.caller, d, name("f")).unwrap();
        let told = seen.take();
        assert!(told.contains(&(format!("entry {} \"f\"", d.0), DoorId(7))), "{told:?}");
        assert!(told.contains(&(format!("inode {f}"), DoorId(7))), "{told:?}");
        assert!(told.iter().all(|(_, door)| *door == DoorId(7)), "{told:?}");
        view.union.forget(file.node, 1);
        view.union.forget(d, 1);
        view.assert_nothing_held();
    }
}

#[test]
fn what_others_change_in_a_layer_is_passed_on() {
    let rig = Rig::quick(2);
    rig.put(1, "d/f", "base");
    rig.put(0, "d/g", "base");
    let upper = dir_layer(&rig.upper(""), false, DirCoherence::Exclusive);
    let (top, bottom) = (
        dir_layer(&rig.lower(0, ""), false, DirCoherence::Shared),
        dir_layer(&rig.lower(1, ""), false, DirCoherence::Shared),
    );
    let view = View::of_union(Union::new(vec![top, bottom.clone()], Some(upper)).unwrap());
    let seen = Arc::new(Seen::default());
    view.union.observe(seen.clone());
    let directory = view.union.lookup(&view.caller, NodeId::ROOT, name("d")).unwrap();
    // Another user of the same layer.
    let other = View { caller: Caller { door: DoorId(9), ..Caller::service() }, ..View::new(bottom) };
    other.write("d/new", "x").unwrap();
    let told = seen.take();
    assert!(told.contains(&(format!("entry {} \"new\"", directory.node.0), DoorId(9))), "{told:?}");
    assert_eq!(view.read("d/new").unwrap(), "x");
    view.union.forget(directory.node, 1);
}

#[test]
fn changes_below_are_seen() {
    let mut rig = Rig::quick(2);
    rig.coherence = DirCoherence::Shared;
    rig.put(1, "d/f", "base");
    let view = rig.union();
    assert_eq!(view.union.coherence(), Coherence::Shared);
    for _ in 0..6 {
        assert_eq!(view.list("d").unwrap(), ["f"]);
        assert_eq!(errno(view.attr("d/late")), Errno::NOENT);
    }
    let directory = view.union.lookup(&view.caller, NodeId::ROOT, name("d")).unwrap();
    rig.put(0, "d/late", "late");
    rig.put(1, "d/f", "changed");
    assert_eq!(view.read("d/late").unwrap(), "late");
    assert_eq!(view.list("d").unwrap(), ["f", "late"]);
    assert_eq!(view.read("d/f").unwrap(), "changed");
    rig.put(0, "d/.wh.f", "");
    assert_eq!(view.list("d").unwrap(), ["late"]);
    host::remove_dir_all(rig.lower(0, "d")).unwrap();
    assert_eq!(view.list("d").unwrap(), ["f"]);
    view.union.forget(directory.node, 1);
    view.assert_nothing_held();
}

#[test]
fn the_weakest_layer_says_how_coherent_a_union_is() {
    let rig = Rig::quick(1);
    let lower = |coherence| dir_layer(&rig.lower(0, ""), true, coherence);
    let upper = || dir_layer(&rig.upper(""), false, DirCoherence::Exclusive);
    let coherence = |lower, upper| Union::new(vec![lower], upper).unwrap().coherence();
    assert_eq!(coherence(lower(DirCoherence::Immutable), None), Coherence::Immutable);
    assert_eq!(coherence(lower(DirCoherence::Immutable), Some(upper())), Coherence::Exclusive);
    assert_eq!(coherence(lower(DirCoherence::Shared), None), Coherence::Shared);
    assert_eq!(coherence(lower(DirCoherence::Shared), Some(upper())), Coherence::Shared);
    let read_only = dir_layer(&rig.upper(""), true, DirCoherence::Exclusive);
    let refused = Union::new(vec![lower(DirCoherence::Immutable)], Some(read_only));
    assert!(refused.err().unwrap().is(Errno::ROFS));
    assert!(Union::new(Vec::new(), None).err().unwrap().is(Errno::INVAL));
}
