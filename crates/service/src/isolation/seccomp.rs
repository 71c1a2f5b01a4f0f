//! The system calls that a worker may make.
//!
//! Two filters: what has no place in any worker ends the process, so that an attack shows in the log; what is
//! merely not needed is answered with ENOSYS, which is how libraries probe for newer calls.

use std::collections::BTreeMap;

use libc::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Files and directories, by descriptors.
const FILES: &[i64] = &[
    SYS_read,
    SYS_write,
    SYS_readv,
    SYS_writev,
    SYS_pread64,
    SYS_pwrite64,
    SYS_preadv,
    SYS_pwritev,
    SYS_preadv2,
    SYS_pwritev2,
    SYS_openat,
    SYS_openat2,
    SYS_close,
    SYS_close_range,
    SYS_fstat,
    SYS_newfstatat,
    SYS_statx,
    SYS_fstatfs,
    SYS_statfs,
    SYS_lseek,
    SYS_fsync,
    SYS_fdatasync,
    SYS_syncfs,
    SYS_sync_file_range,
    SYS_ftruncate,
    SYS_fallocate,
    SYS_fadvise64,
    SYS_readahead,
    SYS_copy_file_range,
    SYS_sendfile,
    SYS_splice,
    SYS_tee,
    SYS_getdents64,
    SYS_mkdirat,
    SYS_mknodat,
    SYS_unlinkat,
    SYS_renameat,
    SYS_renameat2,
    SYS_linkat,
    SYS_symlinkat,
    SYS_readlinkat,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fchmodat2,
    SYS_fchown,
    SYS_fchownat,
    SYS_utimensat,
    SYS_fsetxattr,
    SYS_fgetxattr,
    SYS_flistxattr,
    SYS_fremovexattr,
    SYS_setxattr,
    SYS_getxattr,
    SYS_listxattr,
    SYS_removexattr,
    SYS_lsetxattr,
    SYS_lgetxattr,
    SYS_llistxattr,
    SYS_lremovexattr,
    SYS_SETXATTRAT,
    SYS_GETXATTRAT,
    SYS_LISTXATTRAT,
    SYS_REMOVEXATTRAT,
    SYS_close_range,
    SYS_flock,
    SYS_fcntl,
    SYS_dup,
    SYS_dup2,
    SYS_dup3,
    SYS_umask,
    SYS_fchdir,
    SYS_setfsuid,
    SYS_setfsgid,
    SYS_memfd_create,
    SYS_pipe2,
    SYS_inotify_init1,
    SYS_inotify_add_watch,
    SYS_inotify_rm_watch,
];
const SYS_SETXATTRAT: i64 = 463;
const SYS_GETXATTRAT: i64 = 464;
const SYS_LISTXATTRAT: i64 = 465;
const SYS_REMOVEXATTRAT: i64 = 466;

/// Threads, memory, waiting, time: what any program takes.
const RUNTIME: &[i64] = &[
    SYS_futex,
    SYS_futex_waitv,
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_brk,
    SYS_membarrier,
    SYS_mincore,
    SYS_set_robust_list,
    SYS_get_robust_list,
    SYS_rseq,
    SYS_set_tid_address,
    SYS_gettid,
    SYS_getpid,
    SYS_getppid,
    SYS_getuid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getegid,
    SYS_getgroups,
    SYS_capget,
    SYS_tgkill,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_rt_sigpending,
    SYS_rt_sigtimedwait,
    SYS_sigaltstack,
    SYS_restart_syscall,
    SYS_exit,
    SYS_exit_group,
    SYS_poll,
    SYS_ppoll,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_epoll_pwait2,
    SYS_eventfd2,
    SYS_timerfd_create,
    SYS_timerfd_settime,
    SYS_clock_gettime,
    SYS_clock_getres,
    SYS_clock_nanosleep,
    SYS_nanosleep,
    SYS_gettimeofday,
    SYS_times,
    SYS_getrusage,
    SYS_getrandom,
    SYS_uname,
    SYS_sysinfo,
    SYS_sched_yield,
    SYS_sched_getaffinity,
    SYS_getcpu,
    SYS_sendmsg,
    SYS_recvmsg,
    SYS_sendto,
    SYS_recvfrom,
    SYS_shutdown,
    SYS_landlock_create_ruleset,
    SYS_landlock_add_rule,
    SYS_landlock_restrict_self,
];

