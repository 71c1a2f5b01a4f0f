//! The worker's side: lists each open file before its program hears of it, and strikes it out after it was closed.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::atomic::fence;

use parking_lot::Mutex;

use super::area::Area;
use super::layout::{CAPACITY, OpenRecord};

/// The open files of one door.
pub struct OpenTable {
    area: Area,
    free: Mutex<Free>,
}

impl std::fmt::Debug for OpenTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenTable").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Free {
    /// Entries that were in use and are not.
    vacant: Vec<u32>,
    /// Those from here on never were.
    fresh: u32,
}

impl OpenTable {
    pub fn new(descriptor: OwnedFd) -> rustix::io::Result<Arc<Self>> {
        Ok(Arc::new(Self { area: Area::map(descriptor, true)?, free: Mutex::default() }))
    }

    /// None when the table is full; the file is open all the same.
    pub fn list(self: &Arc<Self>, record: &OpenRecord) -> Option<Listed> {
        let header = self.area.header();
        let index = {
            let mut free = self.free.lock();
            match free.vacant.pop() {
                Some(index) => index,
                None if (free.fresh as usize) < CAPACITY => {
                    free.fresh += 1;
                    header.used.store(free.fresh.into(), Relaxed);
                    free.fresh - 1
                }
                None => {
                    header.untold.fetch_add(1, Relaxed);
                    return None;
                }
            }
        };
        let entry = self.area.entry(index as usize);
        let commit = entry.commit.load(Relaxed);
        // After the last strike, for who reads it meanwhile.
        fence(Release);
        for (place, word) in entry.words.iter().zip(record.to_words()) {
            place.store(word, Relaxed);
        }
        entry.commit.store(commit.wrapping_add(1) | 1, Release);
        Some(Listed { table: self.clone(), index })
    }
}

/// An open file stands in the table as long as this lives.
pub struct Listed {
    table: Arc<OpenTable>,
    index: u32,
}

impl Drop for Listed {
    fn drop(&mut self) {
        let entry = self.table.area.entry(self.index as usize);
        let commit = entry.commit.load(Relaxed);
        entry.commit.store(commit.wrapping_add(1) & !1, Release);
        self.table.free.lock().vacant.push(self.index);
    }
}
