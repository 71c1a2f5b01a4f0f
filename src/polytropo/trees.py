"""Removing directory trees that may be of any depth, with any names and permissions."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> None:
    """Removes a directory and all below it; a missing one is fine.

    Directories found below are first moved up into `path`, so that neither depth nor the length of
    a path matters and two descriptors are enough. What others remove meanwhile is not an error; what is
    mounted there is (EBUSY).
    """
    try:
        top = _open_writable(None, os.fspath(path))
    except FileNotFoundError:
        return
    try:
        _Remover(top).run()
    finally:
        os.close(top)
    with suppress(FileNotFoundError):
        path.rmdir()


class _Remover:
    def __init__(self, top: int) -> None:
        self._top = top
        self._device = os.fstat(top).st_dev
        self._moved = 0
        self._pending: list[str | bytes] = []

    def run(self) -> None:
        self._empty(self._top, is_top=True)
        while self._pending:
            name = self._pending.pop()
            try:
                directory = _open_writable(self._top, name)
            except FileNotFoundError:
                continue
            try:
                self._empty(directory, is_top=False)
            finally:
                os.close(directory)
            with suppress(FileNotFoundError):
                os.rmdir(name, dir_fd=self._top)

    def _empty(self, directory: int, *, is_top: bool) -> None:
        if os.fstat(directory).st_dev != self._device:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), "a mount")
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        os.unlink(entry.name, dir_fd=directory)
                elif is_top:
                    self._pending.append(entry.name)
                else:
                    self._move_up(directory, entry.name)

    def _move_up(self, directory: int, name: str) -> None:
        # A directory that may not be written to cannot be moved either.
        try:
            os.close(_open_writable(directory, name))
        except FileNotFoundError:
            return
        while True:
            self._moved += 1
            target = f".removed-{self._moved}"
            try:
                os.rename(name, target, src_dir_fd=directory, dst_dir_fd=self._top)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    continue
                if error.errno == errno.ENOENT:
                    return
                raise
            self._pending.append(target)
            return


def _open_writable(parent: int | None, name: str | bytes) -> int:
    """Opens a directory, giving the owner all rights over it where they are missing."""
    try:
        directory = os.open(name, _DIRECTORY, dir_fd=parent)
    except PermissionError:
        os.chmod(name, stat.S_IRWXU, dir_fd=parent)
        directory = os.open(name, _DIRECTORY, dir_fd=parent)
    if os.geteuid() != 0:
        mode = os.fstat(directory).st_mode
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            os.fchmod(directory, stat.S_IRWXU)
    return directory
