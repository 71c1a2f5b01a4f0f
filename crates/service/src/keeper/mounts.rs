//! How the keeper mounts a stack: which worker serves it, through which door, where it is shown.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use log::{info, warn};
use polytropo_libservices::stack::{DirCoherence, Layer, StackDocument};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::child::{Child, Served, Watcher};
use super::mounting::{self, Detach, Identity, Unattached};
use super::orders::{Keeper, Watching};
use super::passing;
use super::recovery::Kept;
use super::roots::{self, Obstacle, Root};
use super::table::{self, Door};
use crate::control::{Answer, Refusal};
use crate::held;
use crate::isolation::ids::Ids;
use crate::state::{self, StateReader};

/// Bound on one stack document; the worker has the same.
pub const DOCUMENT_MAX_BYTES: usize = 4 << 20;

/// Nodes that one worker may give numbers to, and as many open files.
const NUMBERS_EACH_LOG2: u32 = 40;

const DOOR_THREADS_MIN: usize = 4;
const DOOR_THREADS_MAX: usize = 16;

/// Where a stack is to be shown.
struct Target<'a> {
    mountpoint: &'a Path,
    place: OwnedFd,
    /// Where that was when it was opened.
    path: PathBuf,
    read_only: bool,
}

impl Target<'_> {
    fn show(&self, mount: Unattached) -> rustix::io::Result<Identity> {
        mount.set_read_only(self.read_only)?;
        let identity = mount.attach(&self.place)?;
        // Whoever gave the order may have been killed since, and another command may be removing the place.
        let now = mounting::path_of(&self.place)?;
        if now != self.path {
            mounting::unmount(&now, Detach::Lazily)?;
            return Err(Errno::NOENT);
        }
        Ok(identity)
    }
}

impl Keeper {
    pub(super) fn usual_ids(&self) -> Result<Ids, Refusal> {
        let (base, count) = (self.config.uid_base, self.config.uid_count);
        // Idmapped mounts take rights over the whole machine.
        if self.config.rootless { self.same_ids() } else { Ok(Ids::Shifted { base, count }) }
    }

    fn same_ids(&self) -> Result<Ids, Refusal> {
        Ids::same(self.config.uid_count)
            .map_err(|error| Refusal::new(format!("the keeper's own ids cannot be read: {error}")))
    }

    pub(super) fn living_worker(&self, ids: Ids) -> Result<Arc<Child>, Refusal> {
        let mut workers = self.workers.lock();
        workers.retain(|worker| worker.is_alive());
        if let Some(living) = workers.iter().find(|worker| worker.ids() == ids) {
            return Ok(living.clone());
        }
        let watcher: Arc<dyn Watcher> = Arc::new(Watching(self.me.clone()));
        let (copies, problem) =
            crate::copies::read(self.config.copy_engine, self.config.tuning_dir.as_deref());
        if let Some(problem) = problem {
            warn!("{problem}");
        }
        // What one gave out the kernel may still know when another takes over.
        let first_number = self.workers_started.fetch_add(1, SeqCst) << NUMBERS_EACH_LOG2;
        let transport = self.config.fuse_transport;
        let started = Child::start(ids, (copies, first_number), transport, watcher.clone())?;
        started.listen(watcher)?;
        workers.push(started.clone());
        Ok(started)
    }

    /// A worker that can serve `roots`, and their copies for it.
    pub(super) fn worker_for(&self, roots: &[Root]) -> Result<(Arc<Child>, Vec<OwnedFd>), Refusal> {
        let ids = self.usual_ids()?;
        let worker = self.living_worker(ids)?;
        let namespace = match ids {
            Ids::Shifted { .. } => worker.namespace(),
            Ids::Same { .. } => None,
        };
        match roots::hand_over(roots, namespace) {
            Ok(copies) => return Ok((worker, copies)),
            Err(Obstacle::Refused(refusal)) => return Err(refusal),
            Err(Obstacle::NotMappable(sentence)) => {
                info!("{sentence}; a worker with the host's own ids serves it");
            }
        }
        let worker = self.living_worker(self.same_ids()?)?;
        match roots::hand_over(roots, None) {
            Ok(copies) => Ok((worker, copies)),
            Err(Obstacle::Refused(refusal)) => Err(refusal),
            Err(Obstacle::NotMappable(sentence)) => Err(Refusal::new(sentence)),
        }
    }

