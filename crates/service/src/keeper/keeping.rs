//! What the keeper has of a living worker, to write what it held if it dies.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use log::{error, info, warn};
use parking_lot::Mutex;

use crate::custody;
use crate::held;

/// By door: memory of held writes, and the files they are of.
#[derive(Default)]
pub struct Keeping(Mutex<HashMap<u64, Kept>>);

struct Kept {
    memory: OwnedFd,
    files: HashMap<u64, OwnedFd>,
    /// Keys only grow, so that no key is another file's later.
    last_key: u64,
    channels: custody::Kept,
}

impl Keeping {
    /// `channels`: the socket by which the worker tells of them.
    pub fn begin(&self, door: u64, memory: OwnedFd, channels: OwnedFd) {
        let channels = custody::Kept::new(channels);
        self.0.lock().insert(door, Kept { memory, files: HashMap::new(), last_key: 0, channels });
    }

    /// Reads what the worker told of channels. False for what makes no sense.
    pub fn look(&self) -> bool {
        self.0.lock().values_mut().all(|kept| kept.channels.look())
    }

    /// The door has ended, and wrote all it held before.
    pub fn end(&self, door: u64) {
        self.0.lock().remove(&door);
    }

    /// False for what makes no sense.
    pub fn keep(&self, door: u64, key: u64, descriptors: Vec<OwnedFd>) -> bool {
        let Ok([file]) = <[OwnedFd; 1]>::try_from(descriptors) else { return false };
        let mut doors = self.0.lock();
        let Some(kept) = doors.get_mut(&door) else { return false };
        let sound =
            key > kept.last_key && kept.files.len() < held::FILES_MAX && held::fits(&file) == Ok(true);
        if sound {
            kept.last_key = key;
            kept.files.insert(key, file);
        }
        sound
    }

    /// False for what makes no sense. Of a door that has ended nothing is kept any more.
    pub fn let_go(&self, door: u64, key: u64) -> bool {
        self.0.lock().get_mut(&door).is_none_or(|kept| kept.files.remove(&key).is_some())
    }

    /// The worker is dead: what it held is written. Before anybody else serves the same files.
    pub fn recover(&self, worker: u32) {
        for (door, kept) in std::mem::take(&mut *self.0.lock()) {
            match held::recover(&kept.memory, &kept.files) {
                Ok(recovered) => tell_held(recovered, (door, worker)),
                Err(errno) => {
                    error!("door {door}: what worker {worker} held of programs' writes is lost: {errno}");
                }
            }
            // After it, since it was posted after it.
            tell_posted(kept.channels.recover(), (door, worker));
        }
    }
}

fn tell_posted(recovered: custody::Recovered, (door, worker): (u64, u32)) {
    let (posts, channels) = (recovered.posts, recovered.channels);
    if posts > 0 {
        info!(
            "door {door}: {posts} writes that worker {worker} had not taken are done, {channels} channels ended"
        );
    }
    if recovered.damaged > 0 {
        warn!("door {door}: worker {worker} left {} channels that make no sense", recovered.damaged);
    }
    if let Some(errno) = recovered.problem {
        let lost = recovered.lost_posts;
        error!("door {door}: {lost} writes that worker {worker} had not done cannot be done: {errno}");
    }
}

fn tell_held(recovered: held::Recovered, (door, worker): (u64, u32)) {
    if recovered.bytes > 0 {
        info!("door {door}: {} bytes that worker {worker} held are written", recovered.bytes);
    }
    if recovered.damaged > 0 {
        warn!("door {door}: worker {worker} left {} entries that make no sense", recovered.damaged);
    }
    if let Some(errno) = recovered.problem {
        let lost = recovered.lost_bytes;
        error!("door {door}: {lost} bytes that worker {worker} held cannot be written: {errno}");
    }
}
