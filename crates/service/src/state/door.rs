//! All that a worker writes down of one door.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::area::Area;
use super::journal::{Begun, Journal, JournalSlot, LostBits};
use super::layout::{MAGIC, OpenRecord, VERSION};
use super::nodes::{NodeRecord, NodeTable};
use super::writer::{Listed, OpenTable};

/// The state area of one door.
pub struct DoorState {
    area: Arc<Area>,
    pub opens: Arc<OpenTable>,
    pub nodes: NodeTable,
    journal: Arc<Journal>,
}

impl std::fmt::Debug for DoorState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DoorState").finish_non_exhaustive()
    }
}

/// What a dead worker has left to its successor.
pub struct Past {
    /// What the kernel was told.
    pub agreed: Agreed,
    pub nodes: Vec<NodeRecord>,
    /// The kernel's open files and directories.
    pub files: Vec<(OpenRecord, Listed)>,
    pub begun: Vec<Begun>,
    pub lost_bits: Vec<LostBits>,
}

/// What was agreed on with the kernel, once for the life of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    pub minor: u32,
    pub flags: u64,
}

impl DoorState {
    /// Of a new area.
    pub fn new(descriptor: OwnedFd) -> rustix::io::Result<Arc<Self>> {
        let area = Arc::new(Area::map(descriptor, true)?);
        Ok(Arc::new(Self {
            opens: OpenTable::new(area.clone()),
            nodes: NodeTable::new(area.clone()),
            journal: Journal::new(area.clone()),
            area,
        }))
    }

    /// Of an area that a dead worker has left; it was the door's `incarnation`th successor's, counted from 1. `blame`: how much
    /// of the last death falls on the requests that were being done. EINVAL for what makes no sense.
    pub fn adopt(descriptor: OwnedFd, incarnation: u64, blame: u64) -> rustix::io::Result<(Arc<Self>, Past)> {
        let area = Arc::new(Area::map(descriptor, true)?);
        let agreed = agreed(&area).ok_or(rustix::io::Errno::INVAL)?;
        let (opens, files) = OpenTable::adopt(area.clone());
        let (nodes, known) = NodeTable::adopt(area.clone());
        let (journal, begun, lost_bits) = Journal::adopt(area.clone(), incarnation, blame);
        let past = Past { agreed, nodes: known, files, begun, lost_bits };
        Ok((Arc::new(Self { area, opens, nodes, journal }), past))
    }

    /// Before the kernel hears of it.
    pub fn agree(&self, agreed: Agreed) {
        let header = self.area.header();
        header.flags.store(agreed.flags, Relaxed);
        header.minor.store(agreed.minor.into(), Release);
    }

    /// For one thread.
    pub fn journal_slot(&self) -> Option<Arc<JournalSlot>> {
        self.journal.slot()
    }
}

pub(super) fn agreed(area: &Area) -> Option<Agreed> {
    let header = area.header();
    if header.magic.load(Acquire) != MAGIC || header.version.load(Relaxed) != VERSION {
        return None;
    }
    let minor = u32::try_from(header.minor.load(Acquire)).ok().filter(|minor| *minor > 0)?;
    Some(Agreed { minor, flags: header.flags.load(Relaxed) })
}