    pub(super) fn mount(&self, stack: &Value, mountpoint: &Path) -> Answer {
        let text = stack.to_string();
        let document = StackDocument::parse(&text)
            .map_err(|error| Refusal::with_errno(Errno::INVAL, error.to_string()))?;
        let (mut document, read_only) = writable_form(document);
        // Not a part of what is served: one superblock for all who want the same, or they would not see each other's writes.
        let channel_writes = document.channel_writes.take().unwrap_or(self.config.channel_writes);
        let text = document.to_json();
        if text.len() > DOCUMENT_MAX_BYTES {
            let sentence = format!("the stack document is longer than {DOCUMENT_MAX_BYTES} bytes");
            return Err(Refusal::with_errno(Errno::INVAL, sentence));
        }
        // Opened before the lock is taken: a slow filesystem holds up this order alone.
        let roots = Arc::new(roots::open_all(&document)?);
        let place = mounting::open_mountpoint(mountpoint)?;
        let path = mounting::path_of(&place)
            .map_err(|errno| Refusal::of(errno, format!("{} cannot be mounted", mountpoint.display())))?;
        let _turn = self.take_turn()?;
        let own: Vec<_> = self.table.lock().doors.values().map(|door| door.device).collect();
        roots::refuse_own(&roots, &own)?;
        let target = Target { mountpoint, place, path, read_only };
        let number = match self.mount_again(&text, &target)? {
            Some(number) => number,
            None => self.mount_anew(&document, text, channel_writes, &roots, &target)?,
        };
        Ok(json!({ "mount": number }))
    }

    /// Mounts the superblock that serves the same document, if there is one.
    fn mount_again(&self, text: &str, target: &Target<'_>) -> Result<Option<u64>, Refusal> {
        let lines = table::kernel_table().unwrap_or_default();
        let Some((door, device, present)) = self.table.lock().same_stack(text, &lines) else {
            return Ok(None);
        };
        let identity = match Unattached::clone_of(&present, device).and_then(|copy| target.show(copy)) {
            Ok(identity) => identity,
            Err(errno) => {
                info!("{} is not shared but served anew: {errno}", present.display());
                return Ok(None);
            }
        };
        let number = self.table.lock().add_mount(door, target.mountpoint, identity);
        info!("mount {number}: {} shows the same as {}", target.mountpoint.display(), present.display());
        Ok(Some(number))
    }

    fn mount_anew(
        &self,
        document: &StackDocument,
        text: String,
        channel_writes: bool,
        roots: &Arc<Vec<Root>>,
        target: &Target<'_>,
    ) -> Result<u64, Refusal> {
        // A stack that is still in use somewhere is served once more by the same worker, under the same locks.
        let same = self.table.lock().locks_of_same(&text);
        let (locks, channel_writes) = match same {
            Some(same) => same,
            None => (Arc::new(roots::lock(roots)?), channel_writes),
        };
        let (worker, copies) = self.worker_for(roots)?;
        let devices = self.devices()?;
        let shown = target.mountpoint.display();
        let cannot = |errno| Refusal::of(errno, format!("{shown} cannot be mounted"));
        let source = self.config.tenant.as_deref().unwrap_or("polytropo");
        let superblock = Unattached::make(&devices[0], source).map_err(cannot)?;
        let identity = superblock.identity().map_err(cannot)?;
        // Only makes writing faster, and is not given to ordinary users.
        if let Err(error) = crate::doors::fuse::raise_dirty_share(identity.device) {
            log::debug!("{shown} keeps the kernel's limit of dirty memory: {error}");
        }
        let kind = kind_of(document);
        let sealed = sealed_copy(text.as_bytes()).map_err(cannot)?;
        let length = text.len();
        let (door, state) = {
            let mut table = self.table.lock();
            let door = table.next_door();
            let state = state::make(door).and_then(|area| Ok((Arc::new(StateReader::new(&area)?), area)));
            let (reader, area) = state.map_err(cannot)?;
            let held = devices.iter().map(OwnedFd::try_clone).collect::<Result<Vec<_>, _>>();
            let held = held.and_then(|devices| Ok((devices, area.try_clone()?)));
            let kept = held.map(|(devices, state)| Arc::new(Kept { devices, roots: roots.clone(), state }));
            let kept = kept.inspect_err(|error| warn!("door {door} cannot be taken over: {error}")).ok();
            let made = Door {
                document: text,
                kind,
                device: identity.device,
                worker: worker.clone(),
                ended: false,
                locks,
                channel_writes,
                state: reader,
                kept,
                incarnation: 0,
            };
            table.doors.insert(door, made);
            (door, area)
        };
        let passing = match self.passes_through(document) {
            true => pass_through(door, &devices[0], &worker, roots.iter().zip(&copies)),
            false => None,
        };
        let held = held::make(door).map_err(cannot)?;
        let attached = worker
            .window_place(door, self.config.cache_bytes, channel_writes)
            .and_then(|windows| {
                let what = Served { door, state: &state, held: &held, incarnation: 0, blame: 0 };
                worker.serve(&what, (&sealed, length), &windows, passing.as_ref(), &devices, &copies)
            })
            .and_then(|()| target.show(superblock).map_err(cannot));
        let mut table = self.table.lock();
        match attached {
            Ok(identity) => {
                let number = table.add_mount(door, target.mountpoint, identity);
                info!("mount {number}: {shown} shows a {kind}, door {door}");
                Ok(number)
            }
            Err(refusal) => {
                // Its superblock is gone with the last descriptor of it; the worker ends the door by itself.
                table.door_failed(door);
                Err(refusal)
            }
        }
    }

