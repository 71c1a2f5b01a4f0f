"""Files that were made just now: whatever the kernel sees of them, and wherever their names have gone meanwhile."""

import array
import fcntl
import itertools
import mmap
import os
import select
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import trap
from trap import attempt

numbers = itertools.count()


def made(text: bytes = b"0123456789") -> tuple[str, int]:
    name = f"made{next(numbers)}"
    file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640)
    os.write(file, text)
    return name, file


def tell(what: str, found: Any) -> None:
    print(f"{what}: {found}")


def is_of(name: str, status: os.stat_result) -> tuple[bool, int, str]:
    seen = os.stat(name)
    same = (seen.st_ino, seen.st_dev) == (status.st_ino, status.st_dev)
    return same, status.st_size, stat.filemode(status.st_mode)


def by_proc(file: int) -> str:
    return f"/proc/self/fd/{file}"


def passed(file: int) -> bytes:
    one, two = socket.socketpair()
    with one, two:
        one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))])
        _, ancillary, *_ = two.recvmsg(1, socket.CMSG_SPACE(4))
        (other,) = array.array("i", ancillary[0][2])
        return os.pread(other, 20, 0)


def child_reads(file: int) -> bytes:
    reader, writer = os.pipe()
    trap.in_child(lambda: os.write(writer, os.pread(file, 20, 0)))
    return os.read(reader, 20)


def program_reads(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    return subprocess.run(["cat"], stdin=file, capture_output=True, timeout=30, check=False).stdout


def mapped(file: int) -> bytes:
    with mmap.mmap(file, 10) as memory:
        memory[0:2] = b"AB"
        return memory[:]


def duplicated(file: int) -> bytes:
    other = os.dup(file)
    os.write(other, b"more")
    os.close(other)
    return os.pread(file, 20, 0)


def replaced(file: int) -> bytes:
    other = os.open("/dev/null", os.O_RDONLY)
    os.dup2(file, other)
    return os.pread(other, 20, 0)


def reopened(file: int) -> bytes:
    with open(f"/dev/fd/{file}", "rb") as other:
        return other.read()


def linked(file: int) -> str:
    os.link(by_proc(file), "linked", follow_symlinks=True)
    found = is_of("linked", os.fstat(file))
    os.unlink("linked")
    return str(found)


def polled(file: int) -> Any:
    poll = select.poll()
    poll.register(file, select.POLLIN | select.POLLOUT)
    return poll.poll(1000)[0][1], [len(found) for found in select.select([file], [file], [], 1)]


def locked(file: int) -> Any:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(file, fcntl.LOCK_EX)
    return os.pread(file, 20, 0)


def moved_to_pipe(file: int) -> bytes:
    reader, writer = os.pipe()
    os.sendfile(writer, file, 0, 10)
    return os.read(reader, 20)


def attributed(file: int) -> Any:
    os.setxattr(file, "user.one", b"1")
    os.setxattr(by_proc(file), "user.two", b"2")
    return sorted(os.listxattr(by_proc(file))), os.getxattr(file, "user.two")


def changed_by_proc(file: int) -> Any:
    os.chmod(by_proc(file), 0o600)
    os.truncate(by_proc(file), 5)
    os.utime(by_proc(file), (1, 2))
    status = os.fstat(file)
    return status.st_size, oct(status.st_mode), status.st_mtime


SEEN: dict[str, Callable[[int], Any]] = {
    "readlink": lambda file: os.path.basename(os.readlink(by_proc(file))),
    "stat by /proc": lambda file: os.stat(by_proc(file)).st_size,
    "lstat by /proc": lambda file: stat.S_ISLNK(os.lstat(by_proc(file)).st_mode),
    "fstat": lambda file: os.fstat(file).st_size,
    "stat of it, by its number": lambda file: os.stat(file).st_size,
    "fstatvfs": lambda file: os.fstatvfs(file).f_namemax,
    "access by /proc": lambda file: os.access(by_proc(file), os.R_OK),
    "fchdir": os.fchdir,
    "listing": os.listdir,
    "open in it": lambda file: os.open("x", os.O_RDONLY, dir_fd=file),
    "stat in it": lambda file: os.stat("x", dir_fd=file),
    "mkdir in it": lambda file: os.mkdir("x", dir_fd=file),
    "flags": lambda file: fcntl.fcntl(file, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH | os.O_APPEND),
    "inherited": os.get_inheritable,
    "dup": duplicated,
    "dup2": replaced,
    "/dev/fd": reopened,
    "descriptors passed": passed,
    "fork": child_reads,
    "program": program_reads,
    "mmap": mapped,
    "link": linked,
    "poll": polled,
    "locks": locked,
    "sendfile": moved_to_pipe,
    "attributes": attributed,
    "changes by /proc": changed_by_proc,
    "fchmod": lambda file: os.fchmod(file, 0o600),
    "fsync": os.fsync,
}


def shown() -> None:
    for what, look in SEEN.items():
        name, file = made()
        tell(what, attempt(look, file))
        tell(f"{what}, afterwards", (is_of(name, os.fstat(file)), os.pread(file, 20, 0)))
        os.close(file)
        os.unlink(name)


def move(name: str) -> str:
    os.rename(name, name + "m")
    return name + "m"


def move_unaware(name: str) -> str:
    trap.unaware("mv", name, name + "m")
    return name + "m"


def remove(name: str) -> None:
    os.unlink(name)


def remove_unaware(name: str) -> None:
    trap.unaware("rm", name)


def take_place(name: str) -> None:
    with open("other", "w") as other:
        other.write("another")
    os.rename("other", name)


def take_place_unaware(name: str) -> None:
    trap.sh(f"echo another > other; mv other {name}")


def make_again(name: str) -> None:
    trap.sh(f"rm {name}; echo again > {name}")


def go_elsewhere(name: str) -> str:
    os.chdir("elsewhere")
    return f"../{name}"


# What happens to the name before the kernel has to open the file after all.
GONE = [
    move,
    move_unaware,
    remove,
    remove_unaware,
    take_place,
    take_place_unaware,
    make_again,
    go_elsewhere,
]
AFTERWARDS: list[Callable[[int], Any]] = [duplicated, child_reads, mapped, passed, program_reads]


def gone() -> None:
    os.mkdir("elsewhere")
    for change in GONE:
        for use in AFTERWARDS:
            name, file = made()
            now = change(name)
            tell(f"{change.__name__}, {use.__name__}", attempt(use, file))
            os.write(file, b"!")
            status = os.fstat(file)
            links = status.st_nlink, status.st_size, os.pread(file, 20, 0)
            tell("afterwards", (links, now and is_of(now, status)))
            os.close(file)
            if now:
                os.unlink(now)
            os.chdir(HOME)


def many() -> None:
    """More than are put off, with long names, at once."""
    files = []
    for number in range(100):
        name = f"{number:03}" + "x" * (200 + number // 2)
        file = os.open(name, os.O_CREAT | os.O_RDWR, 0o600)
        os.write(file, b"%d" % number)
        files.append((name, file))
    tell("many in a child", trap.in_child(lambda: [os.pread(file, 9, 0) for _, file in files]))
    tell("many", all(os.pread(file, 9, 0) == b"%d" % number for number, (_, file) in enumerate(files)))
    for name, file in files:
        assert is_of(name, os.fstat(file))[0]
        os.close(file)
        os.unlink(name)


trap.begin()
HOME = os.getcwd()
for _ in range(100):
    os.close(os.open("warm", os.O_CREAT | os.O_RDWR, 0o600))
    os.unlink("warm")
shown()
gone()
many()
tell("left", sorted(os.listdir(".")))
sys.stdout.flush()
