"""What each policy misses of a trace.

Published ones are libCacheSim's and see every use; ours see what the service sees.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import libcachesim

PUBLISHED = {
    "FIFO": libcachesim.FIFO,
    "LRU": libcachesim.LRU,
    "Clock": libcachesim.Clock,
    "ARC": libcachesim.ARC,
    "2Q": libcachesim.TwoQ,
    "SIEVE": libcachesim.Sieve,
    "S3-FIFO": libcachesim.S3FIFO,
    "W-TinyLFU": libcachesim.WTinyLFU,
    "Belady": libcachesim.Belady,
}


@dataclass(frozen=True)
class Outcome:
    """Of a trace's uses: how many were read from below, and how many asked for bytes that were hidden."""

    misses: int
    questions: int


def published(name: str, trace: list[int], blocks: int) -> Outcome:
    cache = PUBLISHED[name](blocks)
    request, misses = libcachesim.Request(), 0
    following = _next_uses(trace) if name == "Belady" else [0] * len(trace)
    for clock, (key, after) in enumerate(zip(trace, following, strict=True)):
        request.obj_id, request.obj_size, request.clock_time = key, 1, clock
        request.next_access_vtime = after
        misses += not cache.get(request)
    return Outcome(misses, 0)


def _next_uses(trace: list[int]) -> list[int]:
    never = (1 << 63) - 1
    after: dict[int, int] = {}
    uses = [never] * len(trace)
    for at in range(len(trace) - 1, -1, -1):
        uses[at] = after.get(trace[at], never)
        after[trace[at]] = at
    return uses


class Queue:
    """First in, first out. Blocks at the old end are hidden: their next use is a question."""

    def __init__(self) -> None:
        self.shown: OrderedDict[int, None] = OrderedDict()
        self.hidden: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.shown) + len(self.hidden)

    def put(self, key: int) -> None:
        self.shown[key] = None

    def hide(self, shown_max: int) -> None:
        while len(self.shown) > shown_max:
            key, _ = self.shown.popitem(last=False)
            self.hidden[key] = None

    def oldest(self) -> int:
        queue = self.hidden or self.shown
        return queue.popitem(last=False)[0]


def segmented(trace: list[int], blocks: int, hidden: float = 0.1) -> Outcome:
    """Segmented FIFO (Turner and Levy, 1981): one queue, its old end hidden."""
    queue, misses, questions = Queue(), 0, 0
    for key in trace:
        if key in queue.shown:
            continue
        if key in queue.hidden:
            questions += 1
            del queue.hidden[key]
        else:
            misses += 1
            if len(queue) >= blocks:
                queue.oldest()
        queue.put(key)
        queue.hide(blocks - int(blocks * hidden))
    return Outcome(misses, questions)


def trial(
    trace: list[int],
    blocks: int,
    entrance: float = 0.4,
    tried: float = 0.15,
    hidden: float = 0.1,
    full: float = 0.85,
) -> Outcome:
    """S3-FIFO with hidden ends in place of counters: new blocks pass a small queue; who is asked for in its
    hidden end, or soon after it went, comes into the main queue, which is segmented."""
    small, main = Queue(), Queue()
    ghosts: OrderedDict[int, None] = OrderedDict()
    small_max = max(1, int(blocks * entrance))
    misses = questions = 0
    for key in trace:
        if key in small.shown or key in main.shown:
            continue
        if key in small.hidden or key in main.hidden:
            questions += 1
            (small if key in small.hidden else main).hidden.pop(key)
            main.put(key)
        else:
            misses += 1
            if len(small) + len(main) >= blocks:
                if len(small) >= small_max or not len(main):
                    ghosts[small.oldest()] = None
                else:
                    main.oldest()
            if key in ghosts:
                del ghosts[key]
                main.put(key)
            else:
                small.put(key)
            while len(ghosts) > blocks:
                ghosts.popitem(last=False)
        if len(small) + len(main) >= int(blocks * full):
            small.hide(max(1, small_max - int(small_max * tried)))
            main.hide(max(1, int((blocks - small_max) * (1 - hidden))))
    return Outcome(misses, questions)


OURS: dict[str, Callable[[list[int], int], Outcome]] = {"segmented FIFO": segmented, "trial": trial}


def run(name: str, trace: list[int], blocks: int) -> Outcome:
    if name in OURS:
        return OURS[name](trace, blocks)
    return published(name, trace, blocks)
