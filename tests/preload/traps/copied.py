"""Small files that are copied without the kernel, by the calls that have it move bytes: offsets, ends, and what it refuses."""

import errno
import fcntl
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

from trap import begin

FICLONE = 0x40049409
begin()


def attempt(function: Callable[..., Any], *arguments: Any) -> object:
    try:
        return function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def where(*files: int) -> list[int]:
    return [os.lseek(file, 0, os.SEEK_CUR) for file in files]


def holds(name: str) -> bytes:
    with open(name, "rb") as file:
        return file.read()


content = bytes(range(256)) * 40
for size in (0, 1, 4096, 4097, 10_000, 300_000):
    with open("from", "wb") as made:
        made.write((content * 30)[:size])
    for turn in range(2):
        source, target = os.open("from", os.O_RDONLY), os.open("to", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        print(size, attempt(fcntl.ioctl, target, FICLONE, source), where(source, target))
        copied = -1
        while copied:
            copied = os.copy_file_range(source, target, 1 << 20)
        print(where(source, target), os.fstat(target).st_size, holds("to") == holds("from"))
        # With offsets of the program's own, which leave those of the files.
        print(os.copy_file_range(source, target, 100, 50, 7), where(source, target), len(holds("to")))
        print(os.copy_file_range(source, target, 100, 3), where(source, target))
        os.lseek(source, 0, os.SEEK_SET)
        os.lseek(target, 5, os.SEEK_SET)
        print(os.sendfile(target, source, None, 20), where(source, target))
        print(os.sendfile(target, source, 11, 5000), where(source, target), len(holds("to")))
        print(os.write(target, b"next"), os.read(source, 10), where(source, target))
        os.close(source)
        os.close(target)
        print(size, zlib.crc32(holds("to")))
with open("from", "wb") as made:
    made.write(content[:5000])
for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDONLY):
    for other in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY):
        source, target = os.open("from", other), os.open("to", flags | os.O_TRUNC * (flags != os.O_RDONLY))
        print(flags, other, attempt(os.copy_file_range, source, target, 100), where(source))
        print(attempt(os.sendfile, target, source, None, 100), where(source))
        print(attempt(os.sendfile, target, source, 10, 100), where(source))
        print(attempt(fcntl.ioctl, target, FICLONE, source), attempt(os.copy_file_range, source, target, 0))
        os.close(source)
        os.close(target)
both = os.open("from", os.O_RDWR)
print(
    attempt(os.copy_file_range, both, both, 100, 0, 200), attempt(os.copy_file_range, both, both, 100, 0, 50)
)
print(attempt(os.copy_file_range, both, 99, 100), attempt(os.copy_file_range, 99, both, 100))
print(attempt(os.copy_file_range, both, both, 100, -1, 5), attempt(os.sendfile, both, 99, 0, 1))
with tempfile.TemporaryFile(dir="/dev/shm") as elsewhere:
    source = os.open("from", os.O_RDONLY)
    print(attempt(fcntl.ioctl, elsewhere.fileno(), FICLONE, source))
    print(attempt(os.copy_file_range, source, elsewhere.fileno(), 100), where(source))
    print(attempt(os.sendfile, elsewhere.fileno(), source, None, 100), where(source))
    print(elsewhere.seek(0), elsewhere.read() == content[:100])
os.mkdir("tree")
for number in range(20):
    with open(f"tree/{number}", "wb") as made:
        made.write(content[: number * 500])
shutil.copytree("tree", "copy")
print([holds(f"copy/{number}") == holds(f"tree/{number}") for number in range(20)])
