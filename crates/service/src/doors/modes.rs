//! Which way an inode's bytes go: decided here and nowhere else, and kept from its first open to its last release.
//!
//! | mode | through FUSE | through a channel |
//! |---|---|---|
//! | immutable | passthrough onto the layer's own file | a window of that file |
//! | window | the kernel's cache, told of changes; direct requests while a channel writes, and to write without mapping | a window |
//! | kernel | the kernel's page cache, which is the truth until the last writer is gone | not: it opens the file through FUSE |
//!
//! The kernel binds an inode to one file while passthrough opens of it are there, and refuses every other way (EIO). A node whose
//! bytes have left that file therefore needs another inode of the kernel (`Decision::Renew`); old opens keep the old file.

use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use polytropo_libservices::NodeId;
use rustc_hash::FxHashMap;

use super::handed::Handed;

const SHARDS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Immutable,
    Window,
    Kernel,
}

/// What somebody wants to do with an inode. Asked after the stack has opened it, so that what an open for writing
/// moves (copy-up) has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    pub door: Door,
    pub access: Access,
    /// The bytes lie in a file that never changes and that can be given out.
    pub immutable: bool,
    /// By the kernel, which runs it as a program.
    pub executes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Fuse,
    Channel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    /// Cannot be mapped.
    WriteOnly,
    ReadWrite,
}

impl Access {
    pub fn writes(self) -> bool {
        self != Access::Read
    }
}

/// How an open file's bytes are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// FUSE: the kernel uses the layer's file itself.
    Passthrough,
    /// FUSE: the kernel's page cache, told of what others change.
    Cached,
    /// FUSE: the kernel's page cache, where what is written is the truth.
    Kernel,
    /// FUSE: every read and write is a request.
    Direct,
    /// Channel: read by mapping, written by requests.
    Window,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Open(Way),
    /// FUSE: the kernel's inode is bound to a file that no longer has the bytes.
    Renew,
    /// Channel: the kernel has the file; open it through FUSE.
    ThroughKernel,
}

/// One open that was granted; to be given back with `release`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    way: Way,
    writes: bool,
    executes: bool,
    renewals: u32,
}

impl Ticket {
    pub fn way(&self) -> Way {
        self.way
    }
}

/// Who has an inode open, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Users {
    pub passthrough: u32,
    pub cached: u32,
    pub kernel: u32,
    pub direct: u32,
    pub channel_readers: u32,
    pub channel_writers: u32,
    /// Passthrough opens of kernel inodes that stood for the node before.
    pub left_behind: u32,
    /// Those of all that are through FUSE by which the kernel runs it as a program.
    pub executing: u32,
}

impl Users {
    pub fn channels(&self) -> u32 {
        self.channel_readers + self.channel_writers
    }

    pub fn fuse(&self) -> u32 {
        self.passthrough + self.cached + self.kernel + self.direct + self.left_behind
    }

    /// `None` while nobody has it open.
    pub fn mode(&self) -> Option<Mode> {
        match self {
            Users { kernel: 1.., .. } => Some(Mode::Kernel),
            Users { passthrough: 1.., .. } => Some(Mode::Immutable),
            _ if self.fuse() + self.channels() == 0 => None,
            _ => Some(Mode::Window),
        }
    }

    /// The table of rules: all that is decided about modes is decided here.
    pub fn decide(&self, wish: Wish) -> Decision {
        let Wish { door, access, immutable, executes: _ } = wish;
        let cached = self.cached + self.kernel > 0;
        match (door, access) {
            (Door::Channel, _) if self.kernel > 0 => Decision::ThroughKernel,
            // Which says ETXTBSY.
            (Door::Channel, _) if self.executing > 0 && access.writes() => Decision::ThroughKernel,
            (Door::Channel, _) => Decision::Open(Way::Window),
            // The kernel lets passthrough in only where its page cache is in no use.
            (Door::Fuse, Access::Read) if immutable && !cached && self.channel_writers == 0 => {
                Decision::Open(Way::Passthrough)
            }
            (Door::Fuse, _) if self.passthrough > 0 => Decision::Renew,
            (Door::Fuse, Access::Read) if self.channel_writers > 0 => Decision::Open(Way::Direct),
            (Door::Fuse, Access::Read) => Decision::Open(Way::Cached),
            (Door::Fuse, Access::WriteOnly) if self.channels() > 0 => Decision::Open(Way::Direct),
            (Door::Fuse, _) => Decision::Open(Way::Kernel),
        }
    }

