//! moodycamel's ConcurrentQueue with tokens, and Boost's lockfree::queue, both bounded.

use super::{CAPACITY, Item, Tries, TriesHandle};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

type Pointer = *mut c_void;

#[repr(C)]
struct Shims {
    moodycamel_new: unsafe extern "C" fn(usize, usize) -> Pointer,
    moodycamel_free: unsafe extern "C" fn(Pointer),
    producer_new: unsafe extern "C" fn(Pointer) -> Pointer,
    producer_free: unsafe extern "C" fn(Pointer),
    consumer_new: unsafe extern "C" fn(Pointer) -> Pointer,
    consumer_free: unsafe extern "C" fn(Pointer),
    moodycamel_put: unsafe extern "C" fn(Pointer, Pointer, *const c_void) -> bool,
    moodycamel_get: unsafe extern "C" fn(Pointer, Pointer, Pointer) -> bool,
    boost_new: unsafe extern "C" fn(usize) -> Pointer,
    boost_free: unsafe extern "C" fn(Pointer),
    boost_put: unsafe extern "C" fn(Pointer, *const c_void) -> bool,
    boost_get: unsafe extern "C" fn(Pointer, Pointer) -> bool,
}

unsafe extern "C" {
    fn queue_shims(item_size: usize) -> Option<&'static Shims>;
}

fn shims<T: Item>() -> &'static Shims {
    // SAFETY: the table is constant.
    unsafe { queue_shims(T::SIZE) }.expect("the shims know this size")
}

pub struct Moodycamel<T> {
    queue: Pointer,
    shims: &'static Shims,
    item: PhantomData<T>,
}

// SAFETY: made for use by many threads; tokens stay with their handle.
unsafe impl<T> Sync for Moodycamel<T> {}

impl<T: Item> Tries<T> for Moodycamel<T> {
    type Handle<'a> = Tokens<'a, T>;
    const LOCKED: (bool, bool) = (false, false);
    fn new(threads: usize) -> Self {
        let shims = shims::<T>();
        // One producer more: the one that ends the run.
        // SAFETY: plain numbers.
        Self { queue: unsafe { (shims.moodycamel_new)(CAPACITY, threads + 1) }, shims, item: PhantomData }
    }
    fn handle(&self, _: usize) -> Self::Handle<'_> {
        // SAFETY: the queue lives, and the handle borrows from it.
        unsafe {
            let producer = (self.shims.producer_new)(self.queue);
            Tokens { queue: self, producer, consumer: (self.shims.consumer_new)(self.queue) }
        }
    }
}

impl<T> Drop for Moodycamel<T> {
    fn drop(&mut self) {
        // SAFETY: no handle is left, since they borrow from this.
        unsafe { (self.shims.moodycamel_free)(self.queue) }
    }
}

pub struct Tokens<'a, T> {
    queue: &'a Moodycamel<T>,
    producer: Pointer,
    consumer: Pointer,
}

impl<T: Item> TriesHandle<T> for Tokens<'_, T> {
    #[inline]
    fn try_put(&mut self, item: &T) -> bool {
        // SAFETY: queue and token live, the item has the size of the shims.
        unsafe {
            (self.queue.shims.moodycamel_put)(
                self.queue.queue,
                self.producer,
                std::ptr::from_ref(item).cast(),
            )
        }
    }
    #[inline]
    fn try_get(&mut self) -> Option<T> {
        let mut item = MaybeUninit::<T>::uninit();
        // SAFETY: as above; the item was written if the call says so.
        unsafe {
            let taken =
                (self.queue.shims.moodycamel_get)(self.queue.queue, self.consumer, item.as_mut_ptr().cast());
            taken.then(|| item.assume_init())
        }
    }
}

impl<T> Drop for Tokens<'_, T> {
    fn drop(&mut self) {
        // SAFETY: made by `handle`, freed once.
        unsafe {
            (self.queue.shims.producer_free)(self.producer);
            (self.queue.shims.consumer_free)(self.consumer);
        }
    }
}

pub struct Boost<T> {
    queue: Pointer,
    shims: &'static Shims,
    item: PhantomData<T>,
}

// SAFETY: made for use by many threads.
unsafe impl<T> Sync for Boost<T> {}

impl<T: Item> Tries<T> for Boost<T> {
    type Handle<'a> = &'a Self;
    const LOCKED: (bool, bool) = (true, true);
    fn new(_: usize) -> Self {
        let shims = shims::<T>();
        // SAFETY: a plain number.
        Self { queue: unsafe { (shims.boost_new)(CAPACITY) }, shims, item: PhantomData }
    }
    fn handle(&self, _: usize) -> Self::Handle<'_> {
        self
    }
}

impl<T> Drop for Boost<T> {
    fn drop(&mut self) {
        // SAFETY: nobody else has it any more.
        unsafe { (self.shims.boost_free)(self.queue) }
    }
}

impl<T: Item> TriesHandle<T> for &Boost<T> {
    #[inline]
    fn try_put(&mut self, item: &T) -> bool {
        // SAFETY: the queue lives, the item has the size of the shims.
        unsafe { (self.shims.boost_put)(self.queue, std::ptr::from_ref(item).cast()) }
    }
    #[inline]
    fn try_get(&mut self) -> Option<T> {
        let mut item = MaybeUninit::<T>::uninit();
        // SAFETY: as above; the item was written if the call says so.
        unsafe {
            let taken = (self.shims.boost_get)(self.queue, item.as_mut_ptr().cast());
            taken.then(|| item.assume_init())
        }
    }
}
