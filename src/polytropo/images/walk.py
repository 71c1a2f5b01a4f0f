"""Walks trees that may be hostile, name by name, without following a link."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from polytropo.images.errors import ImageError, shown
from polytropo.images.ownership import Attributes, Ownership, read_attributes
from polytropo.rooted import open_in_root


@dataclass(slots=True)
class Found:
    """Something in a directory."""

    name: bytes
    attributes: Attributes
    inode: int
    links: int
    size_bytes: int
    marks: dict[bytes, bytes]
    """The union's own attributes, `user.polytropo.*`."""

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.attributes.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.attributes.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.attributes.mode)


class Tree:
    """A tree on disk and how it keeps owners. Close it, or use it in a `with`."""

    def __init__(self, path: Path, ownership: Ownership) -> None:
        self.ownership = ownership
        self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._root)

    def top(self) -> Found:
        """The root itself."""
        return self._found(self._root, b".")

    def list(self, path: bytes) -> Iterator[Found]:
        """What is in the directory `path`, sorted by name."""
        directory = open_in_root(self._root, path or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for name in sorted(os.fsencode(name) for name in os.listdir(directory)):  # noqa: PTH208
                try:
                    yield self._found(directory, name)
                except FileNotFoundError:
                    continue  # removed meanwhile
        finally:
            os.close(directory)

    def get(self, path: bytes) -> Found | None:
        """What has the name `path`, without following a link at its end."""
        above, _, name = path.rpartition(b"/")
        try:
            directory = open_in_root(self._root, above or b".", os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return self._found(directory, name)
        except FileNotFoundError:
            return None
        finally:
            os.close(directory)

    def open_file(self, path: bytes, inode: int) -> int:
        """Opens the regular file `path` for reading, which has to be the one that was found."""
        descriptor = open_in_root(self._root, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        if status.st_ino != inode or not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise ImageError(f"{shown(path)} was replaced while it was read; try again when nobody writes it")
        return descriptor

    def digest_of(self, path: bytes) -> str:
        """The SHA-256 of a regular file's data."""
        import hashlib

        descriptor = open_in_root(self._root, path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def target_of(self, path: bytes) -> bytes:
        """What the symbolic link at `path` says."""
        above, _, name = path.rpartition(b"/")
        directory = open_in_root(self._root, above or b".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return os.readlink(name, dir_fd=directory)
        finally:
            os.close(directory)

    def _found(self, directory: int, name: bytes) -> Found:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        path = b"/proc/self/fd/%d/%s" % (directory, name)
        attributes, marks = read_attributes(status, path, self.ownership)
        return Found(name, attributes, status.st_ino, status.st_nlink, status.st_size, marks)
