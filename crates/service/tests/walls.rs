//! The filters of a worker, each tried in a process of its own: this test program, started anew.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use polytropo_service::isolation::{landlock, seccomp};

const PART: &str = "POLYTROPO_TEST_PART";

/// Runs the test `name` again in a process where `inside` happens.
fn in_a_process(name: &str, inside: impl FnOnce()) -> Option<ExitStatus> {
    if std::env::var_os(PART).is_some_and(|part| part == name) {
        inside();
        std::process::exit(0);
    }
    let program = std::env::current_exe().unwrap();
    let status = Command::new(program).args(["--exact", name, "--nocapture"]).env(PART, name).status();
    Some(status.unwrap())
}

fn errno_of(done: libc::c_long) -> i32 {
    assert_eq!(done, -1, "it was allowed");
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

#[test]
fn a_program_cannot_be_run() {
    let status = in_a_process("a_program_cannot_be_run", || {
        rustix::thread::set_no_new_privs(true).unwrap();
        seccomp::install().unwrap();
        // SAFETY: the filter ends the process before the null pointers are looked at.
        unsafe { libc::execve(std::ptr::null(), std::ptr::null(), std::ptr::null()) };
    });
    assert_eq!(status.unwrap().signal(), Some(libc::SIGSYS));
}

#[test]
fn a_socket_cannot_be_made() {
    let status = in_a_process("a_socket_cannot_be_made", || {
        rustix::thread::set_no_new_privs(true).unwrap();
        seccomp::install().unwrap();
        // SAFETY: the call takes numbers only.
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
    });
    assert_eq!(status.unwrap().signal(), Some(libc::SIGSYS));
}

#[test]
fn what_is_not_needed_is_not_there() {
    let status = in_a_process("what_is_not_needed_is_not_there", || {
        rustix::thread::set_no_new_privs(true).unwrap();
        seccomp::install().unwrap();
        // SAFETY: these calls take numbers only, or are refused before pointers are looked at.
        unsafe {
            assert_eq!(errno_of(libc::syscall(libc::SYS_setuid, 0)), libc::ENOSYS);
            assert_eq!(errno_of(libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER)), libc::ENOSYS);
            assert_eq!(errno_of(libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)), libc::ENOSYS);
            assert_eq!(errno_of(libc::syscall(libc::SYS_ioctl, 0, libc::TIOCSTI, 0)), libc::ENOSYS);
            let code = libc::PROT_READ | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let done = libc::syscall(libc::SYS_mmap, 0, 4096, code, flags, -1, 0);
            assert_eq!(errno_of(done), libc::ENOSYS);
            let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            let set = libc::syscall(libc::SYS_prlimit64, 0, libc::RLIMIT_CORE, &raw const limit, 0);
            assert_eq!(errno_of(set), libc::ENOSYS);
        }
        // What serving takes works: threads, files, memory, a umask of the thread's own.
        let thread = std::thread::spawn(|| {
            // SAFETY: only this thread's umask and working directory are parted.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.unwrap();
            vec![1u8; 1 << 22].len()
        });
        assert_eq!(thread.join().unwrap(), 1 << 22);
        File::open("/").unwrap().metadata().unwrap();
    });
    assert!(status.unwrap().success());
}

fn open_in(directory: &OwnedFd, name: &str, flags: libc::c_int) -> std::io::Result<()> {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: the name is NUL-terminated and lives through the call; the new descriptor is closed by `File`.
    let opened = unsafe { libc::openat(directory.as_raw_fd(), name.as_ptr(), flags, 0o600) };
    if opened < 0 {
        return Err(std::io::Error::last_os_error());
    }
    drop(own(opened));
    Ok(())
}

fn own(descriptor: libc::c_int) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: the caller just got it from the kernel and gives it away.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

#[test]
fn a_stack_reaches_its_own_directories_only() {
    let place = tempfile::tempdir().unwrap();
    let directory = |name: &str| -> OwnedFd {
        let path = place.path().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("file"), name).unwrap();
        File::open(path).unwrap().into()
    };
    let (ours, layer, others) = (directory("ours"), directory("layer"), directory("others"));
    let confined = std::thread::spawn(move || {
        rustix::thread::set_no_new_privs(true).unwrap();
        landlock::allow_only([(&ours, false), (&layer, true)].into_iter()).unwrap();
        let denied = |done: std::io::Result<()>| done.unwrap_err().raw_os_error() == Some(libc::EACCES);
        open_in(&ours, "file", libc::O_RDWR).unwrap();
        open_in(&ours, "new", libc::O_RDWR | libc::O_CREAT).unwrap();
        rustix::fs::mkdirat(&ours, "d", rustix::fs::Mode::RWXU).unwrap();
        // Between directories too, which Landlock treats apart.
        rustix::fs::renameat(&ours, "new", &ours, "d/new").unwrap();
        rustix::fs::linkat(&ours, "d/new", &ours, "again", rustix::fs::AtFlags::empty()).unwrap();
        open_in(&layer, "file", libc::O_RDONLY).unwrap();
        assert!(denied(open_in(&layer, "file", libc::O_RDWR)));
        assert!(denied(open_in(&layer, "new", libc::O_RDWR | libc::O_CREAT)));
        assert!(denied(open_in(&others, "file", libc::O_RDONLY)));
        // A thread that it starts inherits the rules.
        let inherited = std::thread::spawn(move || denied(open_in(&others, "file", libc::O_RDONLY)));
        assert!(inherited.join().unwrap());
    });
    confined.join().unwrap();
    // The others of the process are as free as before.
    File::open(place.path().join("others/file")).unwrap().as_fd();
}
