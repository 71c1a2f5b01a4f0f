//! Files of which the upper holds some blocks and a lower the others.
//!
//! The bytes of a block are the lower's until the record says that they are the upper's. They are copied or written first and recorded
//! then: a power cut leaves the old bytes of a block or the new ones, since either they were ordered on the device before, or the
//! block is loose: recorded with a checksum, it is the upper's own only if its bytes are found. A loose block is not changed
//! before it was ordered and recorded anew.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*};

use parking_lot::{Mutex, RwLock};

use super::Union;
use super::crc32::crc32;
use super::files::File;
use super::layers::{Held, OpenFile, marks};
use super::lookup::mark;
use super::nodes::Node;
use super::record::{self, Blocks, Identity, LOOSE_MAX, Source};
use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::types::*;

/// How many times a file's blocks are brought up before the pieces double.
const FILLS_A_DOUBLING: u32 = 64;
/// Most doublings: pieces of 8 blocks, whose copy costs about what waiting for them does.
const DOUBLINGS_MAX: u32 = 3;

/// Larger pieces are ordered before they are recorded: reading them back would take as long.
const LOOSE_PIECE_MAX_BYTES: u64 = 256 << 10;
const SUM_BUFFER_BYTES: usize = 64 << 10;

/// Sizes by which unions copy.
#[derive(Clone, Copy, Debug)]
pub struct BlockSizes {
    /// Of a block, at least.
    pub block_bytes: u64,
    /// Files up to this size are copied whole when they are written.
    pub whole_max_bytes: u64,
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self { block_bytes: 64 << 10, whole_max_bytes: 256 << 10 }
    }
}

impl BlockSizes {
    /// The blocks of a file of `size_bytes` of which the upper has none, at most `count_max` of them.
    pub fn blocks(&self, size_bytes: u64, count_max: u64) -> Blocks {
        let least = size_bytes.div_ceil(count_max).next_power_of_two();
        Blocks::none_own(self.block_bytes.max(least), size_bytes)
    }
}

/// What an upper file lacks, and where that is.
pub struct Partial {
    pub source: Source,
    pub lower: Arc<Held>,
    lower_blocks_512: u64,
    blocks: RwLock<Blocks>,
    missing_bytes: AtomicU64,
    has_loose: AtomicBool,
    /// Held alone while blocks are brought up or cut off, shared while the upper's own bytes are written.
    pub filling: RwLock<()>,
    fills: AtomicU32,
    /// The record could not be written after the file was cut.
    unsaved: AtomicBool,
}

impl Partial {
    pub fn new(source: Source, lower: Arc<Held>, lower_blocks_512: u64, blocks: Blocks) -> Arc<Self> {
        Arc::new(Self {
            source,
            lower,
            lower_blocks_512,
            missing_bytes: AtomicU64::new(blocks.missing_bytes()),
            has_loose: AtomicBool::new(!blocks.loose().is_empty()),
            blocks: RwLock::new(blocks),
            filling: RwLock::default(),
            fills: AtomicU32::new(0),
            unsaved: AtomicBool::new(false),
        })
    }

    pub fn blocks(&self) -> Blocks {
        self.blocks.read().clone()
    }

    /// Whether the bytes at `at` are the upper's own, and where (at most `until`) that ends.
    pub fn run(&self, at: u64, until: u64) -> (bool, u64) {
        self.blocks.read().run(at, until)
    }

    pub fn has_loose(&self) -> bool {
        self.has_loose.load(Acquire)
    }

    pub fn has_loose_in(&self, start: u64, end: u64) -> bool {
        self.has_loose() && self.blocks.read().has_loose_in(start, end)
    }

    /// What the lower's part adds to the space that the file takes.
    pub fn lower_blocks_512(&self) -> u64 {
        self.lower_blocks_512.min(self.missing_bytes.load(Relaxed).div_ceil(4096).saturating_mul(8))
    }

