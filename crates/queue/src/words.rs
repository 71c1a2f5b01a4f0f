//! Queues of words: RCQS (40 bits in one word) and RCQD (64 bits, double-width compare-and-swap).

use crate::cell::{Cell, DoubleCell, SingleCell};
use crate::handle::{Handle, View};
use crate::layout::{self, Config, Geometry, Kind, Memory};
use crate::{Error, Stats};
use core::marker::PhantomData;

/// A queue of words in memory of its own or shared.
pub struct Words<C, M> {
    memory: M,
    geometry: Geometry,
    cell: PhantomData<fn() -> C>,
}

/// One word a slot, lock-free. With one lane linearizable as a first-in first-out queue.
pub type Rcqs<M> = Words<SingleCell, M>;
/// A double word a slot: items of 64 bits.
pub type Rcqd<M> = Words<DoubleCell, M>;

mod private {
    pub trait Kinded {
        const KIND: super::Kind;
    }
    impl Kinded for super::SingleCell {
        const KIND: super::Kind = super::Kind::Single;
    }
    impl Kinded for super::DoubleCell {
        const KIND: super::Kind = super::Kind::Double;
    }
}
use private::Kinded;

#[cfg(feature = "alloc")]
impl<C: Cell + Kinded> Words<C, layout::Heap> {
    /// A queue inside this process.
    pub fn new(config: &Config) -> Result<Self, Error> {
        let memory = layout::Heap::new(Self::size_bytes(config)?)?;
        Self::create(memory, config)
    }
}

impl<C: Cell + Kinded, M: Memory> Words<C, M> {
    /// Bytes of memory that a queue of this configuration needs.
    pub fn size_bytes(config: &Config) -> Result<usize, Error> {
        Ok(Geometry::new(C::KIND, config)?.total_size())
    }

    /// Makes a queue in zeroed memory that nobody else uses yet.
    pub fn create(memory: M, config: &Config) -> Result<Self, Error> {
        let geometry = Geometry::new(C::KIND, config)?;
        if !C::supported() {
            return Err(Error::Unsupported);
        }
        layout::create(&memory, &geometry)?;
        Ok(Self { memory, geometry, cell: PhantomData })
    }

    /// Takes part in a queue that exists in the memory.
    pub fn attach(memory: M) -> Result<Self, Error> {
        let geometry = layout::attach(&memory)?;
        if geometry.kind != C::KIND {
            return Err(Error::NotAQueue);
        }
        if !C::supported() {
            return Err(Error::Unsupported);
        }
        Ok(Self { memory, geometry, cell: PhantomData })
    }

    fn view(&self) -> View<'_, C> {
        layout::view(&self.memory, &self.geometry)
    }

    /// A participant; each thread has its own.
    pub fn handle(&self) -> Handle<'_, C> {
        Handle::new(self.view())
    }

    /// A participant that counts as running on `cpu` until it looks for itself.
    pub fn handle_on_cpu(&self, cpu: u32) -> Handle<'_, C> {
        Handle::on_cpu(self.view(), cpu)
    }

    pub fn close(&self) {
        self.view().close();
    }

    pub fn len(&self) -> usize {
        self.view().lanes.item_count()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn capacity(&self) -> usize {
        self.geometry.capacity()
    }

    pub fn stats(&self) -> Stats {
        self.view().stats()
    }

    pub fn memory(&self) -> &M {
        &self.memory
    }
}
