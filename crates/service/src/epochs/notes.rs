//! What an answer depends on, noted while it is looked up.

use std::cell::Cell;

use polytropo_libservices::{Attr, Caller, Libservice, Name, NodeId};
use polytropo_wire::epochs::{EVERYTHING, Tag};

use super::Epochs;

/// The notes of one answer.
pub struct Notes<'a> {
    epochs: &'a Epochs,
    tag: Cell<Tag>,
    everything: Option<u64>,
    inode: Cell<Option<(u16, u64)>>,
}

impl<'a> Notes<'a> {
    /// Begin before anything is looked at.
    pub fn new(epochs: &'a Epochs) -> Self {
        let mut tag = Tag::default();
        let everything = epochs.table().and_then(|table| table.sample(EVERYTHING));
        tag.add(EVERYTHING, everything);
        Self { epochs, tag: Cell::new(tag), everything, inode: Cell::new(None) }
    }

    /// What everything's counter was before anything was looked at.
    pub fn everything(&self) -> Option<u64> {
        self.everything
    }

    /// The counter of the inode that is told of, and what it was before its attributes were read.
    pub fn inode(&self) -> Option<(u16, u64)> {
        // Nothing else can change where nothing can.
        let unchanging = self.everything.filter(|_| self.epochs.immutable).map(|sample| (EVERYTHING, sample));
        unchanging.or(self.inode.get())
    }

    /// What the answer depends on, so far.
    pub fn tag(&self) -> Tag {
        self.tag.get()
    }

    /// The answer cannot be kept.
    pub fn spoil(&self) {
        self.update(Tag::spoil);
    }

    fn update(&self, change: impl FnOnce(&mut Tag)) {
        let mut tag = self.tag.get();
        change(&mut tag);
        self.tag.set(tag);
    }

    fn add(&self, counter: u16) {
        if let Some(table) = self.epochs.table() {
            self.update(|tag| tag.add(counter, table.epoch(counter).sample()));
        }
    }

    /// A name is looked up next.
    pub fn name(&self, directory: &Attr, name: &Name) {
        if let Some(table) = self.epochs.table().filter(|_| !self.epochs.immutable) {
            self.add(table.of_name(directory.ino, name));
        }
    }

    /// The inode of this number will be looked up next, and told of: its attributes as they are found then are true from here on.
    pub fn expect(&self, ino: u64) {
        if let Some(table) = self.epochs.table().filter(|_| !self.epochs.immutable) {
            let counter = table.of_inode(ino);
            let sample = table.sample(counter);
            self.update(|tag| tag.add(counter, sample));
            self.inode.set(sample.map(|sample| (counter, sample)));
        }
    }

    /// The answer tells of `node`'s attributes. Tells them as they are now: `seen` were read before it was known which counter is theirs.
    /// `stack` is the door's own, which takes back permissions to write without waiting before it tells anything.
    pub fn attributes(&self, stack: &dyn Libservice, caller: &Caller, node: NodeId, seen: &Attr) -> Attr {
        let Some(table) = self.epochs.table().filter(|_| !self.epochs.immutable) else { return seen.clone() };
        let counter = table.of_inode(seen.ino);
        let sample = table.sample(counter);
        self.update(|tag| tag.add(counter, sample));
        self.inode.set(sample.map(|sample| (counter, sample)));
        match stack.getattr(caller, node, None) {
            Ok(attr) if attr.ino == seen.ino => attr,
            _ => {
                self.spoil();
                seen.clone()
            }
        }
    }
}
