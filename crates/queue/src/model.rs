//! Queues for the model checker, whose atomics cannot lie in raw memory.

use crate::bytes::BytesView;
use crate::cell::{Cell, SingleCell};
use crate::handle::{Handle, Local, View};
use crate::lane::{Index, LaneControl, Slots};
use crate::lanes::Lanes;
use crate::pool::{BufferHeader, Hint, Participant, Pool};
use crate::sync::{AtomicU32, AtomicU64};
use crate::wait::{Event, Events, Statistics};
use std::vec::Vec;

pub struct Parts<C> {
    controls: Vec<LaneControl>,
    cells: Vec<C>,
    events: Events,
    statistics: Statistics,
    shift: u32,
    skew: u64,
}

impl<C: Cell> Parts<C> {
    pub fn new(lanes: usize, shift: u32, skew: u64) -> Self {
        let index = || Index { ticket: AtomicU64::new(0), cpu: AtomicU32::new(0) };
        let counter = || AtomicU64::new(0);
        Self {
            controls: (0..lanes).map(|_| LaneControl { tail: index(), head: index() }).collect(),
            cells: (0..lanes << shift).map(|_| C::new()).collect(),
            events: Events { closed: AtomicU32::new(0), items: Event::new(), spaces: Event::new() },
            statistics: Statistics {
                sleeps: counter(),
                wakes: counter(),
                spins_in_vain: counter(),
                lost_enqueues: counter(),
                lost_dequeues: counter(),
                rescued: counter(),
            },
            shift,
            skew,
        }
    }

    pub fn view(&self) -> View<'_, C> {
        let slots = Slots { cells: &self.cells, spread: 0 };
        let lanes = Lanes::new(&self.controls, slots, self.shift, self.skew);
        View { lanes, events: &self.events, statistics: &self.statistics }
    }

    pub fn handle_on_cpu(&self, cpu: u32) -> Handle<'_, C> {
        Handle::on_cpu(self.view(), cpu)
    }
}

/// An RCQB without the bytes: items are the numbers of their buffers' contents, kept by the test.
pub struct BytesParts {
    words: Parts<SingleCell>,
    participants: Vec<Participant>,
    hints: Vec<Hint>,
    headers: Vec<BufferHeader>,
}

impl BytesParts {
    pub fn new(shift: u32, participants: usize) -> Self {
        let word = || AtomicU64::new(0);
        Self {
            words: Parts::new(1, shift, 4),
            participants: (0..participants).map(|_| Participant { identity: word() }).collect(),
            hints: (0..1).map(|_| Hint { busy: word() }).collect(),
            headers: (0..1 << shift)
                .map(|_| BufferHeader { word: word(), length: AtomicU32::new(0) })
                .collect(),
        }
    }

    /// The view of a participant that joins with this identity, and what it keeps for itself.
    pub fn join(&self, identity: u64) -> (BytesView<'_>, Local) {
        let pool = Pool { participants: &self.participants, hints: &self.hints, headers: &self.headers };
        let words = self.words.view();
        let participant = pool.join(identity).expect("there is a place");
        (BytesView { words, pool, participant, identity }, Local::new(&words.lanes))
    }

    /// What a buffer holds.
    pub fn content(&self, index: usize) -> &AtomicU32 {
        &self.headers[index].length
    }
}
