//! What the keeper does when it is told to.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, UNIX_EPOCH};

use log::{info, warn};
use parking_lot::{Condvar, Mutex, MutexGuard};
use polytropo_libservices::stack::{Layer, StackDocument};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::Config;
use super::child::{Child, Watcher};
use super::mounting::{self, Detach, Unattached};
use super::roots::{self, Obstacle, Root};
use super::table::{self, Door, Mount, Table};
use crate::control::{Answer, Order, Orders, Refusal};
use crate::isolation::ids::Ids;

/// After the last unmount the door is given so long to end, so that all is written before the order is answered.
const DOOR_END_TIMEOUT: Duration = Duration::from_secs(2);
/// Bound on one stack document; the worker has the same.
pub const DOCUMENT_MAX_BYTES: usize = 4 << 20;

const DOOR_THREADS_MIN: usize = 4;
const DOOR_THREADS_MAX: usize = 16;

/// The keeper's state, shared by the threads of its clients.
pub struct Keeper {
    me: Weak<Keeper>,
    config: Config,
    started: Instant,
    /// Held while mounts and workers are made and ended: one order at a time. `table` is never held for long.
    ordering: Mutex<()>,
    table: Mutex<Table>,
    door_ends: Condvar,
    /// The living workers, one for each way to map ids that was needed.
    workers: Mutex<Vec<Arc<Child>>>,
    /// Devices that were opened for this keeper, where it may not open them.
    given_devices: Mutex<Vec<OwnedFd>>,
    wake: OwnedFd,
    stopped: AtomicBool,
}

