//! Which files programs may have written to, so that the kernel may hold more of them than the stack has.
//!
//! The kernel looks for file capabilities before the first buffered write to an inode that it holds, and asks us, since it has nobody
//! else to ask. Whoever was never asked about has no bytes in the kernel alone, but for what was stored through a shared
//! mapping, which neither makes a file longer nor has anything to do with its holes if it has none.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use polytropo_libservices::NodeId;

/// Several nodes share a bit; a bit is never taken back, since only the kernel knows when it forgets an inode.
const BITS: usize = 1 << 18;

pub struct Written {
    /// False where the kernel began with somebody else, who was asked.
    from_the_beginning: AtomicBool,
    bits: Box<[AtomicU64]>,
}

impl Default for Written {
    fn default() -> Self {
        let bits = (0..BITS / 64).map(|_| AtomicU64::new(0)).collect();
        Self { from_the_beginning: AtomicBool::new(false), bits }
    }
}

impl Written {
    /// The kernel begins, and holds nothing yet.
    pub fn begin(&self) {
        self.from_the_beginning.store(true, Ordering::Release);
    }

    /// Before the kernel is answered what capabilities the file has.
    pub fn mark(&self, node: NodeId) {
        let (word, bit) = self.place(node);
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::Release);
        }
    }

    pub fn may_be(&self, node: NodeId) -> bool {
        let (word, bit) = self.place(node);
        !self.from_the_beginning.load(Ordering::Acquire) || word.load(Ordering::Acquire) & bit != 0
    }

    fn place(&self, node: NodeId) -> (&AtomicU64, u64) {
        let bit = node.0 as usize % BITS;
        (&self.bits[bit / 64], 1 << (bit % 64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_about_since_the_beginning() {
        let written = Written::default();
        assert!(written.may_be(NodeId(7)));
        written.begin();
        assert!(!written.may_be(NodeId(7)));
        written.mark(NodeId(7));
        let alike = NodeId(7 + BITS as u64);
        assert!(written.may_be(NodeId(7)) && written.may_be(alike) && !written.may_be(NodeId(8)));
    }
}
