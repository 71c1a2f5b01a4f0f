//! What threads are about to do, and have done, that must not be done twice: a successor is sent the same requests again.
//!
//! Each thread has a slot, which is cleared once the kernel has the answer. What a dead worker left there stays until its request was
//! sent again and answered, however many workers die before that.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};

use parking_lot::Mutex;
use polytropo_libservices::Name;
use polytropo_libservices::name::NAME_LEN_MAX;
use polytropo_libservices::privileges::Witness;
use rustc_hash::FxHashMap;

use super::area::Area;
use super::layout::{SLOT_WORDS, SLOTS, SUSPECTS, Slot};

const OPCODE: usize = 0;
const INO: usize = 1;
const FLAGS: usize = 2;
const PARENT: usize = 3;
const NEW_PARENT: usize = 4;
/// Lengths of the names, 16 bits each.
const LENGTHS: usize = 5;
const NAME: usize = 6;
const NAME_WORDS: usize = 32;
const NEW_NAME: usize = NAME + NAME_WORDS;

const BEGUN: u64 = 1;
const DONE: u64 = 2;

/// The mode of a file whose setuid and setgid bits may be gone for the moment, and the kernel's number of it.
const MODE: usize = NEW_NAME + NAME_WORDS;
const MODE_OF: usize = MODE + 1;
/// The worker that wrote it, or was sent the request again.
const SEEN_BY: usize = MODE + 2;
/// The kernel's number of the request that the thread is doing, whatever it is; 0: none.
const DOING: usize = SEEN_BY + 1;
const _: () = assert!(DOING < SLOT_WORDS);

/// A request that is blamed so much is not done any more: three deaths by a fault of the worker's own, or ten by SIGKILL, which is how others end it,
/// and the kernel if there is no memory.
const BLAME_MAX: u64 = 30;
pub const BLAME_OF_FAULT: u64 = 10;
pub const BLAME_OF_KILL: u64 = 3;

/// What dead workers left may take so many slots. Some of it was answered all the same, at the moment of a death, and is never asked
/// for: what was not asked for longest gives way.
const LEFT_MAX: usize = SLOTS / 2;

/// An operation that must not be done twice. Names of directories by the kernel's numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intent {
    pub unique: u64,
    pub opcode: u32,
    /// Of a rename: the number of the inode that is moved, as the stack shows it.
    pub ino: u64,
    pub flags: u32,
    pub parent: u64,
    pub name: Option<Box<Name>>,
    pub new_parent: u64,
    pub new_name: Option<Box<Name>>,
}

/// What a dead worker was doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begun {
    pub intent: Intent,
    /// It was done, and may not have been answered.
    pub done: bool,
    pub(super) slot: usize,
}

/// A file whose setuid and setgid bits a dead worker may have had no time to give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostBits {
    /// The kernel's number.
    pub node: u64,
    pub mode: u32,
}

pub(super) struct Journal {
    area: Arc<Area>,
    incarnation: u64,
    free: Mutex<Vec<usize>>,
    suspects: Suspects,
}

impl Journal {
    pub fn new(area: Arc<Area>) -> Arc<Self> {
        Arc::new(Self {
            area,
            incarnation: 0,
            free: Mutex::new((0..SLOTS).rev().collect()),
            suspects: Suspects::default(),
        })
    }

    /// Of an area that dead workers have left. `incarnation`: how many there were.
    pub fn adopt(area: Arc<Area>, incarnation: u64, blame: u64) -> (Arc<Self>, Vec<Begun>, Vec<LostBits>) {
        let suspects = Suspects::adopt(&area, blame);
        let lost = (0..SLOTS).filter_map(|index| lost_bits(area.slot(index))).collect();
        let mut begun: Vec<_> = (0..SLOTS).filter_map(|index| begun(area.slot(index), index)).collect();
        let seen_by = |begun: &Begun| area.slot(begun.slot).words[SEEN_BY].load(Relaxed);
        begun.sort_by_key(|begun| std::cmp::Reverse(seen_by(begun)));
        begun.truncate(LEFT_MAX);
        let free = (0..SLOTS).rev().filter(|index| begun.iter().all(|begun| begun.slot != *index)).collect();
        for &index in &free {
            let index: usize = index;
            area.slot(index).stage.store(0, Relaxed);
        }
        (Arc::new(Self { area, incarnation, free: Mutex::new(free), suspects }), begun, lost)
    }