    /// In pieces of this size blocks are brought up: they grow, so that a file written all over is not waited for block by block.
    pub fn next_cluster_bytes(&self, sizes: &BlockSizes) -> u64 {
        let blocks = self.blocks.read();
        if blocks.limit_bytes <= sizes.whole_max_bytes {
            return u64::MAX;
        }
        let fills = self.fills.fetch_add(1, Relaxed);
        blocks.block_bytes << (fills / FILLS_A_DOUBLING).min(DOUBLINGS_MAX)
    }

    fn set(&self, blocks: Blocks) {
        self.missing_bytes.store(blocks.missing_bytes(), Relaxed);
        self.has_loose.store(!blocks.loose().is_empty(), Release);
        *self.blocks.write() = blocks;
    }
}

/// What is known of the bytes of a node on the upper.
#[derive(Default)]
pub struct Bytes {
    /// Nothing is missing: the others need not be looked at.
    whole: AtomicBool,
    state: Mutex<State>,
    /// The record changed since the file was last made durable with all its attributes.
    pub unsynced: AtomicBool,
}

#[derive(Default)]
enum State {
    #[default]
    Unread,
    Whole,
    Partial(Arc<Partial>),
    /// It has a record, and what that names is not there.
    Broken,
}

impl Bytes {
    pub fn set(&self, partial: Option<Arc<Partial>>) {
        let mut state = self.state.lock();
        self.whole.store(partial.is_none(), Release);
        *state = partial.map_or(State::Whole, State::Partial);
    }

    /// As far as it was read.
    pub fn lower_blocks_512(&self) -> u64 {
        if self.whole.load(Acquire) {
            return 0;
        }
        match &*self.state.lock() {
            State::Partial(partial) => partial.lower_blocks_512(),
            _ => 0,
        }
    }
}

impl Union {
    /// What the upper lacks of a file's bytes. `None` when nothing, and for files of lowers.
    pub(super) fn partial(&self, node: &Node) -> Result<Option<Arc<Partial>>> {
        if node.bytes.whole.load(Acquire) || node.kind != libc::S_IFREG {
            return Ok(None);
        }
        let Some(upper) = node.upper() else { return Ok(None) };
        let mut state = node.bytes.state.lock();
        if matches!(*state, State::Unread) {
            *state = match self.read_record(node, &upper)? {
                Ok(Some(partial)) => State::Partial(partial),
                Ok(None) => State::Whole,
                Err(problem) => {
                    log::error!("a file of inode number {} cannot be read: {problem}", node.ino);
                    State::Broken
                }
            };
            node.bytes.unsynced.store(true, Release);
            node.bytes.whole.store(matches!(*state, State::Whole), Release);
        }
        match &*state {
            State::Partial(partial) => Ok(Some(partial.clone())),
            State::Broken => Err(Error::new(Errno::IO, "use a file whose lower part is not what it was")),
            State::Unread | State::Whole => Ok(None),
        }
    }

    /// The inner error says why the record leads nowhere.
    fn read_record(
        &self,
        node: &Node,
        upper: &Arc<Held>,
    ) -> Result<std::result::Result<Option<Arc<Partial>>, String>> {
        let work = self.work()?;
        if !work.has_partial_files() {
            return Ok(Ok(None));
        }
        let Some(value) = mark(&self.own, upper, marks::BLOCKS)? else { return Ok(Ok(None)) };
        let Some((source, mut blocks)) = record::decode(&value) else {
            return Ok(
                Err("the record of which blocks it has was damaged or made by a later version".into()),
            );
        };
        let place = || format!("{} of layer {}", source.path.escape_ascii(), source.origin.ordinal);
        let Some((lower, attr)) = self.find_source(&source)? else {
            return Ok(Err(format!("it is a part of {}, which is gone", place())));
        };
        if attr.file_type() != libc::S_IFREG || Identity::of(&attr) != source.identity {
            return Ok(Err(format!("it is a part of {}, which is another file by now", place())));
        }
        let lost = self.lost_blocks(upper, &blocks)?;
        let size_bytes = upper.attr(&self.own)?.size_bytes;
        if size_bytes < blocks.limit_bytes || !lost.is_empty() {
            // Somebody was killed before he could record a cut; or the power was.
            blocks.lose(&lost);
            blocks.cut(size_bytes);
            self.write_record(node, upper, &source, &blocks)?;
        }
        Ok(Ok((!blocks.is_done()).then(|| Partial::new(source, lower, attr.blocks_512, blocks))))
    }

