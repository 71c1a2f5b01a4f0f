"""Tar archives that hold images: which kind one is, and the files in it by name."""

import errno
import io
import os
import posixpath
import re
from pathlib import Path

from polytropo.errors import StorageError
from polytropo.images.blobs import FileReader
from polytropo.images.errors import ImageError, shown
from polytropo.images.streams import CHUNK_BYTES, PADDING_BYTES_MAX, ChunkReader, Readable, drain
from polytropo.images.tar_reader import Entry, Kind, TarReader
from polytropo.units import format_size

_HEAD_BYTES = 64 << 10
_FILES_MAX = 100_000
_LINKS_MAX = 8
_HEX = "[0-9a-f]{64}"
# What the first entry of an image archive may be called; anything else begins a root filesystem.
_ARCHIVE_NAME = re.compile(
    rf"blobs(/sha256(/{_HEX})?)?|oci-layout|index\.json|manifest\.json|repositories"
    rf"|{_HEX}(\.json|\.tar|/VERSION|/json|/layer\.tar)?"
)


def holds_images(stream: ChunkReader) -> bool:
    """Whether a tar stream is an image archive and no root filesystem. Raises ImageError for others."""
    head = stream.peek(_HEAD_BYTES)
    if not head:
        raise ImageError("it is empty; give an image archive or the tar of a root filesystem")
    reader = iter(TarReader(io.BytesIO(head)))
    name = ""
    for count in range(_HEAD_BYTES):
        try:
            entry = next(reader, None)
        except ImageError:
            if count == 0:
                raise ImageError("it is no tar archive, and no directory with an image layout") from None
            break
        name = "" if entry is None else _plain_name(entry.name)
        if entry is None or name:
            break
    return _ARCHIVE_NAME.fullmatch(name) is not None


class _Index:
    """Names of files in an archive, and the links between them."""

    def __init__(self) -> None:
        self._links: dict[str, str] = {}
        self.names: set[str] = set()

    def add(self, entry: Entry) -> str | None:
        """Takes an entry; returns the name of one that is a file to keep."""
        name = _plain_name(entry.name)
        if len(self.names) + len(self._links) >= _FILES_MAX:
            raise ImageError(f"it holds more than {_FILES_MAX} files, which no image archive does")
        if entry.kind in (Kind.SYMLINK, Kind.HARD_LINK):
            base = posixpath.dirname(name).encode() + b"/" if entry.kind is Kind.SYMLINK else b""
            self._links[name] = _plain_name(base + entry.link_name)
            self.names.discard(name)
        elif entry.kind is Kind.FILE:
            if entry.pieces is not None:
                raise ImageError(f"its entry {shown(entry.name)} is a sparse file, as in no image archive")
            self._links.pop(name, None)
            self.names.add(name)
            return name
        return None

    def target(self, name: str) -> str:
        """The file that a name means; links lead only to other names of the archive."""
        for _ in range(_LINKS_MAX):
            if name in self.names:
                break
            name = self._links.get(name, name)
        return name


class TarFileBlobs:
    """The files of a plain tar archive on disk, read where they lie."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._index = _Index()
        self._places: dict[str, tuple[int, int]] = {}
        source = _SeekingReader(descriptor)
        reader = TarReader(source)
        for entry in reader:
            if name := self._index.add(entry):
                self._places[name] = (source.position, entry.size_bytes)

    def open(self, path: str) -> tuple[Readable, int]:
        place = self._places.get(self._index.target(path))
        if place is None:
            raise FileNotFoundError(path)
        return FileReader(self._descriptor, *place), place[1]

    def has(self, path: str) -> bool:
        return self._index.target(path) in self._places

    def close(self) -> None:
        """The descriptor is the caller's."""


class SpooledBlobs:
    """The files of an archive that can be read only once, kept in a temporary directory."""

    def __init__(self, stream: Readable, directory: Path) -> None:
        self._directory = directory
        self._index = _Index()
        self._numbers: dict[str, int] = {}
        self._open: int | None = None
        reader = TarReader(stream)
        for number, entry in enumerate(reader):
            if name := self._index.add(entry):
                self._keep(reader, entry, number)
                self._numbers[name] = number
        drain(stream, PADDING_BYTES_MAX)  # whoever writes it should not meet a closed pipe

    def open(self, path: str) -> tuple[Readable, int]:
        self.close()
        name = self._index.target(path)
        if name not in self._index.names:
            raise FileNotFoundError(path)
        self._open = os.open(self._file(self._numbers[name]), os.O_RDONLY | os.O_CLOEXEC)
        size_bytes = os.fstat(self._open).st_size
        return FileReader(self._open, 0, size_bytes), size_bytes

    def has(self, path: str) -> bool:
        return self._index.target(path) in self._index.names

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open)
            self._open = None

    def _keep(self, reader: TarReader, entry: Entry, number: int) -> None:
        space = os.statvfs(self._directory)
        if entry.size_bytes > space.f_bavail * space.f_frsize:
            raise StorageError(
                f"cannot keep {shown(entry.name)} of the archive: it takes"
                f" {format_size(entry.size_bytes)}, which the filesystem of {self._directory.parent} has not"
                " left; free some space (`polytropo system prune`)",
                errno.ENOSPC,
            )
        with self._file(number).open("xb", buffering=0) as file:
            while data := reader.read(CHUNK_BYTES):
                file.write(data)

    def _file(self, number: int) -> Path:
        return self._directory / str(number)


class _SeekingReader:
    """Reads a file on disk in order, and jumps where nobody wants to read."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = os.fstat(descriptor).st_size
        self.position = 0

    def read(self, size: int, /) -> bytes:
        data = os.pread(self._descriptor, size, self.position)
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        """Moves on by `size` bytes, fewer at the end; returns how many."""
        skipped = max(0, min(size, self._end - self.position))
        self.position += skipped
        return skipped


def _plain_name(name: bytes) -> str:
    text = name.decode("utf-8", "surrogateescape")
    return posixpath.normpath(f"/{text}").lstrip("/") if text else ""
