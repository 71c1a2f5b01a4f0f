//! One io_uring that can do nothing but what the FUSE door needs.
//!
//! It takes commands to a device (URING_CMD) and waits for an eventfd (POLL_ADD); the kernel refuses all else on it for good
//! (IORING_REGISTER_RESTRICTIONS), and so the worker may keep it behind its system call filter.

use std::ffi::c_void;
use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io_uring::{
    IORING_OFF_SQ_RING, IORING_OFF_SQES, IoringEnterFlags, IoringFeatureFlags, IoringOp, IoringRegisterOp,
    IoringRestrictionOp, IoringSetupFlags, IoringSqeFlags, io_uring_enter, io_uring_params,
    io_uring_register, io_uring_restriction, io_uring_setup, register_or_sqe_op_or_sqe_flags_union,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use zerocopy::{Immutable, IntoBytes};

/// Commands that one ring may have under way.
pub const COMMANDS_MAX: u32 = 32;

/// `struct io_uring_sqe` of 128 bytes, with `struct fuse_uring_cmd_req` in it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default, IntoBytes, Immutable)]
pub struct Command {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    /// Which command of the device.
    command: u32,
    padding: u32,
    address: u64,
    len: u32,
    operation_flags: u32,
    user_data: u64,
    reserved: u64,
    fuse_flags: u64,
    commit_id: u64,
    queue: u16,
    fuse_padding: [u16; 3],
    rest: [u64; 7],
}

const _: () = assert!(size_of::<Command>() == 128);

/// `FUSE_IO_URING_CMD_REGISTER`
const REGISTER: u32 = 1;
/// `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`
const COMMIT_AND_FETCH: u32 = 2;

impl Command {
    /// Gives the kernel an entry of `queue`. `parts` are two `iovec`s: header and payload.
    pub fn register(
        device: BorrowedFd<'_>,
        queue: u16,
        parts: *const [libc::iovec; 2],
        user_data: u64,
    ) -> Self {
        Self { address: parts as u64, len: 2, ..Self::to_device(device, REGISTER, queue, user_data) }
    }

    /// Answers the request `commit_id` of an entry and asks for its next one.
    pub fn commit_and_fetch(device: BorrowedFd<'_>, queue: u16, commit_id: u64, user_data: u64) -> Self {
        Self { commit_id, ..Self::to_device(device, COMMIT_AND_FETCH, queue, user_data) }
    }

    fn to_device(device: BorrowedFd<'_>, command: u32, queue: u16, user_data: u64) -> Self {
        let opcode = IoringOp::UringCmd as u8;
        Self { opcode, fd: device.as_raw_fd(), command, queue, user_data, ..Self::default() }
    }

    /// Completes once `file` can be read from.
    pub fn wait_readable(file: BorrowedFd<'_>, user_data: u64) -> Self {
        Self {
            opcode: IoringOp::PollAdd as u8,
            fd: file.as_raw_fd(),
            operation_flags: libc::POLLIN as u32,
            user_data,
            ..Self::default()
        }
    }
}

/// What became of a command.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    pub user_data: u64,
    pub result: i32,
}

