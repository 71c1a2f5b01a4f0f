"""The kernel's rules for a FUSE service's answers to opens of one inode, and a program that tries them.

    unshare --mount --propagation private python -m tests.service.kernel_rules DIRECTORY LENGTH

The program is a service of its own, of a few requests, so that nothing of ours stands between the rules and
the kernel. Files are opened by names that say how the service is to answer (`7-cached`); all names of one
number are one inode. It goes through all orders of LENGTH opens, maps and closes, prints what went another
way than the rules say, and ends with status 1 then.
"""

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CACHED, DIRECT, PASS_A, PASS_B, PASS_A_DIRECT = "cached", "direct", "pass-a", "pass-b", "pass-a-direct"
WAYS = (CACHED, DIRECT, PASS_A, PASS_B, PASS_A_DIRECT)
MAP_SHARED, MAP_PRIVATE, CLOSE_OLDEST, CLOSE_NEWEST = (
    "map shared",
    "map private",
    "close oldest",
    "close newest",
)
EVENTS = (*WAYS, MAP_SHARED, MAP_PRIVATE, CLOSE_OLDEST, CLOSE_NEWEST)

# Whether an open or a map that comes (columns) is let in beside one that is there (rows): fs/fuse/iomode.c.
# An inode is cached, bound to one file, or neither. Opens for direct I/O make it neither, but are refused
# where it is bound; a shared map makes its open cached.
ROWS = (CACHED, DIRECT, PASS_A, PASS_B, PASS_A_DIRECT, "direct, mapped")
RULES = {
    #                  cached direct pass-a pass-b pass-a-direct
    CACHED:           (True,  True,  False, False, False),
    DIRECT:           (True,  True,  True,  True,  True),
    PASS_A:           (False, False, True,  False, True),
    PASS_B:           (False, False, False, True,  False),
    PASS_A_DIRECT:    (False, False, True,  False, True),
    "direct, mapped": (True,  True,  False, False, False),
}  # fmt: skip
SIZE_BYTES = 8192
OURS, BYTES_A, BYTES_B = b"s" * SIZE_BYTES, b"a" * SIZE_BYTES, b"b" * SIZE_BYTES

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_FILES = 2
_BACKING_OPEN = 0x4010E501
_PASSTHROUGH, _ALLOW_MMAP, _INIT_EXT = 1 << 37, 1 << 36, 1 << 30
_OPEN_FLAGS = {CACHED: 0, DIRECT: 1, PASS_A: 1 << 7, PASS_B: 1 << 7, PASS_A_DIRECT: 1 << 7 | 1}
_LOOKUP, _GETATTR, _OPEN, _READ, _RELEASE, _INIT, _FORGET, _BATCH_FORGET = 1, 3, 14, 15, 18, 26, 2, 42
_FLUSH, _GETXATTR = 25, 22


class Server:
    """Answers until the mount is gone."""

    def __init__(self, device: int, backings: dict[str, int]) -> None:
        self._device = device
        self._backings = backings
        self._next_way: dict[int, str] = {}

    def serve(self) -> None:
        try:
            while True:
                self.serve_one()
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def serve_one(self) -> None:
        message = os.read(self._device, 1 << 18)
        _, opcode, unique, node, *_ = _IN.unpack_from(message)
        if opcode in (_FORGET, _BATCH_FORGET):
            return
        answer = self._answer(opcode, node, message[_IN.size :])
        code, payload = (-answer, b"") if isinstance(answer, int) else (0, answer)
        os.write(self._device, _OUT.pack(_OUT.size + len(payload), code, unique) + payload)

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes | int:
        if opcode == _INIT:
            return agree(body)
        if opcode == _LOOKUP:
            number, _, way = body.rstrip(b"\0").decode().partition("-")
            found = int(number) + _FILES
            self._next_way[found] = way
            return struct.pack("<4Q2I", found, 0, 0, 0, 0, 0) + attributes(found)
        if opcode == _GETATTR:
            return struct.pack("<QII", 0, 0, 0) + attributes(node)
        if opcode == _OPEN:
            way = self._next_way[node]
            return struct.pack("<QIi", 1, _OPEN_FLAGS[way], self._backings.get(way, 0))
        if opcode == _READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return OURS[offset : offset + size]
        if opcode in (_RELEASE, _FLUSH):
            return b""
        return errno.ENOSYS


def agree(body: bytes) -> bytes:
    flags, flags2 = struct.unpack_from("<12xII", body)
    offered = flags | flags2 << 32
    if not offered & _PASSTHROUGH:
        raise SystemExit("this kernel cannot pass files through")
    wanted = _PASSTHROUGH | _ALLOW_MMAP | _INIT_EXT
    head = struct.pack("<4I2H2I2H", 7, 41, 1 << 17, wanted & 0xFFFF_FFFF, 16, 12, 1 << 17, 1, 32, 0)
    return head + struct.pack("<II", wanted >> 32, 1) + bytes(24)


