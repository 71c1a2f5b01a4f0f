//! Open files of channels that the kernel is to open itself, though it cannot find them: their names were moved or removed.
//!
//! The program gets a name that nobody can guess, and the kernel finds the file by it in the root of the mount, once. The inode's own rights
//! count as ever.

use std::collections::VecDeque;

use parking_lot::Mutex;
use polytropo_libservices::{Errno, NodeId};
use polytropo_wire::message::{HANDED_NAME_BYTES, handed_name};

/// Names that were given out and not used. The oldest goes first.
const WAITING_MAX: usize = 256;

#[derive(Default)]
pub struct Handed {
    waiting: Mutex<VecDeque<([u64; 2], NodeId)>>,
}

impl Handed {
    /// The two words of a name for a node, which whoever asks holds meanwhile.
    pub fn give(&self, node: NodeId) -> Result<[u64; 2], Errno> {
        let mut random = [0; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let (low, high) = random.split_at(8);
        let words =
            [low, high].map(|half| half.iter().fold(0, |word: u64, byte| word << 8 | u64::from(*byte)));
        let mut waiting = self.waiting.lock();
        if waiting.len() >= WAITING_MAX {
            waiting.pop_front();
        }
        waiting.push_back((words, node));
        Ok(words)
    }

    /// The node that the kernel looks for by `name`.
    pub fn take(&self, name: &[u8]) -> Option<NodeId> {
        if name.len() != HANDED_NAME_BYTES {
            return None;
        }
        let mut waiting = self.waiting.lock();
        let at = waiting.iter().position(|(words, _)| handed_name(*words) == *name)?;
        waiting.remove(at).map(|(_, node)| node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_good_once() {
        let handed = Handed::default();
        let name = handed_name(handed.give(NodeId(7)).unwrap());
        assert_eq!(handed.take(b"something"), None);
        assert_eq!(handed.take(&name), Some(NodeId(7)));
        assert_eq!(handed.take(&name), None);
    }

    #[test]
    fn names_that_nobody_uses_go() {
        let handed = Handed::default();
        let first = handed_name(handed.give(NodeId(1)).unwrap());
        (0..WAITING_MAX).for_each(|_| _ = handed.give(NodeId(2)).unwrap());
        assert_eq!(handed.take(&first), None);
        assert_eq!(handed.waiting.lock().len(), WAITING_MAX);
    }
}
