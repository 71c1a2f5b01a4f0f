//! Programs that may not, that lie, that scribble, that die.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::time::{Duration, Instant};

use polytropo_client::{At, Channel, Error, Refused};
use polytropo_queue::{Borrowed, Rcqs};
use polytropo_wire::channel::{self, Slot, state};
use polytropo_wire::hello::{Hello, Verdict, WELCOME_BYTES, Welcome};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde_json::json;

use crate::Test;
use crate::support::{Site, as_child, open_path, pattern};

pub const TESTS: &[Test] = &[
    ("others_get_what_permissions_allow", others_get_what_permissions_allow),
    ("who_cannot_be_weighed_is_refused", who_cannot_be_weighed_is_refused),
    ("only_a_descriptor_of_the_mount_counts", only_a_descriptor_of_the_mount_counts),
    ("windows_can_only_be_read", windows_can_only_be_read),
    ("a_client_that_scribbles_breaks_only_itself", a_client_that_scribbles_breaks_only_itself),
    ("directories_are_not_handed_over", directories_are_not_handed_over),
    ("a_client_that_dies_leaves_nothing", a_client_that_dies_leaves_nothing),
    ("a_service_that_dies_is_noticed", a_service_that_dies_is_noticed),
];

const RDONLY: u32 = libc::O_RDONLY as u32;
const OTHER: u32 = 12_345;

fn immutable() -> serde_json::Value {
    json!({"read_only": true, "coherence": "immutable"})
}

fn become_other(uid: u32, groups: &[u32]) {
    let groups: Vec<_> = groups.iter().map(|gid| rustix::thread::Gid::from_raw(*gid)).collect();
    let (user, group) = (rustix::thread::Uid::from_raw(uid), rustix::thread::Gid::from_raw(uid));
    rustix::thread::set_thread_groups(&groups).unwrap();
    rustix::thread::set_thread_res_gid(group, group, group).unwrap();
    rustix::thread::set_thread_res_uid(user, user, user).unwrap();
}

fn errno<T>(result: Result<T, Error>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(Error::Errno(errno)) => errno,
        Err(other) => panic!("{other:?}"),
    }
}

