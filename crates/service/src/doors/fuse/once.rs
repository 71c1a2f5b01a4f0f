//! Operations that must not be done twice.
//!
//! The kernel sends a request again to the next worker if the last one died before it answered. So what is not the same when done twice is
//! written down before it is done and after. Whoever died in between may have done it or not: then the directory is looked at, whose lock
//! the kernel holds for this request all the while.

use polytropo_libservices::{Caller, Entry, Errno, Name, NodeId, OpenFlags, RenameFlags, Result};

use super::abi::opcode;
use super::session::Operation;
use crate::state::Intent;

impl Operation<'_> {
    fn intent(&self, name: &Name) -> Intent {
        Intent {
            // Another worker may be sent it a third time.
            unique: self.unique(),
            opcode: self.header.opcode,
            parent: self.header.nodeid,
            name: Some(name.to_boxed()),
            ..Intent::default()
        }
    }

    fn begin(&self, intent: &Intent) {
        if let Some(journal) = self.journal {
            journal.begin(intent);
        }
    }

    /// Writes down what became of it.
    fn finish<T>(&self, result: Result<T>) -> Result<T> {
        if let (true, Some(journal)) = (result.is_ok(), self.journal) {
            journal.done();
        }
        result
    }

    fn was_done(&self) -> bool {
        self.past.as_ref().is_some_and(|past| past.done)
    }

    /// A dead worker has begun it, and `error` says that it is done already.
    fn was_begun<T>(&self, result: &Result<T>, error: Errno) -> bool {
        self.past.is_some() && matches!(result, Err(e) if e.is(error))
    }

    /// Takes away what a dead worker made by halves: it may lack its mode or owner. Nobody was told of it, since the kernel
    /// holds the directory's lock and still waits; it found no such name before it asked. What has bytes, entries or other
    /// names was somebody's, and stays.
    fn clear_half_made(&self, name: &Name) {
        if self.past.is_none() {
            return;
        }
        let caller = Caller::service();
        let Ok(found) = self.stack().lookup(&caller, self.node, name) else { return };
        self.stack().forget(found.node, 1);
        let cleared = match found.attr.file_type() {
            libc::S_IFDIR => self.stack().rmdir(&caller, self.node, name),
            libc::S_IFREG if found.attr.size_bytes > 0 => return,
            _ if found.attr.nlink > 1 => return,
            _ => self.stack().unlink(&caller, self.node, name),
        };
        if let Err(error) = cleared {
            log::debug!("what a dead worker made stays as it is: {error}");
        }
    }

    /// Makes something new by the name `name`.
    pub(super) fn make_new(&self, name: &Name, make: impl FnOnce() -> Result<Entry>) -> Result<Entry> {
        if !self.was_done() {
            self.clear_half_made(name);
        }
        self.make(name, make)
    }

    /// Makes the name `name`.
    pub(super) fn make(&self, name: &Name, make: impl FnOnce() -> Result<Entry>) -> Result<Entry> {
        let made = || self.stack().lookup(&self.caller, self.node, name);
        if self.was_done() {
            return made();
        }
        if self.keeps_journal() {
            self.begin(&self.intent(name));
        }
        let result = make();
        if self.was_begun(&result, Errno::EXIST) {
            return made();
        }
        self.finish(result)
    }

    /// The same for a file that is open then.
    pub(super) fn make_open<T>(
        &self,
        name: &Name,
        flags: OpenFlags,
        create: impl Fn(OpenFlags) -> Result<T>,
    ) -> Result<T> {
        if self.was_done() {
            return create(flags - OpenFlags::EXCLUSIVE);
        }
        self.clear_half_made(name);
        if self.keeps_journal() {
            self.begin(&self.intent(name));
        }
        let result = create(flags);
        if self.was_begun(&result, Errno::EXIST) {
            return create(flags - OpenFlags::EXCLUSIVE);
        }
        self.finish(result)
    }

    /// Does something to the name `name` after which doing it again fails with `again`.
    pub(super) fn take_away(
        &self,
        name: &Name,
        again: Errno,
        take: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if self.was_done() {
            return Ok(());
        }
        if self.keeps_journal() {
            self.begin(&self.intent(name));
        }
        let result = take();
        if self.was_begun(&result, again) {
            return Ok(());
        }
        self.finish(result)
    }

    /// The same for what has no name: attributes of a node.
    pub(super) fn change(&self, again: Errno, change: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.was_done() {
            return Ok(());
        }
        if self.keeps_journal() {
            let (unique, opcode, parent) = (self.unique(), self.header.opcode, self.header.nodeid);
            self.begin(&Intent { unique, opcode, parent, ..Intent::default() });
        }
        let result = change();
        if self.was_begun(&result, again) {
            return Ok(());
        }
        self.finish(result)
    }

    /// Moves a name, and tells where its node is now.
    pub(super) fn move_name(
        &self,
        name: &Name,
        (new_number, new_parent): (u64, NodeId),
        new_name: &Name,
        flags: RenameFlags,
    ) -> Result<()> {
        let rename = || self.stack().rename(&self.caller, self.node, name, new_parent, new_name, flags);
        if !self.session.numbers.are_kept() {
            return rename();
        }
        if let Some(past) = &self.past
            && (past.done || self.is_there(new_parent, new_name, past.intent.ino))
        {
            // Where its node is was seen when this worker took over.
            return Ok(());
        }
        let moved = self.stack().lookup(&self.caller, self.node, name)?;
        let other = match flags.contains(RenameFlags::EXCHANGE) {
            true => self.stack().lookup(&self.caller, new_parent, new_name).ok(),
            false => None,
        };
        self.begin(&Intent {
            ino: moved.attr.ino,
            flags: flags.bits(),
            new_parent: new_number,
            new_name: Some(new_name.to_boxed()),
            ..self.intent(name)
        });
        let result = self.finish(rename());
        let numbers = &self.session.numbers;
        if result.is_ok() {
            let (from, to) = ((self.header.nodeid, name), (new_number, new_name));
            numbers.moved(self.number_of(moved.node), from, to);
            if let Some(other) = &other {
                numbers.moved(self.number_of(other.node), to, from);
            }
        }
        for looked_up in std::iter::once(moved).chain(other) {
            self.stack().forget(looked_up.node, 1);
        }
        result
    }

    fn is_there(&self, parent: NodeId, name: &Name, ino: u64) -> bool {
        let Ok(found) = self.stack().lookup(&self.caller, parent, name) else { return false };
        self.stack().forget(found.node, 1);
        found.attr.ino == ino
    }

    fn keeps_journal(&self) -> bool {
        self.journal.is_some()
    }

    /// As the kernel first sent it.
    fn unique(&self) -> u64 {
        self.header.unique & !opcode::RESENT
    }
}
