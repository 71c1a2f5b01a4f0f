"""Failures that a person is told about: one sentence each, which says what is wrong and what to do."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PolytropoError(Exception):
    """A failure whose `str()` is one complete sentence for the user."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class StorageError(PolytropoError):
    """The host's filesystem refused; `errno` tells why."""

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.errno = number


_ADVICE = {
    errno.ENOSPC: "the filesystem of {where} is full; free some space (`polytropo system prune`)",
    errno.EDQUOT: "the disk quota at {where} is used up; free some space and try again",
    errno.EROFS: "{where} is read-only; mount it writable or set POLYTROPO_HOME to another directory",
    errno.EACCES: "{where} may not be used by this user; run as its owner or set POLYTROPO_HOME",
    errno.EPERM: "{where} may not be changed by this user; run as its owner or set POLYTROPO_HOME",
    errno.EMFILE: "this process has too many open files; raise its limit (`ulimit -n`) and try again",
    errno.ENOTSUP: "the filesystem of {where} lacks extended attributes; use ext4, xfs or btrfs",
}


def storage_error(error: OSError, action: str, where: Path) -> StorageError:
    """The sentence for `error`, which stopped `action` ("import the image") in the directory `where`."""
    number = error.errno or errno.EIO
    advice = _ADVICE.get(number)
    if advice is None:
        place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(where)
        advice = f"{place}: {os.strerror(number)}"
    return StorageError(f"cannot {action}: {advice.format(where=where)}", number)


@contextmanager
def storage_errors(action: str, where: Path) -> Iterator[None]:
    """Turns an OSError inside into a `StorageError`; `action` completes "cannot ..."."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, action, where) from error
