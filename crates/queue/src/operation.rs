//! The operations that [`crate::lanes::Lanes::turn`] runs in one lane or another.
//!
//! Types and not closures, so that each is surely compiled into its caller: a call that returns more than two words, in memory, costs
//! more than the locked instruction that it is about.

use crate::cell::{Cell, SingleCell};
use crate::lane::{Bounds, Index, Lane, LaneControl, Refusal};
use crate::pool::{Held, Pool};

/// What a participant does in a lane.
pub trait Operation<C: Cell> {
    type Output;
    /// The end of the lane that it works at.
    fn end(control: &LaneControl) -> &Index;
    fn run(&mut self, lane: &Lane<'_, C>, bounds: &mut Bounds) -> Result<Self::Output, Refusal>;
}

pub struct Put<C: Cell> {
    pub item: C::Item,
    pub cpu: u32,
}

pub struct PutMany<'a, C: Cell> {
    pub items: &'a [C::Item],
    pub cpu: u32,
}

pub struct Take {
    pub cpu: u32,
}

pub struct TakeMany<'a, C: Cell> {
    pub out: &'a mut [C::Item],
    pub cpu: u32,
}

/// Takes the number of a buffer out of the ring, and the buffer; nothing if the ring's entry was out of date.
pub struct TakeBuffer<'a> {
    pub pool: Pool<'a>,
    pub participant: u32,
    pub cpu: u32,
}

impl<C: Cell> Operation<C> for Put<C> {
    type Output = ();
    #[inline(always)]
    fn end(control: &LaneControl) -> &Index {
        &control.tail
    }
    #[inline(always)]
    fn run(&mut self, lane: &Lane<'_, C>, bounds: &mut Bounds) -> Result<(), Refusal> {
        lane.enqueue(self.item, bounds, self.cpu)
    }
}

impl<C: Cell> Operation<C> for PutMany<'_, C> {
    type Output = usize;
    fn end(control: &LaneControl) -> &Index {
        &control.tail
    }
    fn run(&mut self, lane: &Lane<'_, C>, bounds: &mut Bounds) -> Result<usize, Refusal> {
        lane.enqueue_batch(self.items, bounds, self.cpu)
    }
}

impl<C: Cell> Operation<C> for Take {
    type Output = C::Item;
    #[inline(always)]
    fn end(control: &LaneControl) -> &Index {
        &control.head
    }
    #[inline(always)]
    fn run(&mut self, lane: &Lane<'_, C>, bounds: &mut Bounds) -> Result<C::Item, Refusal> {
        lane.dequeue(bounds, self.cpu)
    }
}

impl<C: Cell> Operation<C> for TakeMany<'_, C> {
    type Output = usize;
    fn end(control: &LaneControl) -> &Index {
        &control.head
    }
    fn run(&mut self, lane: &Lane<'_, C>, bounds: &mut Bounds) -> Result<usize, Refusal> {
        lane.dequeue_batch(self.out, bounds, self.cpu)
    }
}

impl Operation<SingleCell> for TakeBuffer<'_> {
    type Output = Option<Held>;
    #[inline(always)]
    fn end(control: &LaneControl) -> &Index {
        &control.head
    }
    #[inline(always)]
    fn run(&mut self, lane: &Lane<'_, SingleCell>, bounds: &mut Bounds) -> Result<Option<Held>, Refusal> {
        let front = lane.front(bounds)?;
        let held = self.pool.take(SingleCell::item(front.raw), self.participant);
        lane.remove(front, bounds, self.cpu);
        Ok(held)
    }
}
