"""Opening files inside a root that somebody else fills: links in it never lead out of it."""

import ctypes
import os
import stat

_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_libc = ctypes.CDLL(None, use_errno=True)


def open_in_root(root: int, path: str | bytes, flags: int, mode: int = 0) -> int:
    """Opens `path` as a program with the directory `root` as its "/" would. Raises OSError.

    Symbolic links, absolute ones and ".." included, stay inside of `root`.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    name = os.fsencode(path) or b"."
    while True:
        descriptor: int = _libc.syscall(_OPENAT2, root, name, ctypes.byref(how), ctypes.sizeof(how))
        if descriptor >= 0:
            return descriptor
        number = ctypes.get_errno()
        # EAGAIN: something was renamed or mounted meanwhile: who knows whether ".." stays inside?
        if number not in (_EINTR, _EAGAIN):
            raise OSError(number, os.strerror(number), path)


_EINTR, _EAGAIN = 4, 11


def read_in_root(root: int, path: str, size_max: int) -> bytes:
    """The content of the regular file `path`, at most `size_max` bytes. Raises OSError, ValueError."""
    # O_NONBLOCK: a FIFO must not hold us up.
    descriptor = open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a regular file")
        parts, size = [], 0
        while block := os.read(descriptor, 1 << 16):
            parts.append(block)
            size += len(block)
            if size > size_max:
                raise ValueError(f"{path} is larger than {size_max} bytes")
        return b"".join(parts)
    finally:
        os.close(descriptor)