    fn count(&mut self, way: Way, writes: bool) -> &mut u32 {
        match way {
            Way::Passthrough => &mut self.passthrough,
            Way::Cached => &mut self.cached,
            Way::Kernel => &mut self.kernel,
            Way::Direct => &mut self.direct,
            Way::Window if writes => &mut self.channel_writers,
            Way::Window => &mut self.channel_readers,
        }
    }
}

/// Wants to know who else comes to the inodes that channels use.
pub trait Watcher: Send + Sync {
    /// Somebody opened an inode that channels had open, and has not been answered yet: permissions to write without waiting
    /// are to be withdrawn, what was posted applied, and with `Mode::Kernel` every channel is to leave. No lock is held.
    fn joined(&self, node: NodeId, mode: Mode, users: Users);
}

#[derive(Default)]
struct Inode {
    users: Users,
    /// How often another inode of the kernel had to take its place.
    renewals: u32,
}

/// The open files of one stack, by inode. All doors of the stack share it.
#[derive(Default)]
pub struct Modes {
    shards: [Mutex<FxHashMap<NodeId, Inode>>; SHARDS],
    watcher: OnceLock<Weak<dyn Watcher>>,
    /// Files that one door hands to the other.
    pub(super) handed: Handed,
}

impl std::fmt::Debug for Modes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Modes").finish_non_exhaustive()
    }
}

impl Modes {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// False if there is one already.
    pub fn watch(&self, watcher: Weak<dyn Watcher>) -> bool {
        self.watcher.set(watcher).is_ok()
    }

    /// Decides about one more open of `node`, and counts it if it is granted.
    pub fn open(&self, node: NodeId, wish: Wish) -> (Decision, Option<Ticket>) {
        let (decision, ticket, before, after) = {
            let mut shard = self.shard(node).lock();
            let inode = shard.entry(node).or_default();
            let before = inode.users;
            let decision = before.decide(wish);
            let ticket = match decision {
                Decision::Open(way) => {
                    let writes = wish.access.writes();
                    *inode.users.count(way, writes) += 1;
                    inode.users.executing += u32::from(wish.executes);
                    Some(Ticket { way, writes, executes: wish.executes, renewals: inode.renewals })
                }
                _ => None,
            };
            let after = inode.users;
            if after == Users::default() {
                shard.remove(&node);
            }
            (decision, ticket, before, after)
        };
        if let (1.., Some(_), Some(mode)) = (before.channels(), ticket, after.mode()) {
            if let Some(watcher) = self.watcher.get().and_then(Weak::upgrade) {
                watcher.joined(node, mode, after);
            }
        }
        (decision, ticket)
    }

    /// Counts an open that goes by requests whatever else is open: through an inode of the kernel that was replaced.
    pub fn open_apart(&self, node: NodeId, writes: bool) -> Ticket {
        let mut shard = self.shard(node).lock();
        let inode = shard.entry(node).or_default();
        inode.users.direct += 1;
        Ticket { way: Way::Direct, writes, executes: false, renewals: inode.renewals }
    }

    /// Another inode of the kernel stands for `node` from now on; passthrough opens of the old one are left behind.
    pub fn renew(&self, node: NodeId) {
        if let Some(inode) = self.shard(node).lock().get_mut(&node) {
            inode.users.left_behind += std::mem::take(&mut inode.users.passthrough);
            inode.renewals = inode.renewals.wrapping_add(1);
        }
    }

    pub fn release(&self, node: NodeId, ticket: Ticket) {
        let mut shard = self.shard(node).lock();
        let Some(inode) = shard.get_mut(&node) else { return };
        let count = match ticket.way {
            Way::Passthrough if ticket.renewals != inode.renewals => &mut inode.users.left_behind,
            way => inode.users.count(way, ticket.writes),
        };
        *count = count.saturating_sub(1);
        inode.users.executing = inode.users.executing.saturating_sub(u32::from(ticket.executes));
        if inode.users == Users::default() {
            shard.remove(&node);
        }
    }

