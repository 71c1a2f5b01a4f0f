"""The search for the fastest variant of a size in a situation.

Exhaustive search, as published (Asterope, PLOS 2021), measures every variant with full care. Successive
halving (Jamieson and Talwalkar, AISTATS 2016) measures all of them a little, keeps the better part, and
measures that with more care.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

from polytropo import _native
from polytropo.tuning.measure import LIBC, Machine, ratio_interval
from polytropo.tuning.plans import Cell

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
# What makes up this share of the bytes that a path copies is decided with more care, and what it never copies
# with less.
_WEIGHTY = 0.02
_FINALS = {"weighty": 81, "usual": FINAL.rounds, "never": 21}
# From this size on a copy takes longer than a sample should: only what was good at the size before is
# tried, and some others.
_LARGE_BYTES = 1 << 20
_HEIRS = 192
_NEWCOMERS = 64
# A batch of contenders is measured in turn; their code stays in the instruction cache.
_BATCH = 64


class Found(NamedTuple):
    """What was found for one size, and what did best at first, best first."""

    cell: Cell
    ranking: tuple[str, ...]


def find(
    machine: Machine,
    situation: str,
    size_bytes: int,
    *,
    keep: bool,
    exhaustive: bool = False,
    heirs: Sequence[str] = (),
    incumbent: str | None = None,
    space: Sequence[str] | None = None,
    weight: float | None = None,
    progress: Progress = lambda done, total: None,
) -> Found:
    """Finds the fastest variant.

    `heirs` are the best of the size before, best first: where copies are long, a search that is not
    exhaustive tries these and some others by chance. `incumbent` is the variant of the size before; it
    stays unless another is surely faster. `space` is what to choose from, else every variant. `weight` is
    this size's share of the bytes that are copied, if known: how much care the decision is worth.
    """
    space = _native.copy_space(keep, size_bytes) if space is None else space
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
    cell = _decide(
        machine,
        left,
        situation,
        size_bytes,
        keep=keep,
        incumbent=incumbent,
        tried=len(candidates),
        rounds=final_rounds(size_bytes, weight),
    )
    return Found(cell, tuple(ranking))


def final_rounds(size_bytes: int, weight: float | None) -> int:
    """How many rounds decide among the last few; fewer where a copy takes long."""
    worth = "usual"
    if weight is not None and not 0 < weight < _WEIGHTY:
        worth = "weighty" if weight else "never"
    return max(15, min(_FINALS[worth], (1 << 30) // size_bytes))


def choose(
    samples: Mapping[str, Sequence[float]], best: str, incumbent: str | None, usual: Sequence[str]
) -> str:
    """`best` has the least median; another one is taken where that need not be more than chance.

    A plan of few variants keeps the instruction cache free, so the size before hands on its own unless `best`
    is surely faster. And a plan is to be slower than the better of the `usual` ways nowhere, so that one
    stays unless what was found is surely faster.
    """
    rival = min(usual, key=lambda name: median(samples[name]))
    for candidate in (incumbent, best):
        if candidate is None or ratio_interval(samples[best], samples[candidate]).high < 1:
            continue
        if candidate in usual and candidate != rival:
            continue
        if candidate == rival or ratio_interval(samples[candidate], samples[rival]).high < 1:
            return candidate
    return rival


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
    *,
    keep: bool,
    incumbent: str | None,
    tried: int,
    rounds: int,
) -> Cell:
    """Measures the last few with the most care, beside those that they are compared with."""
    kernel = _native.copy_kernel_method()
    kept = [incumbent] if incumbent is not None else []
    usual = (kernel,) if keep else (kernel, LIBC)

    def measured(names: Sequence[str]) -> dict[str, Sequence[float]]:
        names = list(dict.fromkeys([*names, kernel, LIBC]))
        taken = machine.sample(names, situation, size_bytes, rounds=rounds, sample_ns=FINAL.sample_ns)
        return dict(zip(names, taken, strict=True))

    names = list(dict.fromkeys([*finalists, *kept, kernel]))
    samples = measured(names)
    best = min(names, key=lambda name: median(samples[name]))
    best = choose(samples, best, incumbent, usual)
    # Once more, with none but the usual ways beside it: each copy leaves the caches as the next one finds
    # them, and where most finalists store past the caches the others look slow.
    samples = measured([best])
    best = choose(samples, best, None, usual)
    return Cell(
        situation=situation,
        size_bytes=size_bytes,
        keep=keep,
        variant=best,
        ns=median(samples[best]),
        libc_ns=median(samples[LIBC]),
        kernel_ns=median(samples[kernel]),
        by_libc=ratio_interval(samples[best], samples[LIBC]),
        by_kernel=ratio_interval(samples[best], samples[kernel]),
        tried=tried,
    )
