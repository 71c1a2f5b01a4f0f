//! What the keeper has mounted, and the doors behind it.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::child::Child;
use super::mounting::{self, Identity, TableLine};
use super::recovery::Kept;
use crate::state::StateReader;

/// One FUSE superblock and the worker that serves it.
pub struct Door {
    pub document: String,
    pub kind: &'static str,
    pub device: (u32, u32),
    pub worker: Arc<Child>,
    /// Its connection to the kernel is over, be it unmounted or aborted.
    pub ended: bool,
    /// Held while the stack may write to its uppers.
    pub locks: Arc<Vec<OwnedFd>>,
    /// Programs may write through channels.
    pub channel_writes: bool,
    /// What the worker tells of its open files, also after its end.
    pub state: Arc<StateReader>,
    /// For a worker that takes over; none once nobody can.
    pub kept: Option<Arc<Kept>>,
    /// How many workers served it before this one.
    pub incarnation: u64,
}

impl Door {
    pub fn is_alive(&self) -> bool {
        // While there is something to take over, somebody does.
        !self.ended && (self.worker.is_alive() || self.kept.is_some())
    }
}

/// One place where a door's superblock is mounted.
#[derive(Clone)]
pub struct Mount {
    pub mountpoint: PathBuf,
    pub door: u64,
    pub identity: Identity,
    pub since: SystemTime,
}

/// Every mount and door by its number.
pub struct Table {
    pub mounts: BTreeMap<u64, Mount>,
    pub doors: BTreeMap<u64, Door>,
    /// Doors that were forgotten before they ended.
    failed: HashSet<u64>,
    last_mount: u64,
    last_door: u64,
    /// Since when there is no mount and no living door.
    pub idle_since: Option<Instant>,
}

impl Table {
    pub fn new() -> Self {
        Self {
            mounts: BTreeMap::new(),
            doors: BTreeMap::new(),
            failed: HashSet::new(),
            last_mount: 0,
            last_door: 0,
            idle_since: Some(Instant::now()),
        }
    }

    pub fn next_door(&mut self) -> u64 {
        self.last_door += 1;
        self.last_door
    }

    pub fn add_mount(&mut self, door: u64, mountpoint: &Path, identity: Identity) -> u64 {
        self.last_mount += 1;
        let since = SystemTime::now();
        let mountpoint = mountpoint.to_owned();
        self.mounts.insert(self.last_mount, Mount { mountpoint, door, identity, since });
        self.settle();
        self.last_mount
    }

    pub fn mount_at(&self, mountpoint: &Path) -> Option<(u64, Mount)> {
        let found = self.mounts.iter().rev().find(|(_, mount)| mount.mountpoint == mountpoint);
        found.map(|(&number, mount)| (number, mount.clone()))
    }

    /// A living door that serves the same document, and a place where it can be seen. The place is the kernel's word for
    /// it: directories above may have been renamed.
    pub fn same_stack(&self, document: &str, lines: &[TableLine]) -> Option<(u64, (u32, u32), PathBuf)> {
        self.mounts.values().find_map(|mount| {
            let door = self.doors.get(&mount.door)?;
            let fits = door.document == document && door.is_alive();
            let line =
                lines.iter().find(|line| fits && line.ours && line.mount_id == mount.identity.mount_id)?;
            line.is_on_top(lines).then(|| (mount.door, door.device, line.path()))
        })
    }

    /// The locks of a living door that serves the same document, mounted or not, and whether channels write there.
    pub fn locks_of_same(&self, document: &str) -> Option<(Arc<Vec<OwnedFd>>, bool)> {
        let mut doors = self.doors.values();
        let same = doors.find(|door| door.is_alive() && door.document == document)?;
        Some((same.locks.clone(), same.channel_writes))
    }

    pub fn is_dead(&self, mount: &Mount) -> bool {
        self.doors.get(&mount.door).is_none_or(|door| !door.is_alive())
    }

    /// False if `worker` has no such door, or it has ended before.
    pub fn door_ended(&mut self, worker: &Child, door: u64) -> bool {
        // Doors that failed to open are forgotten here and end in the worker all the same.
        let mut known = self.failed.remove(&door);
        if let Some(door) = self.doors.get_mut(&door).filter(|door| std::ptr::eq(&*door.worker, worker)) {
            known |= !door.ended;
            door.ended = true;
            door.kept = None;
        }
        self.settle();
        known
    }

    /// Nobody takes over from `worker`.
    pub fn let_go(&mut self, worker: &Child) {
        for door in self.doors.values_mut().filter(|door| std::ptr::eq(&*door.worker, worker)) {
            door.kept = None;
        }
    }

    /// Forgets a door that could not be mounted.
    pub fn door_failed(&mut self, door: u64) {
        if self.doors.remove(&door).is_some_and(|door| door.is_alive()) {
            self.failed.insert(door);
        }
        self.settle();
    }

    pub fn has_mounts_of(&self, door: u64) -> bool {
        self.mounts.values().any(|mount| mount.door == door)
    }

    /// Forgets the mounts that the kernel's table no longer has; returns how many.
    pub fn forget_vanished(&mut self, lines: &[TableLine]) -> usize {
        let before = self.mounts.len();
        self.mounts.retain(|_, mount| {
            lines.iter().any(|line| line.ours && line.mount_id == mount.identity.mount_id)
        });
        self.settle();
        before - self.mounts.len()
    }

    /// Drops doors that nobody can reach any more and keeps the idle clock.
    pub fn settle(&mut self) {
        let mounts = &self.mounts;
        self.doors.retain(|id, door| door.is_alive() || mounts.values().any(|mount| mount.door == *id));
        for door in self.doors.values_mut().filter(|door| !door.is_alive()) {
            door.locks = Arc::default();
        }
        let busy = !self.mounts.is_empty() || !self.doors.is_empty();
        self.idle_since = if busy { None } else { self.idle_since.or_else(|| Some(Instant::now())) };
    }
}

/// Reads the kernel's table; an unreadable one counts as unknown, never as empty.
pub fn kernel_table() -> Option<Vec<TableLine>> {
    mounting::mount_table().inspect_err(|error| log::error!("the mount table cannot be read: {error}")).ok()
}
