"""Streams that an image passes through: counted, digested, decompressed, read exactly."""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Protocol, cast

from polytropo.images.errors import ImageError

CHUNK_BYTES = 1 << 20
# Programs pad archives to a few KiB; whoever sends more wants to keep us busy.
PADDING_BYTES_MAX = 64 << 20
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
# What a zstd frame may make its reader keep; the format's own recommendation for decoders is 8 MiB.
_ZSTD_WINDOW_BYTES_MAX = 1 << 27
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "zip"}
_MAGIC_BYTES = 6


class Readable(Protocol):
    """Anything to read bytes from, in order."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none only at the end."""


Told = Callable[[int], None]


class DigestReader:
    """Passes bytes on, counting and hashing them."""

    def __init__(self, source: Readable, told: Told | None = None, size_bytes_max: int | None = None) -> None:
        self._source = source
        self._hash = hashlib.sha256()
        self._told = told
        self._size_bytes_max = size_bytes_max
        self.size_bytes = 0

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        self._hash.update(data)
        self.size_bytes += len(data)
        if self._size_bytes_max is not None and self.size_bytes > self._size_bytes_max:
            raise ImageError(f"it is larger than the {self._size_bytes_max} bytes that its manifest declares")
        if self._told:
            self._told(self.size_bytes)
        return data

    @property
    def digest(self) -> str:
        """`sha256:` and the hexadecimal digest of what was read so far."""
        return f"sha256:{self._hash.hexdigest()}"


class ChunkReader:
    """Reads from an iterator of chunks, with a look at what comes next."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = b""
        self._position = 0

    @classmethod
    def of(cls, source: Readable) -> "ChunkReader":
        return cls(_chunks(source))

    def read(self, size: int, /) -> bytes:
        available = len(self._buffer) - self._position
        while available == 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._buffer, self._position, available = chunk, 0, len(chunk)
        size = min(size, available)
        if size == len(self._buffer):
            data, self._buffer, self._position = self._buffer, b"", 0
            return data
        data = self._buffer[self._position : self._position + size]
        self._position += size
        return data

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end; they are read again later."""
        rest = self._buffer[self._position :]
        while len(rest) < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            rest += chunk
        self._buffer, self._position = rest, 0
        return rest[:size]


def read_exactly(source: Readable, size: int) -> bytes:
    """`size` bytes, fewer only at the end."""
    data = source.read(size)
    if len(data) == size or not data:
        return data
    parts, missing = [data], size - len(data)
    while missing and (data := source.read(missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def compression_of(magic: bytes) -> str:
    """How a stream is compressed, by its first bytes. Raises ImageError for what we do not read."""
    if magic.startswith(_GZIP):
        return "gzip"
    if magic.startswith(_ZSTD) or _ZSTD_SKIPPABLE.match(magic):
        return "zstd"
    for start, name in _OTHERS.items():
        if magic.startswith(start):
            raise ImageError(f"it is compressed with {name}; use gzip, zstd or no compression")
    return "none"


def decompressed(source: Readable) -> ChunkReader:
    """What `source` holds, decompressed if it begins like gzip or zstd."""
    reader = source if isinstance(source, ChunkReader) else ChunkReader.of(source)
    kind = compression_of(reader.peek(_MAGIC_BYTES))
    if kind == "gzip":
        return ChunkReader(_gunzip(reader))
    if kind == "zstd":
        return ChunkReader(_unzstd(reader))
    return reader


def drain(source: Readable, size_bytes_max: int) -> None:
    """Reads to the end. Raises ImageError if that is more than `size_bytes_max` away."""
    left = size_bytes_max
    while data := source.read(CHUNK_BYTES):
        left -= len(data)
        if left < 0:
            raise ImageError(f"more than {size_bytes_max} bytes follow the end of its tar archive")


def copy(source: Readable, target: IO[bytes]) -> None:
    """Writes all of `source` to `target`."""
    while data := source.read(CHUNK_BYTES):
        target.write(data)


def _chunks(source: Readable) -> Iterator[bytes]:
    while data := source.read(CHUNK_BYTES):
        yield data


def _gunzip(source: Readable) -> Iterator[bytes]:
    """All members of a gzip stream, in pieces of at most CHUNK_BYTES however well it is packed."""
    data = source.read(CHUNK_BYTES)
    while data:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if not data and not (data := source.read(CHUNK_BYTES)):
                raise ImageError("its gzip stream ends too early; get a complete copy")
            try:
                out = member.decompress(data, CHUNK_BYTES)
            except zlib.error as error:
                raise ImageError(f"its gzip stream is damaged ({error}); get a sound copy") from None
            data = member.unused_data if member.eof else member.unconsumed_tail
            if out:
                yield out
        # Zeros may pad the end, as gzip(1) allows.
        while not data.strip(b"\0"):
            if not (data := source.read(CHUNK_BYTES)):
                return
        data = data.lstrip(b"\0") if data[:1] == b"\0" else data


def _unzstd(source: Readable) -> Iterator[bytes]:
    import zstandard  # takes long to load, and few archives need it

    context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES_MAX)
    try:
        with context.stream_reader(cast(IO[bytes], _Plain(source)), read_across_frames=True) as reader:
            while data := reader.read(CHUNK_BYTES):
                yield data
    except zstandard.ZstdError as error:
        raise ImageError(f"its zstd stream is damaged ({error}); get a sound copy") from None


class _Plain:
    """What the zstd library takes for a file; it asks for pieces of its own size."""

    def __init__(self, source: Readable) -> None:
        self._source = source

    def read(self, size: int = CHUNK_BYTES, /) -> bytes:
        return self._source.read(size)
