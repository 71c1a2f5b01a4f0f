//! Writes back what is held: in large pieces, in the background, and before anybody looks.

use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::Ordering::Release;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;
use polytropo_libservices::{Errno, Error, NodeId, Result};

use super::bell::Bell;
use super::file::{HeldFile, Pages};
use super::layout::{PAGE_BYTES, range_word};
use super::store::{Files, Held};

/// Bytes may be held for so long.
pub const AGE_MAX: Duration = Duration::from_secs(1);
/// How often somebody looks how old they are.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// After so many looks at nothing the memory is given back.
const IDLE_LOOKS: u32 = 50;
/// Written at a time.
const REQUEST_BYTES_MAX: usize = 1 << 20;

thread_local! {
    /// What this thread is writing back: what is told of that is no news.
    static WRITING: std::cell::Cell<Option<NodeId>> = const { std::cell::Cell::new(None) };
}

/// Whether a change of the node that this thread is told of is one that all have seen already.
pub fn is_writing_back(node: NodeId) -> bool {
    WRITING.get() == Some(node)
}

/// Pages that follow one upon the other.
#[derive(Default)]
struct Batch {
    offset: u64,
    pages: Vec<u64>,
}

impl Held {
    /// What was held of the node when this was called is with the layers when it returns.
    pub fn flush(&self, node: NodeId) {
        if let Some(file) = self.find(node) {
            self.flush_file(&file);
        }
    }

    pub fn flush_all(&self) {
        let files: Vec<_> = self.files.lock().by_node.values().cloned().collect();
        files.iter().for_each(|file| self.flush_file(file));
    }

    /// Does something with a file of which nothing is held meanwhile, and which may have another size afterwards.
    pub fn exclusively<T>(&self, node: NodeId, work: impl FnOnce() -> T) -> T {
        let Some(file) = self.find(node) else { return work() };
        let _writing = file.writing.lock();
        let mut pages = file.pages.lock();
        self.write_back(&file, &mut pages, false);
        pages.size_bytes = None;
        work()
    }

    pub(super) fn flush_file(&self, file: &HeldFile) {
        let _writing = file.writing.lock();
        self.write_back(file, &mut file.pages.lock(), true);
    }

    /// A file needs room: its own bytes go, or those of others.
    pub(super) fn make_room(&self, file: &HeldFile) {
        let others: Vec<_> = self.files.lock().by_node.values().cloned().collect();
        let fullest = others.iter().max_by_key(|other| other.pages.lock().held.len());
        match fullest {
            Some(fullest) => self.flush_file(fullest),
            None => self.flush_file(file),
        }
    }

    /// Writes what is held back. With `let_go` more may come in meanwhile, and stays.
    pub(super) fn write_back(&self, file: &HeldFile, pages: &mut MutexGuard<'_, Pages>, let_go: bool) {
        if pages.held.is_empty() {
            return;
        }
        let mut numbers: Vec<u64> = pages.held.keys().copied().collect();
        numbers.sort_unstable();
        let mut bytes = std::mem::take(&mut *self.scratch.lock());
        let (mut next, mut failed) = (0, None);
        while next < numbers.len() {
            let batch = self.gather(pages, &numbers[next..], &mut bytes);
            next += batch.pages.len();
            let written = if let_go {
                MutexGuard::unlocked(pages, || self.write_through(file, batch.offset, &bytes))
            } else {
                self.write_through(file, batch.offset, &bytes)
            };
            failed = failed.or(written.err());
            self.settle(pages, &batch);
        }
        bytes.clear();
        *self.scratch.lock() = bytes;
        pages.since = (!pages.held.is_empty()).then(Instant::now);
        if let Some(error) = failed {
            log::warn!("bytes that a program had written are lost, which it is told: {error}");
            file.late.set(error.errno());
            pages.size_bytes = None;
            if let Some(lost) = self.lost.get() {
                lost(file.node);
            }
        }
    }

