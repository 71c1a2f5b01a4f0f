//! The queues that are compared, each behind the same two traits.

pub mod bbq;
#[cfg(feature = "cpp")]
pub mod cpp;
pub mod crossbeam;
pub mod michael_scott;
pub mod ours;
pub mod scq;
pub mod spsc;

/// Slots of every queue.
pub const CAPACITY: usize = 1024;

/// What is queued: a time stamp, and bytes up to the item's size.
pub trait Item: Copy + Send + 'static {
    const SIZE: usize;
    fn stamped(time: u64) -> Self;
    fn time(&self) -> u64;
}

impl<const N: usize> Item for [u64; N] {
    const SIZE: usize = N * 8;
    #[inline(always)]
    fn stamped(time: u64) -> Self {
        let mut item = [0x5555_5555_5555_5555; N];
        item[0] = time;
        item
    }
    #[inline(always)]
    fn time(&self) -> u64 {
        self[0]
    }
}

/// A queue as threads use it: both operations wait.
pub trait Queue<T: Item>: Sync + Sized {
    type Handle<'a>: Handle<T>
    where
        Self: 'a;
    fn new(threads: usize) -> Self;
    fn handle(&self, thread: usize) -> Self::Handle<'_>;
    /// How often somebody slept, woke others, and spun in vain.
    fn waits(&self) -> [u64; 3];
}

pub trait Handle<T> {
    fn put(&mut self, item: T);
    fn get(&mut self) -> T;
}

/// A queue that only tries; [`crate::waited::Waited`] adds the waiting.
pub trait Tries<T: Item>: Sync + Sized {
    type Handle<'a>: TriesHandle<T>
    where
        Self: 'a;
    /// Whether a put (a get) ends in a locked instruction, as a look for sleepers needs before it.
    const LOCKED: (bool, bool);
    fn new(threads: usize) -> Self;
    fn handle(&self, thread: usize) -> Self::Handle<'_>;
}

pub trait TriesHandle<T> {
    fn try_put(&mut self, item: &T) -> bool;
    fn try_get(&mut self) -> Option<T>;
}

/// A place for an item that one thread at a time owns, as the queue's protocol says.
pub struct Place<T>(pub std::cell::UnsafeCell<std::mem::MaybeUninit<T>>);

// SAFETY: the queues hand a place from thread to thread by acquire and release operations.
unsafe impl<T: Send> Sync for Place<T> {}

impl<T: Copy> Place<T> {
    pub fn many(count: usize) -> Box<[Self]> {
        (0..count).map(|_| Self(std::cell::UnsafeCell::new(std::mem::MaybeUninit::uninit()))).collect()
    }
    /// # Safety
    /// The caller owns the place now.
    #[inline(always)]
    pub unsafe fn write(&self, item: &T) {
        // SAFETY: the caller owns it.
        unsafe { (*self.0.get()).write(*item) };
    }
    /// # Safety
    /// The caller owns the place now, and it was written.
    #[inline(always)]
    pub unsafe fn read(&self) -> T {
        // SAFETY: the caller owns it, and it was written.
        unsafe { (*self.0.get()).assume_init() }
    }
}
