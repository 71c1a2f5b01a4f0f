//! What happens when a worker dies: another one takes its doors over.
//!
//! The keeper holds every device of a door, so the kernel neither ends the connection nor what was read from it; programs wait. The
//! next worker gets the same devices, the directories once more, and the state area that the dead one has left.

use std::os::fd::OwnedFd;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use log::{error, info, warn};

use super::child::Child;
use super::mounting;
use super::mounts::sealed_copy;
use super::orders::Keeper;
use super::roots::Root;
use crate::control::Refusal;
use crate::doors::fuse::can_be_resumed;
use crate::state::StateReader;

/// In which `restarts` of the configuration are counted.
const RESTARTS_PERIOD: Duration = Duration::from_secs(60);
/// What else kills workers again and again does so once in this time at most. Programs wait meanwhile.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// How often somebody who waits looks whether that is still needed.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What a door's next worker will need.
pub struct Kept {
    pub devices: Vec<OwnedFd>,
    pub roots: Arc<Vec<Root>>,
    pub state: OwnedFd,
}

/// What is asked of the door before it is served again.
struct Orphan {
    door: u64,
    document: String,
    kept: Arc<Kept>,
    channel_writes: bool,
    incarnation: u64,
    blame: u64,
}

/// Starts the thread that has others take over from workers that ended.
pub fn start(keeper: Weak<Keeper>, ended: Receiver<Arc<Child>>) -> std::io::Result<()> {
    let run = move || {
        while let Ok(dead) = ended.recv() {
            let Some(keeper) = keeper.upgrade() else { return };
            keeper.take_over(&dead, &ended);
        }
    };
    std::thread::Builder::new().name("recovery".into()).spawn(run).map(drop)
}

impl Keeper {
    /// `dead` has ended. Returns when its doors are served again, or are dead too; and those of workers that ended meanwhile.
    fn take_over(&self, dead: &Child, ended: &Receiver<Arc<Child>>) {
        let mut waiting = self.orphans_of(dead);
        while !waiting.is_empty() {
            self.pause_before_restart(&waiting);
            // One that cannot be served holds up no other.
            waiting.retain(|&door| !self.serve_again(door));
            waiting.extend(ended.try_iter().flat_map(|dead| self.orphans_of(&dead)));
            self.tell_of_ends();
        }
        self.tell_of_ends();
    }

    fn tell_of_ends(&self) {
        self.table.lock().settle();
        self.door_ends.notify_all();
        self.wake();
    }

    /// The doors of a dead worker that another one can take over. The others are given up.
    fn orphans_of(&self, dead: &Child) -> Vec<u64> {
        let doors: Vec<_> = {
            let table = self.table.lock();
            let its = table.doors.iter().filter(|(_, door)| std::ptr::eq(&*door.worker, dead) && !door.ended);
            its.map(|(&id, door)| (id, can_take_over(&door.state))).collect()
        };
        let mut orphans = Vec::new();
        for (door, possible) in doors {
            match possible {
                Ok(()) => orphans.push(door),
                Err(why) => self.give_up(door, why),
            }
        }
        orphans
    }

    /// Tries to have a door served again. True if nothing is left to be done for it.
    fn serve_again(&self, door: u64) -> bool {
        let Some(orphan) = self.orphan(door) else { return true };
        let hopeless = match (self.is_stopped(), self.config.restarts) {
            (true, _) => Some("the service is ending"),
            (false, 0) => Some("no other worker is to be started"),
            (false, _) => None,
        };
        if let Some(why) = hopeless {
            self.give_up(door, why);
            return true;
        }
        let began = Instant::now();
        match self.hand_over(&orphan) {
            Ok(worker) => {
                let mut table = self.table.lock();
                if let Some(door) = table.doors.get_mut(&orphan.door) {
                    door.worker = worker;
                    door.incarnation = orphan.incarnation;
                }
                info!("door {door} is served again after {} ms", began.elapsed().as_millis());
                // Should that worker be dead by now, we hear of it.
                true
            }
            Err(refusal) => {
                warn!("door {door} cannot be served again: {}", refusal.sentence);
                false
            }
        }
    }

