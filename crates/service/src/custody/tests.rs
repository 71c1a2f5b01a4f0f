use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

use polytropo_wire::channel::{POSTS_PART_AT, TOTAL_BYTES};
use polytropo_wire::posts::{POST_AREAS_AT, POST_BYTES, POSTS_AT, Post, STATE_DONE, STATE_FREE};

use super::*;
use crate::sealed::{self, Mapping};

/// A worker that told of one channel, the program's side of that, and the keeper.
struct Site {
    custodian: Arc<Custodian>,
    kept: Kept,
    descriptor: OwnedFd,
    memory: Mapping,
    issued: AtomicU64,
    directory: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let (ours, theirs) = pair().unwrap();
        let descriptor = sealed::make("test", TOTAL_BYTES).unwrap();
        let memory = Mapping::of(&descriptor, TOTAL_BYTES, true).unwrap();
        Self {
            custodian: Custodian::new(theirs, Box::new(|_| ())),
            kept: Kept::new(ours),
            descriptor,
            memory,
            issued: AtomicU64::new(0),
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn file(&self, name: &str) -> File {
        let path = self.directory.path().join(name);
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    fn post_at(&self, number: usize) -> &Post {
        // SAFETY: within the mapping, aligned, made of atomics.
        unsafe { self.memory.base().add(POSTS_PART_AT + POSTS_AT).cast::<Post>().add(number).as_ref() }
    }

    /// As a program posts.
    fn post(&self, number: usize, file: u64, offset: u64, bytes: &[u8]) {
        let post = self.post_at(number);
        post.file.store(file, Relaxed);
        post.offset.store(offset, Relaxed);
        post.bytes.store(bytes.len() as u32, Relaxed);
        let area = (POSTS_PART_AT + POST_AREAS_AT + number * POST_BYTES) as u64;
        File::from(self.descriptor.try_clone().unwrap()).write_all_at(bytes, area).unwrap();
        post.publish(&self.issued, &AtomicU64::new(file), file);
    }

    fn state(&self, number: usize) -> (u32, u32) {
        let post = self.post_at(number);
        (post.kind(), post.outcome.load(Relaxed))
    }

    fn ended(&self) -> u32 {
        // SAFETY: as above; the word lies behind magic and version.
        unsafe { self.memory.base().add(12).cast::<AtomicU32>().as_ref() }.load(Relaxed)
    }
}

fn read(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn what_a_dead_worker_left_is_done_in_order() {
    let mut site = Site::new();
    let channel = site.custodian.channel(site.descriptor.as_fd()).unwrap();
    let (one, two) = (site.file("one"), site.file("two"));
    let _permits = [
        channel.permit(0x1_0001, false, Some(one.as_fd())).unwrap(),
        channel.permit(0x1_0002, true, Some(two.as_fd())).unwrap(),
    ];
    two.write_all_at(b"start ", 0).unwrap();
    // In no order of their places; the second was begun by the worker, and done by halves.
    site.post(9, 0x1_0001, 0, b"abcdef");
    site.post(3, 0x1_0001, 2, b"XY");
    assert!(site.post_at(3).take());
    site.post(5, 0x1_0001, 3, b"Z");
    // Appended by the worker, which did not come to say so.
    site.post(60, 0x1_0002, 0, b"more ");
    assert!(site.post_at(60).take());
    site.post_at(60).say_place(6);
    two.write_all_at(b"more ", 6).unwrap();
    site.post(2, 0x1_0002, 0, b"end");
    // Done, and overtaken by one that is told to be done.
    site.post(20, 0x1_0001, 1, b"old");
    assert!(site.post_at(20).take());
    site.post_at(20).say_applied(0);
    // Failed, and overtaken.
    site.post(21, 0x1_0001, 0, b"lost");
    assert!(site.post_at(21).take());
    site.post_at(21).say_applied(libc::ENOSPC as u32);
    let ended = site.ended();
    assert_eq!(ended, 0);
    let kept = std::mem::replace(&mut site.kept, Kept::new(pair().unwrap().0));
    let recovered = kept.recover();
    assert_eq!((recovered.posts, recovered.lost_posts, recovered.damaged), (5, 0, 0));
    assert_eq!((read(&one), read(&two)), (b"abXZef".to_vec(), b"start more end".to_vec()));
    assert_eq!(site.state(21), (STATE_DONE, libc::ENOSPC as u32));
}

#[test]
fn programs_hear_of_it() {
    let mut site = Site::new();
    let channel = site.custodian.channel(site.descriptor.as_fd()).unwrap();
    let file = site.file("one");
    let _permit = channel.permit(0x1_0001, false, Some(file.as_fd())).unwrap();
    // Of a file that nobody keeps.
    let _other = channel.permit(0x1_0002, false, None).unwrap();
    site.post(0, 0x1_0001, 0, b"bytes");
    site.post(1, 0x1_0002, 0, b"bytes");
    site.post(5, 0x1_0001, u64::MAX, b"bytes");
    // Of one that need not be kept: its writers wait.
    site.post(2, 0x1_0003, 0, b"bytes");
    site.post(4, 0x1_0003, 0, b"bytes");
    assert!(site.post_at(4).take());
    let kept = std::mem::replace(&mut site.kept, Kept::new(pair().unwrap().0));
    let recovered = kept.recover();
    assert_eq!((recovered.posts, recovered.lost_posts, recovered.channels), (1, 2, 1));
    assert_eq!(site.state(0), (STATE_DONE, 0));
    assert_eq!(site.state(1), (STATE_DONE, libc::EIO as u32));
    assert_eq!(site.state(5), (STATE_DONE, libc::EFBIG as u32));
    assert!(site.post_at(2).take_back() && site.post_at(4).take_back());
    assert_eq!((site.state(3).0, site.ended()), (STATE_FREE, 1));
}

#[test]
fn what_is_given_back_is_not_kept() {
    let mut site = Site::new();
    let channel = site.custodian.channel(site.descriptor.as_fd()).unwrap();
    let file = site.file("one");
    for _ in 0..2 * PERMITS_MAX {
        drop(channel.permit(0x1_0001, false, Some(file.as_fd())).unwrap());
        assert!(site.kept.look());
    }
    site.post(0, 0x1_0001, 0, b"bytes");
    drop(channel);
    assert!(site.kept.look());
    let kept = std::mem::replace(&mut site.kept, Kept::new(pair().unwrap().0));
    assert_eq!(kept.recover(), Recovered::default());
    assert!(read(&file).is_empty());
}

#[test]
fn many_threads_tell_in_one_order() {
    let mut site = Site::new();
    let channel = site.custodian.channel(site.descriptor.as_fd()).unwrap();
    for _ in 0..100 {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..16).for_each(|number| drop(channel.permit(number, false, None))));
            }
        });
        assert!(site.kept.look());
    }
}

#[test]
fn nonsense_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = File::create(directory.path().join("one")).unwrap();
    let read_only = File::open(directory.path().join("one")).unwrap();
    let tries: [(Message, Option<&File>); 5] = [
        ([9, 1, 0, 0], None),
        ([PERMIT, 1, 1, 7], Some(&read_only)),
        ([PERMIT, 0, 1, 7], Some(&file)),
        ([0; 4], None),
        ([u64::MAX; 4], None),
    ];
    for (message, file) in tries {
        let (ours, theirs) = pair().unwrap();
        let mut kept = Kept::new(ours);
        send(&theirs, message, file.map(|file| file.as_fd()), SendFlags::empty()).unwrap();
        assert!(!kept.look(), "{message:?}");
    }
    let (ours, theirs) = pair().unwrap();
    rustix::net::send(&theirs, &[7; 5], SendFlags::empty()).unwrap();
    assert!(!Kept::new(ours).look());
    // A channel that is none is damage.
    let (ours, theirs) = pair().unwrap();
    let mut kept = Kept::new(ours);
    send(&theirs, [CHANNEL, 1, 0, 0], Some(file.as_fd()), SendFlags::empty()).unwrap();
    assert!(kept.look());
    assert_eq!(kept.recover().damaged, 1);
}
