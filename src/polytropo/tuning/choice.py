"""Which of several ways to copy is taken, by times that were measured side by side.

A plan is to be slower than memcpy(3) and the kernel's method nowhere, whatever a machine does: where a
situation was measured under several conditions (the other core near or far, the source here or there), a
variant has to hold under each of them.
"""

from collections.abc import Iterable, Sequence
from statistics import geometric_mean, median

from polytropo.tuning.measure import LIBC, Interval, Samples, ratio_interval

# A variant that is slower by less than this under some condition is not slower; one that is faster by less
# is not worth a place in a plan.
_SAME = 0.01
# One that may be slower by more is behind.
_BEHIND = 1.05


class Compared:
    """Times of several ways to copy, by name, from one look or several."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}
        self._conditions: list[str] = []

    def add(self, names: Sequence[str], samples: Samples) -> None:
        """Adds rounds. All looks have to be at the same `names`."""
        for name, values in zip(names, samples.ns, strict=True):
            self._times.setdefault(name, []).extend(values)
        self._conditions.extend(samples.conditions)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._times)

    @property
    def conditions(self) -> frozenset[str]:
        """Those under which enough rounds were taken."""
        return frozenset(self.parts)

    @property
    def parts(self) -> dict[str, dict[str, list[float]]]:
        """Times by condition and name."""
        parts = Samples(list(self._times.values()), self._conditions).parts()
        return {condition: dict(zip(self._times, times, strict=True)) for condition, times in parts.items()}

    def mean_ns(self, name: str) -> float:
        """Of all conditions alike."""
        return geometric_mean(median(part[name]) for part in self.parts.values())

    def by(self, name: str, other: str) -> Interval:
        """The time of one by that of another, where it is largest."""
        return max(
            (ratio_interval(part[name], part[other]) for part in self.parts.values()),
            key=lambda ratio: ratio.high,
        )

    def by_best(self, name: str, usual: Iterable[str]) -> dict[str, Interval]:
        """By condition, the time by that of the best of the usual ways there."""
        usual = tuple(usual)
        found = {}
        for condition, part in self.parts.items():
            best = min((other for other in usual if other in part), key=lambda other: median(part[other]))
            found[condition] = ratio_interval(part[name], part[best])
        return found

    def choose(self, incumbent: str | None, usual: Sequence[str], barred: Iterable[str] = ()) -> str:
        """The fastest that is surely faster than the `usual` ways under some condition, and slower under
        none; else the one of these that is never far behind the other; where each of these is, whatever is
        not.

        The `incumbent`, the variant of the size before, goes on unless another is surely faster: a plan of
        few variants keeps the instruction cache free. None of the `barred` is taken.
        """
        rival = min(usual, key=lambda name: self._worst(name, usual))
        never = {
            *usual,
            *barred,
            LIBC,
        }  # memcpy(3) changes vector registers, so it is not always among the usual
        sure = [name for name in self.names if name not in never and self._beats(name, usual)]
        if not sure:
            least = min(
                (name for name in self.names if name not in never),
                key=lambda name: self._worst(name, usual),
                default=rival,
            )
            behind = self._worst(rival, usual) > _BEHIND
            return least if behind and self._worst(least, usual) < _BEHIND else rival
        best = min(sure, key=self.mean_ns)
        if incumbent in sure and not self._surely_faster(best, incumbent):
            return incumbent
        return best

    def _worst(self, name: str, usual: Sequence[str]) -> float:
        return max(ratio.high for ratio in self.by_best(name, usual).values())

    def _beats(self, name: str, usual: Sequence[str]) -> bool:
        ratios = self.by_best(name, usual).values()
        return all(r.high < 1 + _SAME for r in ratios) and any(r.high < 1 - _SAME for r in ratios)

    def _surely_faster(self, name: str, other: str) -> bool:
        ratios = [ratio_interval(part[name], part[other]) for part in self.parts.values()]
        return any(r.high < 1 for r in ratios) and all(r.low <= 1 for r in ratios)
