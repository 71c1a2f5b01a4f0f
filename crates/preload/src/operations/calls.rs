//! Which operation a call is, and what every call does to what is known.

use super::placeholders::{self, Asked};
use super::process::{self, LINK, table};
use super::table::{Kind, Table};
use super::{changing, directories, elsewhere, kept, moving, names, reading, standins, writing};
use crate::hooks::Answer;
use crate::sys::{self, nr};
use crate::trace::{self, Why};

const CLONE_VM: usize = 0x100;
const CLONE_FILES: usize = 0x400;
const CLONE_FS: usize = 0x200;
const CLONE_NEWPID: usize = 0x2000_0000;
const PR_SET_SECCOMP: usize = 22;
const CLONE_VFORK: usize = 0x4000;
const CLONE_THREAD: usize = 0x1_0000;
/// New namespaces: CLONE_NEW*.
const CLONE_NAMESPACES: usize = 0x7e02_0080;
const O_ACCMODE_ETC: usize = 3 | 0o100 | 0o1000 | 0o200_000 | 0o10_000_000 | 0o40_000;
const AT_EMPTY_PATH: usize = 0x1000;
const CLOSE_RANGE_UNSHARE: usize = 2;
const F_NOTIFY: usize = 1026;
const F_SETFD: usize = 2;
const F_SETLK: usize = 6;
const F_SETLKW: usize = 7;
const ENOENT: isize = -2;
const EBADF: isize = -9;
const EBUSY: isize = -16;

