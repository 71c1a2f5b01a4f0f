//! Counts of names of lower inodes, kept on disk in the names of empty files: `ORDINAL-INO-COUNT`.

use std::sync::Arc;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use super::layers::{Held, Origin};
use super::work::{count, list};
use crate::error::Result;
use crate::name::Name;
use crate::types::*;

pub struct Tally {
    directory: Arc<Held>,
    counts: Mutex<FxHashMap<Origin, u32>>,
}

impl Tally {
    /// Reads what `directory` holds; other names in it are left alone.
    pub fn read(caller: &Caller, directory: &Arc<Held>) -> Result<Self> {
        let mut counts = FxHashMap::default();
        for name in list(caller, directory)? {
            let text = name.as_bytes();
            let Some(dash) = text.iter().rposition(|byte| *byte == b'-') else { continue };
            if let (Some(origin), Some(count)) = (Origin::parse(&text[..dash]), count(&text[dash + 1..])) {
                counts.insert(origin, count);
            }
        }
        Ok(Self { directory: directory.clone(), counts: Mutex::new(counts) })
    }

    pub fn get(&self, origin: Origin) -> Option<u32> {
        self.counts.lock().get(&origin).copied()
    }

    pub fn origins(&self) -> Vec<Origin> {
        self.counts.lock().keys().copied().collect()
    }

    /// Records another count in one step; `None` when there is nothing to be counted any more.
    pub fn set(&self, caller: &Caller, origin: Origin, after: Option<u32>) -> Result<()> {
        let before = self.get(origin);
        let (service, node) = (self.directory.service(), self.directory.node);
        match (before, after) {
            (before, after) if before == after => return Ok(()),
            (None, Some(after)) => {
                let made = service.mknod(caller, node, &name(origin, after), libc::S_IFREG, 0)?;
                drop(self.directory.take(made));
            }
            (Some(before), None) => service.unlink(caller, node, &name(origin, before))?,
            (Some(before), Some(after)) => {
                let (old, new) = (name(origin, before), name(origin, after));
                service.rename(caller, node, &old, node, &new, RenameFlags::empty())?;
            }
            (None, None) => unreachable!("they are equal"),
        }
        let mut counts = self.counts.lock();
        match after {
            Some(after) => counts.insert(origin, after),
            None => counts.remove(&origin),
        };
        Ok(())
    }
}

fn name(origin: Origin, count: u32) -> Box<Name> {
    let text = format!("{}-{count}", origin.text());
    Name::new(text.as_bytes()).expect("numbers are a name").to_boxed()
}
