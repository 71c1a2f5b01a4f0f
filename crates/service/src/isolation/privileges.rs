//! Ids and capabilities.

use rustix::io::{Errno, Result};
use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid};

/// What serving files takes, over files whose owners are mapped: owners, permissions and set-id bits as programs in
/// containers set them; SETUID and SETGID for setfsuid(2), so that what is made belongs to its owner at once.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);

/// Tells the kernel that memory must not be reclaimed through this process's own filesystem. Threads inherit it.
pub fn become_io_flusher() {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: this prctl takes numbers only. Failure (no right, old kernel) costs nothing but that hint.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
}

/// Root of the user namespace, without supplementary groups where that is allowed.
pub fn become_inner_root() -> Result<()> {
    match rustix::thread::set_thread_groups(&[]) {
        // Who maps a single id may not drop groups.
        Ok(()) | Err(Errno::PERM) => {}
        Err(errno) => return Err(errno),
    }
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
}

/// Gives up every capability but those kept, for good.
pub fn reduce() -> Result<()> {
    // A thread that changes its filesystem uid keeps its capabilities.
    rustix::thread::set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_SETUID_FIXUP | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED,
    )?;
    for number in 0..64 {
        if KEPT.bits() & (1 << number) != 0 {
            continue;
        }
        // SAFETY: this prctl takes numbers only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } != 0 {
            match std::io::Error::last_os_error().raw_os_error() {
                Some(libc::EINVAL) => break, // beyond the last one that this kernel knows
                _ => return Err(Errno::PERM),
            }
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let sets = CapabilitySets { effective: KEPT, permitted: KEPT, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)
}

/// Not traceable by its like, no privileges by execve(2), dies with its parent.
pub fn lock() -> Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::thread::set_no_new_privs(true)?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
}
