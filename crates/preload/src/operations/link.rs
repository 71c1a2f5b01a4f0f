//! The process's channel: made on first need, given up for good when it fails.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use polytropo_client::Channel;

use super::process;

const NONE: u32 = 0;
const CONNECTING: u32 = 1;
const READY: u32 = 2;
const OFF: u32 = 3;
/// Off, and there was one.
const GONE: u32 = 4;
/// Descriptors of the channel below this number would be in the way of the program's own.
const LOWEST_DESCRIPTOR: i32 = 512;

pub struct Link {
    state: AtomicU32,
    channel: UnsafeCell<MaybeUninit<Channel>>,
}

// SAFETY: the channel is written by whoever moved the state from NONE to CONNECTING, and read only after READY.
unsafe impl Sync for Link {}

impl Link {
    pub const fn new() -> Self {
        Self { state: AtomicU32::new(NONE), channel: UnsafeCell::new(MaybeUninit::uninit()) }
    }

    /// The channel, if there is one now.
    #[inline]
    pub fn get(&self) -> Option<&Channel> {
        // SAFETY: READY says that it was written, and it is never written again but in a forked child, by `forget`.
        (self.state.load(Acquire) == READY).then(|| unsafe { (*self.channel.get()).assume_init_ref() })
    }

    /// The channel, connected if need be. A thread that comes while another connects does without.
    pub fn get_or_connect(&self, connect: impl FnOnce() -> Option<Channel>) -> Option<&Channel> {
        if self.state.compare_exchange(NONE, CONNECTING, AcqRel, Acquire).is_err() {
            return self.get();
        }
        let channel = connect().filter(|channel| {
            // A low limit keeps them low: then they are the program's numbers, and there is no channel.
            channel.descriptors().iter().all(|descriptor| *descriptor >= LOWEST_DESCRIPTOR)
        });
        let Some(channel) = channel else {
            self.state.store(OFF, Release);
            return None;
        };
        // SAFETY: this thread alone is CONNECTING.
        unsafe { (*self.channel.get()).write(channel) };
        self.state.store(READY, Release);
        let channel = self.get()?;
        if let Some(table) = process::known_table() {
            for descriptor in channel.descriptors() {
                table.keep_own(descriptor as usize);
            }
        }
        Some(channel)
    }

    /// No use any more: everything goes to the kernel. The memory stays, since other threads may be in it.
    pub fn give_up(&self) {
        let given_up = |state| Some(if matches!(state, READY | GONE) { GONE } else { OFF });
        let _ = self.state.fetch_update(AcqRel, Acquire, given_up);
    }

    /// The channel that was given up, for what became of writes that had returned.
    pub fn given_up(&self) -> Option<&Channel> {
        // SAFETY: it was READY before; see `get`.
        (self.state.load(Acquire) == GONE).then(|| unsafe { (*self.channel.get()).assume_init_ref() })
    }

    /// In a forked child, which has none of the memory: begins anew.
    pub fn forget(&self) {
        if self.state.swap(NONE, AcqRel) == READY {
            // SAFETY: it was READY, and the child's only thread takes it out.
            unsafe { (*self.channel.get()).assume_init_read() }.forget_in_child();
        }
    }
}
