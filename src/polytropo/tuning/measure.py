"""Times of copies, their spread, and how sure a comparison is."""

import math
import os
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from polytropo import _native
from polytropo.errors import PolytropoError

LIBC = "libc"
SITUATIONS = {
    "hot": "both in this core's caches",
    "fresh": "the source was just written by another core",
    "handed": "the destination is soon read by another core",
    "relayed": "both of these",
    "cold": "neither is in any cache",
    "read": "the source is in any cache or in none, the destination in this core's",
}
SIZES_BYTES = tuple(64 << (2 * step) for step in range(11))  # 64 B to 64 MiB
ACROSS = frozenset({"fresh", "handed", "relayed"})
"""Those that another core has a part in."""
# Cores that share a cache answer each other in 50 to 150 ns, others take from 250 on.
_FAR_NS = 200
_ENOUGH_ROUNDS = 5


class Interval(NamedTuple):
    """A median and the bounds that hold the true one in 95 of 100 runs (order statistics; no distribution
    assumed).
    """

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """The median of `values` (at least one) with its 95 % interval; of fewer than six values, the whole
    range.
    """
    ordered = sorted(values)
    count = len(ordered)
    # The number of values below the median is binomial(count, 1/2); its normal approximation is good from
    # about six on.
    reach = math.ceil(1.96 * math.sqrt(count) / 2) if count >= 6 else count
    middle = count / 2
    low = max(0, math.floor(middle - reach))
    high = min(count - 1, math.ceil(middle + reach) - 1)
    return Interval(statistics.median(ordered), ordered[low], ordered[high])


class Samples(NamedTuple):
    """For each contender a time in every round, and under what the round was taken.

    Virtual CPUs change their places while they run, so the other core is `near` (it shares a cache) in some
    rounds and `far` in others: what is fastest differs. A copy that is `read` has its source in several
    places by turns. Elsewhere there is one condition without a name.
    """

    ns: list[list[float]]
    conditions: list[str]

    @classmethod
    def joined(cls, several: Sequence["Samples"]) -> "Samples":
        """The rounds of several, of the same contenders, one after the other."""
        ns = [
            [value for values in of_one for value in values]
            for of_one in zip(*(each.ns for each in several), strict=True)
        ]
        return cls(ns, [condition for each in several for condition in each.conditions])

    def parts(self) -> dict[str, list[list[float]]]:
        """The times by condition; one that few rounds were taken under tells nothing and is left out."""
        found = {
            condition: [
                [value for value, under in zip(values, self.conditions, strict=True) if under == condition]
                for values in self.ns
            ]
            for condition in sorted(set(self.conditions))
        }
        enough = {name: part for name, part in found.items() if len(part[0]) >= _ENOUGH_ROUNDS}
        return enough or found


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Ours by theirs, round by round, so that what disturbed both at once cancels out. Below 1 ours is
    faster.
    """
    return median_interval([mine / other for mine, other in zip(ours, theirs, strict=True)])


class Machine:
    """The CPUs that samples are taken on: this process's first, and another one as the peer."""

    def __init__(self) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        self.cpu = cpus[0]
        self.other_cpu = cpus[1] if len(cpus) > 1 else None
        self._bench = _native.CopyBench(self.cpu, self.other_cpu)

    def situations(self) -> tuple[str, ...]:
        """What can be measured here: with one CPU, nothing that needs two."""
        return tuple(name for name in SITUATIONS if self.other_cpu is not None or name not in ACROSS)

    def distance(self) -> str:
        """Whether the other core, which there has to be, is `near` or `far` at the moment."""
        return self.sample([LIBC], "fresh", 64, rounds=1, sample_ns=1000).conditions[0]

    def sample(
        self, names: Sequence[str], situation: str, size_bytes: int, *, rounds: int, sample_ns: int
    ) -> Samples:
        """Nanoseconds a copy: for each of `names` (variants, or `libc`) one sample in each of `rounds`
        rounds.
        """
        if situation not in self.situations():
            raise PolytropoError(
                f"copies that are {situation} need a second CPU;"
                " allow this process another (taskset) or leave them out"
            )
        try:
            ns, told = self._bench.sample(list(names), situation, size_bytes, rounds, sample_ns)
        except OSError as error:
            raise PolytropoError(
                f"cannot measure copies of {size_bytes} bytes on CPU {self.cpu}: {error.strerror or error}"
            ) from error
        return Samples(ns, [_condition(round_trip_ns, source) for round_trip_ns, source in told])


def _condition(round_trip_ns: float | None, source: str | None) -> str:
    if round_trip_ns is None:
        return source or ""
    return "far" if round_trip_ns > _FAR_NS else "near"
