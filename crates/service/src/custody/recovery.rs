//! Applies what was posted in the channel of a dead worker. The program may still be writing there, and anything may stand there: it could
//! have written those bytes to those files itself, and nothing else can come of it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU64, fence};

use polytropo_wire::channel::{Header, POSTS_PART_AT, SLOTS, SLOTS_AT, Slot, TOTAL_BYTES};
use polytropo_wire::message::FILES_MAX;
use polytropo_wire::posts::{
    PERMITS_AT, POST_AREAS_AT, POST_BYTES, POSTS, POSTS_AT, Post, STATE_PUBLISHED, STATE_TAKEN, withdraw,
};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::kept::PermittedFile;
use crate::futex::wake_all;
use crate::held::{read_all, write_all};
use crate::sealed::Mapping;

/// What became of posted writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    pub channels: usize,
    pub posts: u64,
    pub lost_posts: u64,
    /// Why the first of those were lost.
    pub problem: Option<Errno>,
    /// What made no sense.
    pub damaged: u64,
}

struct Memory(Mapping);

impl Memory {
    fn header(&self) -> &Header {
        // SAFETY: begins the mapping, page-aligned, and is made of atomics.
        unsafe { self.0.base().cast().as_ref() }
    }

    fn slot(&self, number: usize) -> &Slot {
        assert!(number < SLOTS);
        // SAFETY: all slots lie in the mapping, aligned, and are made of atomics.
        unsafe { self.0.base().add(SLOTS_AT).cast::<Slot>().add(number).as_ref() }
    }

    fn post(&self, number: usize) -> &Post {
        assert!(number < POSTS);
        // SAFETY: all posts lie in the mapping, aligned, and are made of atomics.
        unsafe { self.0.base().add(POSTS_PART_AT + POSTS_AT).cast::<Post>().add(number).as_ref() }
    }

    fn permit(&self, file: u64) -> &AtomicU64 {
        let index = (file & 0xffff) as usize % FILES_MAX;
        // SAFETY: a word for each index lies in the mapping, aligned.
        unsafe { self.0.base().add(POSTS_PART_AT + PERMITS_AT).cast::<AtomicU64>().add(index).as_ref() }
    }
}

/// `files`: those of the channel that may be written without waiting.
pub fn recover(memory: &OwnedFd, files: &[&PermittedFile], recovered: &mut Recovered) {
    let Ok(mapped) = Mapping::of(memory, TOTAL_BYTES, true).map(Memory) else {
        recovered.damaged += 1;
        return;
    };
    recovered.channels += 1;
    // From here on writers wait, and take back what nobody took. What was acknowledged before is seen below.
    files.iter().for_each(|file| withdraw(mapped.permit(file.number)));
    fence(SeqCst);
    let by_number: HashMap<u64, &PermittedFile> = files.iter().map(|file| (file.number, *file)).collect();
    for file in files.iter().filter_map(|file| file.file.as_ref()) {
        // Where bytes go is said below. Of a file that may only be appended to this fails, and does no harm.
        if let Ok(flags) = rustix::fs::fcntl_getfl(file) {
            let _ = rustix::fs::fcntl_setfl(file, flags - OFlags::APPEND);
        }
    }
    let mut posted: Vec<(u64, usize)> = (0..POSTS)
        .filter(|number| matches!(mapped.post(*number).kind(), STATE_PUBLISHED | STATE_TAKEN))
        .map(|number| (mapped.post(number).sequence.load(Relaxed), number))
        .collect();
    posted.sort_unstable();
    for (_, number) in posted {
        let post = mapped.post(number);
        // What the dead worker had taken is done again: the same bytes at the same place, in the same order. But not what it had done, since
        // it may have done later ones after that.
        let taken = post.kind() == STATE_TAKEN;
        if let Some(outcome) = post.applied().filter(|_| taken) {
            if post.finish(outcome) {
                wake_all(&post.state);
            }
            continue;
        }
        if !by_number.contains_key(&post.file.load(Relaxed)) {
            // Who wrote it without a permit waits, takes it back when the channel has ended, and writes by another way.
            if taken {
                post.hand_back();
            }
            continue;
        }
        if !taken && !post.take() {
            continue;
        }
        let outcome = match apply(memory, number, post, &by_number) {
            Ok(()) => {
                recovered.posts += 1;
                0
            }
            Err(errno) => {
                recovered.lost_posts += 1;
                recovered.problem = recovered.problem.or(Some(errno));
                errno.raw_os_error() as u32
            }
        };
        if post.finish(outcome) {
            wake_all(&post.state);
        }
    }
    mapped.header().ended.store(1, SeqCst);
    (0..SLOTS).for_each(|number| _ = wake_all(&mapped.slot(number).state));
    (0..POSTS).for_each(|number| _ = wake_all(&mapped.post(number).state));
}

fn apply(
    memory: &OwnedFd,
    number: usize,
    post: &Post,
    files: &HashMap<u64, &PermittedFile>,
) -> Result<(), Errno> {
    let permitted = files.get(&post.file.load(Relaxed)).ok_or(Errno::BADF)?;
    let file = permitted.file.as_ref().ok_or(Errno::IO)?;
    let mut bytes = vec![0; (post.bytes.load(Relaxed) as usize).min(POST_BYTES)];
    // Read, not looked at through the mapping, where pages might have to be allocated.
    read_all(memory, &mut bytes, (POSTS_PART_AT + POST_AREAS_AT + number * POST_BYTES) as u64)?;
    let offset = match (permitted.appends, post.place()) {
        (false, _) => post.offset.load(Relaxed),
        (true, Some(place)) => place,
        (true, None) => rustix::fs::fstat(file)?.st_size as u64,
    };
    let end = offset.checked_add(bytes.len() as u64).filter(|end| i64::try_from(*end).is_ok());
    end.ok_or(Errno::FBIG)?;
    write_all(file, &bytes, offset)
}
