//! Queues for the model checker, whose atomics cannot lie in raw memory.

use crate::cell::Cell;
use crate::handle::{Handle, View};
use crate::lane::{Index, LaneControl, Slot};
use crate::lanes::Lanes;
use crate::sync::{AtomicU32, AtomicU64};
use crate::wait::{Event, Events, Statistics};
use std::vec::Vec;

pub struct Parts<C> {
    controls: Vec<LaneControl>,
    slots: Vec<Slot<C>>,
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
            slots: (0..lanes << shift).map(|_| Slot { cell: C::new() }).collect(),
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
        let lanes =
            Lanes { controls: &self.controls, slots: &self.slots, shift: self.shift, skew: self.skew };
        View { lanes, events: &self.events, statistics: &self.statistics }
    }

    pub fn handle_on_cpu(&self, cpu: u32) -> Handle<'_, C> {
        Handle::on_cpu(self.view(), cpu)
    }
}
