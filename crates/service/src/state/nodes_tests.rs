use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use polytropo_libservices::Name;
use polytropo_libservices::privileges::Witness;

use super::*;

/// All that is written of a number follows from it and from where it is, so that halves show.
fn seen_at<'a>(number: u64, place: u64, name: &'a mut Vec<u8>) -> Seen<'a> {
    *name = name_of(number, place);
    Seen { number, parent: place, name, ino: number * 7, file_type: libc::S_IFREG, linked: false }
}

/// Some are short, some long.
fn name_of(number: u64, place: u64) -> Vec<u8> {
    let mut name = format!("{number}.{place}.").into_bytes();
    let length = 20 + (number * 31 + place * 17) as usize % 230;
    name.resize(length.max(name.len()), b'x');
    name
}

fn is_whole(record: &NodeRecord) -> bool {
    record.places.iter().all(|(parent, name)| *name == name_of(record.number, *parent))
        && record.ino == record.number * 7
        && record.file_type == libc::S_IFREG
}

fn state() -> (std::sync::Arc<DoorState>, StateReader, OwnedFd) {
    let descriptor = make(1).unwrap();
    let reader = StateReader::new(&descriptor).unwrap();
    let copy = descriptor.try_clone().unwrap();
    (DoorState::new(descriptor).unwrap(), reader, copy)
}

fn name(bytes: &[u8]) -> &Name {
    Name::new(bytes).unwrap()
}

#[test]
fn a_node_stands_there_until_its_last_look_up_is_dropped() {
    let (state, reader, _) = state();
    let mut buffer = Vec::new();
    for _ in 0..3 {
        state.nodes.seen(&seen_at(5, 1, &mut buffer));
    }
    state.nodes.moved(5, (1, name(&name_of(5, 1))), (2, name(&name_of(5, 2))));
    state.nodes.moved(6, (1, name(b"a")), (2, name(b"unknown")));
    let nodes = reader.nodes();
    assert_eq!((nodes.untold, nodes.damaged), (0, 0));
    let [node] = &nodes.nodes[..] else { panic!("{nodes:?}") };
    assert!(is_whole(node) && (node.places[0].0, node.lookups) == (2, 3), "{node:?}");
    assert!(!state.nodes.forget(5, 2));
    assert_eq!(reader.nodes().nodes[0].lookups, 1);
    assert!(state.nodes.forget(5, 9));
    assert!(reader.nodes().nodes.is_empty());
}

#[test]
fn further_names_of_a_file_are_kept_and_move() {
    let (state, reader, descriptor) = state();
    let mut buffer = Vec::new();
    for place in [1, 2, 3, 2] {
        state.nodes.seen(&Seen { linked: true, ..seen_at(5, place, &mut buffer) });
    }
    let at = |place| name_of(5, place);
    state.nodes.moved(5, (2, name(&at(2))), (4, name(&at(4))));
    state.nodes.moved(5, (1, name(&at(1))), (6, name(&at(6))));
    state.agree(Agreed { minor: 45, flags: 0 });
    drop(state);
    let (state, past) = DoorState::adopt(descriptor, 1, 10).unwrap();
    for nodes in [past.nodes, reader.nodes().nodes] {
        let [node] = &nodes[..] else { panic!("{nodes:?}") };
        let mut places: Vec<_> = node.places.iter().map(|place| place.0).collect();
        places.sort();
        assert!(is_whole(node) && node.lookups == 4 && places == [3, 4, 6], "{node:?}");
    }
    for place in 10..40 {
        state.nodes.seen(&Seen { linked: true, ..seen_at(5, place, &mut buffer) });
    }
    assert_eq!(reader.nodes().nodes[0].places.len(), 9);
    assert!(state.nodes.forget(5, 34));
    assert!(reader.nodes().nodes.is_empty());
}

#[test]
fn who_takes_over_knows_the_nodes_and_their_places() {
    let (state, reader, descriptor) = state();
    let mut buffer = Vec::new();
    for number in 2..500 {
        state.nodes.seen(&seen_at(number, 1, &mut buffer));
    }
    for number in (2..500).step_by(3) {
        state.nodes.forget(number, 1);
    }
    state.agree(Agreed { minor: 45, flags: 7 });
    drop(state);
    let before = reader.nodes().nodes;
    let (state, past) = DoorState::adopt(descriptor, 1, 10).unwrap();
    let mut nodes = past.nodes;
    nodes.sort_by_key(|node| node.number);
    assert_eq!(nodes, before);
    assert_eq!(past.agreed, Agreed { minor: 45, flags: 7 });
    // What was free is used again, and what was taken is not.
    for number in 1000..1400 {
        state.nodes.seen(&seen_at(number, 3, &mut buffer));
    }
    let nodes = reader.nodes();
    assert_eq!(nodes.nodes.len(), before.len() + 400);
    assert!(nodes.nodes.iter().all(is_whole) && nodes.damaged == 0);
}

