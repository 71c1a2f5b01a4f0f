"""Reads tar archives entry by entry, trusting nothing in them.

Knows ustar, pax and GNU archives with long names, sparse files, base-256 numbers. Memory is bounded: one
header, one pax record block and one sparse map at a time; entries are not remembered.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from polytropo.images.errors import ImageError, shown
from polytropo.images.streams import CHUNK_BYTES, Readable, read_exactly

BLOCK_BYTES = 512
NAME_BYTES_MAX = 4095  # PATH_MAX without its NUL
_PAX_BYTES_MAX = 1 << 20
_SPARSE_PIECES_MAX = 1 << 20
_SIZE_MAX = 2**63 - 1
_TIME_S_MAX = 2**40
_NS = 10**9
_ZEROS = bytes(BLOCK_BYTES)
_XATTR = b"SCHILY.xattr."
_DIGITS = b"0123456789"
_DIGITS_MAX = 19  # of a number below 2**63


class Kind(Enum):
    FILE = "file"
    HARD_LINK = "hard link"
    SYMLINK = "symbolic link"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    DIRECTORY = "directory"
    FIFO = "FIFO"


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER_DEVICE,
    b"4": Kind.BLOCK_DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}
_REFUSED = {b"M": "a part of a multi-volume archive", b"D": "a GNU incremental directory"}


@dataclass(slots=True)
class Entry:
    """One entry; names as in the archive. `pieces` are the (offset, length) that hold data, None: all."""

    kind: Kind
    name: bytes
    link_name: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size_bytes: int
    device_major: int
    device_minor: int
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    pieces: list[tuple[int, int]] | None = None

    @property
    def data_bytes(self) -> int:
        """How many bytes of data the archive holds for this entry."""
        return self.size_bytes if self.pieces is None else sum(length for _, length in self.pieces)


class TarReader:
    """Iterate over it for entries; `read` gives the current file's data, what is not read is skipped."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        # A source on disk can jump.
        self._skip: Callable[[int], int] | None = getattr(source, "skip", None)
        self._left = 0
        self._padding = 0
        self._pax: dict[bytes, bytes] = {}
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None
        self.ended_properly = False

    def __iter__(self) -> Iterator[Entry]:
        while True:
            self._skip_rest()
            header = self._header()
            if header is None:
                return
            kind = header[156:157]
            size_bytes = _number(header[124:136], "size")
            if kind in (b"x", b"X"):
                self._pax = _pax_records(self._extension(size_bytes))
            elif kind == b"g":
                self._extension(size_bytes)
            elif kind == b"L":
                self._long_name = self._extension(size_bytes).rstrip(b"\0")
            elif kind == b"K":
                self._long_link = self._extension(size_bytes).rstrip(b"\0")
            else:
                entry = self._entry(header, kind, size_bytes)
                self._pax, self._long_name, self._long_link = {}, None, None
                yield entry

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes of the current entry's data."""
        size = min(size, self._left)
        if size == 0:
            return b""
        data = self._source.read(size)
        if not data:
            raise ImageError("its tar archive ends in the middle of a file; get a complete copy")
        self._left -= len(data)
        return data

    def _skip_rest(self) -> None:
        self._left += self._padding
        self._padding = 0
        if self._skip is not None and self._left:
            self._left -= self._skip(self._left)
        while self._left:
            self.read(CHUNK_BYTES)

    def _header(self) -> bytes | None:
        header = read_exactly(self._source, BLOCK_BYTES)
        if header == _ZEROS:
            self.ended_properly = read_exactly(self._source, BLOCK_BYTES) in (_ZEROS, b"")
            if not self.ended_properly:
                raise ImageError("its tar archive has an empty header in the middle; get a sound copy")
            return None
        if not header:
            if self._pax or self._long_name or self._long_link:
                raise ImageError("its tar archive ends after an extended header; get a complete copy")
            return None
        if len(header) < BLOCK_BYTES:
            raise ImageError("its tar archive ends in the middle of a header; get a complete copy")
        _check_sum(header)
        return header

    def _extension(self, size_bytes: int) -> bytes:
        if size_bytes > _PAX_BYTES_MAX:
            raise ImageError(
                f"its tar archive has an extended header of {size_bytes} bytes; {_PAX_BYTES_MAX} are the most"
            )
        self._begin_data(size_bytes)
        data = read_exactly(self, size_bytes)
        if len(data) < size_bytes:
            raise ImageError("its tar archive ends in an extended header; get a complete copy")
        return data

    def _begin_data(self, size_bytes: int) -> None:
        self._left = size_bytes
        self._padding = -size_bytes % BLOCK_BYTES

    def _entry(self, header: bytes, type_flag: bytes, size_bytes: int) -> Entry:
        pax = self._pax
        name = _chosen_name(pax.get(b"path"), self._long_name, _ustar_name(header))
        link_name = _chosen_name(pax.get(b"linkpath"), self._long_link, _text(header[157:257]))
        kind = _KINDS.get(type_flag)
        if kind is None:
            what = _REFUSED.get(type_flag, f"of the unknown type {type_flag!r}")
            raise ImageError(f"its entry {shown(name)} is {what}")
        if kind is Kind.FILE and name.endswith(b"/") and type_flag != b"S":
            kind = Kind.DIRECTORY
        if b"size" in pax:
            size_bytes = _decimal(pax[b"size"], "size")
        stored_bytes = size_bytes if _KINDS[type_flag] is Kind.FILE else 0
        self._begin_data(stored_bytes)
        entry = Entry(
            kind=kind,
            name=name,
            link_name=link_name,
            mode=_number(header[100:108], "mode") & 0o7777,
            uid=_id(pax.get(b"uid"), header[108:116], "uid"),
            gid=_id(pax.get(b"gid"), header[116:124], "gid"),
            mtime_ns=_mtime_ns(pax.get(b"mtime"), header[136:148]),
            size_bytes=stored_bytes,
            device_major=_device(header[329:337]),
            device_minor=_device(header[337:345]),
            xattrs={key[len(_XATTR) :]: value for key, value in pax.items() if key.startswith(_XATTR)},
        )
        if kind is Kind.FILE:
            self._make_sparse(entry, header, type_flag)
        return entry

    def _make_sparse(self, entry: Entry, header: bytes, type_flag: bytes) -> None:
        pax = self._pax
        if type_flag == b"S":
            real_bytes, pieces = _number(header[483:495], "real size"), self._gnu_pieces(header)
        elif pax.get(b"GNU.sparse.major") == b"1":
            real_bytes = _decimal(pax.get(b"GNU.sparse.realsize", b""), "sparse size")
            pieces = self._pax_1_pieces()
        elif b"GNU.sparse.size" in pax:
            real_bytes = _decimal(pax[b"GNU.sparse.size"], "sparse size")
            pieces = _pairs(
                [_decimal(n, "sparse map") for n in pax.get(b"GNU.sparse.map", b"").split(b",") if n]
            )
        else:
            return
        if b"GNU.sparse.name" in pax:
            entry.name = _checked_name(pax[b"GNU.sparse.name"])
        _check_pieces(entry.name, pieces, real_bytes, self._left)
        entry.size_bytes, entry.pieces = real_bytes, pieces

    def _gnu_pieces(self, header: bytes) -> list[tuple[int, int]]:
        numbers, more = _gnu_map(header[386:482]), header[482]
        while more:
            # The map goes on in blocks between header and data, which the size does not count.
            block = read_exactly(self._source, BLOCK_BYTES)
            if len(block) < BLOCK_BYTES or len(numbers) > 2 * _SPARSE_PIECES_MAX:
                raise _damaged_map()
            numbers += _gnu_map(block[:504])
            more = block[504]
        return _pairs(numbers)

    def _pax_1_pieces(self) -> list[tuple[int, int]]:
        """The map in front of the data: decimal numbers, a line each, padded to a block."""
        lines = self._map_lines()
        count = _decimal(next(lines), "sparse map")
        if count > _SPARSE_PIECES_MAX:
            raise _damaged_map()
        return _pairs([_decimal(next(lines), "sparse map") for _ in range(2 * count)])

    def _map_lines(self) -> Iterator[bytes]:
        rest = b""
        while len(rest) <= _DIGITS_MAX:
            block = read_exactly(self, BLOCK_BYTES)
            if len(block) < BLOCK_BYTES:
                break
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
        raise _damaged_map()


