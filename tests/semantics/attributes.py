"""Promises about attributes, owners, permissions, locks and times."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import subprocess
import sys

from tests.semantics.files import in_another_process
from tests.semantics.registry import Ground, promise

ORDINARY = 12345


def as_ordinary_user(script: str, *arguments: object) -> str:
    """Runs Python code as an ordinary user and returns what it printed."""
    words = [
        "setpriv",
        f"--reuid={ORDINARY}",
        f"--regid={ORDINARY}",
        "--clear-groups",
        "/usr/bin/python3",
        "-c",
    ]
    done = subprocess.run(
        [*words, script, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_TRY_OPEN = """
import os, sys
try:
    os.open(sys.argv[1], int(sys.argv[2]))
    print("opened")
except OSError as error:
    print(error.strerror)
"""


@promise("permissions")
def _(ground: Ground) -> None:
    path = ground.empty / "file"
    path.write_text("secret")
    path.chmod(0o600)
    assert as_ordinary_user(_TRY_OPEN, path, os.O_RDONLY) == "Permission denied"
    path.chmod(0o644)
    assert as_ordinary_user(_TRY_OPEN, path, os.O_RDONLY) == "opened"
    assert as_ordinary_user(_TRY_OPEN, path, os.O_WRONLY) == "Permission denied"
    assert as_ordinary_user(_TRY_OPEN, ground.empty / "new", os.O_CREAT) == "Permission denied"


@promise("sticky")
def _(ground: Ground) -> None:
    ground.empty.chmod(0o1777)
    (ground.empty / "file").touch()
    remove = "import os, sys\ntry: os.unlink(sys.argv[1])\nexcept OSError as e: print(e.errno)"
    assert as_ordinary_user(remove, ground.empty / "file") in (str(errno.EPERM), str(errno.EACCES))


@promise("owners")
def _(ground: Ground) -> None:
    ground.empty.chmod(0o777)
    made = "import os, sys; os.close(os.open(sys.argv[1], os.O_CREAT, 0o640)); os.mkdir(sys.argv[2])"
    as_ordinary_user(made, ground.empty / "file", ground.empty / "directory")
    for name in ("file", "directory"):
        found = (ground.empty / name).stat()
        assert (found.st_uid, found.st_gid) == (ORDINARY, ORDINARY)
    os.chown(ground.empty / "file", 1, 65000)
    found = (ground.empty / "file").stat()
    assert (found.st_uid, found.st_gid) == (1, 65000)


@promise("setgid-directory")
def _(ground: Ground) -> None:
    directory = ground.empty / "shared"
    directory.mkdir()
    os.chown(directory, 0, 4321)
    directory.chmod(0o2777)
    (directory / "file").touch()
    (directory / "inner").mkdir()
    assert (directory / "file").stat().st_gid == 4321
    inner = (directory / "inner").stat()
    assert inner.st_gid == 4321 and inner.st_mode & stat.S_ISGID


@promise("setuid-cleared")
def _(ground: Ground) -> None:
    path = ground.empty / "file"
    path.write_text("x")
    path.chmod(0o6777)
    write = "import os, sys; os.write(os.open(sys.argv[1], os.O_WRONLY), b'y')"
    as_ordinary_user(write, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777
    path.chmod(0o4755)
    os.chown(path, ORDINARY, ORDINARY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@promise("umask-and-default-acl")
def _(ground: Ground) -> None:
    old = os.umask(0o027)
    try:
        os.close(os.open(ground.empty / "plain", os.O_CREAT, 0o666))
        assert stat.S_IMODE((ground.empty / "plain").stat().st_mode) == 0o640
        acl = ["setfacl", "-m", "d:u::rwx,d:g::rwx,d:o::rx,d:u:4321:rwx", str(ground.empty)]
        subprocess.run(acl, check=True, timeout=60)
        os.close(os.open(ground.empty / "inherits", os.O_CREAT, 0o666))
        assert stat.S_IMODE((ground.empty / "inherits").stat().st_mode) == 0o664
        words = ["getfacl", "--omit-header", "--absolute-names", str(ground.empty / "inherits")]
        shown = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
        assert "user:4321:rwx" in shown
    finally:
        os.umask(old)


@promise("extended-attributes")
def _(ground: Ground) -> None:
    path = ground.image / "file"
    os.setxattr(path, "user.colour", b"blue" * 500)
    os.setxattr(path, "user.empty", b"")
    assert os.getxattr(path, "user.colour") == b"blue" * 500 and os.getxattr(path, "user.empty") == b""
    assert sorted(os.listxattr(path)) == ["user.colour", "user.empty"]
    try:
        os.setxattr(path, "user.colour", b"", os.XATTR_CREATE)
        raise AssertionError("XATTR_CREATE replaced")
    except OSError as refusal:
        assert refusal.errno == errno.EEXIST
    os.removexattr(path, "user.colour")
    assert os.listxattr(path) == ["user.empty"]


@promise("file-capabilities")
def _(ground: Ground) -> None:
    path = ground.empty / "file"
    path.touch()
    value = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    os.setxattr(path, "security.capability", value)
    assert os.getxattr(path, "security.capability") == value
    path.write_bytes(b"changed")
    assert "security.capability" not in os.listxattr(path)


@promise("locks")
def _(ground: Ground) -> None:
    path = ground.empty / "file"
    path.write_bytes(bytes(100))
    script = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
try:
    if sys.argv[2] == "flock":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, int(sys.argv[3]))
    print("locked")
except BlockingIOError:
    print("busy")
"""
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert in_another_process(script, path, "flock", 0).strip() == "busy"
        fcntl.flock(file, fcntl.LOCK_UN)
        assert in_another_process(script, path, "flock", 0).strip() == "locked"
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 20)
        assert in_another_process(script, path, "posix", 25).strip() == "busy"
        assert in_another_process(script, path, "posix", 30).strip() == "locked"


