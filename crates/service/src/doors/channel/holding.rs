//! Posts that are held instead of being passed to the layers at once.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use polytropo_libservices::{Errno, OpenFlags};

use super::client::{Client, OpenFile};
use super::memory::Posted;
use crate::held::{HeldFile, Piece, Putting};

/// A file is held once so many bytes of it were posted: smaller ones are written in one go as it is.
const HOLD_FROM_BYTES: u64 = 64 << 10;
/// Posts that are told to be done together, since each telling waits until all that was copied before has left for memory.
const TOLD_TOGETHER: usize = 8;

impl Client {
    /// Holds the first posts, as far as they are of one file whose writes are held; tells how many. None if none is. `before` is done first.
    pub(super) fn hold(&self, posts: &[Posted], before: impl FnOnce()) -> Option<usize> {
        let first = posts.first()?;
        let (file, held) = self.held_file(first.file)?;
        before();
        let count = posts.iter().take_while(|post| post.file == first.file).count();
        let done = catch_unwind(AssertUnwindSafe(|| self.hold_all(&file, &held, &posts[..count])));
        if done.is_err() {
            log::error!("channel door {}: a posted write cannot be held", self.door.id.0);
            // Some of them may be done; who waits for those is not told twice.
            let fail = |post: &Posted| self.memory.finish_post(post.number, Errno::IO.raw_os_error() as u32);
            posts[..count].iter().filter(|post| self.memory.is_taken(post.number)).for_each(fail);
        }
        Some(count)
    }

    /// The open file of a number, if its writes are held: it is granted, and so much was posted that it pays.
    fn held_file(&self, number: u64) -> Option<(Arc<OpenFile>, Arc<HeldFile>)> {
        let held = self.door.held.as_ref()?;
        // Once withdrawn nothing more is held: whoever withdraws waits for us after that, and writes what is held then.
        if !self.memory.is_permitted(number) {
            return None;
        }
        let file = self.file(number).ok()?;
        if !file.flags.contains(OpenFlags::WRITE) || file.posted_bytes() < HOLD_FROM_BYTES {
            return None;
        }
        let mut caller = self.peer.caller.clone();
        caller.door = self.door.kernel_door.unwrap_or(caller.door);
        let begun = held.begin((file.node, file.file().ok()?), file.flags, &caller, &file.late)?;
        Some((file, begun))
    }

    fn hold_all(&self, file: &OpenFile, into: &Arc<HeldFile>, posts: &[Posted]) {
        let Some(held) = &self.door.held else { return };
        let mut putting = Putting::begin(held, into);
        // Looked for after that: blocks of a window that is made from now on are filled with what is held.
        let window = self.door.windows.window_of(file.node);
        let see = |piece: Piece| {
            if let Some(window) = &window {
                // SAFETY: the piece is there as long as this runs.
                unsafe { window.change(piece.offset, piece.bytes, piece.count, piece.size_bytes) };
            }
        };
        let mut bytes = 0;
        for together in posts.chunks(TOLD_TOGETHER) {
            for post in together {
                if into.appends()
                    && let Ok(place) = putting.place(post.offset)
                {
                    self.memory.say_place(post.number, place);
                }
                let outcome = match file.late.take() {
                    // SAFETY: the post's bytes lie in the channel's memory, which lives as long as the client.
                    0 => match unsafe { putting.put(post.offset, self.memory.post_bytes(post), see) } {
                        Ok(()) => 0,
                        Err(error) => {
                            log::debug!("posted write of process {}: {error}", self.peer.caller.pid);
                            error.errno().raw_os_error() as u32
                        }
                    },
                    late => late,
                };
                self.memory.mark_done(post.number, outcome);
                bytes += post.bytes as u64;
            }
            self.memory.tell_done(together.iter().map(|post| post.number));
        }
        drop(putting);
        file.count_posted(bytes);
        self.door.grew(bytes);
    }
}