/// Memory shared with the kernel.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn new(ring: BorrowedFd<'_>, len: usize, offset: u64) -> rustix::io::Result<Self> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let start = unsafe { mmap(std::ptr::null_mut(), len, protection, flags, ring, offset) }?;
        let start = NonNull::new(start.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { start, len })
    }

    /// A counter at `offset`, which the kernel named.
    fn counter(&self, offset: u32) -> &AtomicU32 {
        assert!(offset as usize + 4 <= self.len && offset % 4 == 0);
        // SAFETY: inside the mapping and aligned; both sides use it as an atomic.
        unsafe { &*self.start.as_ptr().add(offset as usize).cast() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more. An error would mean that it is not there.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// One ring. One thread at a time uses it.
pub struct Ring {
    fd: OwnedFd,
    rings: Mapping,
    commands: Mapping,
    params: io_uring_params,
    /// Commands pushed that the kernel has not been told of.
    pushed: u32,
    /// Commands that have not completed.
    under_way: u32,
}

// SAFETY: the mappings are plain memory, reached through `&mut self` only.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring with its restrictions in force.
    pub fn new() -> io::Result<Self> {
        let mut params = io_uring_params::default();
        params.flags = IoringSetupFlags::SQE128
            | IoringSetupFlags::R_DISABLED
            | IoringSetupFlags::COOP_TASKRUN
            | IoringSetupFlags::NO_SQARRAY;
        // SAFETY: the kernel writes to `params` alone; no command is given yet.
        let fd = unsafe { io_uring_setup(COMMANDS_MAX, &mut params) }?;
        if !params.features.contains(IoringFeatureFlags::SINGLE_MMAP | IoringFeatureFlags::NODROP) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        restrict(&fd)?;
        let rings_bytes = params.cq_off.cqes as usize + params.cq_entries as usize * COMPLETION_BYTES;
        let commands_bytes = params.sq_entries as usize * size_of::<Command>();
        let rings = Mapping::new(fd.as_fd(), rings_bytes, IORING_OFF_SQ_RING)?;
        let commands = Mapping::new(fd.as_fd(), commands_bytes, IORING_OFF_SQES)?;
        Ok(Self { fd, rings, commands, params, pushed: 0, under_way: 0 })
    }

    /// No command is under way, so that others may use the ring.
    pub fn is_idle(&self) -> bool {
        self.pushed == 0 && self.under_way == 0
    }

    /// Queues a command; `submit_and_wait` hands it over.
    ///
    /// # Safety
    /// What the command names (descriptor, memory of an entry) must stay until the thread that submits it has ended or
    /// the command has completed.
    pub unsafe fn push(&mut self, command: &Command) -> rustix::io::Result<()> {
        if self.pushed >= self.params.sq_entries {
            self.enter(None)?;
        }
        let tail = self.rings.counter(self.params.sq_off.tail);
        let place = tail.load(Ordering::Relaxed) & (self.params.sq_entries - 1);
        let target = self.commands.start.cast::<Command>();
        // SAFETY: `place` is below `sq_entries`, for so many commands the mapping has room; the kernel does not look at
        // this one before the tail says so.
        unsafe { target.add(place as usize).write(*command) };
        tail.store(tail.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
        self.pushed += 1;
        Ok(())
    }

    /// Hands over what was pushed and waits until something has completed. INTR when a signal came.
    pub fn submit_and_wait(&mut self) -> rustix::io::Result<()> {
        self.enter(NonZeroU32::new(1))
    }

    /// Hands over what was pushed.
    pub fn submit(&mut self) -> rustix::io::Result<()> {
        self.enter(None)
    }

    fn enter(&mut self, wait_count: Option<NonZeroU32>) -> rustix::io::Result<()> {
        let wait = wait_count.map_or(0, NonZeroU32::get);
        // SAFETY: whoever pushed the commands keeps what they name.
        let taken = unsafe { io_uring_enter(&self.fd, self.pushed, wait, IoringEnterFlags::GETEVENTS) }?;
        let taken = taken.min(self.pushed);
        self.pushed -= taken;
        self.under_way += taken;
        Ok(())
    }

    /// The next command that has completed.
    pub fn completed(&mut self) -> Option<Completion> {
        let head = self.rings.counter(self.params.cq_off.head);
        let at = head.load(Ordering::Relaxed);
        if at == self.rings.counter(self.params.cq_off.tail).load(Ordering::Acquire) {
            return None;
        }
        let place = (at & (self.params.cq_entries - 1)) as usize;
        let start = self.params.cq_off.cqes as usize + place * COMPLETION_BYTES;
        // SAFETY: `place` is below `cq_entries`, for so many the mapping has room, and the kernel has filled it (Acquire).
        let completion = unsafe {
            let record = self.rings.start.as_ptr().add(start);
            Completion {
                user_data: record.cast::<u64>().read_unaligned(),
                result: record.add(8).cast::<i32>().read_unaligned(),
            }
        };
        head.store(at.wrapping_add(1), Ordering::Release);
        self.under_way = self.under_way.saturating_sub(1);
        Some(completion)
    }
}

/// `struct io_uring_cqe`
const COMPLETION_BYTES: usize = 16;

/// Allows what the door needs, for good, and lets the ring begin.
fn restrict(ring: &OwnedFd) -> io::Result<()> {
    let allow = |sqe_op| {
        let mut one = io_uring_restriction::default();
        one.opcode = IoringRestrictionOp::SqeOp;
        one.register_or_sqe_op_or_sqe_flags = register_or_sqe_op_or_sqe_flags_union { sqe_op };
        one
    };
    let mut no_flags = io_uring_restriction::default();
    no_flags.opcode = IoringRestrictionOp::SqeFlagsAllowed;
    no_flags.register_or_sqe_op_or_sqe_flags =
        register_or_sqe_op_or_sqe_flags_union { sqe_flags: IoringSqeFlags::empty() };
    // That no call of io_uring_register is named refuses them all.
    let rules = [allow(IoringOp::UringCmd), allow(IoringOp::PollAdd), no_flags];
    let start = rules.as_ptr().cast::<c_void>();
    // SAFETY: the kernel reads so many records of that layout and keeps none; the second call has no arguments.
    unsafe {
        io_uring_register(ring, IoringRegisterOp::RegisterRestrictions, start, rules.len() as u32)?;
        io_uring_register(ring, IoringRegisterOp::RegisterEnableRings, std::ptr::null(), 0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `None`, with a sentence, where there is no io_uring.
    fn ring() -> Option<Ring> {
        Ring::new().inspect_err(|error| eprintln!("skipped: no io_uring here: {error}")).ok()
    }

    fn event() -> OwnedFd {
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn a_readable_file_completes() {
        let Some(mut ring) = ring() else { return };
        let event = event();
        // SAFETY: `event` outlives the ring's use.
        unsafe { ring.push(&Command::wait_readable(event.as_fd(), 7)) }.unwrap();
        rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
        ring.submit_and_wait().unwrap();
        let done = ring.completed().unwrap();
        assert_eq!((done.user_data, done.result), (7, i32::from(libc::POLLIN)));
        assert!(ring.completed().is_none() && ring.is_idle());
    }

    #[test]
    fn all_other_operations_are_refused() {
        let Some(mut ring) = ring() else { return };
        let event = event();
        for opcode in 0..=64u8 {
            if [IoringOp::UringCmd as u8, IoringOp::PollAdd as u8].contains(&opcode) {
                continue;
            }
            let command = Command { opcode, fd: event.as_raw_fd(), ..Command::default() };
            // SAFETY: names no memory.
            unsafe { ring.push(&command) }.unwrap();
            ring.submit_and_wait().unwrap();
            let refused = ring.completed().unwrap().result;
            // EINVAL: this kernel does not know the operation at all.
            assert!([-libc::EACCES, -libc::EINVAL].contains(&refused), "operation {opcode}: {refused}");
        }
        // SAFETY: no arguments.
        let done =
            unsafe { io_uring_register(&ring.fd, IoringRegisterOp::UnregisterFiles, std::ptr::null(), 0) };
        assert_eq!(done, Err(rustix::io::Errno::ACCESS));
    }
}
