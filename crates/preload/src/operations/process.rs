//! What the process as a whole is like: whether there is a service to go to, whether this is still the process that it was.

use core::cell::UnsafeCell;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32};

use polytropo_client::{Error, Refused};

use super::link::Link;
use super::table::Table;
use super::{kept, placeholders};
use crate::sys;

pub const PATH_BYTES_MAX: usize = 512;
/// How often a program that begins to watch files tries to say so.
const WATCH_ATTEMPTS: u32 = 3;
const WATCH_PAUSE_NS: u64 = 20_000_000;

/// Where the service is and what it serves.
#[derive(Clone, Copy)]
pub struct Setting {
    socket: [u8; PATH_BYTES_MAX],
    socket_length: usize,
    /// Without a slash at its end: nothing for the root directory.
    mount: [u8; PATH_BYTES_MAX],
    mount_length: usize,
    /// `st_dev` of the mount, and its root's inode.
    device: u64,
    root: u64,
    /// A channel is made for those only who have lost by doing without.
    patient: bool,
}

impl Setting {
    pub const fn none() -> Self {
        Self {
            socket: [0; PATH_BYTES_MAX],
            socket_length: 0,
            mount: [0; PATH_BYTES_MAX],
            mount_length: 0,
            device: 0,
            root: 0,
            patient: false,
        }
    }

    /// `None` if there is no such socket or mount.
    pub fn new(socket: &[u8], mount: &[u8]) -> Option<Self> {
        let mut setting = Self::none();
        let mount = mount.strip_suffix(b"/").unwrap_or(mount);
        setting.socket.get_mut(..socket.len())?.copy_from_slice(socket);
        setting.mount.get_mut(..mount.len())?.copy_from_slice(mount);
        (setting.socket_length, setting.mount_length) = (socket.len(), mount.len());
        (!socket.is_empty() && socket.len() < PATH_BYTES_MAX && mount.len() + 2 < PATH_BYTES_MAX)
            .then_some(())?;
        sys::status_at(&setting.socket)?;
        let root = sys::status_at(&setting.root_path())?;
        (setting.device, setting.root) = (root.device, root.inode);
        Some(setting)
    }

    /// Without a slash at its end.
    pub fn mount(&self) -> &[u8] {
        &self.mount[..self.mount_length]
    }

    /// With a zero byte at its end.
    fn root_path(&self) -> [u8; PATH_BYTES_MAX] {
        let mut path = self.mount;
        if self.mount_length == 0 {
            path[0] = b'/';
        }
        path
    }

    /// What is below our mount, relative to it.
    pub fn inside<'a>(&self, path: &'a [u8]) -> Option<&'a [u8]> {
        path.strip_prefix(&self.mount[..self.mount_length])?
            .strip_prefix(b"/")
            .filter(|rest| !rest.is_empty())
    }

    /// Flags of the mount, as statfs(2) tells them.
    pub fn mount_flags(&self) -> Option<u64> {
        sys::mount_flags(&self.root_path())
    }

    pub fn device(&self) -> u64 {
        self.device
    }

    pub fn root_inode(&self) -> u64 {
        self.root
    }

    pub fn set_patient(&mut self, patient: bool) {
        self.patient = patient;
    }

    pub fn is_patient(&self) -> bool {
        self.patient
    }

    pub fn connect(&self) -> Result<polytropo_client::Channel, Refused> {
        let root = sys::open(&self.root_path(), sys::O_PATH | sys::O_DIRECTORY, 0) as i32;
        if root < 0 {
            return Err(Refused::Errno(-root));
        }
        let channel = polytropo_client::Channel::connect(&self.socket[..self.socket_length], root);
        sys::close(root);
        channel
    }
}

/// Tells the service what was counted, if there is one and this process is the channel's.
pub fn tell() {
    if table().is_some()
        && let Some(channel) = LINK.get()
    {
        channel.tell(crate::trace::counts());
    }
}

/// Requests on this process's channel, and how often the service had to be woken.
pub fn asked() -> (u64, u64) {
    LINK.asked().into()
}

/// How many requests there were on the channel that there is now.
#[inline]
pub fn requests() -> u64 {
    LINK.requests()
}

struct Once(UnsafeCell<Setting>);
// SAFETY: written before the program has threads and before anything reads it.
unsafe impl Sync for Once {}

static SETTING: Once = Once(UnsafeCell::new(Setting::none()));
static TABLE: AtomicPtr<Table> = AtomicPtr::new(core::ptr::null_mut());
static PROCESS: AtomicU32 = AtomicU32::new(0);
/// Something happened after which nothing is known any more.
static OFF: AtomicBool = AtomicBool::new(false);
pub static LINK: Link = Link::new();

