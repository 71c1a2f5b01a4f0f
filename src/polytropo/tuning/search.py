"""The search for the fastest variant of a size in a situation.

Exhaustive search, as published (Asterope, PLOS 2021), measures every variant with full care. Successive
halving (Jamieson and Talwalkar, AISTATS 2016) measures all of them a little, keeps the better part, and
measures that with more care.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from statistics import geometric_mean, median
from typing import NamedTuple

from polytropo import _native
from polytropo.tuning.choice import Compared
from polytropo.tuning.measure import ACROSS, LIBC, Machine
from polytropo.tuning.plans import Cell

Progress = Callable[[int, int], None]


class Care(NamedTuple):
    """How a rung measures: samples each, and how long one takes at least."""

    keep: int
    rounds: int
    sample_ns: int


# From all variants to eight. A sample is at least one copy, so of large sizes they take longer.
RUNGS = (Care(512, 1, 2_000), Care(128, 3, 5_000), Care(32, 7, 10_000), Care(8, 15, 20_000))
LARGE_RUNGS = (Care(64, 1, 2_000), Care(24, 2, 2_000), Care(8, 4, 2_000))
EXHAUSTIVE = Care(8, 15, 20_000)
FINAL = Care(1, 41, 50_000)
# What makes up this share of the bytes that a path copies is decided with more care, and what it never copies
# with less.
_WEIGHTY = 0.02
_FINALS = {"weighty": 81, "usual": FINAL.rounds, "never": 21}
# From this size on a copy takes longer than a sample should: only what was good at the size before is
# tried, and some others.
_LARGE_BYTES = 1 << 20
_HEIRS = 96
_NEWCOMERS = 64
# A batch of contenders is measured in turn; their code stays in the instruction cache.
_BATCH = 64
# Where the source of a read lies goes by turns of so many rounds.
_TURN = 3
# What stores past the caches wins while the other core is far and loses while it is near. Of those left, so
# many of each kind stay, lest a search that saw one of both loses what holds under both.
_SHARE_PAST_CACHES = 4


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
    rungs = (EXHAUSTIVE,) if exhaustive else LARGE_RUNGS if size_bytes >= _LARGE_BYTES else RUNGS
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
            ranking = _better_part(timed, _HEIRS, situation)
        left = _better_part(timed, rung.keep, situation)
    names = contenders(left, incumbent)
    compared = Compared()
    compared.add(
        names,
        machine.sample(
            names,
            situation,
            size_bytes,
            rounds=final_rounds(size_bytes, weight),
            sample_ns=FINAL.sample_ns,
        ),
    )
    cell = decided(compared, situation, size_bytes, keep, incumbent, tried=len(candidates))
    return Found(cell, tuple(ranking))


def contenders(finalists: Sequence[str], incumbent: str | None) -> list[str]:
    """Those that a decision is about: the last few, the variant of the size before and the usual ways."""
    kept = [incumbent] if incumbent is not None else []
    return list(dict.fromkeys([*finalists, *kept, _native.copy_kernel_method(), LIBC]))


def decided(
    compared: Compared,
    situation: str,
    size_bytes: int,
    keep: bool,
    incumbent: str | None,
    *,
    tried: int,
    looks: int = 0,
) -> Cell:
    """The decision on what was compared, with the figures that it was made by."""
    kernel = _native.copy_kernel_method()
    usual = (kernel,) if keep else (kernel, LIBC)
    # Where the other core was never seen near, what stores past the caches is fastest, and it is the slowest
    # once that comes near.
    unproven = situation in ACROSS and compared.conditions == {"far"}
    barred = [name for name in compared.names if unproven and _is_past_caches(name)]
    best = compared.choose(incumbent, usual, barred)
    others = sorted(set(compared.names) - {best, *usual}, key=compared.mean_ns)
    return Cell(
        situation=situation,
        size_bytes=size_bytes,
        keep=keep,
        variant=best,
        ns=compared.mean_ns(best),
        libc_ns=compared.mean_ns(LIBC),
        kernel_ns=compared.mean_ns(kernel),
        by_libc=compared.by(best, LIBC),
        by_kernel=compared.by(best, kernel),
        tried=tried,
        finalists=others,
        looks=looks,
    )


def final_rounds(size_bytes: int, weight: float | None) -> int:
    """How many rounds decide among the last few; fewer where a copy takes long."""
    worth = "usual"
    if weight is not None and not 0 < weight < _WEIGHTY:
        worth = "weighty" if weight else "never"
    return max(7, min(_FINALS[worth], (1 << 30) // size_bytes))


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
    rounds = max(care.rounds, _TURN) if situation == "read" else care.rounds
    for begin in range(0, len(names), _BATCH):
        batch = names[begin : begin + _BATCH]
        samples = machine.sample(batch, situation, size_bytes, rounds=rounds, sample_ns=care.sample_ns)
        parts = samples.parts().values()
        for index, name in enumerate(batch):
            times[name] = geometric_mean(median(part[index]) for part in parts)
        told(begin + len(batch))
    return sorted(times, key=times.__getitem__)


def _is_past_caches(name: str) -> bool:
    return ".nt." in name


def _better_part(ranked: Sequence[str], keep: int, situation: str) -> list[str]:
    """The first `keep`; across cores some of each kind of store."""
    if situation not in ACROSS:
        return list(ranked[:keep])
    past = [name for name in ranked if _is_past_caches(name)]
    within = [name for name in ranked if not _is_past_caches(name)]
    share = keep // _SHARE_PAST_CACHES
    chosen = {*past[:share], *within[: keep - share]}
    return [name for name in ranked if name in chosen]