/// Every file is tried by the same user through the channel and through the kernel.
fn others_get_what_permissions_allow() {
    let mut site = Site::start();
    let source = site.directory("data");
    let directories = [
        ("open", 0o755, 0),
        ("closed", 0o700, 0),
        ("passage", 0o711, 0),
        ("theirs", 0o700, OTHER),
        ("group", 0o050, 0),
    ];
    let files = [
        ("all", 0o644, 0, 0),
        ("owner", 0o600, 0, 0),
        ("group", 0o640, 0, 777),
        ("theirs", 0o400, OTHER, 0),
        ("none", 0o077, OTHER, 0),
        ("acl", 0o644, 0, 0),
    ];
    for (directory, mode, uid) in directories {
        let path = source.join(directory);
        fs::create_dir(&path).unwrap();
        for (file, mode, uid, gid) in files {
            fs::write(path.join(file), "x").unwrap();
            chown(path.join(file), Some(uid), Some(gid)).unwrap();
            fs::set_permissions(path.join(file), fs::Permissions::from_mode(mode)).unwrap();
        }
        chown(&path, Some(uid), Some(if directory == "group" { 777 } else { 0 })).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let mnt = site.mount("data", immutable());
    for groups in [&[][..], &[777]] {
        let good = as_child(|| {
            become_other(OTHER, groups);
            let channel = site.connect(&mnt);
            for (directory, ..) in directories {
                for (file, ..) in files {
                    let name = format!("{directory}/{file}");
                    let kernel = |result: std::io::Result<()>| {
                        result.err().and_then(|e| e.raw_os_error()).unwrap_or(0)
                    };
                    let opened = kernel(fs::File::open(mnt.join(&name)).map(drop));
                    assert_eq!(
                        errno(channel.open(At::Root, name.as_bytes(), RDONLY, 0, 0)),
                        opened,
                        "open {name}"
                    );
                    let looked = kernel(fs::metadata(mnt.join(&name)).map(drop));
                    assert_eq!(errno(channel.stat(At::Root, name.as_bytes(), 0)), looked, "stat {name}");
                }
            }
        });
        assert!(good);
    }
}

/// The kernel knows one place of a directory: by a second name it would be moved there, and lose what is mounted below.
fn directories_are_not_handed_over() {
    let mut site = Site::start_with(&["--channel-writes"]);
    let source = site.directory("data");
    fs::create_dir_all(source.join("etc/below")).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    let mnt = site.mount("data", json!({"coherence": "exclusive"}));
    let below = mnt.join("etc/below");
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", &below, "tmpfs", flags, None).unwrap();
    fs::write(below.join("mark"), "mounted").unwrap();
    let channel = site.connect(&mnt);
    let open = |path: &[u8], flags| channel.open(At::Root, path, flags, 0, 0).unwrap().file;
    let look = |name: &[u8]| fs::read(mnt.join(std::ffi::OsStr::from_bytes(name)));
    let name = channel.hand(open(b"file", libc::O_RDWR as u32)).unwrap();
    assert_eq!(look(&name).unwrap(), b"content");
    for flags in [libc::O_DIRECTORY, libc::O_DIRECTORY | libc::O_PATH] {
        let handed = channel.hand(open(b"etc", flags as u32));
        // What a program would do with a name.
        handed.iter().for_each(|name| _ = look(name));
        assert_eq!(fs::read(below.join("mark")).unwrap(), b"mounted", "what is mounted below was moved");
        assert_eq!(handed, Err(Error::Kernel));
    }
    drop(channel);
    rustix::mount::unmount(&below, rustix::mount::UnmountFlags::DETACH).unwrap();
}

fn who_cannot_be_weighed_is_refused() {
    let mut site = Site::start();
    let mnt = site.mount("data", immutable());
    let refused = |prepare: fn(), verdict: Verdict| {
        assert!(as_child(|| {
            prepare();
            match site.try_connect(&mnt) {
                Err(Refused::Verdict(told)) => assert_eq!(told, verdict),
                other => panic!("{:?}", other.map(drop)),
            }
        }));
    };
    refused(|| rustix::thread::set_no_new_privs(true).unwrap(), Verdict::NoNewPrivileges);
    refused(
        || {
            // SAFETY: one thread.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUSER) }.unwrap();
        },
        Verdict::OtherUserNamespace,
    );
    refused(
        || {
            // SAFETY: changes this thread's filesystem id only.
            unsafe { libc::setfsuid(OTHER) };
        },
        Verdict::UnusualCredentials,
    );
    refused(
        || {
            rustix::thread::set_keep_capabilities(true).unwrap();
            let mut sets = rustix::thread::capabilities(None).unwrap();
            become_other(OTHER, &[]);
            sets.effective = rustix::thread::CapabilitySet::DAC_OVERRIDE;
            rustix::thread::set_capabilities(None, sets).unwrap();
        },
        Verdict::UnusualCredentials,
    );
    assert!(site.try_connect(&mnt).is_ok());
}

fn only_a_descriptor_of_the_mount_counts() {
    let mut site = Site::start();
    fs::create_dir(site.directory("data").join("inside")).unwrap();
    let mnt = site.mount("data", immutable());
    let told = |path: &Path| match site.try_connect(path) {
        Err(Refused::Verdict(told)) => told,
        other => panic!("{:?}", other.map(drop)),
    };
    assert_eq!(told(Path::new("/")), Verdict::NotOurs);
    assert_eq!(told(&mnt.join("inside")), Verdict::NotOurs);
    let part = site.directory("part");
    rustix::mount::mount_bind(mnt.join("inside"), &part).unwrap();
    assert_eq!(told(&part), Verdict::NotTheRoot);
    // A mount that only another mount namespace has.
    let elsewhere = open_path(&mnt);
    assert!(as_child(|| {
        crate::support::own_mount_namespace();
        let socket = site.socket();
        let path = std::os::unix::ffi::OsStrExt::as_bytes(socket.as_os_str());
        match Channel::connect(path, std::os::fd::AsRawFd::as_raw_fd(&elsewhere)) {
            Err(Refused::Verdict(told)) => assert_eq!(told, Verdict::NotOurs),
            other => panic!("{:?}", other.map(drop)),
        }
    }));
}

/// A connection made by hand.
pub struct Raw {
    socket: OwnedFd,
    base: NonNull<u8>,
    bell: OwnedFd,
    pub windows: OwnedFd,
    pub answers: OwnedFd,
}

impl Raw {
    pub fn connect(site: &Site, mnt: &Path) -> Self {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(site.socket()).unwrap()).unwrap();
        let root = open_path(mnt);
        let rights = [root.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
        let hello = Hello::default().to_bytes();
        rustix::net::sendmsg(&socket, &[IoSlice::new(&hello)], &mut control, SendFlags::empty()).unwrap();
        let mut bytes = [0; WELCOME_BYTES];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(&socket, &mut parts, &mut control, RecvFlags::empty()).unwrap();
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        assert_eq!(Welcome::from_bytes(&bytes).unwrap().verdict, Verdict::Welcome as u32);
        let [memory, bell, windows, _epochs, answers] = <[OwnedFd; 5]>::try_from(descriptors).unwrap();
        let (protection, bytes) = (ProtFlags::READ | ProtFlags::WRITE, channel::TOTAL_BYTES);
        assert!(rustix::fs::ftruncate(&memory, 0).is_err(), "the memory can be shrunk under the service");
        // SAFETY: a new mapping.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, &memory, 0).unwrap()
        };
        Self { socket, base: NonNull::new(base.cast()).unwrap(), bell, windows, answers }
    }

    fn ring(&self) {
        rustix::io::write(&self.bell, &1u64.to_ne_bytes()).unwrap();
    }

    fn slot(&self, number: usize) -> &Slot {
        // SAFETY: in the mapping, aligned, made of atomics.
        unsafe { self.base.add(channel::SLOTS_AT).cast::<Slot>().add(number % channel::SLOTS).as_ref() }
    }

    fn scribble(&self, at: usize, byte: u8) {
        // SAFETY: in the mapping; nobody has a reference to these bytes that are not atomics.
        unsafe { self.base.add(at % channel::TOTAL_BYTES).write_volatile(byte) };
    }
}

