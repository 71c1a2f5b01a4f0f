"""What the kernel of this host really does, found out by trying it in children that leave nothing behind."""

import ctypes
import errno
import os
import select
import signal
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_CHILD_TIMEOUT_S = 5.0

# The same numbers on all architectures.
_SYS_OPEN_TREE = 428
_SYS_MOUNT_SETATTR = 442
_SYS_LANDLOCK_CREATE_RULESET = 444

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 2, 4, 0x4000, 1 << 18
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_IDMAP = 0x00100000
_LANDLOCK_VERSION = 1
_PR_SET_PDEATHSIG = 1

# FUSE_INIT as the kernel sends it: a header, then version, read-ahead and two words of flags.
_FUSE_HEADER_BYTES = 40
_FUSE_INIT = struct.Struct("=IIIII")
_FUSE_READ_MIN_BYTES = 1 << 17
_FUSE_PASSTHROUGH = 1 << 37
_FUSE_OVER_IO_URING = 1 << 41


class ProbeError(Exception):
    """What was tried does not work; `errno` tells why."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


@dataclass(frozen=True)
class Fuse:
    """The kernel's side of FUSE."""

    major: int
    minor: int
    passthrough: bool
    io_uring: bool


def fuse() -> Fuse:
    """Mounts FUSE in a namespace of its own and reads the kernel's greeting. Raises ProbeError."""
    answer = _in_child(_fuse_greeting)
    major, minor, _, low, high = _FUSE_INIT.unpack_from(answer, _FUSE_HEADER_BYTES)
    flags = low | high << 32
    return Fuse(major, minor, bool(flags & _FUSE_PASSTHROUGH), bool(flags & _FUSE_OVER_IO_URING))


def user_namespace() -> None:
    """Makes a user namespace. Raises ProbeError if this user may not."""
    _in_child(_enter_user_namespace)


def idmapped_mounts(directory: Path) -> None:
    """Tries an idmapped mount of the filesystem that holds `directory`. Raises ProbeError."""
    _in_child(lambda: _idmap(directory))


def landlock_abi() -> int:
    """The version of Landlock, 0 where it is absent or switched off."""
    answer: int = _LIBC.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
    return max(answer, 0)


def answers(path: Path, timeout_s: float = _CHILD_TIMEOUT_S) -> int | None:
    """statfs(2) of `path` within a time: 0 or its errno; None if there is no answer.

    Not stat(2), which the kernel answers from its memory, also for a service that is dead.
    """
    try:
        _in_child(lambda: _statfs(path), timeout_s)
    except ProbeError as error:
        return None if error.errno == errno.ETIMEDOUT else error.errno
    return 0


def _in_child(work: Callable[[], bytes], timeout_s: float = _CHILD_TIMEOUT_S) -> bytes:
    """What `work` returns in a forked child, which is killed when it takes too long."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _answer(work, write_end)
    os.close(write_end)
    try:
        ready, _, _ = select.select([read_end], [], [], timeout_s)
        answer = os.read(read_end, 65536) if ready else struct.pack("=i", errno.ETIMEDOUT)
    finally:
        os.close(read_end)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    number = struct.unpack_from("=i", answer)[0] if len(answer) >= 4 else errno.EIO
    if number != 0:
        raise ProbeError(number)
    return answer[4:]


def _answer(work: Callable[[], bytes], write_end: int) -> None:
    # Never returns: a child that went on would run the caller's program a second time.
    number, answer = errno.EIO, b""
    try:
        answer = work()
        number = 0
    except OSError as error:
        number = error.errno or errno.EIO
    finally:
        os.write(write_end, struct.pack("=i", number) + answer)
        os._exit(0)


def _fuse_greeting() -> bytes:
    if os.geteuid() == 0:
        _check(_LIBC.unshare(_CLONE_NEWNS))
    else:
        _enter_user_namespace(_CLONE_NEWUSER | _CLONE_NEWNS)
    # The kernel mounts only what was opened in the same user namespace.
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    _check(_LIBC.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    place = os.fsencode(tempfile.gettempdir())
    _check(_LIBC.mount(b"polytropo", place, b"fuse", ctypes.c_ulong(_MS_NOSUID | _MS_NODEV), options))
    return os.read(device, _FUSE_READ_MIN_BYTES)[: _FUSE_HEADER_BYTES + _FUSE_INIT.size]


def _enter_user_namespace(flags: int = _CLONE_NEWUSER) -> bytes:
    uid, gid = os.geteuid(), os.getegid()
    _check(_LIBC.unshare(flags))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    return b""


def _idmap(directory: Path) -> bytes:
    namespace = _shifted_namespace()
    _check(_LIBC.unshare(_CLONE_NEWNS))
    tree: int = _LIBC.syscall(
        _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(directory), _OPEN_TREE_CLONE | os.O_CLOEXEC
    )
    _check(tree)
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace)
    _check(
        _LIBC.syscall(
            _SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, ctypes.c_size_t(len(attributes))
        )
    )
    return b""


def _shifted_namespace() -> int:
    """A descriptor of a user namespace with other ids than ours."""
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.write(ready_write, b"x" if _LIBC.unshare(_CLONE_NEWUSER) == 0 else b"")
        os.close(ready_write)
        signal.pause()
        os._exit(0)
    os.close(ready_write)
    try:
        if not os.read(ready_read, 1):
            raise OSError(errno.EPERM, "unshare")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text("0 1000000 65536")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready_read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _statfs(path: Path) -> bytes:
    os.statvfs(path)
    return b""


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