@promise("times")
def _(ground: Ground) -> None:
    path = ground.image / "file"
    os.utime(path, ns=(1_000_000_001_234_567_891, 1_500_000_000_987_654_321))
    found = path.stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001_234_567_891, 1_500_000_000_987_654_321)
    before = ground.empty.stat().st_mtime_ns
    (ground.empty / "new").touch()
    assert ground.empty.stat().st_mtime_ns > before
    fd = os.open(ground.empty / "new", os.O_WRONLY)
    changed = os.fstat(fd).st_mtime_ns
    os.write(fd, b"x")
    assert os.fstat(fd).st_mtime_ns >= changed
    os.close(fd)


@promise("birth-time")
def _(ground: Ground) -> None:
    path = ground.empty / "file"
    path.touch()
    words = ["stat", "--format=%W %X", str(path)]
    shown = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert int(shown[0]) > 0 and abs(int(shown[0]) - int(shown[1])) <= 2


@promise("inode-numbers")
def _(ground: Ground) -> None:
    path = ground.image / "file"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"changed")
        assert os.fstat(file.fileno()).st_ino == before.st_ino
    assert path.stat().st_ino == before.st_ino and path.stat().st_dev == before.st_dev
    listed = {entry.name: entry.inode() for entry in os.scandir(ground.image)}
    assert listed["file"] == before.st_ino


@promise("open-across-copy-up")
def _(ground: Ground) -> None:
    path = ground.image / "file"
    reader = os.open(path, os.O_RDONLY)
    assert os.pread(reader, 5, 0) == b"image"
    with path.open("ab") as file:
        file.write(b"appended later")
    assert os.pread(reader, 99, 100_000) == (b"" if ground.passthrough else b"appended later")
    assert path.read_bytes()[100_000:] == b"appended later"
    assert os.fstat(reader).st_size == 100_014
    os.close(reader)


@promise("descriptors-across-processes")
def _(ground: Ground) -> None:
    path = ground.empty / "out"
    subprocess.run(["sh", "-c", f"(echo one; echo two) >{path}; echo three >>{path}"], check=True, timeout=60)
    assert path.read_text() == "one\ntwo\nthree\n"
    libc = ctypes.CDLL(None)
    assert libc.syncfs(os.open(ground.empty, os.O_RDONLY)) == 0
    assert sys.getfilesystemencoding()
