"""Writes tar archives of trees: pax format, the same bytes for the same tree."""

import os
import stat
from collections.abc import Iterator

from polytropo.images.data import Data
from polytropo.images.errors import ImageError, shown
from polytropo.images.ownership import Attributes
from polytropo.images.streams import CHUNK_BYTES
from polytropo.images.tar_reader import BLOCK_BYTES

END = bytes(2 * BLOCK_BYTES)
_NAME_BYTES_MAX = 100
_OCTAL_ID_MAX = 0o7777777
_OCTAL_SIZE_MAX = 0o77777777777
_NS = 10**9
_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}
_HARD_LINK = b"1"
_EXTENDED = b"x"


def header(name: bytes, attributes: Attributes, *, link: bytes = b"", size_bytes: int = 0) -> bytes:
    """The header of an entry; `link` is the target of a symbolic link."""
    kind = _TYPES.get(stat.S_IFMT(attributes.mode))
    if kind is None:
        raise ImageError(f"{shown(name)} is a socket, which archives cannot hold")
    return _header(name, kind, attributes, link, size_bytes, {})


def hard_link(name: bytes, target: bytes, attributes: Attributes) -> bytes:
    """The header of one more name of an earlier entry."""
    return _header(name, _HARD_LINK, Attributes(attributes.mode, 0, 0, 0, 0, {}), target, 0, {})


def regular_file(name: bytes, attributes: Attributes, data: Data) -> Iterator[bytes]:
    """A file with its data; its holes stay holes. Raises ImageError if it changes meanwhile."""
    size_bytes = data.size_bytes
    pieces = data.pieces()
    if pieces == [(0, size_bytes)] or size_bytes == 0:
        yield _header(name, b"0", attributes, b"", size_bytes, {})
        yield from _data(name, data, [(0, size_bytes)], size_bytes)
        return
    # GNU's sparse format 1.0: the map stands before the data.
    lines = [len(pieces), *(number for piece in pieces for number in piece)]
    table = b"".join(b"%d\n" % number for number in lines)
    table += bytes(-len(table) % BLOCK_BYTES)
    stored_bytes = len(table) + sum(length for _, length in pieces)
    records = {
        b"GNU.sparse.major": b"1",
        b"GNU.sparse.minor": b"0",
        b"GNU.sparse.name": name,
        b"GNU.sparse.realsize": b"%d" % size_bytes,
    }
    yield _header(name, b"0", attributes, b"", stored_bytes, records)
    yield table
    yield from _data(name, data, pieces, stored_bytes)


def _data(name: bytes, data: Data, pieces: list[tuple[int, int]], stored_bytes: int) -> Iterator[bytes]:
    for offset, length in pieces:
        end = offset + length
        while offset < end:
            read = data.read(min(end - offset, CHUNK_BYTES), offset)
            if not read:
                raise ImageError(
                    f"{shown(name)} was shortened while it was read; try again when nobody writes it"
                )
            yield read
            offset += len(read)
    yield bytes(-stored_bytes % BLOCK_BYTES)


def _header(
    name: bytes,
    kind: bytes,
    attributes: Attributes,
    link: bytes,
    size_bytes: int,
    records: dict[bytes, bytes],
) -> bytes:
    records = dict(records)
    seconds, ns = divmod(attributes.mtime_ns, _NS)
    if len(name) > _NAME_BYTES_MAX or not name.isascii():
        records[b"path"] = name
    if len(link) > _NAME_BYTES_MAX or not link.isascii():
        records[b"linkpath"] = link
    if ns or not 0 <= seconds <= _OCTAL_SIZE_MAX:
        records[b"mtime"] = _decimal_time(attributes.mtime_ns)
    for key, number, most in (
        (b"uid", attributes.uid, _OCTAL_ID_MAX),
        (b"gid", attributes.gid, _OCTAL_ID_MAX),
        (b"size", size_bytes, _OCTAL_SIZE_MAX),
    ):
        if number > most:
            records[key] = b"%d" % number
    for key, value in attributes.xattrs.items():
        records[b"SCHILY.xattr." + key] = value
    block = _block(name, kind, attributes, link, size_bytes)
    if not records:
        return block
    data = b"".join(_record(key, records[key]) for key in sorted(records))
    extended = _block(b"PaxHeaders/" + name, _EXTENDED, Attributes(0o644, 0, 0, 0, 0, {}), b"", len(data))
    return extended + data + bytes(-len(data) % BLOCK_BYTES) + block


def _block(name: bytes, kind: bytes, attributes: Attributes, link: bytes, size_bytes: int) -> bytes:
    seconds = attributes.mtime_ns // _NS
    block = b"".join(
        (
            name[:_NAME_BYTES_MAX].ljust(100, b"\0"),
            b"%07o\0" % stat.S_IMODE(attributes.mode),
            b"%07o\0" % min(attributes.uid, _OCTAL_ID_MAX),
            b"%07o\0" % min(attributes.gid, _OCTAL_ID_MAX),
            b"%011o\0" % min(size_bytes, _OCTAL_SIZE_MAX),
            b"%011o\0" % max(0, min(seconds, _OCTAL_SIZE_MAX)),
            b" " * 8,
            kind,
            link[:_NAME_BYTES_MAX].ljust(100, b"\0"),
            b"ustar\00000",
            bytes(64),
            b"%07o\0" % os.major(attributes.rdev),
            b"%07o\0" % os.minor(attributes.rdev),
        )
    ).ljust(BLOCK_BYTES, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _record(key: bytes, value: bytes) -> bytes:
    """LENGTH KEY=VALUE, where the length counts itself."""
    rest = b" %s=%s\n" % (key, value)
    length = len(rest) + len(str(len(rest)))
    if len(str(length)) > len(str(len(rest))):
        length += 1
    return b"%d%s" % (length, rest)


def _decimal_time(ns: int) -> bytes:
    sign = b"-" if ns < 0 else b""
    seconds, rest = divmod(abs(ns), _NS)
    return sign + (b"%d.%09d" % (seconds, rest) if rest else b"%d" % seconds)
