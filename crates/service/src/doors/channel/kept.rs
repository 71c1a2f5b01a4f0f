//! Directories that programs went through lately: their look-ups are kept, since to reach one anew costs an open and a close.
//!
//! Only that the layers know them is kept, nothing about them: what changes is seen at once.

use std::collections::VecDeque;

use parking_lot::Mutex;
use polytropo_libservices::{Libservice, NodeId};
use rustc_hash::FxHashSet;

/// Directories of one door. Each may cost the service a descriptor, for which the layers have a budget of their own.
const KEPT_MAX: usize = 1024;

#[derive(Default)]
pub struct Kept(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    nodes: FxHashSet<NodeId>,
    /// First in, first out.
    order: VecDeque<NodeId>,
}

impl Kept {
    /// Takes over one look-up of a directory, or gives it back.
    pub fn keep(&self, stack: &dyn Libservice, node: NodeId) {
        let superfluous = {
            let inner = &mut *self.0.lock();
            if !inner.nodes.insert(node) {
                Some(node)
            } else {
                inner.order.push_back(node);
                let over = inner.order.len() > KEPT_MAX;
                let oldest = if over { inner.order.pop_front() } else { None };
                oldest.inspect(|node| {
                    inner.nodes.remove(node);
                })
            }
        };
        if let Some(node) = superfluous {
            stack.forget(node, 1);
        }
    }

    pub fn give_back(&self, stack: &dyn Libservice) {
        let inner = std::mem::take(&mut *self.0.lock());
        inner.nodes.into_iter().for_each(|node| stack.forget(node, 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use polytropo_libservices::{Attr, Caller, Result};
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    #[derive(Default)]
    struct Counts(AtomicU64);

    impl Libservice for Counts {
        fn kind(&self) -> &'static str {
            "counts"
        }

        fn getattr(&self, _: &Caller, _: NodeId, _: Option<polytropo_libservices::HandleId>) -> Result<Attr> {
            unreachable!("nothing about a directory is asked")
        }

        fn forget(&self, _: NodeId, count: u64) {
            self.0.fetch_add(count, Relaxed);
        }
    }

    #[test]
    fn every_lookup_is_given_back_once() {
        let (stack, kept) = (Counts::default(), Kept::default());
        let given = |times: u64| assert_eq!(stack.0.load(Relaxed), times);
        kept.keep(&stack, NodeId(2));
        given(0);
        kept.keep(&stack, NodeId(2));
        given(1);
        (3..KEPT_MAX as u64 + 12).for_each(|id| kept.keep(&stack, NodeId(id)));
        given(1 + 10);
        kept.keep(&stack, NodeId(2));
        given(1 + 11);
        kept.give_back(&stack);
        given(1 + 11 + KEPT_MAX as u64);
    }
}
