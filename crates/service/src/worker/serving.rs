//! The stacks of a worker and the doors that serve them.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use polytropo_libservices::stack::StackDocument;
use polytropo_libservices::{Caller, DoorId, FsCapabilities, Interner, Libservice, build_with};
use serde_json::{Value, json};

use crate::copies::{Tally, counts_by_name};
use crate::custody::Custodian;
use crate::doors::channel::{
    CHANNEL_DOOR, ChannelDoor, ChannelOptions, ChannelStatistics, Grants, Guard, Peer, Posting, WindowAccess,
};
use crate::doors::fuse::{DoorStatistics, FuseDoor, FuseOptions, Passthrough, RingPool};
use crate::doors::modes::Modes;
use crate::epochs::Epochs;
use crate::held::{self, Held};
use crate::isolation;
use crate::link::{Link, Newcomer, Report};
use crate::passing::{KeepersRegistrar, SIZE_MIN_BYTES};
use crate::slabs::{Slabs, SmallFiles};
use crate::state::{DoorState, Past};
use crate::windows::Store;

/// The keeper refuses longer ones.
const DOCUMENT_MAX_BYTES: usize = 4 << 20;

/// What an hour of load has a service hold beside windows: its threads' buffers, names, tables.
const BESIDE_WINDOWS_BYTES: u64 = 16 << 20;
/// But no more than this part of a cache.
const BESIDE_WINDOWS_SHARE: u64 = 16;

/// The ceiling is one for all that a service holds.
fn for_windows(cache_bytes: u64) -> u64 {
    cache_bytes - BESIDE_WINDOWS_BYTES.min(cache_bytes / BESIDE_WINDOWS_SHARE)
}

/// The doors that are open, by the keeper's numbers.
pub struct Doors {
    link: Arc<Link>,
    stacks: Arc<Stacks>,
    open: OpenDoors,
    /// The windows of all doors.
    store: Option<Arc<Store>>,
    /// Made before the walls were up.
    rings: Option<Arc<RingPool>>,
}

type OpenDoors = Arc<Mutex<Opened>>;

#[derive(Default)]
struct Opened {
    doors: HashMap<u64, Arc<FuseDoor>>,
    /// The channels to the same stacks.
    channels: HashMap<u64, Arc<ChannelDoor>>,
    /// What doors did that have ended.
    past: DoorStatistics,
    past_copies: Tally,
    past_channels: ChannelStatistics,
}

/// The stacks that are alive. A document that is served again while its stack still lives, for programs that kept an
/// unmounted one, gets that stack: two unions must not write to one upper.
#[derive(Default)]
struct Stacks {
    interner: Interner,
    alive: Mutex<HashMap<String, Weak<Epochs>>>,
}

impl Stacks {
    fn get(
        &self,
        document: &StackDocument,
        roots: Vec<OwnedFd>,
        slabs: Option<&Arc<Slabs>>,
    ) -> Result<Arc<Epochs>, String> {
        let mut alive = self.alive.lock();
        alive.retain(|_, stack| stack.strong_count() > 0);
        let text = document.to_json();
        if let Some(stack) = alive.get(&text).and_then(Weak::upgrade) {
            return Ok(stack);
        }
        let stack = build_with(document, roots, &self.interner)
            .map_err(|error| format!("the stack cannot be built: {error}"))?;
        let stack = match slabs {
            Some(slabs) => SmallFiles::over(stack, slabs.clone()),
            None => stack,
        };
        let stack = Epochs::over(stack);
        alive.insert(text, Arc::downgrade(&stack));
        Ok(stack)
    }
}

/// What comes with the order to serve.
pub struct Given {
    /// The document, the tmpfs of windows, the door's directory there as programs see it, the state area, the memory of held writes, the way to have the keeper know of channels, with `passthrough` the way to the keeper for
    /// it, the device, and one more device for each thread but the first.
    pub descriptors: Vec<OwnedFd>,
    pub document_bytes: usize,
    pub cache_bytes: u64,
    pub passthrough: bool,
    /// Programs may write through channels.
    pub channel_writes: bool,
    /// How many workers served the door before.
    pub incarnation: u64,
    pub blame: u64,
}

