"""What becomes of names that a service was making when it died.

Names are locks to many programs, so a name is taken for one's own only if nobody else can have made it: the
service said that it did, or what is there is as it would have made it and was made when it began to. The next
worker, through which others make names, begins later than that. What is there without its owner and mode was
made by halves then, and is made anew.
"""

import enum
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

# From a beginning to what it made. The next worker makes names 5 ms later at the earliest, of which clocks of
# filesystems, which lag behind, may hide 4.
_AFTER_NS, _LAG_NS = 1_000_000, 20_000_000


class Found(enum.Enum):
    OURS = enum.auto()
    HALF = enum.auto()
    """The service made it, and died before it had its owner and mode."""
    OTHERS = enum.auto()


@dataclass(frozen=True)
class Made:
    """What was to be made: type and permissions, where a link leads."""

    mode: int
    target: str = ""
    source: str = ""
    """Of another name, the first one."""


def found(name: str, root: int, made: Made, at_ns: int, inode: int | None) -> tuple[Found, int]:
    """What has the name by now, and its inode; the service began at `at_ns`, or made `inode`."""
    try:
        there = os.stat(name, dir_fd=root, follow_symlinks=False)
    except OSError:
        return Found.OTHERS, 0
    if inode is not None:
        return (Found.OURS if inode == there.st_ino else Found.OTHERS), there.st_ino
    if made.source:
        with suppress(OSError):
            source = os.stat(made.source, dir_fd=root, follow_symlinks=False)
            if (source.st_dev, source.st_ino) == (there.st_dev, there.st_ino):
                return Found.OURS, there.st_ino
        return Found.OTHERS, there.st_ino
    kind = stat.S_IFMT(made.mode)
    new = (
        stat.S_IFMT(there.st_mode) == kind
        and there.st_nlink <= (2 if kind == stat.S_IFDIR else 1)
        and -_LAG_NS <= there.st_ctime_ns - at_ns <= _AFTER_NS
        and (kind != stat.S_IFREG or there.st_size == 0)
        and (kind != stat.S_IFLNK or os.readlink(name, dir_fd=root) == made.target)
    )
    if not new:
        return Found.OTHERS, there.st_ino
    # Directories take the setgid bit from theirs.
    bits = 0o1777 if kind == stat.S_IFDIR else 0o7777
    owned = (there.st_uid, there.st_gid) == (os.geteuid(), os.getegid())
    whole = owned and there.st_mode & bits == made.mode & bits
    return (Found.OURS if whole else Found.HALF), there.st_ino


def remove(name: str, root: int, made: Made) -> bool:
    """Takes what was made by halves away."""
    try:
        if stat.S_ISDIR(made.mode):
            os.rmdir(name, dir_fd=root)
        else:
            os.unlink(name, dir_fd=root)
    except OSError:
        return False
    return True


def is_done(name: str, root: int, made: Made, amid: BaseException, again: Callable[[], None]) -> bool:
    """Whether a name that is there is the one that was to be made; `again` makes it anew."""
    _, at_ns, inode = amid.args
    if inode is not None:
        return True
    what, _ = found(name, root, made, at_ns, inode)
    if what is Found.HALF and remove(name, root, made):
        again()
        return True
    return what is Found.OURS


def open_again(name: str, flags: int, permissions: int, root: int, umask: int, amid: BaseException) -> int:
    """open(2) that was to make a file; `amid` says how far the service came."""
    _, at_ns, inode = amid.args
    try:
        # So that the kernel hears of what is there.
        return os.open(name, flags | os.O_CREAT | os.O_EXCL, permissions, dir_fd=root)
    except FileExistsError:
        made = Made(stat.S_IFREG | permissions & ~umask)
        what, there = found(name, root, made, at_ns, inode)
        if what is Found.HALF and remove(name, root, made):
            return os.open(name, flags, permissions, dir_fd=root)
        if not flags & os.O_EXCL:
            return os.open(name, flags, permissions, dir_fd=root)
        if what is not Found.OURS:
            raise
        plain = flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC) | os.O_NOFOLLOW
        opened = os.open(name, plain, dir_fd=root)
        if os.fstat(opened).st_ino == there:
            return opened
        os.close(opened)
        raise
