//! crossbeam's ArrayQueue and bounded channel.

use super::{CAPACITY, Item, Tries, TriesHandle};
use crossbeam_channel::{Receiver, Sender, bounded};
use crossbeam_queue::ArrayQueue;

pub struct Array<T>(ArrayQueue<T>);

impl<T: Item> Tries<T> for Array<T> {
    type Handle<'a> = &'a ArrayQueue<T>;
    const LOCKED: (bool, bool) = (false, false);
    fn new(_: usize) -> Self {
        Self(ArrayQueue::new(CAPACITY))
    }
    fn handle(&self, _: usize) -> Self::Handle<'_> {
        &self.0
    }
}

impl<T: Item> TriesHandle<T> for &ArrayQueue<T> {
    #[inline]
    fn try_put(&mut self, item: &T) -> bool {
        self.push(*item).is_ok()
    }
    #[inline]
    fn try_get(&mut self) -> Option<T> {
        self.pop()
    }
}

pub struct Channel<T>(Sender<T>, Receiver<T>);

impl<T: Item> Tries<T> for Channel<T> {
    type Handle<'a> = &'a Self;
    const LOCKED: (bool, bool) = (false, false);
    fn new(_: usize) -> Self {
        let (sender, receiver) = bounded(CAPACITY);
        Self(sender, receiver)
    }
    fn handle(&self, _: usize) -> Self::Handle<'_> {
        self
    }
}

impl<T: Item> TriesHandle<T> for &Channel<T> {
    #[inline]
    fn try_put(&mut self, item: &T) -> bool {
        self.0.try_send(*item).is_ok()
    }
    #[inline]
    fn try_get(&mut self) -> Option<T> {
        self.1.try_recv().ok()
    }
}
