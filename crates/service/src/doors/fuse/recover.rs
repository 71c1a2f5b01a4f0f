//! Taking over a connection whose worker is dead: what the kernel holds is found again in a stack that was built anew.
//!
//! Each node was written down with its directory and name, and is looked up there; it is the same if the stack shows the same inode number
//! and type. What is not found is ESTALE, upon which the kernel looks names up again. Then the kernel is asked to send again what was read
//! and not answered.

use polytropo_libservices::privileges::without;
use polytropo_libservices::{Caller, Libservice, Name, NodeId, OpenFlags, RenameFlags, SetAttr};
use rustc_hash::FxHashMap;

use super::session::Session;
use crate::state::{Begun, Intent, Kind, Listed, LostBits, NodeRecord, OpenRecord, Past};

/// Bound on climbing from a node to the root.
const DEPTH_MAX: usize = 8192;

/// What became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    pub nodes: usize,
    pub nodes_lost: usize,
    pub files: usize,
    pub files_lost: usize,
}

struct Rebuilding<'a> {
    session: &'a Session,
    caller: Caller,
    records: FxHashMap<u64, NodeRecord>,
    /// `None`: not to be found.
    found: FxHashMap<u64, Option<NodeId>>,
}

/// Before any request is read.
pub fn recover(session: &Session, past: Past) -> Recovered {
    let records = past.nodes.into_iter().map(|record| (record.number, record)).collect();
    let found = FxHashMap::from_iter([(NodeId::ROOT.0, Some(NodeId::ROOT))]);
    let mut rebuilding = Rebuilding { session, caller: Caller::service(), records, found };
    rebuilding.follow_renames(&past.begun);
    let mut recovered = Recovered::default();
    let numbers: Vec<u64> = rebuilding.records.keys().copied().collect();
    for number in numbers {
        match rebuilding.find(number) {
            Some(_) => recovered.nodes += 1,
            None => recovered.nodes_lost += 1,
        }
    }
    session.was_begun(past.begun);
    past.lost_bits.iter().for_each(|lost| rebuilding.give_back(lost));
    for (record, listed) in past.files {
        match rebuilding.open(&record, listed) {
            Some(()) => recovered.files += 1,
            None => recovered.files_lost += 1,
        }
    }
    recovered
}

impl Rebuilding<'_> {
    fn stack(&self) -> &dyn Libservice {
        &*self.session.stack
    }

    /// The node behind a number, and on the way there those of the directories above.
    fn find(&mut self, number: u64) -> Option<NodeId> {
        let mut way = vec![number];
        while let Some(&at) = way.last() {
            if self.found.contains_key(&at) {
                way.pop();
                continue;
            }
            // A directory has one place; of a file each may be the one.
            let places = self.records.get(&at).map_or(&[][..], |record| &record.places[..]);
            let above = places.iter().map(|(parent, _)| *parent).find(|at| !self.found.contains_key(at));
            let node = match above {
                Some(parent) if way.len() < DEPTH_MAX => {
                    way.push(parent);
                    continue;
                }
                // A circle, or deeper than any tree.
                Some(_) => None,
                None => self.look_up(at),
            };
            self.found.insert(at, node);
        }
        self.found.get(&number).copied().flatten()
    }

    /// Looks for a node in its directories, which were looked for.
    fn look_up(&self, number: u64) -> Option<NodeId> {
        let record = self.records.get(&number)?;
        let node = record.places.iter().find_map(|place| self.look_at(place, record))?;
        self.session.numbers.recover_node(number, node, record.lookups);
        Some(node)
    }

    fn look_at(&self, (parent, name): &(u64, Vec<u8>), record: &NodeRecord) -> Option<NodeId> {
        let parent = self.found.get(parent).copied().flatten()?;
        let entry = self.stack().lookup(&self.caller, parent, Name::new(name).ok()?).ok()?;
        if entry.attr.ino != record.ino || entry.attr.file_type() != record.file_type {
            self.stack().forget(entry.node, 1);
            return None;
        }
        Some(entry.node)
    }

    /// Names that were on the move: who died may have moved them and not written that down.
    fn follow_renames(&mut self, begun: &[Begun]) {
        let renames: Vec<_> =
            begun.iter().map(|begun| &begun.intent).filter(|intent| intent.new_name.is_some()).collect();
        // One may have moved a directory above another.
        for _ in 0..renames.len() {
            for intent in &renames {
                self.follow(intent);
                // A directory that was not found may be now.
                self.found.retain(|_, node| node.is_some());
            }
        }
    }

    fn follow(&mut self, intent: &Intent) {
        let (Some(name), Some(new_name)) = (&intent.name, &intent.new_name) else { return };
        let (from, to) = ((intent.parent, &**name), (intent.new_parent, &**new_name));
        let Some(new_parent) = self.find(intent.new_parent) else { return };
        let Ok(there) = self.stack().lookup(&self.caller, new_parent, new_name) else { return };
        self.stack().forget(there.node, 1);
        if there.attr.ino != intent.ino {
            return;
        }
        let exchanged = RenameFlags::from_bits_truncate(intent.flags).contains(RenameFlags::EXCHANGE);
        let mut moved = Vec::new();
        for record in self.records.values_mut() {
            for place in &mut record.places {
                let is = |(parent, name): (u64, &Name)| (place.0, &place.1[..]) == (parent, name.as_bytes());
                let (old, new) = if is(from) && record.ino == intent.ino {
                    (from, to)
                } else if exchanged && is(to) && record.ino != intent.ino {
                    (to, from)
                } else {
                    continue;
                };
                *place = (new.0, new.1.as_bytes().to_vec());
                moved.push((record.number, old, new));
            }
        }
        for (number, old, new) in moved {
            self.session.numbers.moved(number, old, new);
        }
    }

    /// Gives setuid and setgid bits back that the host took away for a write.
    fn give_back(&mut self, lost: &LostBits) {
        let Some(node) = self.find(lost.node) else { return };
        let Ok(attr) = self.stack().getattr(&self.caller, node, None) else { return };
        if attr.file_type() != libc::S_IFREG {
            return;
        }
        if attr.mode & 0o7777 == lost.mode || attr.mode & 0o7777 != without(lost.mode) {
            return;
        }
        let changes = SetAttr { mode: Some(lost.mode), ..SetAttr::default() };
        if let Err(error) = self.stack().setattr(&self.caller, node, None, &changes) {
            log::warn!("setuid and setgid bits {:o} of node {} are lost: {error}", lost.mode, lost.node);
        }
    }

    /// Opens again what programs have open.
    fn open(&mut self, record: &OpenRecord, listed: Listed) -> Option<()> {
        let node = self.find(record.kernel_node)?;
        let caller = Caller { uid: record.uid, gid: record.gid, ..self.caller.clone() };
        let session = self.session;
        let handle = match record.kind {
            Kind::File => {
                let flags =
                    record.flags - (OpenFlags::TRUNCATE | OpenFlags::EXCLUSIVE | OpenFlags::UNLINKABLE);
                let opened = self.stack().open(&caller, node, flags).ok()?;
                session.opens.adopt(node, opened.handle, flags, listed);
                opened.handle
            }
            Kind::Directory => {
                let handle = self.stack().opendir(&caller, node).ok()?;
                session.opens.adopt_directory(handle, listed);
                handle
            }
            Kind::Place => return None,
        };
        session.numbers.recover_handle(record.handle, handle);
        Some(())
    }
}
