//! The worker's side: lists each open file before its program hears of it, and strikes it out after it was closed.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use super::area::Area;
use super::layout::{CAPACITY, Entry, OpenRecord, Through};
use super::reader::{Found, look};
use super::vacancies::Vacancies;

/// The open files of one door.
pub struct OpenTable {
    area: Arc<Area>,
    entries: Vacancies,
}

impl std::fmt::Debug for OpenTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenTable").finish_non_exhaustive()
    }
}

impl OpenTable {
    pub(super) fn new(area: Arc<Area>) -> Arc<Self> {
        Arc::new(Self { area, entries: Vacancies::new(CAPACITY) })
    }

    /// Of an area that a dead worker has left, and the kernel's open files in it. What programs had open through channels went with these.
    pub(super) fn adopt(area: Arc<Area>) -> (Arc<Self>, Vec<(OpenRecord, Listed)>) {
        let table = Self::new(area);
        let used = usize::try_from(table.area.header().used.load(Acquire)).unwrap_or(CAPACITY).min(CAPACITY);
        let mut taken = vec![false; used];
        let mut files = Vec::new();
        for index in 0..used as u32 {
            let entry = table.area.entry(index as usize);
            match look(entry) {
                Found::Whole(record) if record.through == Through::Fuse => {
                    taken[index as usize] = true;
                    files.push((record, Listed { table: table.clone(), index }));
                }
                _ => strike(entry),
            }
        }
        table.entries.adopt(&taken);
        (table, files)
    }

    /// For the next worker, of which programs that wait for the kernel to tell them of a change do not hear.
    pub fn say_watched(&self, watched: bool) {
        self.area.header().watched.store(watched.into(), Relaxed);
    }

    /// Whether files were watched when the last worker died.
    pub fn is_watched(&self) -> bool {
        self.area.header().watched.load(Relaxed) != 0
    }

    /// None when the table is full; the file is open all the same.
    pub fn list(self: &Arc<Self>, record: &OpenRecord) -> Option<Listed> {
        let header = self.area.header();
        let Some(index) = self.entries.take(&header.used) else {
            header.untold.fetch_add(1, Relaxed);
            return None;
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

fn strike(entry: &Entry) {
    let commit = entry.commit.load(Relaxed);
    entry.commit.store(commit.wrapping_add(1) & !1, Release);
}

/// An open file stands in the table as long as this lives.
pub struct Listed {
    table: Arc<OpenTable>,
    index: u32,
}

impl Drop for Listed {
    fn drop(&mut self) {
        strike(self.table.area.entry(self.index as usize));
        self.table.entries.give_back(self.index);
    }
}