/// Decides one call. `at_bridge`: the thread can be cancelled while it waits in the kernel, but only there.
pub fn answer(number: usize, arguments: &[usize; 6], at_bridge: bool) -> Answer {
    if matches!(number, nr::EXIT_GROUP) {
        process::tell();
        trace::report();
        return Answer::Pass(Why::EndOfProcess);
    }
    let Some(table) = table() else { return Answer::Pass(Why::NotOurs) };
    if matches!(number, nr::FCNTL | nr::INOTIFY_ADD_WATCH | nr::FANOTIFY_MARK) && watches(number, arguments) {
        process::watch();
        return Answer::Pass(Why::Unseen);
    }
    // Before what is done to descriptors: names in open directories need not be opened by the kernel for it.
    if matches!(number, nr::RENAME | nr::RENAMEAT | nr::RENAMEAT2) {
        // As long as their paths lead to them.
        standins::name_all(table);
    }
    if let Some(answer) = changing::answer(number, arguments) {
        return answer;
    }
    if let Some(answer) = directories::answer(number, arguments) {
        return answer;
    }
    match number {
        nr::READ => reading::read(table, arguments),
        nr::PREAD64 => reading::pread(table, arguments),
        nr::LSEEK => reading::seek(table, arguments),
        nr::WRITE => writing::write(table, arguments),
        nr::PWRITE64 => writing::pwrite(table, arguments),
        nr::WRITEV => writing::write_gathered(table, arguments),
        nr::FTRUNCATE
        | nr::FSYNC
        | nr::FDATASYNC
        | nr::FALLOCATE
        | nr::SYNC_FILE_RANGE
        | nr::FCHMOD
        | nr::FCHOWN
        | nr::UTIMENSAT => writing::change(table, number, arguments),
        nr::UMASK => writing::change_umask(arguments),
        nr::SETRLIMIT | nr::PRLIMIT64 => writing::change_limit(table, number, arguments),
        nr::OPEN => open(table, number, arguments, (arguments[1], arguments[2]), at_bridge),
        nr::OPENAT => open(table, number, arguments, (arguments[2], arguments[3]), at_bridge),
        nr::CLOSE => close(table, arguments),
        nr::DUP2 | nr::DUP3 => replace(table, number, arguments),
        nr::CLOSE_RANGE => close_range(table, arguments),
        nr::FORK | nr::VFORK | nr::CLONE | nr::CLONE3 => child(table, number, arguments),
        nr::EXECVE | nr::EXECVEAT | nr::SENDMSG | nr::SENDMMSG => {
            placeholders::upgrade_all(table, matches!(number, nr::EXECVE | nr::EXECVEAT));
            table.release_all();
            directories::upgrade_all(matches!(number, nr::EXECVE | nr::EXECVEAT));
            if number == nr::EXECVE && sys::is_executable(arguments[0]) {
                process::tell();
                trace::report_before_exec();
            }
            Answer::Pass(Why::Shares)
        }
        nr::NEWFSTATAT if arguments[3] & AT_EMPTY_PATH != 0 => about_descriptor(table, number, arguments),
        nr::STAT | nr::LSTAT | nr::NEWFSTATAT => names::stat(number, arguments),
        nr::STATX => names::statx(arguments),
        nr::ACCESS | nr::FACCESSAT | nr::FACCESSAT2 => names::access(number, arguments),
        nr::READLINK | nr::READLINKAT => names::read_link(number, arguments),
        nr::CHDIR | nr::FCHDIR => {
            // Their paths may begin where the process is.
            standins::name_all(table);
            if number == nr::FCHDIR && !standins::name_one(table, arguments[0]) {
                return Answer::Done(placeholders::refusal());
            }
            names::change_directory(number, arguments)
        }
        nr::PRCTL if arguments[0] != PR_SET_SECCOMP => Answer::Pass(Why::NotOurs),
        nr::UNSHARE if arguments[0] & (CLONE_FILES | CLONE_NEWPID) == 0 => {
            placeholders::upgrade_all(table, false);
            kept::give_up_all();
            reach_changes()
        }
        nr::SETUID
        | nr::SETGID
        | nr::SETREUID
        | nr::SETREGID
        | nr::SETGROUPS
        | nr::SETRESUID
        | nr::SETRESGID
        | nr::SETFSUID
        | nr::SETFSGID
        | nr::CAPSET
        | nr::LANDLOCK_RESTRICT_SELF
        | nr::CHROOT
        | nr::PIVOT_ROOT
        | nr::MOUNT
        | nr::UMOUNT2
        | nr::MOVE_MOUNT => {
            // As long as this process still may.
            placeholders::upgrade_all(table, false);
            kept::give_up_all();
            reach_changes()
        }
        // A filter may kill for calls that the program does not make itself. Children in other namespaces of processes may have this one's number, by which
        // they are told from it.
        nr::PRCTL | nr::SECCOMP | nr::IO_URING_SETUP | nr::IO_SETUP | nr::UNSHARE | nr::SETNS => {
            process::turn_off();
            Answer::Pass(Why::Unseen)
        }
        nr::COPY_FILE_RANGE => moving::copy_range(table, arguments),
        nr::SENDFILE => moving::send_file(table, arguments),
        nr::IOCTL => elsewhere::control(table, arguments),
        nr::BPF | nr::PERF_EVENT_OPEN | nr::PIDFD_GETFD | nr::FSCONFIG => {
            elsewhere::make_all_real(table);
            about_descriptor(table, number, arguments)
        }
        nr::FCNTL if matches!(arguments[1], F_SETLK | F_SETLKW) => {
            elsewhere::note_lock(table, arguments[0]);
            about_descriptor(table, number, arguments)
        }
        nr::FCNTL if arguments[1] == F_SETFD => placeholders::set_flags(table, arguments[0], arguments[2]),
        _ => about_descriptor(table, number, arguments),
    }
}

/// The kernel is to tell of what happens to files, and does not see what is done without it.
#[cold]
fn watches(number: usize, arguments: &[usize; 6]) -> bool {
    match number {
        nr::FCNTL => arguments[1] == F_NOTIFY,
        nr::INOTIFY_ADD_WATCH => sys::device_of(arguments[1]) == Some(process::setting().device()),
        _ => true,
    }
}

/// A call about descriptors that is no operation of its own.
#[inline]
pub fn about_descriptor(table: &Table, number: usize, arguments: &[usize; 6]) -> Answer {
    if let Some(answer) = elsewhere::refuse_own(table, number, arguments) {
        return answer;
    }
    if let Some(answer) = placeholders::answer(table, number, arguments) {
        return answer;
    }
    if let Some(answer) = placeholders::make_real(table, number, arguments) {
        return answer;
    }
    hand_over(table, number, arguments);
    Answer::Pass(Why::NotOurs)
}

/// The channel belongs to the rights and the mounts of its making: paths are the kernel's from now on.
fn reach_changes() -> Answer {
    // With the rights with which they were opened.
    directories::upgrade_all(false);
    names::end();
    Answer::Pass(Why::Reach)
}