    /// One for each thread; none when there are too many.
    pub fn slot(self: &Arc<Self>) -> Option<Arc<JournalSlot>> {
        let own = self.free.lock().pop()?;
        Some(Arc::new(JournalSlot {
            journal: self.clone(),
            own,
            at: AtomicUsize::new(own),
            about: AtomicU64::new(0),
        }))
    }
}

/// One thread's. Used by that thread alone.
pub struct JournalSlot {
    journal: Arc<Journal>,
    own: usize,
    /// The slot of the request at hand: the thread's own, or a dead worker's.
    at: AtomicUsize,
    /// The kernel's number of the node whose bytes the request changes.
    about: AtomicU64,
}

impl JournalSlot {
    fn slot(&self) -> &Slot {
        self.journal.area.slot(self.at.load(Relaxed))
    }

    /// A request begins: what a dead worker wrote down of it counts on.
    pub fn take_up(&self, node: u64, past: Option<&Begun>) {
        self.about.store(node, Relaxed);
        self.at.store(past.map_or(self.own, |past| past.slot), Relaxed);
        if past.is_some() {
            self.slot().words[SEEN_BY].store(self.journal.incarnation, Relaxed);
        }
    }

    /// The request of that number is about to be done. False if too many workers died when they did it.
    pub fn may_do(&self, unique: u64) -> bool {
        self.journal.area.slot(self.own).words[DOING].store(unique, Release);
        !self.journal.suspects.is_condemned(unique)
    }

    /// The request changes the bytes of another node.
    pub fn is_about(&self, node: u64) {
        self.about.store(node, Relaxed);
    }

    /// Before the stack is asked to do it.
    pub fn begin(&self, intent: &Intent) {
        let slot = self.slot();
        if self.at.load(Relaxed) != self.own {
            // It is there already.
            return;
        }
        slot.stage.store(0, Relaxed);
        fence(Release);
        let bytes = |name: &Option<Box<Name>>| name.as_ref().map_or(0, |name| name.as_bytes().len() as u64);
        slot.unique.store(intent.unique, Relaxed);
        slot.words[OPCODE].store(intent.opcode.into(), Relaxed);
        slot.words[INO].store(intent.ino, Relaxed);
        slot.words[FLAGS].store(intent.flags.into(), Relaxed);
        slot.words[PARENT].store(intent.parent, Relaxed);
        slot.words[NEW_PARENT].store(intent.new_parent, Relaxed);
        slot.words[LENGTHS].store(bytes(&intent.name) | bytes(&intent.new_name) << 16, Relaxed);
        put(&slot.words[NAME..], &intent.name);
        put(&slot.words[NEW_NAME..], &intent.new_name);
        slot.words[SEEN_BY].store(self.journal.incarnation, Relaxed);
        slot.stage.store(BEGUN, Release);
    }

    /// After it was done, before the kernel hears of it.
    pub fn done(&self) {
        self.slot().stage.store(DONE, Release);
    }

    /// The kernel has the answer, and does not ask again.
    pub fn answered(&self) {
        let doing = self.journal.area.slot(self.own).words[DOING].swap(0, Relaxed);
        self.journal.suspects.acquit(&self.journal.area, doing);
        let slot = self.slot();
        if slot.stage.load(Relaxed) != 0 {
            slot.stage.store(0, Release);
        }
        let at = self.at.swap(self.own, Relaxed);
        if at != self.own {
            self.journal.free.lock().push(at);
        }
    }
}

impl Witness for JournalSlot {
    fn leave(&self, mode: u32) {
        let slot = self.slot();
        slot.words[MODE_OF].store(self.about.load(Relaxed), Relaxed);
        slot.words[MODE].store(u64::from(mode) | MODE_COUNTS, Release);
    }

    fn back(&self) {
        self.slot().words[MODE].store(0, Release);
    }
}

