//! How doors end.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use polytropo_libservices::dir::Dir;
use polytropo_libservices::stack::{DirCoherence, DirLayer, Ownership};
use polytropo_libservices::{DoorId, Libservice};
use polytropo_service::doors::fuse::{FuseDoor, FuseOptions, mount_options};

use crate::support::{
    RingSwitch, eventually, mount_filesystem, on_mount, own_mount_namespace, unmount, wants_rings, why_not,
};

#[test]
fn an_aborted_connection_ends_the_server_and_all_who_wait() {
    on_mount(&["--coherence", "shared"], |site| {
        fs::write(site.path("f"), "x").unwrap();
        let mut file = File::open(site.path("f")).unwrap();
        site.abort();
        let refused = file.read(&mut [0; 10]).and_then(|_| fs::metadata(site.path("f")));
        let errno = refused.unwrap_err().raw_os_error();
        assert!(matches!(errno, Some(libc::ENOTCONN | libc::ECONNABORTED)), "{errno:?}");
    });
}

#[test]
fn a_lazy_unmount_lets_open_files_finish() {
    on_mount(&["--coherence", "exclusive"], |site| {
        let mut file = File::create(site.path("f")).unwrap();
        file.write_all(b"before").unwrap();
        unmount(&site.mount);
        file.write_all(b" and after").unwrap();
        file.sync_all().unwrap();
        drop(file);
        assert_eq!(fs::read(site.source.join("f")).unwrap(), b"before and after");
    });
}

#[test]
fn many_threads_are_served_at_once() {
    on_mount(&["--coherence", "exclusive", "--threads", "4"], |site| {
        std::thread::scope(|scope| {
            for worker in 0..8 {
                scope.spawn(move || {
                    let directory = site.path(&format!("d{worker}"));
                    fs::create_dir(&directory).unwrap();
                    for number in 0..50 {
                        let path = directory.join(number.to_string());
                        fs::write(&path, number.to_string().repeat(1_000)).unwrap();
                        assert_eq!(fs::read(&path).unwrap(), number.to_string().repeat(1_000).as_bytes());
                    }
                    fs::remove_dir_all(&directory).unwrap();
                });
            }
        });
        assert_eq!(fs::read_dir(&site.mount).unwrap().count(), 0);
    });
}

/// The door runs in this process: only what other threads answer is asked for here.
#[test]
fn a_door_that_is_stopped_ends_its_threads_and_gives_back_the_stack() {
    if let Some(reason) = why_not() {
        eprintln!("skipped: {reason}");
        return;
    }
    own_mount_namespace();
    let scratch = tempfile::tempdir().unwrap();
    let [source, mount] = ["source", "mount"].map(|name| scratch.path().join(name));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&mount).unwrap();
    let layer = DirLayer {
        path: source.clone(),
        read_only: false,
        coherence: DirCoherence::Exclusive,
        ownership: Ownership::Native,
    };
    let stack: Arc<dyn Libservice> = Arc::new(Dir::new(File::open(&source).unwrap().into(), &layer).unwrap());
    let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let data = std::ffi::CString::new(mount_options(device.as_raw_fd(), 0, 0)).unwrap();
    mount_filesystem(c"fuse", &mount, &data);
    let options = FuseOptions { threads: 3, ..FuseOptions::default() };
    let door = FuseDoor::start(device.into(), stack.clone(), options, DoorId(1)).unwrap();
    fs::write(mount.join("f"), "x").unwrap();
    assert_eq!(fs::read(mount.join("f")).unwrap(), b"x");
    let operations = door.statistics().operations;
    assert_eq!((operations["create"].count, operations["create"].errors), (1, 0));
    assert_eq!(door.statistics().written_bytes, 1);
    door.stop();
    door.wait_ended();
    drop(door);
    // The last descriptor is gone, and with it the connection.
    let refused = fs::metadata(mount.join("g")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ENOTCONN));
    assert_eq!(Arc::strong_count(&stack), 1, "the door still holds the stack");
    unmount(&mount);
    assert_eq!(fs::read(source.join("f")).unwrap(), b"x");
}

#[test]
fn io_uring_is_used_where_it_is_switched_on_and_not_missed_elsewhere() {
    if wants_rings() {
        eprintln!("skipped: the switch is held on in this run");
        return;
    }
    for on in [false, true] {
        let _switch = match RingSwitch::set(on) {
            Ok(switch) => switch,
            Err(reason) => return eprintln!("skipped: {reason}"),
        };
        on_mount(&["--coherence", "exclusive", "--fuse-transport", "uring"], |site| {
            fs::write(site.path("f"), "x").unwrap();
            assert_eq!(fs::read(site.source.join("f")).unwrap().len(), 1);
            eventually("threads of rings, or none", || {
                site.server_threads().iter().any(|name| name.contains(".ring")) == on
            });
        });
    }
}