    pub fn users(&self, node: NodeId) -> Users {
        self.shard(node).lock().get(&node).map(|inode| inode.users).unwrap_or_default()
    }

    fn shard(&self, node: NodeId) -> &Mutex<FxHashMap<NodeId, Inode>> {
        &self.shards[node.0 as usize % SHARDS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const NODE: NodeId = NodeId(7);

    fn fuse(access: Access, immutable: bool) -> Wish {
        Wish { door: Door::Fuse, access, immutable, executes: false }
    }

    fn channel(access: Access) -> Wish {
        Wish { door: Door::Channel, access, immutable: false, executes: false }
    }

    /// What the kernel allows on one of its inodes: `fs/fuse/iomode.c`.
    fn kernel_allows(users: &Users, way: Way) -> bool {
        match way {
            Way::Passthrough => users.cached + users.kernel == 0,
            Way::Cached | Way::Kernel | Way::Direct => users.passthrough == 0,
            Way::Window => true,
        }
    }

    fn wishes() -> Vec<Wish> {
        let mut all = Vec::new();
        for door in [Door::Fuse, Door::Channel] {
            for access in [Access::Read, Access::WriteOnly, Access::ReadWrite] {
                // What is opened for writing does not lie in an immutable file any more.
                let choices = if access.writes() { &[false][..] } else { &[false, true] };
                all.extend(choices.iter().map(|&immutable| Wish {
                    door,
                    access,
                    immutable,
                    executes: false,
                }));
            }
        }
        all
    }

    /// Every order of up to six opens and releases: never what the kernel would refuse, never two truths at once.
    #[test]
    fn every_order_of_opens_keeps_one_mode() {
        type State = (Users, Vec<Way>);
        let mut seen: HashSet<String> = HashSet::new();
        let mut states: Vec<State> = vec![(Users::default(), Vec::new())];
        for _ in 0..6 {
            let mut next: Vec<State> = Vec::new();
            for (users, open) in &states {
                for wish in wishes() {
                    let mut after = *users;
                    let mut ways = open.clone();
                    match users.decide(wish) {
                        Decision::Open(way) => {
                            assert!(kernel_allows(users, way), "{users:?} {wish:?} {way:?}");
                            *after.count(way, wish.access.writes()) += 1;
                            ways.push(way);
                        }
                        Decision::Renew => {
                            assert!(wish.door == Door::Fuse && users.passthrough > 0);
                            after.left_behind += std::mem::take(&mut after.passthrough);
                            assert_ne!(after.decide(wish), Decision::Renew);
                        }
                        Decision::ThroughKernel => {
                            assert!(wish.door == Door::Channel && users.mode() == Some(Mode::Kernel));
                        }
                    }
                    let writer_through_kernel = wish.door == Door::Fuse && wish.access == Access::ReadWrite;
                    if writer_through_kernel && users.passthrough == 0 {
                        assert_eq!(after.mode(), Some(Mode::Kernel));
                    }
                    next.push((after, ways));
                }
                for (place, way) in open.iter().enumerate() {
                    let mut after = *users;
                    let mut ways = open.clone();
                    ways.remove(place);
                    let count = match way {
                        Way::Passthrough if after.passthrough == 0 => &mut after.left_behind,
                        Way::Window if after.channel_readers == 0 => &mut after.channel_writers,
                        way => after.count(*way, false),
                    };
                    *count = count.saturating_sub(1);
                    next.push((after, ways));
                }
            }
            next.retain(|state| seen.insert(format!("{state:?}")));
            states = next;
        }
        assert!(seen.len() > 500);
    }

    #[test]
    fn the_table() {
        use Access::*;
        use Decision::*;
        let open = |before: &[Wish], last: Wish| {
            let modes = Modes::default();
            for wish in before {
                assert!(modes.open(NODE, *wish).1.is_some());
            }
            (modes.open(NODE, last).0, modes.users(NODE).mode())
        };
        let image = fuse(Read, true);
        let runs = Wish { executes: true, ..fuse(Read, false) };
        let cases: &[(&[Wish], Wish, Decision, Mode)] = &[
            (&[], image, Open(Way::Passthrough), Mode::Immutable),
            (&[image], image, Open(Way::Passthrough), Mode::Immutable),
            (&[image], fuse(ReadWrite, false), Renew, Mode::Immutable),
            (&[image], fuse(WriteOnly, false), Renew, Mode::Immutable),
            (&[image], fuse(Read, false), Renew, Mode::Immutable),
            (&[image], channel(Read), Open(Way::Window), Mode::Immutable),
            (&[image], channel(ReadWrite), Open(Way::Window), Mode::Immutable),
            (&[fuse(Read, false)], image, Open(Way::Cached), Mode::Window),
            (&[fuse(WriteOnly, false)], image, Open(Way::Cached), Mode::Kernel),
            (&[fuse(WriteOnly, false)], fuse(ReadWrite, false), Open(Way::Kernel), Mode::Kernel),
            (&[fuse(WriteOnly, false)], channel(Read), ThroughKernel, Mode::Kernel),
            (&[channel(Read)], fuse(WriteOnly, false), Open(Way::Direct), Mode::Window),
            (&[channel(Read)], fuse(ReadWrite, false), Open(Way::Kernel), Mode::Kernel),
            (&[channel(ReadWrite)], fuse(Read, false), Open(Way::Direct), Mode::Window),
            (&[channel(ReadWrite)], image, Open(Way::Direct), Mode::Window),
            (&[channel(Read)], fuse(Read, false), Open(Way::Cached), Mode::Window),
            (&[runs], channel(Read), Open(Way::Window), Mode::Window),
            (&[runs], channel(ReadWrite), ThroughKernel, Mode::Window),
        ];
        for (before, last, decision, mode) in cases {
            assert_eq!(open(before, *last), (*decision, Some(*mode)), "{before:?} {last:?}");
        }
    }

    #[test]
    fn what_was_opened_before_a_renewal_is_counted_apart() {
        let modes = Modes::default();
        let old = modes.open(NODE, fuse(Access::Read, true)).1.unwrap();
        assert_eq!(modes.open(NODE, fuse(Access::ReadWrite, false)), (Decision::Renew, None));
        modes.renew(NODE);
        let writer = modes.open(NODE, fuse(Access::ReadWrite, false)).1.unwrap();
        assert_eq!((modes.users(NODE).left_behind, modes.users(NODE).kernel), (1, 1));
        modes.release(NODE, old);
        assert_eq!(modes.users(NODE), Users { kernel: 1, ..Users::default() });
        modes.release(NODE, writer);
        assert_eq!(modes.users(NODE).mode(), None);
        assert!(modes.shards.iter().all(|shard| shard.lock().is_empty()));
    }

    #[test]
    fn a_program_that_ended_may_be_written() {
        let modes = Modes::default();
        let runs = Wish { executes: true, ..fuse(Access::Read, false) };
        let running = modes.open(NODE, runs).1.unwrap();
        let reads = modes.open(NODE, fuse(Access::Read, false)).1.unwrap();
        modes.release(NODE, running);
        assert_eq!(modes.open(NODE, channel(Access::WriteOnly)).0, Decision::Open(Way::Window));
        modes.release(NODE, reads);
        assert_eq!(modes.users(NODE).executing, 0);
    }

    #[test]
    fn channels_hear_who_joins_them() {
        #[derive(Default)]
        struct Heard(Mutex<Vec<Mode>>);
        impl Watcher for Heard {
            fn joined(&self, node: NodeId, mode: Mode, _users: Users) {
                assert_eq!(node, NODE);
                self.0.lock().push(mode);
            }
        }
        let modes = Modes::default();
        let heard = Arc::new(Heard::default());
        let watcher: Weak<dyn Watcher> = Arc::downgrade(&(heard.clone() as Arc<dyn Watcher>));
        assert!(modes.watch(watcher));
        for wish in [fuse(Access::Read, false), channel(Access::Read), channel(Access::ReadWrite)] {
            modes.open(NODE, wish);
        }
        modes.open(NODE, fuse(Access::ReadWrite, false));
        modes.open(NODE, channel(Access::Read));
        assert_eq!(*heard.0.lock(), [Mode::Window, Mode::Kernel]);
    }
}
