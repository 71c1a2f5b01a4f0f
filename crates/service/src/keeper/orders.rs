//! What the keeper does when it is told to.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, UNIX_EPOCH};

use log::{info, warn};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::Config;
use super::child::{Child, Watcher};
use super::mounting::{self, Detach};
use super::recovery;
use super::table::{self, Mount, Table};
use crate::control::{Answer, Order, Orders, Refusal};

/// After the last unmount the door is given so long to end, so that all is written before the order is answered.
const DOOR_END_TIMEOUT: Duration = Duration::from_secs(2);
/// What killed workers left is written in this time at the latest.
const WORKERS_END_TIMEOUT: Duration = Duration::from_secs(15);
/// How often somebody who waits for that looks.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Open files that one answer lists.
const OPEN_FILES_SHOWN_MAX: usize = 4096;

/// The keeper's state, shared by the threads of its clients.
pub struct Keeper {
    pub(super) me: Weak<Keeper>,
    pub(super) config: Config,
    pub(super) started: Instant,
    /// Held while mounts and workers are made and ended: one order at a time. `table` is never held for long.
    pub(super) ordering: Mutex<()>,
    pub(super) table: Mutex<Table>,
    pub(super) door_ends: Condvar,
    /// The living workers, one for each way to map ids that was needed.
    pub(super) workers: Mutex<Vec<Arc<Child>>>,
    /// Devices that were opened for this keeper, where it may not open them.
    pub(super) given_devices: Mutex<Vec<OwnedFd>>,
    /// To the thread that has others take over from them.
    pub(super) ended_workers: Sender<Arc<Child>>,
    /// When that was, of late.
    pub(super) restarts: Mutex<Vec<Instant>>,
    pub(super) workers_started: AtomicU64,
    pub(super) wake: OwnedFd,
    pub(super) stopped: AtomicBool,
}

