//! How doors end.

use std::fs::{self, File};
use std::io::{Read, Write};

use crate::support::{on_mount, unmount};

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
