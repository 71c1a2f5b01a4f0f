"""The search for the fastest variant of a size in a situation.

Exhaustive search, as published (Asterope, PLOS 2021), measures every variant with full care. Successive
halving (Jamieson and Talwalkar, AISTATS 2016) measures all of them a little, keeps the better part, and
measures that with more care.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

from polytropo import _native
from polytropo.tuning.measure import LIBC, Machine, ratio_interval

Progress = Callable[[int, int], None]


class Care(NamedTuple):
    """How a rung measures: samples each, and how long one takes at least."""

    keep: int
    rounds: int
    sample_ns: int


# From all variants to eight. A sample is at least one copy, so of large sizes they take longer.
RUNGS = (Care(512, 1, 2_000), Care(128, 3, 5_000), Care(32, 7, 10_000), Care(8, 15, 20_000))
EXHAUSTIVE = Care(8, 15, 20_000)
FINAL = Care(1, 41, 50_000)
# From this size on a copy takes longer than a sample should: only what was good at the size before is
# tried, and some others.
_LARGE_BYTES = 1 << 20
_HEIRS = 192
_NEWCOMERS = 64
# A batch of contenders is measured in turn; their code stays in the instruction cache.
_BATCH = 64


@dataclass(frozen=True)
class Found:
    """What was found for one size: the variant, and its time by those of memcpy(3) and of the kernel's
    method.
    """

    variant: str
    ns: float
    libc_ns: float
    kernel_ns: float
    by_libc: tuple[float, float, float]
    by_kernel: tuple[float, float, float]
    tried: int
    ranking: tuple[str, ...] = ()


def find(
    machine: Machine,
    situation: str,
    size_bytes: int,
    *,
    keep: bool,
    exhaustive: bool = False,
    heirs: Sequence[str] = (),
    incumbent: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Found:
    """Finds the fastest variant.

    `heirs` are the best of the size before, best first: where copies are long, a search that is not
    exhaustive tries these and some others by chance. `incumbent` is the variant of the size before; it
    stays unless another is surely faster.
    """
    space = _native.copy_space(keep, size_bytes)
    candidates = space
    if not exhaustive and size_bytes >= _LARGE_BYTES and heirs:
        chosen = [name for name in heirs if name in set(space)][:_HEIRS]
        others = sorted(set(space) - set(chosen))
        candidates = chosen + random.Random(size_bytes).sample(others, min(_NEWCOMERS, len(others)))
    rungs = (EXHAUSTIVE,) if exhaustive else RUNGS
    total = sum(
        min(len(candidates), rung.keep * 4) if index else len(candidates) for index, rung in enumerate(rungs)
    )
    done = 0
    ranking: list[str] = []
    left = candidates
    for index, rung in enumerate(rungs):
        timed = _rank(machine, left, situation, size_bytes, rung, partial(_told, progress, done, total))
        done += len(left)
        if index == 0:
            ranking = timed[: max(_HEIRS, rung.keep)]
        left = timed[: rung.keep]
    return _decide(machine, left, situation, size_bytes, incumbent, len(candidates), tuple(ranking))


def _told(progress: Progress, base: int, total: int, done: int) -> None:
    progress(base + done, total)


def _rank(
    machine: Machine,
    names: Sequence[str],
    situation: str,
    size_bytes: int,
    care: Care,
    told: Callable[[int], None],
) -> list[str]:
    times: dict[str, float] = {}
    for begin in range(0, len(names), _BATCH):
        batch = names[begin : begin + _BATCH]
        samples = machine.sample(batch, situation, size_bytes, rounds=care.rounds, sample_ns=care.sample_ns)
        times.update((name, median(values)) for name, values in zip(batch, samples, strict=True))
        told(begin + len(batch))
    return sorted(times, key=times.__getitem__)


def _decide(
    machine: Machine,
    finalists: Sequence[str],
    situation: str,
    size_bytes: int,
    incumbent: str | None,
    tried: int,
    ranking: tuple[str, ...],
) -> Found:
    """Measures the last few with the most care, beside those that they are compared with."""
    kernel = _native.copy_kernel_method()
    kept = [incumbent] if incumbent is not None else []
    names = list(dict.fromkeys([*finalists, *kept, kernel]))
    rounds = max(15, min(FINAL.rounds, (1 << 30) // size_bytes))
    samples = dict(
        zip(
            [*names, LIBC],
            machine.sample([*names, LIBC], situation, size_bytes, rounds=rounds, sample_ns=FINAL.sample_ns),
            strict=True,
        )
    )
    best = min(names, key=lambda name: median(samples[name]))
    # A plan of few variants keeps the instruction cache free: only what is surely faster takes another
    # one's place.
    if incumbent is not None and ratio_interval(samples[best], samples[incumbent]).high >= 1:
        best = incumbent
    return Found(
        variant=best,
        ns=median(samples[best]),
        libc_ns=median(samples[LIBC]),
        kernel_ns=median(samples[kernel]),
        by_libc=ratio_interval(samples[best], samples[LIBC]),
        by_kernel=ratio_interval(samples[best], samples[kernel]),
        tried=tried,
        ranking=ranking,
    )