/// What it takes to open a door.
struct Plan {
    number: u64,
    id: DoorId,
    document: StackDocument,
    roots: Vec<OwnedFd>,
    device: OwnedFd,
    spare_devices: Vec<Arc<OwnedFd>>,
    windows: OwnedFd,
    shown: OwnedFd,
    store: Arc<Store>,
    /// The way to the keeper that registers files with the kernel.
    passthrough: Option<OwnedFd>,
    channel_writes: bool,
    /// Memory for held writes, and the way to the keeper that keeps their files.
    held: OwnedFd,
    /// The way to have it know of channels.
    custody: OwnedFd,
    link: Arc<Link>,
    state: Arc<DoorState>,
    /// What a dead worker has left.
    past: Option<Past>,
    rings: Option<Arc<RingPool>>,
}

impl Doors {
    pub fn new(link: Arc<Link>, rings: Option<Arc<RingPool>>) -> Self {
        Self { rings, link, stacks: Arc::default(), open: Arc::default(), store: None }
    }

    /// Builds a stack and serves it at a FUSE device.
    pub fn serve(&mut self, number: u64, given: Given, roots: Vec<OwnedFd>) -> Result<(), String> {
        let mut descriptors = given.descriptors.into_iter();
        let (Some(document), Some(own), Some(shown)) =
            (descriptors.next(), descriptors.next(), descriptors.next())
        else {
            return Err("the keeper sent no document, or no room for windows".into());
        };
        let (Some(state), Some(held), Some(custody)) =
            (descriptors.next(), descriptors.next(), descriptors.next())
        else {
            return Err("the keeper sent no room for state or held writes, or no way to keep channels".into());
        };
        let passthrough = if given.passthrough { descriptors.next() } else { None };
        let Some(device) = descriptors.next() else {
            return Err("the keeper sent no device".into());
        };
        let document = read_document(document, given.document_bytes)?;
        let id = door_id(number)?;
        let spare_devices = descriptors.map(Arc::new).collect();
        let cache_bytes = given.cache_bytes;
        // One for all doors, which come with the same directory.
        let windows = own.try_clone().map_err(|error| format!("a descriptor cannot be had: {error}"))?;
        let store = self.store.get_or_insert_with(|| {
            Store::new(Some(own).filter(|_| cache_bytes > 0), for_windows(cache_bytes))
        });
        let store = store.clone();
        let channel_writes = given.channel_writes;
        let state = match given.incarnation {
            0 => DoorState::new(state).map(|state| (state, None)),
            successor => {
                DoorState::adopt(state, successor, given.blame).map(|(state, past)| (state, Some(past)))
            }
        };
        let (state, past) = state.map_err(|errno| format!("the state area cannot be used: {errno}"))?;
        let plan = Plan {
            number,
            id,
            document,
            roots,
            device,
            spare_devices,
            windows,
            shown,
            store,
            passthrough,
            channel_writes,
            held,
            custody,
            link: self.link.clone(),
            state,
            past,
            rings: self.rings.clone(),
        };
        let (link, stacks, open) = (self.link.clone(), self.stacks.clone(), self.open.clone());
        let (tell, told) = sync_channel(1);
        // A thread of the door's own, since Landlock confines it, and all that it starts, to this stack.
        let run = move || match plan.open(&stacks) {
            Ok((door, channels)) => {
                let channels = Arc::new(channels);
                {
                    let mut opened = open.lock();
                    opened.doors.insert(number, door.clone());
                    opened.channels.insert(number, channels.clone());
                }
                // The task's thread is there until it has heard of it.
                let _ = tell.send(Ok(()));
                attend(number, door, channels, &link, &open);
            }
            Err(problem) => {
                let _ = tell.send(Err(problem));
            }
        };
        std::thread::Builder::new()
            .name(format!("door-{number}"))
            .spawn(run)
            .map_err(|error| format!("a thread cannot be started: {error}"))?;
        told.recv().unwrap_or_else(|_| Err("the door's thread ended".into()))
    }