/// A call that the kernel does, and that may see the offset of a file that it names.
fn hand_over(table: &Table, number: usize, arguments: &[usize; 6]) {
    // These do not look at offsets.
    const BLIND: [usize; 12] = [
        nr::FSTAT,
        nr::NEWFSTATAT,
        nr::STATX,
        nr::MMAP,
        nr::FADVISE64,
        nr::FLOCK,
        nr::FSYNC,
        nr::FSTATFS,
        nr::FGETXATTR,
        nr::READAHEAD,
        nr::READLINKAT,
        nr::FACCESSAT,
    ];
    if BLIND.contains(&number)
        || (number == nr::FCNTL && matches!(arguments[1], 1..=3))
        || (number == nr::IOCTL && arguments[1] == placeholders::TCGETS)
    {
        return;
    }
    let named = crate::table::DESCRIPTORS.get(number).copied().unwrap_or(0);
    for (at, descriptor) in arguments.iter().enumerate() {
        if named >> at & 1 == 1
            && let Some(entry) = table.entry(*descriptor)
        {
            entry.release(*descriptor);
        }
    }
}

/// open(2): what is opened for reading only, and by this process alone, is held from its beginning.
fn open(
    table: &Table,
    number: usize,
    arguments: &[usize; 6],
    (flags, mode): (usize, usize),
    at_bridge: bool,
) -> Answer {
    let (directory, path) =
        if number == nr::OPEN { (sys::AT_FDCWD, arguments[0]) } else { (arguments[0], arguments[1]) };
    if let Some(errno) = names::missing(directory, path, flags) {
        return Answer::Done(errno);
    }
    if let Some(opened) = directories::open(number, arguments) {
        if let Some(entry) = usize::try_from(opened).ok().and_then(|opened| table.entry(opened)) {
            let _ = placeholders::end(entry);
        }
        return Answer::Asked(opened);
    }
    if flags & O_ACCMODE_ETC != 0 {
        let opened = writing::open(table, Asked { directory, path, flags }, mode);
        return opened.unwrap_or(Answer::Pass(Why::NotHeld));
    }
    if let Some(answer) = placeholders::open(table, Asked { directory, path, flags }) {
        return answer;
    }
    if at_bridge {
        // It may wait, for the other end of a FIFO.
        return Answer::Pass(Why::NotHeld);
    }
    standins::name_all(table);
    // SAFETY: the program's own call.
    let opened = unsafe { sys::call(number, *arguments) };
    if opened >= 0 {
        if let Some(entry) = table.entry(opened as usize) {
            let _ = placeholders::end(entry);
            directories::closed(opened as usize);
        }
        table.hold(opened as usize);
    } else if opened == ENOENT {
        names::was_missing(directory, path, flags);
    }
    Answer::Asked(opened)
}

fn is_our_own(descriptor: usize) -> bool {
    LINK.descriptors().is_some_and(|own| own.contains(&(descriptor as i32)))
}

/// close(2). Nothing may be learnt of the old file after it is gone: so it is forgotten before and after.
fn close(table: &Table, arguments: &[usize; 6]) -> Answer {
    let descriptor = arguments[0];
    if is_our_own(descriptor) {
        // The program has opened no such descriptor.
        return Answer::Done(EBADF);
    }
    let Some(entry) = table.entry(descriptor) else { return Answer::Pass(Why::NotOurs) };
    if placeholders::settled(entry) == Kind::Own {
        return Answer::Done(EBADF);
    }
    elsewhere::before_end(descriptor, entry);
    let ended = placeholders::end(entry);
    directories::closed(descriptor);
    // SAFETY: the program's own call.
    let closed = unsafe { sys::call(nr::CLOSE, *arguments) };
    Answer::Asked(ended.map_or_else(|errno| if closed == 0 { errno } else { closed }, |()| closed))
}