def attributes(node: int) -> bytes:
    root = node == 1
    mode = stat.S_IFDIR | 0o755 if root else stat.S_IFREG | 0o644
    size = 0 if root else SIZE_BYTES
    return _ATTR.pack(node, size, 16, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


@dataclass
class Held:
    """An open file, and how it stands in the rules."""

    descriptor: int
    row: str
    maps: list[mmap.mmap] = field(default_factory=list)

    def shown(self, *, mapped: bool) -> bytes:
        """Reads of a bound inode that is opened for direct I/O are requests; maps are of the file."""
        if self.row == PASS_B:
            return BYTES_B
        return BYTES_A if self.row == PASS_A or (self.row == PASS_A_DIRECT and mapped) else OURS

    def close(self) -> None:
        os.close(self.descriptor)
        for area in self.maps:
            area.close()


class Wrong(Exception):
    """The kernel went another way than the rules."""


def allowed(held: list[Held], way: str) -> bool:
    return all(RULES[other.row][WAYS.index(way)] for other in held)


def act(event: str, held: list[Held], mount: Path, number: int) -> None:
    if event in WAYS:
        wanted = allowed(held, event)
        try:
            held.append(Held(os.open(mount / f"{number}-{event}", os.O_RDONLY), event))
            done = True
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            done = False
        if done != wanted:
            raise Wrong(
                f"{event} is {'let in' if done else 'refused'} beside {[other.row for other in held]}"
            )
    elif event == CLOSE_OLDEST:
        held.pop(0).close()
    elif event == CLOSE_NEWEST:
        held.pop().close()
    else:
        map_newest(event, held)


def map_newest(event: str, held: list[Held]) -> None:
    newest = held[-1]
    flags = mmap.MAP_SHARED if event == MAP_SHARED else mmap.MAP_PRIVATE
    # A map of an open for direct I/O is cached, and has to fit as such.
    caches = event == MAP_SHARED and newest.row == DIRECT
    wanted = not caches or allowed(held[:-1], CACHED)
    try:
        newest.maps.append(mmap.mmap(newest.descriptor, SIZE_BYTES, flags, mmap.PROT_READ))
        done = True
    except OSError:
        done = False
    if done != wanted:
        raise Wrong(f"a {event} of {newest.row} is {'let in' if done else 'refused'}")
    if caches and done:
        newest.row = "direct, mapped"


def look(held: list[Held]) -> None:
    for other in held:
        seen = os.pread(other.descriptor, 16, 4000)
        if seen != other.shown(mapped=False)[:16]:
            raise Wrong(f"an open {other.row} reads {seen!r}")
        for area in other.maps:
            if area[4000:4016] != other.shown(mapped=True)[:16]:
                raise Wrong(f"a map of {other.row} shows {area[4000:4016]!r}")


def orders(length: int) -> Iterator[tuple[str, ...]]:
    for order in itertools.product(EVENTS, repeat=length):
        if order[0] in WAYS:
            yield order


def walk(order: tuple[str, ...], mount: Path, number: int) -> None:
    held: list[Held] = []
    try:
        for event in order:
            if event in WAYS or held:
                act(event, held, mount, number)
            look(held)
    finally:
        for other in held:
            other.close()


def start(directory: Path) -> Path:
    """Mounts the service, which is a process of its own and ends with the mount or with us; returns where."""
    mount = directory / "mount"
    mount.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"rules", str(mount).encode(), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "the mount cannot be made")
    parent = os.getpid()
    if os.fork() == 0:
        libc.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
        if os.getppid() != parent:
            os._exit(1)
        Server(device, register(device, directory)).serve()
        os._exit(0)
    os.close(device)
    return mount


def register(device: int, directory: Path) -> dict[str, int]:
    """Answers INIT first, before which nothing can be registered."""
    Server(device, {}).serve_one()
    backings = {}
    for name, content in (("a", BYTES_A), ("b", BYTES_B)):
        path = directory / name
        path.write_bytes(content)
        with path.open("rb") as file:
            # Only of a buffer that may change the call's result is told.
            backings[name] = fcntl.ioctl(
                device, _BACKING_OPEN, bytearray(struct.pack("<iIQ", file.fileno(), 0, 0))
            )
    return {PASS_A: backings["a"], PASS_B: backings["b"], PASS_A_DIRECT: backings["a"]}


def main(directory: Path, length: int) -> int:
    mount = start(directory)
    wrong = count = 0
    for count, order in enumerate(orders(length), start=1):
        try:
            walk(order, mount, count)
        except (Wrong, OSError) as error:
            wrong += 1
            print(f"{' / '.join(order)}: {error}")
            if wrong == 30:
                break
    print(f"{count} orders, {wrong} against the rules")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