    /// Opens a channel for a program. `descriptors`: its socket, the process, its mount table, what is mounted inside.
    pub fn connect(&self, door: u64, newcomer: Newcomer, descriptors: Vec<OwnedFd>) -> Result<(), String> {
        let Ok([socket, process, mounts, covered]) = <[OwnedFd; 4]>::try_from(descriptors) else {
            return Err("the keeper sent other descriptors than a channel takes".into());
        };
        let channels = self.open.lock().channels.get(&door).cloned();
        let channels = channels.ok_or("the door has ended")?;
        let caller = Caller {
            uid: newcomer.uid,
            gid: newcomer.gid,
            groups: newcomer.groups.into(),
            capabilities: FsCapabilities::from_bits_truncate(newcomer.capabilities),
            umask: 0,
            pid: newcomer.pid,
            door: channel_door(door_id(door)?),
        };
        let covered = read_sealed(covered, newcomer.covered_bytes)?;
        let covered = covered.split(|&byte| byte == 0).filter(|path| !path.is_empty());
        channels.connect(Peer {
            caller,
            read_only: newcomer.read_only,
            is_root: newcomer.is_root,
            covered: covered.map(<[u8]>::to_vec).collect(),
            device: newcomer.device,
            mount_id: newcomer.mount_id,
            socket,
            process,
            mounts,
        });
        Ok(())
    }

    /// What one door did, or all that have ended; with the latter the windows of all.
    pub fn statistics(&self, number: Option<u64>) -> Value {
        let counted = match number {
            Some(number) => {
                let (door, channels) = {
                    let opened = self.open.lock();
                    (opened.doors.get(&number).cloned(), opened.channels.get(&number).cloned())
                };
                let copied = channels.as_ref().map(|c| c.copied()).unwrap_or_default();
                let told = door.and_then(|door| serde_json::to_value(door.statistics()).ok());
                let channels = channels.and_then(|c| serde_json::to_value(c.statistics()).ok());
                told.map(|mut told| {
                    told["channels"] = channels.unwrap_or_default();
                    told["copies"] = json!(counts_by_name(&copied));
                    told
                })
            }
            None => {
                let opened = self.open.lock();
                serde_json::to_value(&opened.past).ok().map(|mut told| {
                    told["copies"] = json!(counts_by_name(&opened.past_copies.counts()));
                    told["channels"] = serde_json::to_value(&opened.past_channels).unwrap_or_default();
                    let windows = self.store.as_ref().map(|store| store.budget().statistics());
                    told["windows"] = serde_json::to_value(windows.unwrap_or_default()).unwrap_or_default();
                    let slabs = self.store.as_ref().and_then(|store| store.slabs());
                    let slabs = slabs.map(|slabs| slabs.statistics()).unwrap_or_default();
                    told["slabs"] = serde_json::to_value(slabs).unwrap_or_default();
                    told
                })
            }
        };
        counted.unwrap_or_else(|| json!({}))
    }
}

