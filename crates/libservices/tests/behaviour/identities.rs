//! The suite once more as others than root: as uid 0 of a user namespace (as services run), and as an ordinary user.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Tells the inner run that it is one.
const INSIDE: &str = "POLYTROPO_BEHAVIOUR_INSIDE";

fn skipped() -> bool {
    let inside = std::env::var_os(INSIDE).is_some();
    if !inside && !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can take on other identities");
        return true;
    }
    inside
}

/// This program where any user can execute it.
fn copy_of_this_program() -> (tempfile::TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    std::fs::set_permissions(temp.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let copy = temp.path().join("behaviour");
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o755)).unwrap();
    (temp, copy)
}

fn suite(command: &mut Command) -> &mut Command {
    command.env(INSIDE, "1").env("RUST_BACKTRACE", "0").current_dir("/")
}

#[test]
fn as_uid_0_of_a_user_namespace() {
    if skipped() {
        return;
    }
    let (_temp, program) = copy_of_this_program();
    let script = "echo; read -r go; exec setpriv --reuid 0 --regid 0 --clear-groups \"$0\"";
    let mut child =
        suite(Command::new("unshare").args(["--user", "--keep-caps", "sh", "-c", script]).arg(&program))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    output.read_line(&mut String::new()).unwrap();
    for map in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{}/{map}", child.id()), "0 200000 65536").unwrap();
    }
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let report = std::io::read_to_string(output).unwrap();
    assert!(child.wait().unwrap().success(), "{report}");
    assert!(report.contains("test native_directory ... ok"), "{report}");
}

#[test]
fn as_an_ordinary_user() {
    if skipped() {
        return;
    }
    let (_temp, program) = copy_of_this_program();
    let as_nobody = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let output = suite(Command::new("setpriv").args(as_nobody).arg(&program)).output().unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{report}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(report.contains("test native_directory ... ok"), "{report}");
}
