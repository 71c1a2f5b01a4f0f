"""Decompression: all forms of a stream that programs write, in pieces of any size."""

import gzip
import io
import random
from collections.abc import Callable

import pytest
import zstandard

from polytropo.images.errors import ImageError
from polytropo.images.streams import CHUNK_BYTES, ChunkReader, DigestReader, decompressed, drain, read_exactly

DATA = random.Random(1).randbytes(300_000) + bytes(3 * CHUNK_BYTES) + b"end"
SKIPPABLE = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


def zstd(data: bytes, *, write_checksum: bool = False) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=write_checksum).compress(data)


def unsized(data: bytes) -> bytes:
    """A zstd frame that does not say how long its content is."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


class Crumbs:
    """Gives a few bytes at a time."""

    def __init__(self, data: bytes, most: int) -> None:
        self._file = io.BytesIO(data)
        self._most = most

    def read(self, size: int, /) -> bytes:
        return self._file.read(min(size, self._most))


@pytest.mark.parametrize(
    "packed",
    [
        lambda: DATA,
        lambda: gzip.compress(DATA),
        lambda: gzip.compress(DATA[:1000]) + gzip.compress(DATA[1000:]),
        lambda: gzip.compress(b"") + gzip.compress(DATA) + gzip.compress(b""),
        lambda: gzip.compress(DATA) + bytes(700),
        lambda: zstd(DATA),
        lambda: zstd(DATA, write_checksum=True),
        lambda: unsized(DATA),
        lambda: zstd(DATA[:1000]) + zstd(DATA[1000:]),
        lambda: SKIPPABLE + zstd(DATA) + SKIPPABLE,
    ],
)
@pytest.mark.parametrize("most", [4093, CHUNK_BYTES])
def test_every_form_gives_the_data_back(packed: Callable[[], bytes], most: int) -> None:
    source = DigestReader(Crumbs(packed(), most))
    stream = decompressed(source)
    assert stream.peek(5) == DATA[:5]
    assert read_exactly(stream, len(DATA) + 1) == DATA
    assert source.size_bytes == len(packed()), "what follows the data is read, too"


@pytest.mark.parametrize("name", ["Paper", "P\x7f", "S", "_", "\x28", "BZ"])
def test_plain_data_is_not_taken_for_packed(name: str) -> None:
    data = name.encode().ljust(600, b"\0")
    assert read_exactly(decompressed(io.BytesIO(data)), 600) == data


@pytest.mark.parametrize("cut", [11, 100, 200_000, -1, -5])
def test_what_is_cut_off_is_refused_or_shorter(cut: int) -> None:
    with pytest.raises(ImageError, match="ends too early"):
        read_exactly(decompressed(io.BytesIO(gzip.compress(DATA)[:cut])), len(DATA) + 1)
    try:
        rest = read_exactly(decompressed(io.BytesIO(zstd(DATA)[:cut])), len(DATA) + 1)
    except ImageError as error:
        assert "zstd stream" in error.sentence
    else:  # whoever reads the archive in it finds that its end is missing
        assert len(rest) < len(DATA)


def test_damage_is_found() -> None:
    for packed in (gzip.compress(DATA), zstd(DATA, write_checksum=True)):
        broken = bytearray(packed)
        broken[len(broken) // 2] ^= 0xFF
        with pytest.raises(ImageError, match="stream is damaged"):
            read_exactly(decompressed(io.BytesIO(bytes(broken))), len(DATA) + 1)


def test_a_window_too_large_for_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = packed.compress(DATA) + packed.flush()
    with pytest.raises(ImageError, match=r"zstd stream is damaged .*memory"):
        read_exactly(decompressed(io.BytesIO(data)), len(DATA))


def test_drain_has_a_bound() -> None:
    drain(ChunkReader(iter([b"x" * 10])), 10)
    with pytest.raises(ImageError, match="more than 9 bytes follow the end"):
        drain(ChunkReader(iter([b"x" * 10])), 9)
