"""The bytes of regular files, to be put into archives."""

import errno
import os
from typing import Protocol


class Data(Protocol):
    """Bytes with holes."""

    size_bytes: int

    def pieces(self) -> list[tuple[int, int]]:
        """The (offset, length) that hold data."""

    def read(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes at `offset`; none at the end only."""


class FileData:
    """A file of the host."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size_bytes = os.fstat(descriptor).st_size

    def pieces(self) -> list[tuple[int, int]]:
        """The (offset, length) that hold data."""
        return self.pieces_in(0, self.size_bytes)

    def pieces_in(self, start: int, end: int) -> list[tuple[int, int]]:
        """Those of a part of the file."""
        pieces = []
        while start < end:
            try:
                begin = os.lseek(self._descriptor, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            if begin >= end:
                break
            start = min(os.lseek(self._descriptor, begin, os.SEEK_HOLE), end)
            pieces.append((begin, start - begin))
        return pieces

    def read(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes at `offset`; none at the end only."""
        return os.pread(self._descriptor, length, offset)

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self._descriptor)
