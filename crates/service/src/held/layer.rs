//! The stack as a program's own open files use it: what is held of them is there.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use polytropo_libservices::*;

use super::layout::PAGE_BYTES;
use super::store::Held;

/// A layer over a stack. Reads see what is held; before anything else it is written.
pub struct HeldLayer {
    below: Arc<dyn Libservice>,
    held: Arc<Held>,
}

impl HeldLayer {
    pub fn new(below: Arc<dyn Libservice>, held: Arc<Held>) -> Self {
        Self { below, held }
    }
}

impl Held {
    /// Reads through what is held.
    fn read_over(
        &self,
        caller: &Caller,
        (node, handle): (NodeId, HandleId),
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        let Some(file) = self.find(node) else {
            return self.below.read(caller, node, handle, offset, buffer);
        };
        // Nothing is written back between the look below and the look at what is held.
        let pages = file.pages.lock();
        let count = self.below.read(caller, node, handle, offset, buffer)?;
        if pages.held.is_empty() {
            return Ok(count);
        }
        let size = pages.size_bytes.unwrap_or(0);
        let known = size.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let total = count.max(known);
        buffer[count..total].fill(0);
        let mut at = offset;
        while at < offset + total as u64 {
            let (number, in_page) = (at / PAGE_BYTES as u64, at % PAGE_BYTES as u64);
            let next = (number + 1) * PAGE_BYTES as u64;
            if let Some(page) = pages.held.get(&number) {
                let from = u64::from(page.from).max(in_page);
                let end = u64::from(page.end).min(in_page + (offset + total as u64 - at));
                if from < end {
                    let to = (number * PAGE_BYTES as u64 + from - offset) as usize;
                    let to = &mut buffer[to..to + (end - from) as usize];
                    // SAFETY: within the page, which nobody writes to while `pages` is locked.
                    unsafe {
                        let bytes = self.area.page(page.index as usize).add(from as usize);
                        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_mut_ptr(), to.len());
                    }
                }
            }
            at = next;
        }
        Ok(total)
    }
}

impl Libservice for HeldLayer {
    fn below(&self) -> Option<&dyn Libservice> {
        Some(&*self.below)
    }

    fn kind(&self) -> &'static str {
        self.below.kind()
    }

    fn getattr(&self, caller: &Caller, node: NodeId, handle: Option<HandleId>) -> Result<Attr> {
        self.held.flush(node);
        self.below.getattr(caller, node, handle)
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<HandleId>,
        changes: &SetAttr,
    ) -> Result<Attr> {
        self.held.exclusively(node, || self.below.setattr(caller, node, handle, changes))
    }

    fn link(&self, caller: &Caller, node: NodeId, new_parent: NodeId, new_name: &Name) -> Result<Entry> {
        self.held.flush(node);
        self.below.link(caller, node, new_parent, new_name)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: OpenFlags) -> Result<Opened> {
        self.held.exclusively(node, || self.below.open(caller, node, flags))
    }

    fn read(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        self.held.read_over(caller, (node, handle), offset, buffer)
    }

    fn write(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        data: &[u8],
    ) -> Result<usize> {
        self.held.exclusively(node, || self.below.write(caller, node, handle, offset, data))
    }

    fn flush(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        self.held.flush(node);
        self.below.flush(caller, node, handle)
    }

    fn fsync(&self, caller: &Caller, node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.held.flush(node);
        self.below.fsync(caller, node, handle, data_only)
    }

    fn order(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        self.held.flush(node);
        self.below.order(caller, node, handle)
    }

    fn begin_order(&self, caller: &Caller, node: NodeId, handle: HandleId) -> Result<()> {
        self.held.flush(node);
        self.below.begin_order(caller, node, handle)
    }

    fn release(&self, node: NodeId, handle: HandleId) {
        self.held.end(node);
        self.below.release(node, handle);
    }

    fn fallocate(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: HandleId,
        mode: FallocateMode,
        offset: u64,
        length: u64,
    ) -> Result<()> {
        self.held.exclusively(node, || self.below.fallocate(caller, node, handle, mode, offset, length))
    }

    fn seek(&self, caller: &Caller, node: NodeId, handle: HandleId, offset: u64, to: SeekTo) -> Result<u64> {
        self.held.flush(node);
        self.below.seek(caller, node, handle, offset, to)
    }

    fn copy_range(
        &self,
        caller: &Caller,
        from: (NodeId, HandleId, u64),
        to: (NodeId, HandleId, u64),
        length: u64,
    ) -> Result<u64> {
        self.held.flush(from.0);
        self.held.exclusively(to.0, || self.below.copy_range(caller, from, to, length))
    }

    fn host_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        self.below.host_file(handle)
    }

    fn immutable_file(&self, handle: HandleId) -> Option<Arc<OwnedFd>> {
        self.below.immutable_file(handle)
    }

    fn content(&self, handle: HandleId) -> Option<ContentId> {
        self.below.content(handle)
    }
}