impl Plan {
    fn open(self, stacks: &Stacks) -> Result<(Arc<FuseDoor>, ChannelDoor), String> {
        let dirs = self.document.dirs();
        let rules = self.roots.iter().zip(&dirs).map(|(root, dir)| (root, dir.read_only));
        let rules = rules.chain([(&self.windows, false)]);
        isolation::landlock::allow_only(rules)
            .map_err(|error| format!("Landlock cannot be set up: {error}"))?;
        let stack = stacks.get(&self.document, self.roots, self.store.slabs())?;
        let passthrough = self.passthrough.map(|socket| Passthrough {
            registrar: Arc::new(KeepersRegistrar::new(socket)),
            size_min_bytes: self.document.passthrough_min_bytes.unwrap_or(SIZE_MIN_BYTES),
        });
        let modes = Modes::new();
        let options = FuseOptions {
            threads: 1 + self.spare_devices.len(),
            spare_devices: self.spare_devices,
            passthrough,
            // What the kernel holds back no channel would see, nor would the kernel see what channels write.
            writeback_cache: !self.channel_writes && self.document.writes_back(),
            stateless_open: !self.channel_writes,
            modes: Some(modes.clone()),
            state: Some(self.state.clone()),
            rings: self.rings,
            ..FuseOptions::default()
        };
        let grants: Arc<Grants> = Arc::default();
        // Where programs write without waiting, the kernel looks at files through a guard.
        let seen: Arc<dyn Libservice> = match self.channel_writes {
            true => Arc::new(Guard::new(stack.clone(), grants.clone())),
            false => stack.clone(),
        };
        let door = match self.past {
            None => FuseDoor::start(self.device, seen, options, self.id),
            Some(past) => FuseDoor::resume(self.device, seen, options, self.id, past),
        };
        let door =
            door.map_err(|error| format!("the FUSE door {} cannot be opened: {error}", self.number))?;
        let place = self.store.place(&format!("door-{}", self.number)).map_err(|error| error.to_string())?;
        let link = self.link.clone();
        // A keeper that is gone keeps nothing.
        let look = move |now| _ = link.send(&Report::Look { now }, &[]);
        let channels = Custodian::new(self.custody, Box::new(look));
        let custodian = Box::new(KeepersCare { link: self.link, door: self.number });
        let held = Held::new(&self.held, stack.clone(), self.store.budget().clone(), custodian)
            .map_err(|errno| format!("the memory of held writes cannot be used: {errno}"))?;
        let channel_options = ChannelOptions {
            modes,
            kernel_tells: self.channel_writes,
            written_through: !self.document.writes_back(),
            windows: WindowAccess { store: self.store, place, shown: Some(self.shown) },
            settle: Some(door.settle()),
            posting: Some(Posting { grants, outdate: door.outdate(), kernel_door: self.id, held }),
            open_table: Some(self.state.opens.clone()),
            custodian: Some(channels),
        };
        let channels = ChannelDoor::start(stack, channel_options, channel_door(self.id))
            .map_err(|error| format!("the channel door {} cannot be opened: {error}", self.number))?;
        Ok((Arc::new(door), channels))
    }
}

/// Waits for a door's end and tells the keeper.
fn attend(number: u64, door: Arc<FuseDoor>, channels: Arc<ChannelDoor>, link: &Link, open: &OpenDoors) {
    door.wait_ended();
    let mut opened = open.lock();
    opened.doors.remove(&number);
    opened.channels.remove(&number);
    opened.past.add(&door.statistics());
    opened.past_copies.add_past(&channels.copied());
    drop(opened);
    // The stack's last writes are done before the keeper may hear of it. Somebody may be about to connect a program.
    channels.stop();
    let mut did = channels.statistics();
    did.threads = 0;
    open.lock().past_channels.add(&did);
    drop(channels);
    drop(door);
    // A keeper that is gone needs no report.
    let _ = link.send(&Report::Ended { door: number, problem: None }, &[]);
}

/// Files of which bytes are held are in the keeper's care.
struct KeepersCare {
    link: Arc<Link>,
    door: u64,
}

impl held::Custodian for KeepersCare {
    fn keep(&self, key: u64, file: BorrowedFd<'_>) -> rustix::io::Result<()> {
        self.link.send(&Report::Holds { door: self.door, key }, &[file])
    }

    fn let_go(&self, key: u64) {
        // A keeper that is gone keeps nothing.
        let _ = self.link.send(&Report::LetsGo { door: self.door, key }, &[]);
    }
}

/// The channels of a door have a number of their own: each hears of what the other changes.
fn channel_door(id: DoorId) -> DoorId {
    DoorId(id.0 | CHANNEL_DOOR)
}

fn door_id(number: u64) -> Result<DoorId, String> {
    let fits = u32::try_from(number).ok().filter(|number| number >> 31 == 0);
    fits.map(DoorId).ok_or_else(|| "too many doors were opened".into())
}

fn read_document(descriptor: OwnedFd, bytes: usize) -> Result<StackDocument, String> {
    let text = read_sealed(descriptor, bytes)?;
    let text = String::from_utf8(text).map_err(|_| "the stack document is not UTF-8".to_owned())?;
    StackDocument::parse(&text).map_err(|error| error.to_string())
}

fn read_sealed(descriptor: OwnedFd, bytes: usize) -> Result<Vec<u8>, String> {
    if bytes > DOCUMENT_MAX_BYTES {
        return Err("what the keeper sent is too long".into());
    }
    let mut text = vec![0; bytes];
    File::from(descriptor)
        .read_exact_at(&mut text, 0)
        .map_err(|error| format!("what the keeper sent cannot be read: {error}"))?;
    Ok(text)
}