def _check_pieces(name: bytes, pieces: list[tuple[int, int]], real_bytes: int, stored_bytes: int) -> None:
    end = 0
    for offset, length in pieces:
        if offset < end or offset + length > real_bytes:
            raise ImageError(f"its sparse file {shown(name)} has a map that does not fit; get a sound copy")
        end = offset + length
    if sum(length for _, length in pieces) != stored_bytes:
        raise ImageError(
            f"its sparse file {shown(name)} has a map that does not fit its data; get a sound copy"
        )


def _damaged_map() -> ImageError:
    return ImageError("its tar archive has a damaged sparse map; get a sound copy")


def _gnu_map(area: bytes) -> list[int]:
    numbers = []
    for start in range(0, len(area), 24):
        if area[start] == 0:
            break
        numbers.append(_number(area[start : start + 12], "sparse map"))
        numbers.append(_number(area[start + 12 : start + 24], "sparse map"))
    return numbers


def _pairs(numbers: list[int]) -> list[tuple[int, int]]:
    if len(numbers) % 2 or len(numbers) > 2 * _SPARSE_PIECES_MAX:
        raise _damaged_map()
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header. A repeated key: the last one, as POSIX has it."""
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    position = 0
    while position < len(data) and data[position] != 0:
        space = data.find(b" ", position, position + 20)
        length = data[position:space] if space > 0 else b""
        end = position + (int(length) if length.isdigit() else 0)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space + 1 or end > len(data) or data[end - 1 : end] != b"\n" or not equals or not key:
            raise ImageError("its tar archive has a damaged extended header; get a sound copy")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            pairs.append(value)  # the map of sparse format 0.0, one record a number
        else:
            records[key] = value
        position = end
    if pairs:
        records[b"GNU.sparse.map"] = b",".join(pairs)
    return records


def _chosen_name(from_pax: bytes | None, from_gnu: bytes | None, from_header: bytes) -> bytes:
    name = from_pax if from_pax is not None else from_gnu if from_gnu is not None else from_header
    return _checked_name(name)


def _checked_name(name: bytes) -> bytes:
    if len(name) > NAME_BYTES_MAX:
        raise ImageError(
            f"its entry {shown(name)} has a name of {len(name)} bytes; {NAME_BYTES_MAX} are the most"
        )
    if b"\0" in name:
        raise ImageError(f"its entry {shown(name)} has a zero byte in its name")
    return name


def _ustar_name(header: bytes) -> bytes:
    name = _text(header[:100])
    # GNU archives have other things where ustar keeps the prefix.
    if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
        return prefix + b"/" + name
    return name


def _text(area: bytes) -> bytes:
    return area.partition(b"\0")[0]


def _check_sum(header: bytes) -> None:
    wanted = _number(header[148:156], "checksum")
    rest = sum(header) - sum(header[148:156]) + 8 * 32
    if wanted != rest:
        # Old programs added the bytes up as signed ones.
        signed = rest - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
        if wanted != signed:
            raise ImageError("its tar archive has a header with a wrong checksum; get a sound copy")


def _number(area: bytes, what: str) -> int:
    """An octal number, or one in base 256 whose first bit is set."""
    if area[:1] >= b"\x80":
        value = (
            int.from_bytes(area, "big", signed=True)
            if area[0] == 0xFF
            else int.from_bytes(bytes([area[0] & 0x7F]) + area[1:], "big")
        )
    else:
        digits = area.strip(b" \0").partition(b"\0")[0].strip(b" ")
        if digits.strip(b"01234567"):
            raise ImageError(f"its tar archive has a header with a damaged {what}; get a sound copy")
        value = int(digits, 8) if digits else 0
    if not 0 <= value <= _SIZE_MAX:
        raise ImageError(f"its tar archive has a header with the impossible {what} {value}")
    return value


def _decimal(text: bytes, what: str) -> int:
    if not text or len(text) > _DIGITS_MAX or text.strip(_DIGITS) or int(text) > _SIZE_MAX:
        raise ImageError(f"its tar archive has an extended header with the impossible {what} {shown(text)}")
    return int(text)


def _id(from_pax: bytes | None, area: bytes, what: str) -> int:
    value = _number(area, what) if from_pax is None else _decimal(from_pax, what)
    if value >= 2**32 - 1:  # that one means "none" to chown(2)
        raise ImageError(f"its tar archive has an entry of the impossible {what} {value}")
    return value


def _device(area: bytes) -> int:
    # Some programs leave other bytes here in entries that are no devices.
    try:
        return _number(area, "device number")
    except ImageError:
        return 2**32


def _mtime_ns(from_pax: bytes | None, area: bytes) -> int:
    if from_pax is None:
        # Times before 1970 are negative numbers in base 256.
        negative = area[0] == 0xFF
        seconds = int.from_bytes(area, "big", signed=True) if negative else _number(area, "time")
        return _bounded_ns(seconds * _NS)
    whole, _, fraction = from_pax.partition(b".")
    digits = whole.removeprefix(b"-")
    if not digits or (digits + fraction).strip(_DIGITS) or len(from_pax) > 64:
        raise ImageError(f"its tar archive has an extended header with the impossible time {shown(from_pax)}")
    ns = int(digits) * _NS + int((fraction + b"0" * 9)[:9])
    return _bounded_ns(-ns if whole.startswith(b"-") else ns)


def _bounded_ns(ns: int) -> int:
    return max(-_TIME_S_MAX * _NS, min(ns, _TIME_S_MAX * _NS))