    /// Copies pages out that follow one upon the other.
    fn gather(&self, pages: &mut Pages, numbers: &[u64], bytes: &mut Vec<u8>) -> Batch {
        bytes.clear();
        let mut batch = Batch::default();
        let mut next = None;
        for number in numbers {
            let Some(page) = pages.held.get_mut(number) else { continue };
            let at = number * PAGE_BYTES as u64 + u64::from(page.from);
            if next.is_some_and(|next| next != at) || bytes.len() >= REQUEST_BYTES_MAX {
                break;
            }
            if next.is_none() {
                batch.offset = at;
            }
            let count = (page.end - page.from) as usize;
            bytes.reserve(count);
            // SAFETY: within the page, which is this file's; nobody writes there while `pages` is locked.
            unsafe {
                let from = self.area.page(page.index as usize).add(page.from as usize);
                std::ptr::copy_nonoverlapping(from.as_ptr(), bytes.as_mut_ptr().add(bytes.len()), count);
                bytes.set_len(bytes.len() + count);
            }
            (page.leaving, page.touched) = (true, None);
            batch.pages.push(*number);
            next = Some(at + count as u64);
        }
        batch
    }

    /// Frees the pages that were written, but for what came meanwhile.
    fn settle(&self, pages: &mut Pages, batch: &Batch) {
        for number in &batch.pages {
            let Some(page) = pages.held.get_mut(number) else { continue };
            page.leaving = false;
            if let Some(touched) = page.touched.take() {
                page.from = touched;
                let entry = self.area.entry(page.index as usize);
                entry.range.store(range_word(page.from, page.end), Release);
            } else {
                let index = page.index;
                pages.held.remove(number);
                self.free_slot(index);
            }
        }
    }

    pub(super) fn write_through(&self, file: &HeldFile, offset: u64, bytes: &[u8]) -> Result<()> {
        let before = WRITING.replace(Some(file.node));
        let mut done = 0;
        let result = loop {
            if done == bytes.len() {
                break Ok(());
            }
            let at = offset + done as u64;
            match self.below.write(&file.caller, file.node, file.handle, at, &bytes[done..]) {
                Ok(0) => break Err(Error::new(Errno::IO, "write held bytes, of which none were taken")),
                Ok(count) => done += count.min(bytes.len() - done),
                Err(error) => break Err(error),
            }
        };
        WRITING.set(before);
        result
    }

    /// Sees to it that a thread looks how old things are.
    pub(super) fn watch(self: &Arc<Self>, files: &mut Files) {
        if files.watched {
            return;
        }
        let (held, bell) = (Arc::downgrade(self), self.bell.clone());
        let started = std::thread::Builder::new().name("held".into()).spawn(move || look_after(&held, &bell));
        match started {
            Ok(_) => files.watched = true,
            Err(error) => {
                log::warn!("writes are not held, for no thread looks after them: {error}");
                files.ended = true;
            }
        }
    }

    /// Writes what is old, or much. False when nothing is held.
    fn look(&self) -> bool {
        self.grow_ahead();
        let much = self.slots.lock().used >= self.pages_max / 2;
        let files: Vec<_> = self.files.lock().by_node.values().cloned().collect();
        for file in files {
            let since = file.pages.lock().since;
            if since.is_some_and(|since| much || since.elapsed() >= AGE_MAX) {
                self.flush_file(&file);
            }
        }
        self.slots.lock().used > 0
    }
}

fn look_after(held: &Weak<Held>, bell: &Bell) {
    let mut idle = 0;
    loop {
        {
            // Not kept while this sleeps.
            let Some(held) = held.upgrade() else { return };
            idle = if held.look() { 0 } else { idle + 1 };
            if idle == IDLE_LOOKS {
                held.shrink();
            }
        }
        bell.wait(if idle <= IDLE_LOOKS { Some(LOOK_EVERY) } else { None });
    }
}