/// Requests that were being done when workers died, and how much they are blamed for that.
#[derive(Default)]
struct Suspects {
    any: AtomicBool,
    known: Mutex<FxHashMap<u64, u64>>,
}

impl Suspects {
    fn adopt(area: &Area, blame: u64) -> Self {
        let places = &area.header().suspects;
        let known = places.iter().map(|place| (place.unique.load(Relaxed), place.blame.load(Relaxed)));
        let mut known: FxHashMap<u64, u64> = known.filter(|(_, blame)| *blame > 0).collect();
        let doing = |slot: usize| &area.slot(slot).words[DOING];
        for unique in (0..SLOTS).map(|slot| doing(slot).load(Acquire)).filter(|unique| *unique != 0) {
            let sum = known.entry(unique).or_default();
            *sum = sum.saturating_add(blame);
        }
        let mut most: Vec<_> = known.into_iter().filter(|(_, blame)| *blame > 0).collect();
        most.sort_by_key(|(_, blame)| std::cmp::Reverse(*blame));
        most.truncate(SUSPECTS);
        for (index, place) in places.iter().enumerate() {
            let (unique, blame) = most.get(index).copied().unwrap_or_default();
            place.unique.store(unique, Relaxed);
            place.blame.store(blame, Release);
        }
        (0..SLOTS).for_each(|slot| doing(slot).store(0, Relaxed));
        Self { any: AtomicBool::new(!most.is_empty()), known: Mutex::new(most.into_iter().collect()) }
    }

    fn is_condemned(&self, unique: u64) -> bool {
        self.any.load(Relaxed) && self.known.lock().get(&unique).is_some_and(|blame| *blame >= BLAME_MAX)
    }

    /// It was answered.
    fn acquit(&self, area: &Area, unique: u64) {
        if !self.any.load(Relaxed) {
            return;
        }
        let mut known = self.known.lock();
        if known.remove(&unique).is_none() {
            return;
        }
        let places = &area.header().suspects;
        places
            .iter()
            .filter(|place| place.unique.load(Relaxed) == unique)
            .for_each(|place| place.blame.store(0, Release));
        self.any.store(!known.is_empty(), Relaxed);
    }
}

const MODE_COUNTS: u64 = 1 << 32;

fn lost_bits(slot: &Slot) -> Option<LostBits> {
    let mode = slot.words[MODE].swap(0, Acquire);
    let node = slot.words[MODE_OF].load(Relaxed);
    (mode & MODE_COUNTS != 0 && node != 0).then_some(LostBits { node, mode: mode as u32 & 0o7777 })
}

fn put(words: &[AtomicU64], name: &Option<Box<Name>>) {
    let bytes = name.as_ref().map_or(&[][..], |name| name.as_bytes());
    for (place, bytes) in words.iter().zip(bytes.chunks(8)) {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        place.store(u64::from_le_bytes(word), Relaxed);
    }
}

fn begun(slot: &Slot, index: usize) -> Option<Begun> {
    let stage = slot.stage.load(Acquire);
    if !matches!(stage, BEGUN | DONE) {
        return None;
    }
    let word = |index: usize| slot.words[index].load(Relaxed);
    let lengths = word(LENGTHS);
    let intent = Intent {
        unique: slot.unique.load(Relaxed),
        opcode: u32::try_from(word(OPCODE)).ok()?,
        ino: word(INO),
        flags: word(FLAGS) as u32,
        parent: word(PARENT),
        name: name(&slot.words[NAME..NEW_NAME], lengths & 0xffff)?,
        new_parent: word(NEW_PARENT),
        new_name: name(&slot.words[NEW_NAME..][..NAME_WORDS], lengths >> 16 & 0xffff)?,
    };
    Some(Begun { intent, done: stage == DONE, slot: index })
}

/// None for what makes no sense.
fn name(words: &[AtomicU64], length: u64) -> Option<Option<Box<Name>>> {
    let length = usize::try_from(length).ok().filter(|length| *length <= NAME_LEN_MAX)?;
    let bytes: Vec<u8> =
        words.iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).take(length).collect();
    if length == 0 { Some(None) } else { Name::new(&bytes).ok().map(|name| Some(name.to_boxed())) }
}
