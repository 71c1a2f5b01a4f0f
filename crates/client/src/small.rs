//! Small files that programs of the same rights have read: opened here, and nobody is asked.

use polytropo_wire::answers::{Kind, bytes};
use polytropo_wire::epochs::EVERYTHING;
use polytropo_wire::message::opened_flags;

use core::sync::atomic::Ordering::Relaxed;

use crate::arena::Chunk;
use crate::channel::Channel;
use crate::directories::Premises;
use crate::files::{Arrived, File};
use crate::operations::Opened;

const O_NOFOLLOW: u32 = 0o400_000;
const AT_SYMLINK_NOFOLLOW: u32 = 0x100;
const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;

impl Channel {
    /// Opens for reading what lies at `path` in the directory with this inode, if it is a small file whose bytes are known. As by
    /// `open_to_read`, the service has nothing open then. `flags`: O_NOFOLLOW or nothing.
    pub fn open_shared(&self, directory: u64, path: &[u8], flags: u32) -> Option<Opened> {
        let follow = if flags & O_NOFOLLOW == 0 { 0 } else { AT_SYMLINK_NOFOLLOW };
        let (found, premises) = self.look_below(directory, path, follow)?;
        let chunk = self.arena.take_chunk()?;
        let taken = self.take_shared(found.ino, &premises, chunk);
        let opened =
            taken.and_then(|(arrived, opened)| self.remember(opened.file, arrived).ok().map(|()| opened));
        if opened.is_none() {
            self.arena.give_chunk(chunk);
        }
        opened
    }

    /// Takes the bytes of the inode to which a path led, as the premises say.
    fn take_shared(&self, ino: u64, premises: &Premises, chunk: Chunk) -> Option<(Arrived, Opened)> {
        let answers = self.listings.as_ref()?.answers()?;
        let record = answers.find(Kind::Bytes, ino)?;
        let known = bytes::View::of(record.payload())?;
        // It may be overwritten just now, and have become another size.
        let (attributes, size) = (known.attributes(), known.size_bytes().min(bytes::BYTES_MAX));
        let tag = premises.tag_with([(EVERYTHING, record.everything()), known.sample()]);
        let to = self.arena.chunk(chunk).cast::<u64>();
        for (at, word) in known.bytes().iter().take(size.div_ceil(8)).enumerate() {
            // SAFETY: a chunk has room for `BYTES_MAX`, is aligned to pages and ours alone now.
            unsafe { to.add(at).write(word.load(Relaxed)) };
        }
        let there = answers.is_there(record.position) && tag.holds(self.lookups.as_ref()?.epochs());
        if !there || attributes.mode & S_IFMT != S_IFREG {
            return None;
        }
        let file = File(self.arena.local_number(chunk));
        let arrived = Arrived {
            flags: opened_flags::CARRIED | opened_flags::TAGGED,
            carried: Some((chunk, size as u64)),
            attributes: attributes.to_words(),
            tag: tag.to_words(),
        };
        Some((arrived, Opened { file, attributes, made: false }))
    }
}
