"""System calls that Python does not offer."""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)


def sync_filesystem(descriptor: int) -> None:
    """Makes all of the filesystem that `descriptor` is on durable (syncfs(2))."""
    if _libc.syncfs(ctypes.c_int(descriptor)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
