"""Files of which a union's upper holds some blocks only, by the record of which and of where the others are.

The record is the attribute `user.polytropo.blocks`; ARCHITECTURE.md describes it ("Union format").
"""

import os
import re
import struct
import zlib
from dataclasses import dataclass

from polytropo.images.data import FileData
from polytropo.images.errors import ImageError, shown
from polytropo.images.extract import RESERVED
from polytropo.images.streams import CHUNK_BYTES
from polytropo.images.walk import Found, Tree

BLOCKS = b"user.polytropo.blocks"
FORMAT = 2
"""The union format that is understood here."""

_FORMAT_NAME = re.compile(rb"format-([0-9]{1,9})")
_LINE = re.compile(
    rb"1 ([0-9]{1,19}) ([0-9]{1,19}) ([0-9]{1,5})-[0-9]{1,20} ([0-9]{1,19})"
    rb" (-?[0-9]{1,19})\.([0-9]{9}) ([0-9]{1,4}) ([0-9]{1,2})\n"
)


@dataclass(frozen=True)
class Record:
    """What a file in an upper lacks, and where that is."""

    block_bytes: int
    limit_bytes: int
    """From here on all bytes are the upper's own."""
    ordinal: int
    size_bytes: int
    mtime_ns: int
    path: bytes
    own: bytes
    """One bit a block."""
    sums: dict[int, int]
    """Checksums of own blocks that may have been lost with the power; they count if their bytes are there."""

    def is_own(self, block: int) -> bool:
        return bool(self.own[block // 8] >> block % 8 & 1)


def parse(value: bytes, name: bytes) -> Record:
    """Reads the attribute. Raises ImageError."""
    match = _LINE.match(value)
    if match:
        block, limit, ordinal, size, seconds, ns, length, count = map(int, match.groups())
        path, rest = value[match.end() :][:length], value[match.end() + length :]
        own, loose = rest[: max(0, len(rest) - 12 * count)], rest[max(0, len(rest) - 12 * count) :]
        components = path.split(b"/")[1:]
        is_path = path.startswith(b"/") and not {b"", b".", b"..", RESERVED} & set(components)
        fits = block > 0 and limit <= size and -(-limit // block) <= len(own) * 8 and len(loose) == 12 * count
        if len(path) == length and is_path and b"\0" not in path and fits:
            sums = dict(struct.iter_unpack("<QI", loose))
            return Record(block, limit, ordinal, size, seconds * 10**9 + ns, path[1:], own, sums)
    raise ImageError(f"the container's record of which blocks of {shown(name)} it holds was damaged")


class PartialData:
    """The bytes of a partial file, from both layers."""

    def __init__(self, upper: int, lower: int, record: Record) -> None:
        self._upper = FileData(upper)
        self._lower = FileData(lower)
        self._record = record
        self._lost = {block for block in record.sums if not self._is_there(block)}
        self.size_bytes = self._upper.size_bytes

    def pieces(self) -> list[tuple[int, int]]:
        """The (offset, length) that hold data."""
        found: list[tuple[int, int]] = []
        for is_own, start, end in self._runs(0, self.size_bytes):
            layer = self._upper if is_own else self._lower
            for offset, length in layer.pieces_in(start, end):
                if found and sum(found[-1]) == offset:
                    found[-1] = (found[-1][0], found[-1][1] + length)
                else:
                    found.append((offset, length))
        return found

    def read(self, length: int, offset: int) -> bytes:
        """Bytes at `offset`, fewer than asked for where another layer begins."""
        for is_own, start, end in self._runs(offset, min(offset + length, self.size_bytes)):
            return (self._upper if is_own else self._lower).read(end - start, start)
        return b""

    def _is_there(self, block: int) -> bool:
        start = block * self._record.block_bytes
        end = min(start + self._record.block_bytes, self._record.limit_bytes)
        found = 0
        while start < end and (data := self._upper.read(min(end - start, CHUNK_BYTES), start)):
            found = zlib.crc32(data, found)
            start += len(data)
        return start >= end and found == self._record.sums[block]

    def _runs(self, at: int, until: int) -> list[tuple[bool, int, int]]:
        record = self._record
        runs: list[tuple[bool, int, int]] = []
        while at < until:
            if at >= record.limit_bytes:
                is_own, end = True, until
            else:
                block = at // record.block_bytes
                is_own = record.is_own(block) and block not in self._lost
                end = min((block + 1) * record.block_bytes, record.limit_bytes, until)
            if runs and runs[-1][0] == is_own:
                runs[-1] = (is_own, runs[-1][1], end)
            else:
                runs.append((is_own, at, end))
            at = end
        return runs

    def close(self) -> None:
        """Closes both files."""
        self._upper.close()
        self._lower.close()


def open_data(tree: Tree, path: bytes, found: Found, lowers: list[Tree]) -> FileData | PartialData:
    """The bytes of a regular file of a layer; `lowers` are the topmost first. Raises ImageError."""
    descriptor = tree.open_file(path, found.inode)
    try:
        if BLOCKS not in found.marks:
            return FileData(descriptor)
        record = parse(found.marks[BLOCKS], path)
        if not 1 <= record.ordinal <= len(lowers):
            raise ImageError(
                f"{shown(path)} is a part of a file in layer {record.ordinal}, which its image lacks"
            )
        lower = lowers[len(lowers) - record.ordinal]
        below = lower.get(record.path)
        if below is None or not below.is_file:
            raise ImageError(f"{shown(path)} is a part of {shown(record.path)} in its image, which is gone")
        if (below.size_bytes, below.attributes.mtime_ns) != (record.size_bytes, record.mtime_ns):
            raise ImageError(
                f"{shown(path)} is a part of {shown(record.path)} in its image, which is another file by now"
            )
        return PartialData(descriptor, lower.open_file(record.path, below.inode), record)
    except BaseException:
        os.close(descriptor)
        raise


def check_format(upper: Tree) -> None:
    """Refuses an upper that a later version wrote. Raises ImageError."""
    if upper.get(RESERVED) is None:
        return
    for found in upper.list(RESERVED):
        match = _FORMAT_NAME.fullmatch(found.name)
        if match and int(match[1]) > FORMAT:
            raise ImageError(
                f"the container's files are in the format {int(match[1])} of a later version of polytropo;"
                f" this one knows {FORMAT}, so use that version"
            )
