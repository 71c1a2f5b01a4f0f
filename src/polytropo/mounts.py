"""The kernel's mount table and what is dead in it."""

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

from polytropo.errors import PolytropoError

FILESYSTEM_TYPE = "fuse.polytropo"
_MNT_DETACH = 2


class Mount(NamedTuple):
    """One line of the mount table."""

    mountpoint: Path
    filesystem_type: str
    source: str
    device: str
    """"major:minor" of the superblock."""


def mount_table(pid: int | str = "self") -> list[Mount]:
    """What the process `pid` sees mounted, in order."""
    found = []
    for line in Path(f"/proc/{pid}/mountinfo").read_bytes().decode("utf-8", "surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, source, _) = before.split(), after.split(" ", 2)
        found.append(Mount(Path(_unescape(fields[4])), kind, _unescape(source), fields[2]))
    return found


def our_mounts(pid: int | str = "self") -> list[Mount]:
    """The mounts of polytropo services."""
    return [mount for mount in mount_table(pid) if mount.filesystem_type == FILESYSTEM_TYPE]


def top_mount(path: Path) -> Mount | None:
    """What is mounted right at `path`, the uppermost if several are; None if nothing is."""
    return next((mount for mount in reversed(mount_table()) if mount.mountpoint == path), None)


def is_dead(path: Path) -> bool:
    """Whether the service behind the mount at `path` is gone, so that every access fails.

    One that does not answer may still come back: it is not dead.
    """
    from polytropo import hostprobe

    return hostprobe.answers(path) in (errno.ENOTCONN, errno.ECONNABORTED)


def detach(path: Path) -> None:
    """Takes the uppermost mount at `path` out of the tree, also while it is in use. Raises PolytropoError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        advice = "; run as root" if number == errno.EPERM else ""
        raise PolytropoError(f"{path} cannot be unmounted: {os.strerror(number)}{advice}")


def detach_ours(below: Path) -> None:
    """Takes what our services mounted at or below `below` out of the tree. Raises PolytropoError."""
    for mount in reversed(our_mounts()):
        if mount.mountpoint.is_relative_to(below):
            detach(mount.mountpoint)


def clear_dead_mounts(below: Path | None = None, *, source: str | None = None) -> list[Path]:
    """Detaches the dead mounts of our services; returns where they were.

    `below` picks those in a directory, `source` those of one tenant.
    """
    cleared = []
    for mount in reversed(our_mounts()):
        wanted = source is None or mount.source == source
        wanted = wanted and (below is None or mount.mountpoint.is_relative_to(below))
        if wanted and is_dead(mount.mountpoint):
            detach(mount.mountpoint)
            cleared.append(mount.mountpoint)
    return cleared


def _unescape(field: str) -> str:
    # The kernel writes space, tab, newline and backslash as octal numbers.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