/// Calls that only an attacker makes here.
const DEADLY: &[i64] = &[
    SYS_execve,
    SYS_execveat,
    SYS_fork,
    SYS_vfork,
    SYS_ptrace,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_pidfd_getfd,
    SYS_mount,
    SYS_umount2,
    SYS_pivot_root,
    SYS_chroot,
    SYS_setns,
    SYS_open_tree,
    SYS_move_mount,
    SYS_fsopen,
    SYS_fsmount,
    SYS_mount_setattr,
    SYS_init_module,
    SYS_finit_module,
    SYS_delete_module,
    SYS_kexec_load,
    SYS_kexec_file_load,
    SYS_bpf,
    SYS_perf_event_open,
    SYS_userfaultfd,
    SYS_open_by_handle_at,
    SYS_add_key,
    SYS_request_key,
    SYS_keyctl,
    SYS_swapon,
    SYS_swapoff,
    SYS_reboot,
    SYS_iopl,
    SYS_ioperm,
    SYS_modify_ldt,
    SYS_acct,
    SYS_quotactl,
    SYS_settimeofday,
    SYS_clock_settime,
    SYS_socket,
    SYS_connect,
    SYS_bind,
    SYS_listen,
    SYS_accept,
    SYS_accept4,
];

/// Installs both filters for this thread and all that it starts.
pub fn install() -> Result<(), seccompiler::Error> {
    let deadly = DEADLY.iter().map(|&call| (call, Vec::new())).collect();
    apply(deadly, SeccompAction::Allow, SeccompAction::KillProcess)?;
    apply(allowed()?, SeccompAction::Errno(ENOSYS as u32), SeccompAction::Allow)
}

fn apply(rules: Rules, others: SeccompAction, listed: SeccompAction) -> Result<(), seccompiler::Error> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let program: BpfProgram = SeccompFilter::new(rules, others, listed, arch)?.try_into()?;
    seccompiler::apply_filter(&program)
}

fn allowed() -> Result<Rules, seccompiler::Error> {
    let mut rules: Rules = FILES.iter().chain(RUNTIME).map(|&call| (call, Vec::new())).collect();
    // Threads only. clone3 cannot be looked into; without it the C library uses clone.
    rules.insert(SYS_clone, vec![has_bits(0, CLONE_THREAD as u64)?]);
    // A working directory and umask of the thread's own.
    rules.insert(SYS_unshare, vec![is(0, CLONE_FS as u64)?]);
    // No code but what was there at the start.
    rules.insert(SYS_mmap, vec![lacks_bits(2, PROT_EXEC as u64)?]);
    rules.insert(SYS_mprotect, vec![lacks_bits(2, PROT_EXEC as u64)?]);
    // Among the CPUs of its cpuset a thread chooses for itself, not for others.
    rules.insert(SYS_sched_setaffinity, vec![is(0, 0)?]);
    // Rings are made before, and can do little: no other can be made, nor these be changed. Given to and waited for, that is all.
    rules.insert(SYS_io_uring_enter, vec![is(3, IORING_ENTER_GETEVENTS)?]);
    // Limits are read, never set.
    rules.insert(SYS_prlimit64, vec![rule(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?]);
    rules.insert(
        SYS_prctl,
        [
            PR_SET_NAME,
            PR_GET_NAME,
            PR_GET_SECUREBITS,
            PR_SET_SECUREBITS,
            PR_SET_NO_NEW_PRIVS,
            PR_SET_IO_FLUSHER,
        ]
        .iter()
        .map(|&option| is(0, option as u64))
        .collect::<Result<_, _>>()?,
    );
    rules.insert(
        SYS_ioctl,
        [
            FICLONE,
            FICLONERANGE,
            FUSE_DEV_IOC_CLONE,
            FUSE_DEV_IOC_BACKING_OPEN,
            FUSE_DEV_IOC_BACKING_CLOSE,
            FS_IOC_GETFLAGS,
            FS_IOC_SETFLAGS,
            FS_IOC_FSGETXATTR,
            FS_IOC_FSSETXATTR,
        ]
        .iter()
        .map(|&request| is(1, request))
        .collect::<Result<_, _>>()?,
    );
    Ok(rules)
}

// linux/fs.h and linux/fuse.h; the numbers are the same on every 64-bit architecture that Rust's standard library and
// seccompiler share.
const FICLONE: u64 = 0x4004_9409;
const FICLONERANGE: u64 = 0x4020_940d;
const FUSE_DEV_IOC_CLONE: u64 = 0x8004_e500;
const FUSE_DEV_IOC_BACKING_OPEN: u64 = 0x4010_e501;
const FUSE_DEV_IOC_BACKING_CLOSE: u64 = 0x4004_e502;
const FS_IOC_GETFLAGS: u64 = 0x8008_6601;
const FS_IOC_SETFLAGS: u64 = 0x4008_6602;
const FS_IOC_FSGETXATTR: u64 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u64 = 0x401c_5820;
const PR_SET_IO_FLUSHER: c_int = 57;
const IORING_ENTER_GETEVENTS: u64 = 1;

fn rule(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, seccompiler::Error> {
    let condition = SeccompCondition::new(argument, length, operator, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn is(argument: u8, value: u64) -> Result<SeccompRule, seccompiler::Error> {
    rule(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn has_bits(argument: u8, bits: u64) -> Result<SeccompRule, seccompiler::Error> {
    rule(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bits), bits)
}

fn lacks_bits(argument: u8, bits: u64) -> Result<SeccompRule, seccompiler::Error> {
    rule(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bits), 0)
}