fn windows_can_only_be_read() {
    let mut site = Site::start();
    let size = 200_000;
    fs::write(site.directory("data").join("large"), pattern(3, 0, size)).unwrap();
    let mnt = site.mount("data", immutable());
    let channel = site.connect(&mnt);
    let file = channel.open(At::Root, b"large", RDONLY, 0, 0).unwrap().file;
    assert_eq!(channel.pread(file, &mut vec![0; size], 0).unwrap(), size);
    let raw = Raw::connect(&site, &mnt);
    use rustix::fs::{AtFlags, Mode, OFlags};
    // Root may list what others may not.
    let listed =
        rustix::fs::openat(&raw.windows, ".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let names: Vec<_> =
        rustix::fs::Dir::read_from(&listed).unwrap().map(|e| e.unwrap().file_name().to_owned()).collect();
    let name = names.into_iter().find(|name| !name.to_bytes().starts_with(b".")).unwrap();
    let refused = |result: rustix::io::Result<()>| assert_eq!(result.unwrap_err(), rustix::io::Errno::ROFS);
    refused(rustix::fs::openat(&raw.windows, &name, OFlags::RDWR, Mode::empty()).map(drop));
    refused(rustix::fs::unlinkat(&raw.windows, &name, AtFlags::empty()));
    refused(rustix::fs::openat(&raw.windows, "new", OFlags::RDWR | OFlags::CREATE, Mode::RUSR).map(drop));
    let read = rustix::fs::openat(&raw.windows, &name, OFlags::RDONLY, Mode::empty()).unwrap();
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&read));
    refused(rustix::fs::open(&again, OFlags::RDWR, Mode::empty()).map(drop));
    // The mount is nobody's, so nobody makes it writable.
    let wanted =
        libc::mount_attr { attr_set: 0, attr_clr: libc::MOUNT_ATTR_RDONLY, propagation: 0, userns_fd: 0 };
    // SAFETY: an empty path and one structure whose size is told.
    let changed = unsafe {
        let directory = std::os::fd::AsRawFd::as_raw_fd(&raw.windows);
        libc::syscall(
            libc::SYS_mount_setattr,
            directory,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const wanted,
            size_of_val(&wanted),
        )
    };
    assert_eq!(changed, -1);
    refused(rustix::fs::openat(&raw.windows, &name, OFlags::RDWR, Mode::empty()).map(drop));
    // Who is not root lists nothing and finds nothing by guessing.
    assert!(as_child(|| {
        become_other(OTHER, &[]);
        let mine = Raw::connect(&site, &mnt);
        let listing =
            rustix::fs::openat(&mine.windows, ".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
        assert_eq!(listing.unwrap_err(), rustix::io::Errno::ACCESS);
        assert!(rustix::fs::openat(&mine.windows, "..", OFlags::RDONLY, Mode::empty()).is_err());
    }));
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Small numbers, sizes at the edges, and anything.
    fn word(&mut self) -> u64 {
        let any = self.next();
        match any % 8 {
            0 | 1 => any >> 60,
            2 => (1 << 16) | ((any >> 40) % 8),
            3 => (any >> 40) % 5000,
            4 => u64::MAX - (any >> 60),
            5 => (1 << 17) + (any >> 60) - 8,
            6 => any >> 33,
            _ => any,
        }
    }
}

