//! What threads are about to do, and have done, that must not be done twice: a successor is sent the same requests again.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, AtomicUsize, fence};

use polytropo_libservices::Name;
use polytropo_libservices::name::NAME_LEN_MAX;

use super::area::Area;
use super::layout::{SLOTS, Slot};

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

/// A worker's threads use one part of the slots, its successor's the next: what was not looked at yet stays though several die in a row.
const GENERATIONS: usize = 8;
const SLOTS_EACH: usize = SLOTS / GENERATIONS;

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
}

pub(super) struct Journal {
    area: Arc<Area>,
    first: usize,
    given: AtomicUsize,
}

impl Journal {
    /// `incarnation`: how many workers served the door before.
    pub fn new(area: Arc<Area>, incarnation: u64) -> Self {
        let first = (incarnation % GENERATIONS as u64) as usize * SLOTS_EACH;
        for index in first..first + SLOTS_EACH {
            area.slot(index).stage.store(0, Relaxed);
        }
        Self { area, first, given: AtomicUsize::new(0) }
    }

    /// One for each thread; none when there are too many.
    pub fn slot(&self) -> Option<JournalSlot> {
        let number = self.given.fetch_add(1, Relaxed);
        (number < SLOTS_EACH).then(|| JournalSlot { area: self.area.clone(), index: self.first + number })
    }
}

/// One thread's.
pub struct JournalSlot {
    area: Arc<Area>,
    index: usize,
}

impl JournalSlot {
    /// Before the stack is asked to do it.
    pub fn begin(&self, intent: &Intent) {
        let slot = self.area.slot(self.index);
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
        slot.stage.store(BEGUN, Release);
    }

    /// After it was done, before the kernel hears of it.
    pub fn done(&self) {
        self.area.slot(self.index).stage.store(DONE, Release);
    }
}

fn put(words: &[AtomicU64], name: &Option<Box<Name>>) {
    let bytes = name.as_ref().map_or(&[][..], |name| name.as_bytes());
    for (place, bytes) in words.iter().zip(bytes.chunks(8)) {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        place.store(u64::from_le_bytes(word), Relaxed);
    }
}

/// What the threads of dead workers were doing.
pub(super) fn read(area: &Area) -> Vec<Begun> {
    (0..SLOTS).filter_map(|index| begun(area.slot(index))).collect()
}

fn begun(slot: &Slot) -> Option<Begun> {
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
    Some(Begun { intent, done: stage == DONE })
}

/// None for what makes no sense.
fn name(words: &[AtomicU64], length: u64) -> Option<Option<Box<Name>>> {
    let length = usize::try_from(length).ok().filter(|length| *length <= NAME_LEN_MAX)?;
    let bytes: Vec<u8> =
        words.iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).take(length).collect();
    if length == 0 { Some(None) } else { Name::new(&bytes).ok().map(|name| Some(name.to_boxed())) }
}