/// Threads that wait in vfork(2) while a child uses their memory.
const BORROWED_MAX: usize = 8;
static BORROWED: [AtomicU32; BORROWED_MAX] = [const { AtomicU32::new(0) }; BORROWED_MAX];
static BORROWED_COUNT: AtomicU32 = AtomicU32::new(0);

/// To be called before there are threads.
pub fn begin(setting: Setting) {
    let Some(memory) = sys::map(0, size_of::<Table>()) else { return };
    // SAFETY: the mapping was made just now.
    if !unsafe { sys::wipe_on_fork(memory, size_of::<Table>()) } {
        return;
    }
    // SAFETY: see `Once`.
    unsafe { *SETTING.0.get() = setting };
    let table = memory as *mut Table;
    // SAFETY: zeroed memory of that size, page-aligned; a zeroed table is one.
    unsafe { (*table).alive.store(1, Relaxed) };
    PROCESS.store(sys::process(), Relaxed);
    TABLE.store(table, Release);
}

pub fn setting() -> &'static Setting {
    // SAFETY: never written after `begin`.
    unsafe { &*SETTING.0.get() }
}

/// The program watches files: what it does itself is the kernel's, and what others do by their channels as soon as the service knows. For that the
/// channel stays, and is made where there is none, also at once after one that has ended: nobody asks later.
pub fn watch() {
    for attempt in 0..WATCH_ATTEMPTS {
        if attempt > 0 {
            // Until the keeper knows of its worker's death.
            sys::nap(WATCH_PAUSE_NS);
        }
        let Some(channel) = LINK.insist(|| setting().connect()) else {
            if LINK.is_off() {
                break;
            } else {
                continue;
            };
        };
        match channel.watch() {
            Err(Error::Gone | Error::GoneAmid(_)) => LINK.give_up(channel),
            // Whoever cannot be told sees what the kernel does.
            Ok(()) | Err(_) => break,
        }
    }
    turn_off();
}

/// From now on everything is the kernel's.
pub fn turn_off() {
    if let Some(table) = table() {
        placeholders::upgrade_all(table, false);
        kept::give_up_all();
        table.release_all();
        super::directories::upgrade_all(false);
    }
    OFF.store(true, Release);
}

/// There is about to be another channel, after one that has ended: what is kept of that is given up.
pub fn begin_with_channel() {
    kept::give_up_all();
    super::names::begin_with_channel();
    super::directories::begin_with_channel();
}

/// The table, whatever may be done with it now.
pub fn known_table() -> Option<&'static Table> {
    // SAFETY: null, or the mapping of `begin`, which is never unmapped.
    unsafe { TABLE.load(Acquire).as_ref() }
}

/// The table, if it may be used now.
#[inline]
pub fn table() -> Option<&'static Table> {
    let table = known_table()?;
    if table.alive.load(Acquire) == 0 {
        begin_in_child(table);
    }
    if OFF.load(Acquire) || (BORROWED_COUNT.load(Acquire) != 0 && is_borrower()) {
        return None;
    }
    Some(table)
}

#[cold]
fn begin_in_child(table: &Table) {
    // The child has one thread; a signal handler may come in between, and does without.
    LINK.forget();
    super::names::forget();
    placeholders::forget_in_child();
    super::directories::forget();
    super::worth::forget_in_child();
    BORROWED.iter().for_each(|thread| thread.store(0, Relaxed));
    BORROWED_COUNT.store(0, Relaxed);
    PROCESS.store(sys::process(), Relaxed);
    crate::trace::reset();
    table.alive.store(1, Release);
}

/// The calling thread is about to lend the process's memory to a child. False if too many do.
pub fn lend() -> bool {
    let thread = sys::thread();
    let free = BORROWED.iter().any(|place| place.compare_exchange(0, thread, AcqRel, Relaxed).is_ok());
    if free {
        BORROWED_COUNT.fetch_add(1, AcqRel);
    }
    free
}

/// Whether this is a child in borrowed memory; if it is the lender, who is back, the loan is over.
#[cold]
fn is_borrower() -> bool {
    if sys::process() != PROCESS.load(Relaxed) {
        return true;
    }
    let thread = sys::thread();
    for place in &BORROWED {
        if place.compare_exchange(thread, 0, AcqRel, Relaxed).is_ok() {
            BORROWED_COUNT.fetch_sub(1, AcqRel);
        }
    }
    false
}