/// dup2(2), dup3(2): the first is shared from now on, the second ends.
fn replace(table: &Table, number: usize, arguments: &[usize; 6]) -> Answer {
    let [from, to, ..] = *arguments;
    if is_our_own(to) {
        return Answer::Done(EBUSY);
    }
    if let Some(entry) = table.entry(from) {
        if entry.kind() == Kind::Own {
            return Answer::Done(EBADF);
        }
        if !placeholders::upgrade(from, entry) {
            return Answer::Done(placeholders::refusal());
        }
        entry.release(from);
    }
    let Some(entry) = table.entry(to).filter(|_| from as u32 != to as u32) else {
        return Answer::Pass(Why::NotOurs);
    };
    if placeholders::settled(entry) == Kind::Own {
        // Either this, or the library closes it: then that is over first.
        if !entry.exchange_kind(entry.generation(), Kind::Own, Kind::Unknown) {
            placeholders::settled(entry);
        }
        kept::forget_descriptor(to);
    }
    elsewhere::before_end(to, entry);
    let locked = placeholders::lock(entry);
    entry.release(to);
    directories::make_real(to);
    // SAFETY: the program's own call.
    let done = unsafe { sys::call(number, *arguments) };
    match (done >= 0, locked) {
        (true, true) => _ = placeholders::end_locked(entry),
        (true, false) => _ = placeholders::end(entry),
        (false, true) => placeholders::unlock(entry),
        (false, false) => {}
    }
    if done >= 0 {
        directories::closed(to);
        directories::duplicated(from, done);
    }
    Answer::Asked(done)
}

/// close_range(2), around our own descriptors.
fn close_range(table: &Table, arguments: &[usize; 6]) -> Answer {
    let [first, last, flags, ..] = *arguments;
    let (first, last) = (first as u32, last as u32);
    if flags & CLOSE_RANGE_UNSHARE != 0 || first > last {
        process::turn_off();
        return Answer::Pass(Why::Unseen);
    }
    if flags != 0 {
        return Answer::Pass(Why::NotOurs);
    }
    let mut own = LINK.descriptors().unwrap_or([i32::MAX; 3]);
    own.sort_unstable();
    let forget = || {
        for descriptor in first..=last.min(super::table::DESCRIPTORS_MAX as u32) {
            if let Some(entry) = table.entry(descriptor as usize) {
                placeholders::settled(entry);
                elsewhere::before_end(descriptor as usize, entry);
                let _ = placeholders::end(entry);
                directories::closed(descriptor as usize);
            }
        }
    };
    kept::give_up_all();
    forget();
    let mut from = first;
    let mut result = 0;
    for stop in own.into_iter().map(|own| own as u32).filter(|own| (first..=last).contains(own)) {
        if from < stop {
            // SAFETY: the program's own call, in parts.
            result = unsafe { sys::call(nr::CLOSE_RANGE, [from as usize, stop as usize - 1, 0, 0, 0, 0]) };
        }
        from = stop + 1;
    }
    if from <= last {
        // SAFETY: as above.
        result = unsafe { sys::call(nr::CLOSE_RANGE, [from as usize, last as usize, 0, 0, 0, 0]) };
    }
    forget();
    own.into_iter().filter(|own| *own != i32::MAX).for_each(|own| table.keep_own(own as usize));
    Answer::Asked(result)
}

/// A child or a thread.
fn child(table: &Table, number: usize, arguments: &[usize; 6]) -> Answer {
    let flags = match number {
        nr::FORK => 0,
        nr::VFORK => CLONE_VM | CLONE_VFORK,
        nr::CLONE => arguments[0],
        // SAFETY: the C library's structure begins with the flags; null is refused by the kernel.
        _ => unsafe { (arguments[0] as *const usize).as_ref() }.copied().unwrap_or(0),
    };
    if flags & CLONE_THREAD != 0 {
        return Answer::Pass(Why::NotOurs);
    }
    if flags & CLONE_FS != 0 {
        // Another process may change the working directory of this one.
        names::end();
    }
    placeholders::upgrade_all(table, false);
    table.release_all();
    directories::upgrade_all(flags & CLONE_VFORK != 0 && flags & CLONE_FILES == 0);
    let memory = flags & CLONE_VM != 0;
    let strange = match (memory, flags & CLONE_VFORK != 0) {
        (true, true) => flags & CLONE_NAMESPACES != 0 || !process::lend(),
        (true, false) => true,
        (false, _) => false,
    };
    if strange || flags & CLONE_FILES != 0 {
        process::turn_off();
    }
    Answer::Pass(Why::Shares)
}
