//! Open files of channels that the kernel is to open itself, though it cannot find them: their names were moved or removed.
//!
//! The program gets a name that nobody can guess, and the kernel finds the file by it in the root of the mount, once. The inode's own rights
//! count as ever.

use parking_lot::Mutex;
use polytropo_libservices::{Errno, NodeId};
use polytropo_wire::message::{HANDED_NAME_BYTES, handed_words};
use rustc_hash::FxHashMap;

/// The two words of a name.
pub type Words = [u64; 2];

#[derive(Default)]
pub struct Handed {
    waiting: Mutex<FxHashMap<Words, NodeId>>,
}

impl Handed {
    /// A name for a node, which whoever asks holds meanwhile, and takes back if nobody used it.
    pub fn give(&self, node: NodeId) -> Result<Words, Errno> {
        let mut random = [0; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let (low, high) = random.split_at(8);
        let words =
            [low, high].map(|half| half.iter().fold(0, |word: u64, byte| word << 8 | u64::from(*byte)));
        self.waiting.lock().insert(words, node);
        Ok(words)
    }

    pub fn take_back(&self, words: Words) {
        self.waiting.lock().remove(&words);
    }

    /// The node that the kernel looks for by `name`.
    pub fn take(&self, name: &[u8]) -> Option<NodeId> {
        if name.len() != HANDED_NAME_BYTES {
            return None;
        }
        self.waiting.lock().remove(&handed_words(name)?)
    }
}

/// Names that one program was given.
#[derive(Default)]
pub struct Given {
    words: [Option<Words>; GIVEN_MAX],
    next: usize,
}

/// The oldest goes first: names are used at once.
const GIVEN_MAX: usize = 4;

impl Given {
    /// Remembers a name; the one that has to go for it.
    pub fn push(&mut self, words: Words) -> Option<Words> {
        self.next = (self.next + 1) % GIVEN_MAX;
        self.words[self.next].replace(words)
    }

    pub fn all(&self) -> impl Iterator<Item = Words> {
        self.words.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use polytropo_wire::message::handed_name;

    #[test]
    fn a_name_is_good_once() {
        let handed = Handed::default();
        let name = handed_name(handed.give(NodeId(7)).unwrap());
        assert_eq!(handed.take(b"something"), None);
        assert_eq!(handed.take(&[b'x'; HANDED_NAME_BYTES]), None);
        assert_eq!(handed.take(&name), Some(NodeId(7)));
        assert_eq!(handed.take(&name), None);
    }

    #[test]
    fn names_that_nobody_uses_go() {
        let (handed, mut given) = (Handed::default(), Given::default());
        let names = [(); 10].map(|()| {
            let words = handed.give(NodeId(1)).unwrap();
            given.push(words).inspect(|old| handed.take_back(*old));
            handed_name(words)
        });
        assert_eq!(names.iter().filter(|name| handed.take(*name).is_some()).count(), GIVEN_MAX);
        assert_eq!(given.all().count(), GIVEN_MAX);
    }
}
