"""Where the parts of an image archive are read from: a directory, or a tar archive on disk or in passing."""

import os
import stat
from pathlib import Path
from typing import Protocol

from polytropo.errors import storage_errors
from polytropo.images.errors import ImageError, shown
from polytropo.images.streams import DigestReader, Readable, Told, read_exactly

DOCUMENT_BYTES_MAX = 4 << 20


class Blobs(Protocol):
    """Files by their path in an archive."""

    def open(self, path: str) -> tuple[Readable, int]:
        """A file and its size; raises FileNotFoundError."""

    def has(self, path: str) -> bool:
        """Whether `open` would find it."""

    def close(self) -> None:
        """Gives back what is open."""


class FileReader:
    """Reads a part of an open file, with an offset of its own."""

    def __init__(self, descriptor: int, offset: int, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._left = size_bytes

    def read(self, size: int, /) -> bytes:
        data = os.pread(self._descriptor, min(size, self._left), self._offset)
        self._offset += len(data)
        self._left -= len(data)
        return data


class DirectoryBlobs:
    """The files of an OCI image layout."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: int | None = None

    def open(self, path: str) -> tuple[Readable, int]:
        self.close()
        self._open = open_regular(self._directory / path)
        size_bytes = os.fstat(self._open).st_size
        return FileReader(self._open, 0, size_bytes), size_bytes

    def has(self, path: str) -> bool:
        return (self._directory / path).is_file()

    def close(self) -> None:
        """Closes the file that was opened last; there is one at a time."""
        if self._open is not None:
            os.close(self._open)
            self._open = None


def open_regular(path: Path) -> int:
    """Opens a file for reading that must be a regular one; a FIFO would keep us waiting."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError(f"{shown(str(path))} is no regular file")
    return descriptor


def blob_path(digest: str) -> str:
    """Where an OCI layout keeps a blob."""
    return f"blobs/{digest.replace(':', '/', 1)}"


def read_document(blobs: Blobs, path: str, digest: str | None = None) -> bytes:
    """A small file, verified against `digest`. Raises ImageError."""
    with storage_errors("read the image", Path(path)):
        try:
            source, size_bytes = blobs.open(path)
        except FileNotFoundError:
            raise ImageError(f"it lacks {shown(path)}; get a complete copy") from None
        if size_bytes > DOCUMENT_BYTES_MAX:
            raise ImageError(f"its {shown(path)} has {size_bytes} bytes; {DOCUMENT_BYTES_MAX} are the most")
        reader = DigestReader(source)
        content = read_exactly(reader, size_bytes)
    if digest is not None and reader.digest != digest:
        raise ImageError(f"its {shown(path)} has the digest {reader.digest}; get a sound copy")
    return content


def open_blob(blobs: Blobs, path: str, told: Told | None = None) -> Readable:
    """A large file; `told` hears how much of it was read."""
    try:
        source, _ = blobs.open(path)
    except FileNotFoundError:
        raise ImageError(f"it lacks {shown(path)}; get a complete copy") from None
    return DigestReader(source, told) if told else source