    /// Whether the kernel is to read files of immutable layers itself.
    fn passes_through(&self, document: &StackDocument) -> bool {
        document.passthrough == Some(true) && !self.config.rootless && passing::may_register()
    }

    /// A FUSE device for a new mount, and more for the threads that serve it.
    fn devices(&self) -> Result<Vec<OwnedFd>, Refusal> {
        if let Some(given) = self.given_devices.lock().pop() {
            return Ok(vec![given]);
        }
        (0..door_threads()).map(|_| mounting::open_device()).collect()
    }
}

/// The door's way to have files passed through. None where nothing lies in an immutable layer, or where it cannot be had; the
/// door then does without.
fn pass_through<'a>(
    door: u64,
    device: &OwnedFd,
    worker: &Arc<Child>,
    mut roots: impl Iterator<Item = (&'a Root, &'a OwnedFd)>,
) -> Option<OwnedFd> {
    let any = worker.may_pass(|mounts| {
        let immutable = roots.by_ref().filter(|(root, _)| root.is_immutable());
        immutable.fold(false, |any, (_, copy)| mounts.add(copy) || any)
    });
    if !any {
        return None;
    }
    let started = device.try_clone().and_then(|device| passing::start(door, device, worker.clone()));
    started.inspect_err(|error| warn!("door {door} passes no files through: {error}")).ok()
}

/// A directory that only this service changes, shown read-only, is the writable one seen through a read-only mount: were
/// it a filesystem of its own, it would not see what the kernel holds back of writes to the other.
fn writable_form(mut document: StackDocument) -> (StackDocument, bool) {
    match &mut document.root {
        Layer::Dir(dir) if dir.read_only && dir.coherence == DirCoherence::Exclusive => {
            dir.read_only = false;
            (document, true)
        }
        _ => (document, false),
    }
}

/// Threads that answer one mount's requests: one a CPU that the tenant may use, so that a request seldom waits for
/// another, and always some, so that slow requests hold up nobody.
fn door_threads() -> usize {
    std::thread::available_parallelism()
        .map_or(DOOR_THREADS_MIN, usize::from)
        .clamp(DOOR_THREADS_MIN, DOOR_THREADS_MAX)
}

fn kind_of(document: &StackDocument) -> &'static str {
    match document.root {
        Layer::Dir(_) => "dir",
        Layer::Union(_) => "union",
        Layer::Fault(_) => "fault",
    }
}

/// A text in memory that nobody can change any more.
pub fn sealed_copy(text: &[u8]) -> rustix::io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let copy = rustix::fs::memfd_create("stack", flags)?;
    let mut written = 0;
    while written < text.len() {
        written += rustix::io::pwrite(&copy, &text[written..], written as u64)?;
    }
    rustix::fs::fcntl_add_seals(
        &copy,
        SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
    )?;
    Ok(copy)
}
