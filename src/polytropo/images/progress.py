"""Adds up how far an import is."""

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Told how far a long piece of work is, in bytes."""

    def __call__(self, done: int, total: int | None, what: str = "") -> None: ...


def silent(done: int, total: int | None, what: str = "") -> None:
    """For those who do not want to know."""


class Meter:
    """Sums the parts of one import, each told for itself."""

    def __init__(self, progress: Progress = silent) -> None:
        self._progress = progress
        self._done = 0
        self._total: int | None = None

    def expect(self, size_bytes: int) -> None:
        """There are `size_bytes` more to come."""
        self._total = (self._total or 0) + size_bytes

    def part(self, size_bytes: int | None) -> Callable[[int], None]:
        """A function to tell how much of the next part is done; the last call of it counts."""
        start = self._done
        if size_bytes is not None:
            self._done += size_bytes

        def told(done: int) -> None:
            self._progress(start + done, self._total)

        return told