    /// A door whose worker is dead. None if all is well with it, or it has ended.
    fn orphan(&self, id: u64) -> Option<Orphan> {
        let table = self.table.lock();
        let door = table.doors.get(&id).filter(|door| !door.ended && !door.worker.is_alive())?;
        Some(Orphan {
            door: id,
            document: door.document.clone(),
            kept: door.kept.clone()?,
            channel_writes: door.channel_writes,
            incarnation: door.incarnation + 1,
            blame: door.worker.blame(),
        })
    }

    fn hand_over(&self, orphan: &Orphan) -> Result<Arc<Child>, Refusal> {
        let cannot = |errno| Refusal::of(errno, "what a worker needs cannot be made");
        let Kept { devices, roots, state } = &*orphan.kept;
        let (worker, copies) = self.worker_for(roots)?;
        let document = sealed_copy(orphan.document.as_bytes()).map_err(cannot)?;
        let windows = worker.window_place(orphan.door, self.config.cache_bytes, orphan.channel_writes)?;
        // What the dead worker held was written back when it ended.
        let held = crate::held::make(orphan.door).map_err(cannot)?;
        let (incarnation, blame) = (orphan.incarnation, orphan.blame);
        let what = super::child::Served { door: orphan.door, state, held: &held, incarnation, blame };
        let document = (&document, orphan.document.len());
        worker.serve(&what, document, &windows, None, devices, &copies)?;
        Ok(worker)
    }

    /// Programs get errors from now on.
    fn give_up(&self, id: u64, why: &str) {
        let place = {
            let mut table = self.table.lock();
            let Some(door) = table.doors.get_mut(&id) else { return };
            error!("door {id} is dead, and programs get ENOTCONN until it is unmounted: {why}");
            door.kept = None;
            table.mounts.values().find(|mount| mount.door == id).cloned()
        };
        // The kernel ends the connection with its last device, which a notice of the dead worker may still hold.
        let Some(mount) = place else { return };
        if let Err(errno) = self.if_on_top(&mount, mounting::abort) {
            warn!("door {id}: its connection is not ended by force: {errno}");
        }
    }

    /// Counts a restart, however many doors it is for, and waits as long as it has to wait.
    fn pause_before_restart(&self, doors: &[u64]) {
        let pause = {
            let mut restarts = self.restarts.lock();
            restarts.retain(|at| at.elapsed() < RESTARTS_PERIOD + PAUSE_MAX);
            let recent = restarts.len();
            restarts.push(Instant::now());
            pause_after(recent, self.config.restarts)
        };
        if pause.is_zero() || self.config.restarts == 0 {
            return;
        }
        warn!("workers die too often: doors {doors:?} get another one in {} s", pause.as_secs());
        let until = Instant::now() + pause;
        let needed = || !self.is_stopped() && doors.iter().any(|&door| self.orphan(door).is_some());
        while Instant::now() < until && needed() {
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// The pause before a restart of which there were `recent` before: none at first, then 1 s, which doubles.
fn pause_after(recent: usize, at_once: usize) -> Duration {
    match recent.checked_sub(at_once) {
        None => Duration::ZERO,
        Some(over) => Duration::from_secs(1 << over.min(5)).min(PAUSE_MAX),
    }
}

fn can_take_over(state: &StateReader) -> Result<(), &'static str> {
    match state.agreed() {
        None => Err("its worker died before it agreed with the kernel on anything"),
        Some(agreed) if can_be_resumed(agreed) => Ok(()),
        Some(_) => Err("with passthrough, io_uring or before Linux 6.9 no other worker can take it over"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_come_at_once_then_ever_later() {
        let pauses: Vec<_> = (0..12).map(|recent| pause_after(recent, 5).as_secs()).collect();
        assert_eq!(pauses, [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 30, 30]);
    }
}
