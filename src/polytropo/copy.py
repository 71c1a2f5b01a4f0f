"""Memory copies as they are fastest on this machine.

    memcpy(destination, source)                    # any objects with the buffer protocol
    memcpy(destination, source, situation="cold")  # neither is in a cache

The plan of `polytropo tune memcpy` is used where there is one, else a default.
"""

import functools
from typing import TYPE_CHECKING

from polytropo import _native

if TYPE_CHECKING:
    from typing_extensions import Buffer


@functools.cache
def _copier() -> _native.Copier:
    from polytropo.state import State, default_home
    from polytropo.tuning.plans import load

    # Opened without making it: a copy is no reason to begin a state directory.
    plan, _ = load(State(default_home()))
    return _native.Copier(plan)


def memcpy(dst: "Buffer", src: "Buffer", *, situation: str = "hot") -> int:
    """Copies all bytes of `src` to the start of `dst` and returns how many.

    `situation` says where they lie: `hot` (this core's caches), `fresh` (just written by another core),
    `handed` (soon read by another core), `relayed` (both), `cold` (no cache), `read` (the source in any
    cache or in none, the destination in this core's). The interpreter lock is released. Source: Asterope
    (PLOS 2021). Raises ValueError if `src` is longer than `dst`, if they overlap, or for an unknown
    situation; BufferError if `dst` is read-only or one of them does not lie in one piece.
    """
    into, out_of = memoryview(dst), memoryview(src)
    if not into.c_contiguous or not out_of.c_contiguous:
        raise BufferError("both buffers have to lie in one piece (C-contiguous)")
    return _copier().copy(into.cast("B"), out_of.cast("B"), situation)