#[test]
fn what_was_begun_is_found() {
    let (state, _, descriptor) = state();
    let first = Intent { unique: 4, opcode: 9, name: Some(name(b"made").to_boxed()), ..Intent::default() };
    let second = Intent {
        unique: 6,
        opcode: 45,
        ino: 77,
        flags: 2,
        parent: 1,
        name: Some(name(&[b'a'; 255]).to_boxed()),
        new_parent: 8,
        new_name: Some(name(b"b").to_boxed()),
    };
    let slots = [state.journal_slot().unwrap(), state.journal_slot().unwrap(), state.journal_slot().unwrap()];
    slots[0].begin(&first);
    slots[0].done();
    slots[1].begin(&second);
    state.agree(Agreed { minor: 45, flags: 0 });
    let found = |incarnation| {
        let (state, past) = DoorState::adopt(descriptor.try_clone().unwrap(), incarnation, 10).unwrap();
        (state, past.begun)
    };
    let expected: Vec<_> = [(first, true, 0), (second, false, 1)]
        .map(|(intent, done, slot)| Begun { intent, done, slot })
        .into();
    for incarnation in 1..300 {
        assert_eq!(found(incarnation).1, expected);
    }
    // What was sent again and answered is forgotten; the others are not.
    let (state, begun) = found(300);
    let slot = state.journal_slot().unwrap();
    slot.take_up(1, Some(&begun[1]));
    slot.done();
    assert!(found(301).1[0].done);
    slot.answered();
    assert_eq!(found(302).1, expected[..1]);
}

#[test]
fn bits_that_were_gone_for_a_moment_are_told_once() {
    let (state, _, descriptor) = state();
    let slots = [state.journal_slot().unwrap(), state.journal_slot().unwrap()];
    for (number, slot) in slots.iter().enumerate() {
        slot.take_up(7 + number as u64, None);
        slot.leave(0o4755);
    }
    slots[0].back();
    state.agree(Agreed { minor: 45, flags: 0 });
    let lost =
        |descriptor: &OwnedFd| DoorState::adopt(descriptor.try_clone().unwrap(), 1, 10).unwrap().1.lost_bits;
    assert_eq!(lost(&descriptor), [LostBits { node: 8, mode: 0o4755 }]);
    assert_eq!(lost(&descriptor), []);
}

#[test]
fn what_is_never_asked_for_gives_way() {
    let (state, _, descriptor) = state();
    state.agree(Agreed { minor: 45, flags: 0 });
    let intent = |unique| Intent { unique, opcode: 9, ..Intent::default() };
    let mut slot = state.journal_slot().unwrap();
    for incarnation in 1..1000 {
        slot.begin(&intent(incarnation));
        let (next, past) = DoorState::adopt(descriptor.try_clone().unwrap(), incarnation, 10).unwrap();
        assert!(past.begun.iter().any(|begun| begun.intent.unique == incarnation));
        assert!(past.begun.iter().any(|begun| begun.intent.unique == 1));
        slot = next.journal_slot().unwrap();
        let first = past.begun.iter().find(|begun| begun.intent.unique == 1);
        slot.take_up(1, first);
        slot.take_up(1, None);
    }
}

const STANDING: u64 = 200;

/// Looks up, moves and forgets until it is killed. A program of its own.
#[test]
#[ignore = "is started and killed by a test"]
fn writes_until_it_is_killed() {
    let Ok(number) = std::env::var("POLYTROPO_TEST_AREA") else { return };
    // SAFETY: the test that started this left the descriptor open for it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number.parse().unwrap()) };
    let state = DoorState::new(descriptor).unwrap();
    let mut buffer = Vec::new();
    for number in 1..=STANDING {
        state.nodes.seen(&seen_at(number, 1, &mut buffer));
    }
    println!("ready");
    for round in 2u64.. {
        for number in 1..=STANDING {
            let (from, to) = (name_of(number, round - 1), name_of(number, round));
            state.nodes.moved(number, (round - 1, name(&from)), (round, name(&to)));
            state.nodes.seen(&seen_at(number, round, &mut buffer));
            state.nodes.forget(number, 1);
            let passing = STANDING + number;
            state.nodes.seen(&seen_at(passing, round, &mut buffer));
            state.nodes.forget(passing, 1);
        }
    }
}

#[test]
fn a_writer_killed_at_any_instant_leaves_whole_nodes() {
    for round in 0..25 {
        let descriptor = make(1).unwrap();
        let reader = StateReader::new(&descriptor).unwrap();
        let inherited = rustix::io::dup(&descriptor).unwrap();
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "state::nodes_tests::writes_until_it_is_killed", "--ignored", "--nocapture"])
            .env("POLYTROPO_TEST_AREA", inherited.as_raw_fd().to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = std::io::BufReader::new(writer.stdout.take().unwrap());
        assert!(std::io::BufRead::lines(out).any(|line| line.unwrap().contains("ready")));
        std::thread::sleep(Duration::from_micros(137 * round));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let nodes = reader.nodes();
        assert_eq!(nodes.damaged, 0, "{nodes:?}");
        assert!(nodes.nodes.iter().all(is_whole));
        let standing = nodes.nodes.iter().filter(|node| node.number <= STANDING);
        let lookups: Vec<_> = standing.map(|node| node.lookups).collect();
        assert_eq!(lookups.len(), STANDING as usize);
        // One may have been in the middle.
        assert!(lookups.iter().all(|lookups| (1..=2).contains(lookups)));
        assert!(nodes.nodes.len() <= STANDING as usize + 1);
    }
}