fn misbehave(site: &Site, mnt: &Path, seed: u64) {
    let mut random = Random(seed * 7919 + 1);
    let mut raw = Raw::connect(site, mnt);
    let paths: [&[u8]; 6] = [b"small", b"large", b"d/../small", b"d", b"link", b"\xff/x"];
    for round in 0..3000 {
        // SAFETY: that many bytes of a mapping that stays to the end of the process.
        let part = unsafe { Borrowed::new(raw.base.add(channel::QUEUE_AT), channel::QUEUE_BYTES) };
        let queue = Rcqs::attach(part);
        let Ok(queue) = queue else {
            raw = Raw::connect(site, mnt);
            continue;
        };
        let number = random.next() as usize % channel::SLOTS;
        let slot = raw.slot(number);
        slot.operation.store((random.next() % 40) as u32, Relaxed);
        slot.request.iter().for_each(|word| word.store(random.word(), Relaxed));
        if round % 2 == 0 {
            let path = paths[random.next() as usize % paths.len()];
            slot.request[0].store(0, Relaxed);
            slot.request[1].store(path.len() as u64, Relaxed);
            path.iter().enumerate().for_each(|(at, byte)| raw.scribble(channel::area_at(number) + at, *byte));
        }
        slot.state.store(state::POSTED, Release);
        let item = if random.next() % 16 == 0 { random.word() >> 24 } else { number as u64 };
        let _ = queue.handle().try_enqueue(item);
        raw.ring();
        if round % 50 == 0 {
            for _ in 0..64 {
                let at = random.next() as usize;
                // The small structures more often than the areas.
                raw.scribble(if at % 2 == 0 { at % channel::AREAS_AT } else { at }, random.next() as u8);
            }
        }
    }
    drop(raw.socket);
}

fn a_client_that_scribbles_breaks_only_itself() {
    let mut site = Site::start();
    let source = site.directory("data");
    fs::write(source.join("small"), "content").unwrap();
    fs::write(source.join("large"), pattern(5, 0, 300_000)).unwrap();
    fs::create_dir(source.join("d")).unwrap();
    std::os::unix::fs::symlink("d", source.join("link")).unwrap();
    let mnt = site.mount("data", immutable());
    let scribblers: Vec<_> =
        (1..4).map(|seed| crate::support::fork_child(|| misbehave(&site, &mnt, seed))).collect();
    let channel = site.connect(&mnt);
    for round in 0..2000u64 {
        let small = channel.open(At::Root, b"d/../small", RDONLY, 0, 0).unwrap().file;
        let large = channel.open(At::Root, b"large", RDONLY, 0, 0).unwrap().file;
        let mut bytes = [0; 4096];
        assert_eq!(channel.pread(small, &mut bytes, 0).unwrap(), 7);
        assert_eq!(&bytes[..7], b"content");
        let at = round * 131 % 290_000;
        assert_eq!(channel.pread(large, &mut bytes, at).unwrap(), 4096);
        assert_eq!(bytes[..], pattern(5, at, 4096));
        channel.close(small).unwrap();
        channel.close(large).unwrap();
    }
    for scribbler in scribblers {
        assert!(scribbler.wait(), "a scribbler failed by itself");
    }
    channel.ping().unwrap();
    assert_eq!(fs::read(mnt.join("small")).unwrap(), b"content");
}

fn channels(site: &mut Site) -> u64 {
    site.order(&json!({"op": "stats"}))["mounts"][0]["channels"]["channels"].as_u64().unwrap()
}

fn a_client_that_dies_leaves_nothing() {
    let mut site = Site::start();
    fs::write(site.directory("data").join("large"), pattern(5, 0, 300_000)).unwrap();
    let mnt = site.mount("data", immutable());
    let children: Vec<_> = (0..8)
        .map(|_| {
            crate::support::fork_child(|| {
                let channel = site.connect(&mnt);
                loop {
                    let file = channel.open(At::Root, b"large", RDONLY, 0, 0).unwrap().file;
                    let _ = channel.pread(file, &mut [0; 4096], 70_000);
                }
            })
        })
        .collect();
    let deadline = Instant::now() + Duration::from_secs(20);
    while channels(&mut site) < 8 {
        assert!(Instant::now() < deadline, "not all connect");
        std::thread::sleep(Duration::from_millis(5));
    }
    children.iter().for_each(|child| child.kill());
    children.into_iter().for_each(|child| assert!(!child.wait()));
    while channels(&mut site) > 0 {
        assert!(Instant::now() < deadline, "a channel outlives its process");
        std::thread::sleep(Duration::from_millis(5));
    }
    site.connect(&mnt).ping().unwrap();
}

fn a_service_that_dies_is_noticed() {
    let mut site = Site::start();
    let mnt = site.mount("data", immutable());
    let channel = site.connect(&mnt);
    channel.ping().unwrap();
    let worker = site.order(&json!({"op": "status"}))["worker_pid"].as_i64().unwrap();
    let worker = rustix::process::Pid::from_raw(worker as i32).unwrap();
    rustix::process::kill_process(worker, rustix::process::Signal::KILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while channel.ping() != Err(Error::Gone) {
        assert!(Instant::now() < deadline, "the service's death is not noticed");
    }
}