    /// The loose blocks whose bytes are not there.
    fn lost_blocks(&self, upper: &Arc<Held>, blocks: &Blocks) -> Result<Vec<u64>> {
        if blocks.loose().is_empty() {
            return Ok(Vec::new());
        }
        let (open, _) = OpenFile::open(&self.own, upper, OpenFlags::READ)?;
        let mut lost = Vec::new();
        for (block, sum) in blocks.loose() {
            if self.checksum(&open, blocks.bounds(*block))? != Some(*sum) {
                lost.push(*block);
            }
        }
        Ok(lost)
    }

    /// Of a range of an open file. `None` when the file ends earlier.
    fn checksum(&self, open: &OpenFile, (mut at, end): (u64, u64)) -> Result<Option<u32>> {
        let (mut sum, mut buffer) = (0, vec![0; SUM_BUFFER_BYTES.min((end - at) as usize)]);
        while at < end {
            let room = buffer.len().min((end - at) as usize);
            let count =
                open.service().read(&self.own, open.held.node, open.handle, at, &mut buffer[..room])?;
            if count == 0 {
                return Ok(None);
            }
            sum = crc32(sum, &buffer[..count]);
            at += count as u64;
        }
        Ok(Some(sum))
    }

    /// Records the blocks of `start..end`, whose bytes the upper has by now, as loose ones, and begins to order them. Says whether that
    /// was possible; they have to be ordered first if not. `filling` is held alone.
    pub(super) fn save_loosely(
        &self,
        (file, open, partial): (&File, &OpenFile, &Partial),
        blocks: &Blocks,
        (start, end): (u64, u64),
    ) -> Result<bool> {
        let few = end - start <= LOOSE_PIECE_MAX_BYTES;
        if !few || !file.flags.contains(OpenFlags::READ) {
            return Ok(false);
        }
        let mut sums = Vec::new();
        for block in start / blocks.block_bytes..end.div_ceil(blocks.block_bytes) {
            let sum = self.checksum(open, blocks.bounds(block))?;
            sums.push((block, sum.ok_or_else(|| Error::new(Errno::IO, "read back what was written"))?));
        }
        let mut blocks = blocks.clone();
        if sums.len() > LOOSE_MAX || !blocks.take_loosely(sums) {
            return Ok(false);
        }
        open.service().begin_order(&self.own, open.held.node, open.handle)?;
        match self.save(&file.node, partial, blocks) {
            Ok(()) => Ok(true),
            // The checksums need room too.
            Err(e) if [Errno::NOSPC, Errno::DQUOT, Errno::TOOBIG, Errno::RANGE].contains(&e.errno()) => {
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Orders the loose blocks and records that. `filling` is held alone.
    pub(super) fn settle_blocks(&self, node: &Node, partial: &Partial) -> Result<()> {
        self.save_late(node, partial)?;
        if !partial.has_loose() {
            return Ok(());
        }
        let upper = node.upper().ok_or_else(|| Error::new(Errno::STALE, "order blocks of a lower file"))?;
        let (open, _) = OpenFile::open(&self.own, &upper, OpenFlags::READ)?;
        upper.service().order(&self.own, upper.node, open.handle)?;
        let mut blocks = partial.blocks();
        blocks.settle();
        self.save(node, partial, blocks)
    }

    /// What a path from the root of one lower leads to.
    pub(super) fn find_source(&self, source: &Source) -> Result<Option<(Arc<Held>, Attr)>> {
        let Some(layer) = self.lowers.iter().find(|layer| layer.ordinal == source.origin.ordinal) else {
            return Ok(None);
        };
        let mut at = (Held::new(layer, NodeId::ROOT), None);
        for name in source.path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            match at.0.find(&self.own, Name::new(name)?) {
                Ok(Some((held, attr))) => at = (held, Some(attr)),
                Ok(None) => return Ok(None),
                Err(e) if e.is(Errno::NOTDIR) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        let (held, attr) = at;
        Ok(attr.map(|attr| (Arc::new(held), attr)))
    }

    fn write_record(&self, node: &Node, upper: &Held, source: &Source, blocks: &Blocks) -> Result<()> {
        node.bytes.unsynced.store(true, Release);
        let service = upper.service();
        if !blocks.is_done() {
            let value = record::encode(source, blocks);
            return service.setxattr(&self.own, upper.node, marks::BLOCKS, &value, XattrFlags::empty());
        }
        match service.removexattr(&self.own, upper.node, marks::BLOCKS) {
            Err(e) if e.is(Errno::NODATA) => Ok(()),
            done => done,
        }
    }

    /// Records which blocks are the upper's, on disk first. `filling` is held alone.
    pub(super) fn save(&self, node: &Node, partial: &Partial, blocks: Blocks) -> Result<()> {
        let upper = node.upper().ok_or_else(|| Error::new(Errno::STALE, "record blocks of a lower file"))?;
        self.write_record(node, &upper, &partial.source, &blocks)?;
        partial.unsaved.store(false, Release);
        let whole = blocks.is_done();
        partial.set(blocks);
        if whole {
            node.bytes.set(None);
        }
        Ok(())
    }

    /// Runs `change`, which gives the file the size `size_bytes`, and records that nothing beyond is the lower's any more.
    pub(super) fn cutting<T>(
        &self,
        node: &Node,
        size_bytes: u64,
        change: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let partial = match self.partial(node) {
            Ok(Some(partial)) => partial,
            Ok(None) => return change(),
            // What is lost is not wanted any more.
            Err(e) if e.is(Errno::IO) && size_bytes == 0 => {
                let done = change()?;
                if let Some(upper) = node.upper() {
                    upper.service().removexattr(&self.own, upper.node, marks::BLOCKS)?;
                }
                node.bytes.set(None);
                return Ok(done);
            }
            Err(e) => return Err(e),
        };
        let _alone = partial.filling.write();
        self.settle_blocks(node, &partial)?;
        let done = change()?;
        let mut blocks = partial.blocks();
        if size_bytes < blocks.limit_bytes {
            blocks.cut(size_bytes);
            let saved = self.save(node, &partial, blocks.clone());
            if saved.is_err() {
                // Until it is recorded, the file must not grow again.
                partial.set(blocks);
                partial.unsaved.store(true, Release);
            }
            saved?;
        }
        Ok(done)
    }

    /// Records what could not be recorded earlier. `filling` is held alone.
    fn save_late(&self, node: &Node, partial: &Partial) -> Result<()> {
        if partial.unsaved.load(Acquire) { self.save(node, partial, partial.blocks()) } else { Ok(()) }
    }

    /// `filling`, shared, for changes of the upper's own bytes.
    pub(super) fn keep_blocks<'a>(
        &self,
        node: &Node,
        partial: &'a Partial,
    ) -> Result<parking_lot::RwLockReadGuard<'a, ()>> {
        loop {
            let shared = partial.filling.read();
            if !partial.unsaved.load(Acquire) {
                return Ok(shared);
            }
            drop(shared);
            let _alone = partial.filling.write();
            self.save_late(node, partial)?;
        }
    }

    /// Brings the missing blocks that lie in `start..end` up, without the bytes in `except`. `filling` is held alone. Nothing
    /// is recorded.
    pub(super) fn bring_up(
        &self,
        partial: &Partial,
        (from, to): (&OpenFile, &OpenFile),
        (start, end): (u64, u64),
        except: (u64, u64),
    ) -> Result<()> {
        let mut at = start;
        while at < end {
            let (own, stop) = partial.run(at, end);
            if !own {
                for piece in [(at, stop.min(except.0)), (at.max(except.1), stop)] {
                    if piece.0 < piece.1 {
                        super::copy_bytes::replace_bytes(&self.own, from, to, piece)?;
                    }
                }
            }
            at = stop;
        }
        Ok(())
    }
}
