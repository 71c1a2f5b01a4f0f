"""The promises of SEMANTICS.md as small programs, by the names that the document gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ground:
    """What a promise is tried on: an empty directory of its own on the mount, and image files below a union.

    `image` is a directory with the files `file` (100,000 bytes), `large` (LARGE_BYTES, sparse, 100,000 bytes
    of data at each of LARGE_DATA), `linked` and `also-linked` (one inode), and the directory `tree/inner`
    with a file; on a union they lie in a lower layer. With `passthrough` the kernel reads those itself.
    """

    empty: Path
    image: Path
    passthrough: bool = False


LARGE_BYTES = 4 << 20
LARGE_DATA = (0, 1 << 20, 3 << 20)

Promise = Callable[[Ground], None]
PROMISES: dict[str, Promise] = {}


def promise(name: str) -> Callable[[Promise], Promise]:
    """Registers a promise under the name that SEMANTICS.md gives it."""

    def register(function: Promise) -> Promise:
        assert name not in PROMISES, name
        PROMISES[name] = function
        return function

    return register