impl Keeper {
    pub fn start(mut config: Config) -> Result<Arc<Self>, Refusal> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags)
            .map_err(|errno| Refusal::of(errno, "an event descriptor cannot be made"))?;
        let given_devices = Mutex::new(std::mem::take(&mut config.devices));
        let keeper = Arc::new_cyclic(|me: &Weak<Keeper>| Self {
            me: me.clone(),
            config,
            started: Instant::now(),
            ordering: Mutex::new(()),
            table: Mutex::new(Table::new()),
            door_ends: Condvar::new(),
            workers: Mutex::default(),
            given_devices,
            wake,
            stopped: AtomicBool::new(false),
        });
        keeper.living_worker(keeper.usual_ids()?)?;
        Ok(keeper)
    }

    pub fn run_dir(&self) -> &Path {
        &self.config.run_dir
    }

    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub fn clear_wake(&self) {
        // EAGAIN: there was nothing to clear.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    fn wake(&self) {
        // EAGAIN: it is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }

    /// Waits for its turn to change something. Refused when the keeper is to end.
    fn take_turn(&self) -> Result<MutexGuard<'_, ()>, Refusal> {
        let turn = self.ordering.lock();
        if self.is_stopped() {
            return Err(Refusal::with_errno(Errno::CONNABORTED, "the service is ending"));
        }
        Ok(turn)
    }

    /// Decides to end if there has been nothing to do for `timeout`. No order can slip in between.
    pub fn stop_if_idle(&self, timeout: Duration) -> bool {
        let Some(_turn) = self.ordering.try_lock() else { return false };
        let idle = self.idle_time().is_some_and(|idle| idle >= timeout);
        if idle {
            self.stopped.store(true, SeqCst);
        }
        idle
    }

    /// How long there has been nothing to do; None while there is.
    pub fn idle_time(&self) -> Option<Duration> {
        self.table.lock().idle_since.map(|since| since.elapsed())
    }

    /// The kernel's mount table changed: some mounts may have gone without an order.
    pub fn look_at_mounts(&self) {
        let Some(_turn) = self.ordering.try_lock_for(Duration::from_millis(200)) else {
            return self.wake();
        };
        let Some(lines) = table::kernel_table() else { return };
        let vanished = self.table.lock().forget_vanished(&lines);
        if vanished > 0 {
            info!("{vanished} mounts were unmounted by others");
        }
    }

    /// Takes everything down, at once.
    pub fn end(&self) {
        self.stopped.store(true, SeqCst);
        let _turn = self.ordering.lock();
        for mount in self.table.lock().mounts.values().rev() {
            if let Err(errno) = self.unmount_if_on_top(mount, Detach::Lazily) {
                warn!("{} stays mounted: {errno}", mount.mountpoint.display());
            }
        }
        for worker in self.workers.lock().drain(..) {
            worker.kill();
        }
    }

    fn usual_ids(&self) -> Result<Ids, Refusal> {
        let (base, count) = (self.config.uid_base, self.config.uid_count);
        // Idmapped mounts take rights over the whole machine.
        if self.config.rootless { self.same_ids() } else { Ok(Ids::Shifted { base, count }) }
    }

    fn same_ids(&self) -> Result<Ids, Refusal> {
        Ids::same(self.config.uid_count)
            .map_err(|error| Refusal::new(format!("the keeper's own ids cannot be read: {error}")))
    }

    fn living_worker(&self, ids: Ids) -> Result<Arc<Child>, Refusal> {
        let mut workers = self.workers.lock();
        workers.retain(|worker| worker.is_alive());
        if let Some(living) = workers.iter().find(|worker| worker.ids() == ids) {
            return Ok(living.clone());
        }
        let watcher: Arc<dyn Watcher> = Arc::new(Watching(self.me.clone()));
        let started = Child::start(ids, watcher.clone())?;
        started.listen(watcher)?;
        workers.push(started.clone());
        Ok(started)
    }

    /// A worker that can serve `roots`, and their copies for it.
    fn worker_for(&self, roots: &[Root]) -> Result<(Arc<Child>, Vec<OwnedFd>), Refusal> {
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

    fn mount(&self, stack: &Value, mountpoint: &Path) -> Answer {
        let text = stack.to_string();
        let document = StackDocument::parse(&text)
            .map_err(|error| Refusal::with_errno(Errno::INVAL, error.to_string()))?;
        let text = document.to_json();
        if text.len() > DOCUMENT_MAX_BYTES {
            let sentence = format!("the stack document is longer than {DOCUMENT_MAX_BYTES} bytes");
            return Err(Refusal::with_errno(Errno::INVAL, sentence));
        }
        // Opened before the lock is taken: a slow filesystem holds up this order alone.
        let roots = roots::open_all(&document)?;
        let place = mounting::open_mountpoint(mountpoint)?;
        let _turn = self.take_turn()?;
        let number = match self.mount_again(&text, &place, mountpoint)? {
            Some(number) => number,
            None => self.mount_anew(&document, text, &roots, &place, mountpoint)?,
        };
        Ok(json!({ "mount": number }))
    }

    /// Mounts the superblock that serves the same document, if there is one.
    fn mount_again(&self, text: &str, place: &OwnedFd, mountpoint: &Path) -> Result<Option<u64>, Refusal> {
        let Some((door, device, present)) = self.table.lock().same_stack(text) else { return Ok(None) };
        let identity = match Unattached::clone_of(&present, device).and_then(|copy| copy.attach(place)) {
            Ok(identity) => identity,
            Err(errno) => {
                info!("{} is not shared but served anew: {errno}", present.display());
                return Ok(None);
            }
        };
        let number = self.table.lock().add_mount(door, mountpoint, identity);
        info!("mount {number}: {} shows the same as {}", mountpoint.display(), present.display());
        Ok(Some(number))
    }

    fn mount_anew(
        &self,
        document: &StackDocument,
        text: String,
        roots: &[Root],
        place: &OwnedFd,
        mountpoint: &Path,
    ) -> Result<u64, Refusal> {
        // A stack that is still in use somewhere is served once more by the same worker, under the same locks.
        let same = self.table.lock().locks_of_same(&text);
        let locks = same.map_or_else(|| roots::lock_uppers(roots).map(Arc::new), Ok)?;
        let (worker, roots) = self.worker_for(roots)?;
        let devices = self.devices()?;
        let shown = mountpoint.display();
        let cannot = |errno| Refusal::of(errno, format!("{shown} cannot be mounted"));
        let source = self.config.tenant.as_deref().unwrap_or("polytropo");
        let superblock = Unattached::make(&devices[0], source).map_err(cannot)?;
        let identity = superblock.identity().map_err(cannot)?;
        // Only makes writing faster, and is not given to ordinary users.
        if let Err(error) = crate::doors::fuse::raise_dirty_share(identity.device) {
            log::debug!("{shown} keeps the kernel's limit of dirty memory: {error}");
        }
        let kind = kind_of(document);
        let sealed = sealed_copy(&text).map_err(cannot)?;
        let length = text.len();
        let door = {
            let mut table = self.table.lock();
            let door = table.next_door();
            let made = Door {
                document: text,
                kind,
                device: identity.device,
                worker: worker.clone(),
                ended: false,
                locks,
            };
            table.doors.insert(door, made);
            door
        };
        let attached = worker
            .serve(door, &sealed, length, &devices, &roots)
            .and_then(|()| superblock.attach(place).map_err(cannot));
        let mut table = self.table.lock();
        match attached {
            Ok(identity) => {
                let number = table.add_mount(door, mountpoint, identity);
                info!("mount {number}: {shown} shows a {kind}, door {door}");
                Ok(number)
            }
            Err(refusal) => {
                // Its superblock is gone with the last descriptor of it; the worker ends the door by itself.
                table.doors.remove(&door);
                table.settle();
                Err(refusal)
            }
        }
    }

    /// A FUSE device for a new mount, and more for the threads that serve it.
    fn devices(&self) -> Result<Vec<OwnedFd>, Refusal> {
        if let Some(given) = self.given_devices.lock().pop() {
            return Ok(vec![given]);
        }
        (0..door_threads()).map(|_| mounting::open_device()).collect()
    }

    fn unmount(&self, mountpoint: &Path, lazy: bool) -> Answer {
        let _turn = self.take_turn()?;
        let shown = mountpoint.display();
        let Some((number, mount)) = self.table.lock().mount_at(mountpoint) else {
            let sentence = format!("this service has nothing mounted at {shown}");
            return Err(Refusal::with_errno(Errno::INVAL, sentence));
        };
        let dead = self.table.lock().is_dead(&mount);
        // Programs that use a dead mount get errors whether it is there or not.
        let how = if lazy || dead { Detach::Lazily } else { Detach::WhenUnused };
        self.unmount_if_on_top(&mount, how).map_err(|errno| in_use_or(errno, mountpoint))?;
        self.unmounted(number, &mount, !lazy && !dead);
        Ok(json!({}))
    }

    fn unmount_if_on_top(&self, mount: &Mount, how: Detach) -> rustix::io::Result<()> {
        let lines = table::kernel_table().ok_or(Errno::IO)?;
        if !lines.iter().any(|line| line.mount_id == mount.mount_id && line.ours) {
            return Ok(()); // somebody was faster
        }
        if !table::is_on_top(mount, &lines) {
            return Err(Errno::BUSY);
        }
        mounting::unmount(&mount.mountpoint, how)
    }

    /// Takes a mount out of the table; with `wait`, until its door has ended if it was the door's last.
    fn unmounted(&self, number: u64, mount: &Mount, wait: bool) {
        let mut table = self.table.lock();
        table.mounts.remove(&number);
        table.settle();
        info!("mount {number}: {} is unmounted", mount.mountpoint.display());
        let deadline = Instant::now() + DOOR_END_TIMEOUT;
        while wait && !table.has_mounts_of(mount.door) && table.doors.contains_key(&mount.door) {
            if self.door_ends.wait_until(&mut table, deadline).timed_out() {
                info!("door {} is still in use, in another mount namespace", mount.door);
                break;
            }
        }
    }

    fn list(&self, stacks: bool) -> Answer {
        let table = self.table.lock();
        let mounts: Vec<_> = table
            .mounts
            .iter()
            .map(|(number, mount)| {
                let since = mount.since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
                let mut shown = json!({
                    "mount": number,
                    "mountpoint": mount.mountpoint,
                    "kind": table.doors.get(&mount.door).map_or("", |door| door.kind),
                    "since_unix_s": since,
                    "dead": table.is_dead(mount),
                });
                if stacks && let Some(door) = table.doors.get(&mount.door) {
                    // What was read once reads again.
                    shown["stack"] = serde_json::from_str(&door.document).unwrap_or_default();
                }
                shown
            })
            .collect();
        Ok(json!({ "mounts": mounts }))
    }

    fn stats(&self) -> Answer {
        // Asked with no lock held: a worker that is slow to answer holds up this order alone.
        let doors: Vec<_> = {
            let table = self.table.lock();
            table.doors.iter().map(|(id, door)| (*id, door.worker.clone())).collect()
        };
        // A door that ended meanwhile, or with its worker, has nothing to tell.
        let counters: BTreeMap<_, _> = doors
            .into_iter()
            .map(|(id, worker)| (id, worker.statistics(id).unwrap_or_else(|_| json!({}))))
            .collect();
        let mounts: Vec<_> = {
            let table = self.table.lock();
            let describe = |(number, mount): (&u64, &Mount)| {
                let mut one = json!({
                    "mount": number,
                    "mountpoint": mount.mountpoint,
                    "dead": table.is_dead(mount),
                });
                if let (Value::Object(one), Some(Value::Object(counters))) =
                    (&mut one, counters.get(&mount.door))
                {
                    one.extend(counters.clone());
                }
                one
            };
            table.mounts.iter().map(describe).collect()
        };
        let worker = self.worker_pid();
        Ok(json!({
            "uptime_s": self.started.elapsed().as_secs_f64(),
            "worker_pid": worker,
            "keeper_pid": std::process::id(),
            "rss_bytes": worker.map_or(0, resident_bytes),
            "mounts": mounts,
        }))
    }

    fn worker_pid(&self) -> Option<u32> {
        self.workers.lock().iter().find(|worker| worker.is_alive()).map(|worker| worker.pid())
    }

    fn status(&self) -> Answer {
        Ok(json!({
            "keeper_pid": std::process::id(),
            "worker_pid": self.worker_pid(),
            "version": env!("CARGO_PKG_VERSION"),
            "uid_base": self.config.uid_base,
        }))
    }

    fn stop(&self, force: bool) -> Answer {
        let _turn = self.take_turn()?;
        let mounts: Vec<_> = self.table.lock().mounts.iter().rev().map(|(n, m)| (*n, m.clone())).collect();
        for (number, mount) in mounts {
            let dead = self.table.lock().is_dead(&mount);
            let how = if force || dead { Detach::Lazily } else { Detach::WhenUnused };
            match self.unmount_if_on_top(&mount, how) {
                Ok(()) => self.unmounted(number, &mount, !force && !dead),
                Err(errno) if force => warn!("{} stays mounted: {errno}", mount.mountpoint.display()),
                Err(errno) => return Err(in_use_or(errno, &mount.mountpoint)),
            }
        }
        if !force && self.table.lock().doors.values().any(|door| door.is_alive()) {
            let sentence = "a mount of this service is in use in another mount namespace, such as a container's; \
                            end what runs there, or use force";
            return Err(Refusal::with_errno(Errno::BUSY, sentence));
        }
        self.stopped.store(true, SeqCst);
        self.wake();
        Ok(json!({}))
    }
}