impl Keeper {
    pub fn start(mut config: Config) -> Result<Arc<Self>, Refusal> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags)
            .map_err(|errno| Refusal::of(errno, "an event descriptor cannot be made"))?;
        let given_devices = Mutex::new(std::mem::take(&mut config.devices));
        let (ended_workers, ended) = channel();
        let keeper = Arc::new_cyclic(|me: &Weak<Keeper>| Self {
            me: me.clone(),
            config,
            started: Instant::now(),
            ordering: Mutex::new(()),
            table: Mutex::new(Table::new()),
            door_ends: Condvar::new(),
            workers: Mutex::default(),
            given_devices,
            ended_workers,
            restarts: Mutex::default(),
            workers_started: AtomicU64::new(0),
            wake,
            stopped: AtomicBool::new(false),
        });
        recovery::start(Arc::downgrade(&keeper), ended)
            .map_err(|error| Refusal::new(format!("a thread cannot be started: {error}")))?;
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

    pub(super) fn wake(&self) {
        // EAGAIN: it is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }

    /// Waits for its turn to change something. Refused when the keeper is to end.
    pub(super) fn take_turn(&self) -> Result<MutexGuard<'_, ()>, Refusal> {
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
        // Looking for them may wait for doors of ours, and whoever gives those up needs the table.
        let mounts: Vec<_> = self.table.lock().mounts.values().rev().cloned().collect();
        for mount in &mounts {
            if let Err(errno) = self.unmount_if_on_top(mount, Detach::ForGood) {
                warn!("{} stays mounted: {errno}", mount.mountpoint.display());
            }
        }
        let workers: Vec<_> = self.workers.lock().drain(..).collect();
        workers.iter().for_each(|worker| worker.kill());
        // What they held of programs' writes, or had not taken yet, is written by us once they are dead.
        let until = Instant::now() + WORKERS_END_TIMEOUT;
        while workers.iter().any(|worker| worker.is_alive()) && Instant::now() < until {
            std::thread::sleep(LOOK_EVERY);
        }
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
        self.if_on_top(mount, |place| mounting::unmount(place, how))
    }

    /// Does something with a mount where it is now, unless it is gone.
    pub(super) fn if_on_top(
        &self,
        mount: &Mount,
        act: impl FnOnce(&Path) -> rustix::io::Result<()>,
    ) -> rustix::io::Result<()> {
        let lines = table::kernel_table().ok_or(Errno::IO)?;
        let number = mount.identity.mount_id;
        let Some(line) = lines.iter().find(|line| line.mount_id == number && line.ours) else {
            return Ok(()); // somebody was faster
        };
        // At the place that the kernel knows: directories above may have been renamed.
        let place = line.path();
        if !line.is_on_top(&lines) {
            return Err(Errno::BUSY);
        }
        // Another service's mount may have got the number of ours, which somebody unmounted.
        if mounting::is_at(&mount.identity, &place)? { act(&place) } else { Ok(()) }
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

    /// Waits for the doors of what was unmounted just now; false if some stay.
    fn wait_for_doors(&self) -> bool {
        let deadline = Instant::now() + DOOR_END_TIMEOUT;
        let mut table = self.table.lock();
        while table.doors.values().any(|door| door.is_alive()) {
            if self.door_ends.wait_until(&mut table, deadline).timed_out() {
                return false;
            }
        }
        true
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
            .map(|(id, worker)| (id, worker.statistics(Some(id)).unwrap_or_else(|_| json!({}))))
            .collect();
        let mounts: Vec<_> = {
            let table = self.table.lock();
            let describe = |(number, mount): (&u64, &Mount)| {
                let mut one = match counters.get(&mount.door) {
                    Some(Value::Object(counters)) => counters.clone(),
                    _ => serde_json::Map::new(),
                };
                // Last, so that no worker's word stands in for ours.
                one.insert("mount".into(), json!(number));
                one.insert("door".into(), json!(mount.door));
                one.insert("mountpoint".into(), json!(mount.mountpoint));
                one.insert("dead".into(), json!(table.is_dead(mount)));
                Value::Object(one)
            };
            table.mounts.iter().map(describe).collect()
        };
        let workers: Vec<_> =
            self.workers.lock().iter().filter(|worker| worker.is_alive()).cloned().collect();
        let past: Vec<_> = workers.iter().filter_map(|worker| worker.statistics(None).ok()).collect();
        let worker = self.worker_pid();
        Ok(json!({
            "past": past,
            "uptime_s": self.started.elapsed().as_secs_f64(),
            "worker_pid": worker,
            "keeper_pid": std::process::id(),
            "rss_bytes": worker.map_or(0, resident_bytes),
            "mounts": mounts,
        }))
    }

    /// Read by the keeper itself, so that it is told of a dead worker too.
    fn open_files(&self, mount: u64) -> Answer {
        let state = {
            let table = self.table.lock();
            let door = table.mounts.get(&mount).and_then(|mount| table.doors.get(&mount.door));
            door.map(|door| door.state.clone())
        };
        let state =
            state.ok_or_else(|| Refusal::with_errno(Errno::INVAL, format!("there is no mount {mount}")))?;
        let found = state
            .open_files()
            .ok_or_else(|| Refusal::with_errno(Errno::IO, "the worker has damaged its state area"))?;
        let (count, shown) = (found.files.len(), found.files.iter().take(OPEN_FILES_SHOWN_MAX));
        Ok(json!({
            "open_files": shown.collect::<Vec<_>>(),
            "count": count,
            "untold": found.untold,
            "damaged": found.damaged,
        }))
    }

    /// The living door whose superblock has this device number.
    pub(super) fn door_of(&self, device: (u32, u32)) -> Option<(u64, Arc<Child>)> {
        let table = self.table.lock();
        let (id, door) = table.doors.iter().find(|(_, door)| door.device == device && door.is_alive())?;
        Some((*id, door.worker.clone()))
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
            let how = if force || dead { Detach::ForGood } else { Detach::WhenUnused };
            match self.unmount_if_on_top(&mount, how) {
                Ok(()) => self.unmounted(number, &mount, !force && !dead),
                Err(errno) if force => warn!("{} stays mounted: {errno}", mount.mountpoint.display()),
                Err(errno) => return Err(in_use_or(errno, &mount.mountpoint)),
            }
        }
        if !force && !self.wait_for_doors() {
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
            Order::OpenFiles { mount } => self.open_files(mount),
            Order::Status {} => self.status(),
            Order::Stop { force } => self.stop(force),
        }
    }

    fn is_ending(&self) -> bool {
        self.is_stopped()
    }
}

pub(super) struct Watching(pub(super) Weak<Keeper>);

impl Watcher for Watching {
    fn door_ended(&self, worker: &Child, door: u64) -> bool {
        let Some(keeper) = self.0.upgrade() else { return true };
        let known = keeper.table.lock().door_ended(worker, door);
        keeper.door_ends.notify_all();
        keeper.wake();
        known
    }

    fn worker_ended(&self, worker: &Arc<Child>) {
        let Some(keeper) = self.0.upgrade() else { return };
        // On another thread: this one can start nothing.
        if keeper.ended_workers.send(worker.clone()).is_err() {
            keeper.table.lock().let_go(worker);
        }
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

fn resident_bytes(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
