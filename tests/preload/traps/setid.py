"""Setuid and setgid bits and capabilities of files that are written without the kernel: by who may keep them, and by who may not."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable

from trap import attempt, begin, sh

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
ORDINARY = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]


def tell(name: str, what: str) -> None:
    found = attempt(os.getxattr, name, "security.capability")
    held = found if isinstance(found, str) else len(found)
    print(what, stat.filemode(os.stat(name).st_mode), sh(f"stat -c %A {name}").strip(), held, flush=True)


def change(name: str, how: Callable[[int], object]) -> None:
    file = os.open(name, os.O_RDWR)
    os.pread(file, 1, 0)
    how(file)
    tell(name, "at once")
    # Set again while it is open: the next write takes them once more, if any does.
    sh(f"chmod 6775 {name}")
    os.pwrite(file, b"again", 10)
    tell(name, "once more")
    for number in range(100):
        os.pwrite(file, b"many", number * 4)
    os.fsync(file)
    os.close(file)
    tell(name, "afterwards")


WAYS: dict[str, Callable[[int], object]] = {
    "write": lambda file: os.write(file, b"bytes"),
    "pwrite": lambda file: os.pwrite(file, b"bytes", 3),
    "truncate": lambda file: os.ftruncate(file, 5),
    "lengthen": lambda file: os.ftruncate(file, 5000),
    "allocate": lambda file: os.posix_fallocate(file, 0, 9000),
    "gathered": lambda file: os.writev(file, [b"some", b"more"]),
}

if len(sys.argv) > 1:
    # So often that the library opens files by itself from now on.
    for _ in range(80):
        os.close(os.open("known", os.O_RDONLY))
        os.stat("known")
    for way, how in WAYS.items():
        print(way, sys.argv[1], flush=True)
        change(way, how)
    cut = os.open("cut", os.O_WRONLY | os.O_TRUNC)
    tell("cut", "cut")
    os.close(cut)
    sys.exit()

begin()
os.chmod(".", 0o777)
for mode in (0o6777, 0o2777, 0o4666):
    for who, before in (("root", []), ("ordinary", ORDINARY)):
        for name in [*WAYS, "cut"]:
            with open(name, "wb") as made:
                made.write(b"content")
            os.setxattr(name, "security.capability", CAPABILITY)
            os.chmod(name, mode)
        print(f"{mode:o}")
        subprocess.run([*before, sys.executable, __file__, who], check=True, timeout=60)
        for name in [*WAYS, "cut"]:
            os.unlink(name)