impl Orders for Keeper {
    fn carry_out(&self, order: Order) -> Answer {
        match order {
            Order::Mount { stack, mountpoint } => self.mount(&stack, &mountpoint),
            Order::Unmount { mountpoint, lazy } => self.unmount(&mountpoint, lazy),
            Order::List { stacks } => self.list(stacks),
            Order::Stats {} => self.stats(),
            Order::Status {} => self.status(),
            Order::Stop { force } => self.stop(force),
        }
    }

    fn is_ending(&self) -> bool {
        self.is_stopped()
    }
}

struct Watching(Weak<Keeper>);

impl Watcher for Watching {
    fn door_ended(&self, door: u64) {
        let Some(keeper) = self.0.upgrade() else { return };
        keeper.table.lock().door_ended(door);
        keeper.door_ends.notify_all();
        keeper.wake();
    }

    fn worker_ended(&self) {
        let Some(keeper) = self.0.upgrade() else { return };
        keeper.table.lock().settle();
        keeper.door_ends.notify_all();
        keeper.wake();
    }
}

fn in_use_or(errno: Errno, mountpoint: &Path) -> Refusal {
    let shown = mountpoint.display();
    match errno {
        Errno::BUSY => {
            let sentence = format!(
                "{shown} is in use: end the programs that work there and unmount what is mounted there, or unmount it lazily"
            );
            Refusal::with_errno(errno, sentence)
        }
        errno => Refusal::of(errno, format!("{shown} cannot be unmounted")),
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

/// The document in memory that nobody can change any more.
fn sealed_copy(text: &str) -> rustix::io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let copy = rustix::fs::memfd_create("stack", flags)?;
    let mut written = 0;
    while written < text.len() {
        written += rustix::io::pwrite(&copy, &text.as_bytes()[written..], written as u64)?;
    }
    rustix::fs::fcntl_add_seals(
        &copy,
        SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
    )?;
    Ok(copy)
}

fn resident_bytes(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
