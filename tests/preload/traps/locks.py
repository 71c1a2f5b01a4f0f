"""Locks of all kinds between processes that know of the library and those that do not, and when they end."""

import errno
import fcntl
import os
import struct
import subprocess
import sys

from trap import UNAWARE, begin, in_child, unaware

OTHER = """
import fcntl, os, sys
file = os.open("locked", os.O_RDWR)
for line in sys.stdin:
    how, at = line.split()
    try:
        if how == "flock": fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB); fcntl.flock(file, fcntl.LOCK_UN)
        else: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, int(at)); fcntl.lockf(file, fcntl.LOCK_UN, 5, int(at))
        print("free", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""
ALONE = """
import fcntl, os
try: fcntl.lockf(os.open("alone", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0); print("free")
except OSError as error: print(error.strerror)
"""
begin()
os.close(os.open("locked", os.O_CREAT | os.O_RDWR))
others = [
    subprocess.Popen(
        [sys.executable, "-c", OTHER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for env in (os.environ, UNAWARE)
]


def seen(how: str = "posix", at: int = 0) -> list[str]:
    answers = []
    for other in others:
        assert other.stdin and other.stdout
        other.stdin.write(f"{how} {at}\n")
        other.stdin.flush()
        answers.append(other.stdout.readline().strip())
    return answers


def tried(function: object, *arguments: object) -> str:
    try:
        return str(function(*arguments) or "done")  # type: ignore[operator]
    except OSError as error:
        return errno.errorcode[error.errno or 0]


for turn in range(3):
    first, second = os.open("locked", os.O_RDWR), os.open("locked", os.O_RDWR)
    os.write(first, b"0123456789")
    fcntl.lockf(first, fcntl.LOCK_EX, 5, 0)
    print(
        "posix", seen(), seen(at=5), os.pread(second, 4, 0), tried(fcntl.lockf, second, fcntl.LOCK_EX, 5, 2)
    )
    # Any descriptor of the file that is closed takes the process's locks away, however it was opened.
    reads = os.open("locked", os.O_RDONLY)
    print("read", os.read(reads, 3), seen())
    os.close(reads)
    print("closed", seen())
    fcntl.lockf(second, fcntl.LOCK_EX, 5, 0)
    print("again", seen(), in_child(lambda: print(tried(fcntl.lockf, first, fcntl.LOCK_EX | fcntl.LOCK_NB))))
    os.close(second)
    print("closed", seen())
    fcntl.lockf(first, fcntl.LOCK_EX, 5, 0)
    print(in_child(lambda: os.close(first)), seen())
    print(
        "asked",
        struct.unpack("hhqqi4x", fcntl.fcntl(first, fcntl.F_GETLK, struct.pack("hhqqi4x", 1, 0, 0, 9, 0)))[0],
    )
    replaced = os.open("locked", os.O_RDONLY)
    os.dup2(os.open("known", os.O_RDONLY), replaced)
    print("replaced", seen())
    for descriptor in (first, replaced):
        os.close(descriptor)

    # Nobody writes, so that the kernel need not know of all who read.
    readers = [os.open("locked", os.O_RDONLY) for _ in range(3)]
    fcntl.lockf(readers[0], fcntl.LOCK_SH, 5, 0)
    print("shared", seen(), [os.pread(reader, 3, 0) for reader in readers])
    os.close(readers[1])
    print("one closed", seen())
    fcntl.lockf(readers[0], fcntl.LOCK_SH, 5, 0)
    os.dup2(os.open("known", os.O_RDONLY), readers[2])
    print("one replaced", seen())
    first, second = os.open("locked", os.O_RDWR), os.open("locked", os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    print("flock", seen("flock"), tried(fcntl.flock, second, fcntl.LOCK_EX | fcntl.LOCK_NB))
    copy = os.dup(first)
    os.close(first)
    print("copied", seen("flock"))
    print(in_child(lambda: fcntl.flock(copy, fcntl.LOCK_UN)), seen("flock"))
    fcntl.flock(second, fcntl.LOCK_SH)
    print("shared", seen("flock"), tried(fcntl.flock, copy, fcntl.LOCK_SH | fcntl.LOCK_NB))
    os.close(copy)
    os.close(second)
    print("closed", seen("flock"))
    # Open file descriptions' own.
    first, second = os.open("locked", os.O_RDWR), os.open("locked", os.O_RDWR)
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    print("own", tried(fcntl.fcntl, first, 37, whole)[:4], tried(fcntl.fcntl, second, 37, whole))
    os.close(second)
    print("other closed", seen())
    os.close(first)
    print("closed", seen())


def dies() -> None:
    file = os.open("locked", os.O_RDWR)
    fcntl.lockf(file, fcntl.LOCK_EX)
    print(seen())
    os.kill(os.getpid(), 9)


print(in_child(dies), seen())
# What is open beside it may have to be made the kernel's, by fork(2) for one, which ends no lock.
with open("alone", "w") as written:
    written.write("0123456789")
for _ in range(3):
    files = [os.open("alone", os.O_RDONLY) for _ in range(2)]
    fcntl.lockf(files[0], fcntl.LOCK_SH, 5, 0)
    files.append(os.open("alone", os.O_RDONLY))
    print("beside", [os.pread(file, 3, 0) for file in files], in_child(lambda: None))
    print(unaware(sys.executable, "-c", ALONE))
    for file in files:
        os.close(file)
    print("closed", unaware(sys.executable, "-c", ALONE))
# What has locks the kernel opens, which gives the lowest number.
locked = os.open("locked", os.O_RDWR)
fcntl.lockf(locked, fcntl.LOCK_SH)
for flags in (os.O_CREAT, os.O_TRUNC, os.O_CREAT | os.O_TRUNC):
    os.close(0)
    print("number", os.open("locked", os.O_WRONLY | flags))
os.close(locked)
for other in others:
    other.communicate()
print([other.returncode for other in others])
