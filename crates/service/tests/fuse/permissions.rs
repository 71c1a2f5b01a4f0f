//! Who may do what: modes, umask, owners, setuid bits, extended attributes, ACLs.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};

use crate::support::{Site, on_each_mount};

/// Runs a shell script as an ordinary user, in the mount.
fn as_user(site: &Site, script: &str) -> bool {
    fs::set_permissions(site.source.parent().unwrap(), Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("sh");
    command
        .arg("-ec")
        .arg(script)
        .current_dir(&site.mount)
        .uid(1234)
        .gid(1234)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().unwrap().success()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn ordinary_users_get_what_is_theirs_and_no_more() {
    on_each_mount(|site| {
        fs::write(site.path("secret"), "x").unwrap();
        fs::set_permissions(site.path("secret"), Permissions::from_mode(0o600)).unwrap();
        assert!(!as_user(site, "cat secret") && !as_user(site, "echo x > new"));
        fs::create_dir(site.path("open")).unwrap();
        fs::set_permissions(site.path("open"), Permissions::from_mode(0o1777)).unwrap();
        assert!(as_user(
            site,
            "umask 027; cd open; echo mine > f; mkdir d; mkfifo p; ln -s f l; cat f; chmod u+x f"
        ));
        for name in ["f", "d", "p", "l"] {
            let found = fs::symlink_metadata(site.path("open").join(name)).unwrap();
            assert_eq!((found.uid(), found.gid()), (1234, 1234), "{name}");
        }
        assert_eq!(mode(&site.path("open/f")), 0o740);
        assert_eq!(mode(&site.path("open/d")), 0o750);
        fs::write(site.path("open/root"), "x").unwrap();
        assert!(!as_user(site, "rm -f open/root"), "the sticky bit does not hold");
    });
}

#[test]
fn writes_of_others_take_setuid_away() {
    on_each_mount(|site| {
        let path = site.path("f");
        fs::write(&path, "x").unwrap();
        let arm = || fs::set_permissions(&path, Permissions::from_mode(0o6777)).unwrap();
        arm();
        File::options().append(true).open(&path).unwrap().write_all(b"root keeps them").unwrap();
        assert_eq!(mode(&path), 0o6777);
        for script in ["echo more >> f", "truncate -s 3 f", ": > f"] {
            arm();
            assert!(as_user(site, script));
            assert_eq!(mode(&path), 0o777, "after {script}");
        }
        arm();
        chown(&path, Some(1234), Some(1234)).unwrap();
        assert_eq!(mode(&path), 0o777, "after chown");
    });
}

#[test]
fn new_files_inherit_the_group_of_a_setgid_directory() {
    on_each_mount(|site| {
        fs::create_dir(site.path("d")).unwrap();
        chown(site.path("d"), None, Some(77)).unwrap();
        fs::set_permissions(site.path("d"), Permissions::from_mode(0o2777)).unwrap();
        assert!(as_user(site, "touch d/f; mkdir d/sub"));
        assert_eq!(fs::metadata(site.path("d/f")).unwrap().gid(), 77);
        assert_eq!(fs::metadata(site.path("d/sub")).unwrap().gid(), 77);
        assert_eq!(mode(&site.path("d/sub")) & 0o2000, 0o2000);
    });
}

#[test]
fn extended_attributes_are_kept() {
    on_each_mount(|site| {
        let path = site.path("f");
        fs::write(&path, "x").unwrap();
        let mut buffer = [0u8; 4096];
        setxattr(&path, "user.one", b"1", XattrFlags::CREATE).unwrap();
        setxattr(&path, "user.two", &[7; 2000], XattrFlags::empty()).unwrap();
        let again = setxattr(&path, "user.one", b"2", XattrFlags::CREATE).unwrap_err();
        assert_eq!(again.raw_os_error(), libc::EEXIST);
        assert_eq!(getxattr(&path, "user.one", &mut buffer[..]).unwrap(), 1);
        assert_eq!(getxattr(&path, "user.two", &mut buffer[..]).unwrap(), 2000);
        assert_eq!(getxattr(&path, "user.two", &mut [0u8; 10]).unwrap_err().raw_os_error(), libc::ERANGE);
        let len = listxattr(&path, &mut buffer[..]).unwrap();
        let names: Vec<_> =
            buffer[..len].split(|&b| b == 0).filter(|name| name.starts_with(b"user.")).collect();
        assert_eq!(names.len(), 2);
        removexattr(&path, "user.one").unwrap();
        let gone = getxattr(&path, "user.one", &mut buffer[..]).unwrap_err();
        assert_eq!(gone.raw_os_error(), libc::ENODATA);
        assert_eq!(getxattr(site.source.join("f"), "user.two", &mut buffer[..]).unwrap(), 2000);
    });
}

#[test]
fn acls_are_obeyed_and_inherited() {
    on_each_mount(|site| {
        let setfacl = |arguments: &[&str]| {
            let done = Command::new("setfacl").args(arguments).current_dir(&site.mount).status();
            assert!(done.expect("setfacl is a test package").success(), "setfacl {arguments:?}");
        };
        fs::write(site.path("f"), "x").unwrap();
        fs::set_permissions(site.path("f"), Permissions::from_mode(0o600)).unwrap();
        assert!(!as_user(site, "cat f"));
        setfacl(&["-m", "u:1234:r", "f"]);
        assert!(as_user(site, "test \"$(cat f)\" = x") && !as_user(site, "echo y > f"));
        fs::create_dir(site.path("d")).unwrap();
        fs::set_permissions(site.path("d"), Permissions::from_mode(0o777)).unwrap();
        setfacl(&["-d", "-m", "u::rwx,g::rwx,o::rwx", "d"]);
        assert!(as_user(site, "umask 077; touch d/f; mkdir d/sub"));
        // A default ACL takes the place of the umask.
        assert_eq!(mode(&site.path("d/f")), 0o666);
        assert_eq!(mode(&site.path("d/sub")), 0o777);
    });
}
