//! Applying what was posted.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use polytropo_libservices::{Caller, Errno, OpenFlags};

use super::client::{Client, OpenFile};
use super::memory::Posted;

/// Bytes that are written at once, if the posts lie one behind the other.
const RUN_BYTES_MAX: usize = 256 << 10;

/// Room that each client keeps for them.
const KEPT_BYTES_MAX: usize = 64 << 10;

/// Posts that become one write.
#[derive(Default)]
struct Run {
    file: u64,
    offset: u64,
    appends: bool,
    bytes: Vec<u8>,
    /// Number and end of each.
    posts: Vec<(usize, usize)>,
    /// Room for those that are taken at a time.
    taken: Vec<Posted>,
}

impl Client {
    /// Whether something was posted since it was looked at.
    pub fn has_posts(&self) -> bool {
        self.memory.posts_issued() != self.posts_applied.load(Acquire)
    }

    /// Whether there is a request or a post to be taken now.
    pub fn wants_service(&self) -> bool {
        self.memory.has_next() || (self.has_posts() && self.memory.has_published())
    }

    /// Applies all that was published before the call. For any thread: whoever comes while another is at it waits.
    pub fn drain(&self) {
        let (finished, _) = self.apply();
        finished.iter().for_each(|(number, outcome)| self.memory.finish_post(*number, *outcome));
    }

    /// `drain` for threads that the kernel does not wait for: programs that wait for their posts hear of them after the kernel did.
    /// False if there was nothing.
    pub fn drain_and_settle(&self) -> bool {
        let (finished, any) = self.apply();
        if self.heard_by_kernel.swap(false, Relaxed) {
            self.door.settle();
        }
        finished.iter().for_each(|(number, outcome)| self.memory.finish_post(*number, *outcome));
        any
    }

    /// Number and outcome of those that are applied and not finished; and whether there were any.
    fn apply(&self) -> (Vec<(usize, u32)>, bool) {
        let mut run = self.draining.lock();
        let mut taken = std::mem::take(&mut run.taken);
        self.memory.take_posts(&mut taken);
        let mut posts = &taken[..];
        let mut finished = Vec::new();
        while let Some((post, rest)) = posts.split_first() {
            if let Some(held) = self.hold(posts, || self.apply_run(&mut run, &mut finished)) {
                posts = &posts[held..];
                continue;
            }
            posts = rest;
            if !run.takes(post) {
                self.apply_run(&mut run, &mut finished);
                run.file = post.file;
                run.offset = post.offset;
                let file = self.file(post.file);
                run.appends = file.is_ok_and(|file| file.flags.contains(OpenFlags::APPEND));
            }
            self.memory.copy_post(post, &mut run.bytes);
            let end = run.bytes.len();
            run.posts.push((post.number, end));
        }
        self.apply_run(&mut run, &mut finished);
        // One that a program damaged or took back is counted by nobody, and has us look each time.
        self.posts_applied.fetch_add(taken.len() as u64, Release);
        let any = !taken.is_empty();
        run.taken = taken;
        (finished, any)
    }

    fn apply_run(&self, run: &mut Run, finished: &mut Vec<(usize, u32)>) {
        if run.posts.is_empty() {
            return;
        }
        let file = self.file(run.file).ok();
        if run.appends && self.memory.is_permitted(run.file) {
            self.say_places(file.as_deref(), run);
        }
        let mut begin = 0;
        let mut done = file.as_deref().map_or(0, |file| self.write_posted(file, run, 0..run.bytes.len()).0);
        for (number, end) in std::mem::take(&mut run.posts) {
            let mut outcome = 0;
            if end > done {
                // The whole was cut short: what is left goes one by one, so that each gets its own answer.
                let rest = done.max(begin)..end;
                outcome = match file.as_deref() {
                    Some(file) => self.write_posted(file, run, rest).1,
                    None => Errno::BADF.raw_os_error() as u32,
                };
                done = end;
            }
            self.memory.say_applied(number, outcome);
            finished.push((number, outcome));
            begin = end;
        }
        if let Some(file) = file {
            self.door.grew(run.bytes.len() as u64);
            file.count_posted(run.bytes.len() as u64);
            if !self.memory.is_permitted(run.file) {
                self.heard_by_kernel.store(true, Relaxed);
            }
            drop(file);
        }
        run.bytes.clear();
        run.bytes.shrink_to(KEPT_BYTES_MAX);
    }

    /// Writes down where bytes will be appended, for the case that this worker dies: who alone writes to the file finds its end there.
    fn say_places(&self, file: Option<&OpenFile>, run: &Run) {
        let Some(file) = file else { return };
        let attr = self.door.own.getattr(&Caller::service(), file.node, file.handle());
        let Ok(size) = attr.map(|attr| attr.size_bytes) else { return };
        let mut begin = 0;
        for (number, end) in &run.posts {
            self.memory.say_place(*number, size + begin as u64);
            begin = *end;
        }
    }

