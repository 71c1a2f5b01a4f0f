"""One process that does file operations below a directory, on orders from a pipe.

Orders and answers are JSON, one a line. An answer is ``{"ok": value}`` or ``{"errno": "ENOENT"}``; a
value holds only what a correct filesystem must answer alike on both sides (no inode numbers,
no times but those that were set).

Run as a program: ``python actor.py DIRECTORY``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import stat
import sys
from collections.abc import Callable
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_ZERO_RANGE = 16


def renameat2(old: str, new: str, flags: int) -> None:
    """renameat2(2), which the standard library lacks; raises OSError."""
    at_fdcwd = -100
    if _libc.renameat2(at_fdcwd, os.fsencode(old), at_fdcwd, os.fsencode(new), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), old)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode; raises OSError."""
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def pattern(seed: int, length: int) -> bytes:
    """Bytes that tell where they came from: the same for the same seed."""
    block = hashlib.blake2b(seed.to_bytes(8, "little")).digest()
    return (block * (length // len(block) + 1))[:length]


def describe(path: str) -> dict[str, Any]:
    """What stat(2) says of ``path`` that must not depend on the filesystem."""
    return describe_stat(os.lstat(path), path)


def describe_stat(info: os.stat_result, path: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"mode": oct(info.st_mode), "uid": info.st_uid, "gid": info.st_gid}
    if stat.S_ISREG(info.st_mode):
        found["size"] = info.st_size
    if not stat.S_ISDIR(info.st_mode):
        found["nlink"] = info.st_nlink
    if stat.S_ISLNK(info.st_mode) and path is not None:
        found["target"] = os.readlink(path)
    if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        found["rdev"] = info.st_rdev
    return found


def open_quick(path: str, flags: int) -> int:
    """open(2) that does not wait for the other end of a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK, 0o644)


def digest(path: str) -> str:
    with open(path, "rb", opener=open_quick) as f:
        if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
            return "not a regular file"
        return hashlib.file_digest(f, "blake2b").hexdigest()[:32]


def tree(root: str) -> dict[str, Any]:
    """Every path below ``root`` with its attributes, bytes and xattrs."""
    found: dict[str, Any] = {}
    for directory, directories, files in os.walk(root):
        for name in sorted(directories) + sorted(files):
            path = os.path.join(directory, name)
            entry = describe(path)
            if stat.S_ISREG(os.lstat(path).st_mode):
                entry["bytes"] = digest(path)
            entry["xattrs"] = xattrs(path)
            found[os.path.relpath(path, root)] = entry
    return found


def xattrs(path: str) -> dict[str, str]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return {n: os.getxattr(path, n, follow_symlinks=False).hex() for n in names if n.startswith("user.")}


class Actor:
    """Does operations below the working directory and keeps open files by slot number."""

    def __init__(self) -> None:
        self.files: dict[int, int] = {}

    def do(self, name: str, arguments: list[Any]) -> Any:
        method: Callable[..., Any] = getattr(self, "do_" + name)
        return method(*arguments)

    # Names

    def do_mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode)

    def do_rmdir(self, path: str) -> None:
        os.rmdir(path)

    def do_unlink(self, path: str) -> None:
        os.unlink(path)

    def do_rename(self, old: str, new: str, flags: int) -> None:
        if flags:
            renameat2(old, new, flags)
        else:
            os.rename(old, new)

    def do_link(self, old: str, new: str) -> None:
        os.link(old, new, follow_symlinks=False)

    def do_symlink(self, target: str, path: str) -> None:
        os.symlink(target, path)

    def do_mkfifo(self, path: str) -> None:
        os.mkfifo(path, 0o640)

    def do_listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def do_scandir(self, path: str) -> list[list[Any]]:
        with os.scandir(path) as entries:
            return sorted([e.name, e.is_dir(follow_symlinks=False), e.is_symlink()] for e in entries)

    # Attributes

    def do_stat(self, path: str) -> dict[str, Any]:
        return describe(path)

    def do_stat_follow(self, path: str) -> dict[str, Any]:
        return describe_stat(os.stat(path), None)

    def do_chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def do_chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(path, uid, gid, follow_symlinks=False)

    def do_utime(self, path: str, atime_ns: int, mtime_ns: int) -> list[int]:
        # Not by its name again: the way there may lead through the link itself, whose atime that sets.
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        try:
            os.utime(path, ns=(atime_ns, mtime_ns), follow_symlinks=False)
            info = os.fstat(fd)
        finally:
            os.close(fd)
        return [info.st_atime_ns, info.st_mtime_ns]

    def do_access(self, path: str, mode: int) -> bool:
        return os.access(path, mode)

    def do_setxattr(self, path: str, name: str, length: int, flags: int) -> None:
        os.setxattr(path, name, pattern(length, length), flags, follow_symlinks=False)

    def do_removexattr(self, path: str, name: str) -> None:
        os.removexattr(path, name, follow_symlinks=False)

    def do_xattrs(self, path: str) -> dict[str, str]:
        return xattrs(path)

    # Bytes, by path

    def do_digest(self, path: str) -> str:
        return digest(path)

    def do_truncate(self, path: str, length: int) -> None:
        os.truncate(path, length)

    def do_append(self, path: str, seed: int, length: int) -> int:
        fd = open_quick(path, os.O_WRONLY | os.O_APPEND)
        try:
            return os.write(fd, pattern(seed, length))
        finally:
            os.close(fd)

    def do_write_file(self, path: str, seed: int, length: int) -> None:
        with open(path, "wb", buffering=0, opener=open_quick) as f:
            f.write(pattern(seed, length))

    # Open files

    def do_open(self, slot: int, path: str, flags: int, mode: int) -> None:
        fd = os.open(path, flags | os.O_NONBLOCK, mode)
        self.do_close(slot)
        self.files[slot] = fd

    def do_tmpfile(self, slot: int, directory: str) -> None:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        self.do_close(slot)
        self.files[slot] = fd

    def do_link_open(self, slot: int, path: str) -> None:
        os.link(f"/proc/self/fd/{self._fd(slot)}", path, follow_symlinks=True)

    def do_close(self, slot: int) -> None:
        if slot in self.files:
            os.close(self.files.pop(slot))

    def do_close_all(self) -> None:
        for slot in list(self.files):
            self.do_close(slot)

    def do_pwrite(self, slot: int, offset: int, seed: int, length: int) -> int:
        return os.pwrite(self._fd(slot), pattern(seed, length), offset)

    def do_write(self, slot: int, seed: int, length: int) -> list[int]:
        fd = self._fd(slot)
        return [os.write(fd, pattern(seed, length)), os.lseek(fd, 0, os.SEEK_CUR)]

    def do_pread(self, slot: int, offset: int, length: int) -> str:
        return hashlib.blake2b(os.pread(self._fd(slot), length, offset)).hexdigest()[:32]

    def do_ftruncate(self, slot: int, length: int) -> None:
        os.ftruncate(self._fd(slot), length)

    def do_fstat(self, slot: int) -> dict[str, Any]:
        return describe_stat(os.fstat(self._fd(slot)), None)

    def do_fsync(self, slot: int) -> None:
        os.fsync(self._fd(slot))

    def do_fallocate(self, slot: int, mode: int, offset: int, length: int) -> None:
        fallocate(self._fd(slot), mode, offset, length)

    def do_seek_hole(self, slot: int) -> list[int]:
        """The end of the file only: where holes lie is the filesystem's choice.

        ext4 of Linux 6.18 puts the hole at the end of some preallocated files far beyond it.
        """
        fd = self._fd(slot)
        here = os.lseek(fd, 0, os.SEEK_CUR)
        size = os.fstat(fd).st_size
        try:
            hole = os.lseek(fd, size - 1, os.SEEK_HOLE) if size else 0
        finally:
            os.lseek(fd, here, os.SEEK_SET)
        return [int(hole >= size - 1), size]

    def do_copy_range(self, source: int, target: int, offset: int, length: int) -> int:
        done = 0
        while done < length:
            count = os.copy_file_range(
                self._fd(source), self._fd(target), length - done, offset + done, offset + done
            )
            if count == 0:
                break
            done += count
        return done

    def do_mmap_write(self, slot: int, offset: int, seed: int, length: int) -> None:
        fd = self._fd(slot)
        if os.fstat(fd).st_size < offset + length:
            os.ftruncate(fd, offset + length)
        with mmap.mmap(fd, offset + length) as window:
            window[offset : offset + length] = pattern(seed, length)

    def do_lock(self, slot: int, kind: str, exclusive: bool, start: int, length: int) -> None:
        operation = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
        if kind == "flock":
            fcntl.flock(self._fd(slot), operation)
        else:
            fcntl.lockf(self._fd(slot), operation, length, start)

    def do_unlock(self, slot: int, kind: str) -> None:
        if kind == "flock":
            fcntl.flock(self._fd(slot), fcntl.LOCK_UN)
        else:
            fcntl.lockf(self._fd(slot), fcntl.LOCK_UN)

    def do_read_here_and_there(self, path: str, seed: int) -> str:
        """Many small reads of one file, by offset and one after the other."""
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return self._read_many(file, seed)
        finally:
            os.close(file)

    def do_read_slot_here_and_there(self, slot: int, seed: int) -> str:
        return self._read_many(self._fd(slot), seed)

    def _read_many(self, file: int, seed: int) -> str:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return "not a regular file"
        dice, found = random.Random(seed), hashlib.blake2b()
        for _ in range(16):
            found.update(os.pread(file, dice.choice((1, 100, 5000, 70_000)), dice.randrange(310_000)))
            found.update(os.read(file, dice.choice((1, 600, 5000))))
            if dice.random() < 0.2:
                os.lseek(file, dice.randrange(100_000), os.SEEK_SET)
        return f"{found.hexdigest()[:16]} {os.lseek(file, 0, os.SEEK_CUR)}"

    def do_tree(self) -> dict[str, Any]:
        return tree(".")

    def _fd(self, slot: int) -> int:
        if slot not in self.files:
            raise OSError(errno.EBADF, "no open file in this slot")
        return self.files[slot]


def serve() -> None:
    actor = Actor()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": actor.do(name, arguments)}
        except OSError as problem:
            answer = {"errno": errno.errorcode.get(problem.errno or 0, str(problem.errno))}
        except ValueError as problem:
            answer = {"errno": f"ValueError {problem}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    os.umask(0o022)
    os.chdir(sys.argv[1])
    serve()