    /// How much was written, and why not all.
    fn write_posted(&self, file: &OpenFile, run: &Run, range: std::ops::Range<usize>) -> (usize, u32) {
        let handle = match file.file() {
            Ok(handle) if file.flags.contains(OpenFlags::WRITE) => handle,
            _ => return (0, Errno::BADF.raw_os_error() as u32),
        };
        let mut caller = self.peer.caller.clone();
        if self.memory.is_permitted(run.file) {
            // The kernel holds nothing of it: it need not be told.
            caller.door = self.door.kernel_door.unwrap_or(caller.door);
        }
        let mut done = 0;
        while done < range.len() {
            let offset = run.offset.saturating_add((range.start + done) as u64);
            let bytes = &run.bytes[range.start + done..range.end];
            match self.write_once(&caller, file, handle, offset, bytes) {
                Ok(0) => return (done, Errno::IO.raw_os_error() as u32),
                Ok(written) => done += written.min(bytes.len()),
                Err(errno) => return (done, errno),
            }
        }
        (done, 0)
    }

    fn write_once(
        &self,
        caller: &Caller,
        file: &OpenFile,
        handle: polytropo_libservices::HandleId,
        offset: u64,
        bytes: &[u8],
    ) -> Result<usize, u32> {
        if i64::try_from(offset.saturating_add(bytes.len() as u64)).is_err() {
            return Err(Errno::FBIG.raw_os_error() as u32);
        }
        let write = || self.door.own.write(caller, file.node, handle, offset, bytes);
        match catch_unwind(AssertUnwindSafe(write)) {
            Ok(Ok(written)) => Ok(written),
            Ok(Err(error)) => {
                log::debug!("posted write of process {}: {error}", self.peer.caller.pid);
                Err(error.errno().raw_os_error() as u32)
            }
            Err(_) => {
                log::error!(
                    "channel door {}: a layer of the stack panicked in a posted write",
                    self.door.id.0
                );
                Err(Errno::IO.raw_os_error() as u32)
            }
        }
    }
}

impl Run {
    fn takes(&self, post: &Posted) -> bool {
        let room = self.bytes.len() + post.bytes <= RUN_BYTES_MAX;
        let follows = self.appends || self.offset.checked_add(self.bytes.len() as u64) == Some(post.offset);
        !self.posts.is_empty() && room && follows && self.file == post.file
    }
}

/// What of posted writes a client keeps.
pub struct Draining(parking_lot::Mutex<Run>);

impl Default for Draining {
    fn default() -> Self {
        Self(parking_lot::Mutex::new(Run::default()))
    }
}

impl Draining {
    fn lock(&self) -> parking_lot::MutexGuard<'_, Run> {
        self.0.lock()
    }
}

impl super::Shared {
    /// Begins to let `client` write the file without waiting, if it is the only one that has it open.
    pub fn begin_grant(
        &self,
        client: &std::sync::Arc<Client>,
        number: u64,
        file: &OpenFile,
    ) -> Option<std::sync::Arc<super::grants::Grant>> {
        let grants = self.grants.as_ref()?;
        let waits = OpenFlags::SYNC | OpenFlags::DSYNC;
        if !file.flags.contains(OpenFlags::WRITE) || file.flags.intersects(waits) || !self.has_room() {
            return None;
        }
        let sole = || {
            let users = self.modes.users(file.node);
            let alone = users.channel_writers == 1 && users.channel_readers == 0 && users.fuse() == 0;
            alone && !self.is_watched()
        };
        if !sole() {
            return None;
        }
        let grant = grants.begin(file.node, client, number)?;
        if !client.has_kept(&grant, number, file) {
            grants.give_back(file.node, &grant);
            return None;
        }
        // What programs keep of the file was true until now. From now on they are told nothing of it before it is withdrawn.
        drop(self.epochs.changing(file.node));
        // Who opens the file is counted first, and withdraws then.
        if sole() {
            return Some(grant);
        }
        grants.give_back(file.node, &grant);
        None
    }

    /// Bytes were written without anybody being told whether there was room.
    pub(super) fn grew(&self, bytes: u64) {
        const LOOK_EVERY_BYTES: u64 = 8 << 20;
        let before = self.grown.fetch_add(bytes, Relaxed);
        if before / LOOK_EVERY_BYTES != (before + bytes) / LOOK_EVERY_BYTES
            && !self.look_for_room()
            && let Some(grants) = &self.grants
        {
            grants.withdraw_all();
        }
    }

    /// Whether all that may be posted fits, with much to spare. Looked for at most every 50 ms.
    fn has_room(&self) -> bool {
        const LOOK_EVERY: std::time::Duration = std::time::Duration::from_millis(50);
        {
            let looked = self.looked_for_room.lock();
            if let Some((when, room)) = *looked
                && when.elapsed() < LOOK_EVERY
            {
                return room;
            }
        }
        self.look_for_room()
    }

    fn look_for_room(&self) -> bool {
        const SPARE_BYTES: u64 = 64 << 20;
        let channel = (polytropo_wire::posts::POSTS * polytropo_wire::posts::POST_BYTES) as u64;
        let grants = self.grants.as_ref().map_or(0, |grants| grants.count()) as u64;
        let space = self.own.statfs(&Caller::service(), polytropo_libservices::NodeId::ROOT);
        let room = space.is_ok_and(|space| {
            let bytes = space.blocks_available.saturating_mul(u64::from(space.block_size_bytes));
            // What is held finds room, too.
            let held = self.held.as_ref().map_or(0, |held| 2 * held.bytes_max());
            bytes >= SPARE_BYTES.max(held) + 2 * channel * (grants + 1)
        });
        *self.looked_for_room.lock() = Some((std::time::Instant::now(), room));
        room
    }
}
