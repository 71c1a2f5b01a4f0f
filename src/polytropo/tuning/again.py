"""The last decision of a search, by several looks at the whole plan.

What a search finds within a second holds for that second: memory lies elsewhere a moment later, and the
virtual CPUs of a machine move between cores that share a cache and cores that do not, some every few seconds.
So all sizes and situations are gone through several times, and of each the variant, what came close to it and
the usual ways are measured side by side on new memory. What was taken for being fast by chance goes.
"""

import time
from collections.abc import Callable
from pathlib import Path

from polytropo.state import State
from polytropo.tuning import plans
from polytropo.tuning.choice import Compared
from polytropo.tuning.measure import ACROSS, Machine
from polytropo.tuning.search import FINAL, contenders, decided

_LOOKS = 4
# On a machine that moved, so many until each situation was seen with the other core near and far.
_LOOKS_MAX = 12
_FINALISTS = 4
_ROUNDS = 27
_ROUNDS_MIN = 6
_BYTES_A_LOOK = 256 << 20
# A virtual machine whose CPUs did not move meanwhile gets so long to do that.
_WAIT_S = 60.0
_POLL_S = 0.25
_CPUINFO = Path("/proc/cpuinfo")

Told = Callable[[int, int | None, str], None]
_Key = tuple[bool, str, int]


def look_again(state: State, machine: Machine, journal: plans.Journal, told: Told) -> None:
    """Decides anew about all that was not looked at again yet, and saves it at the end of all looks."""
    cells = {(cell.keep, cell.situation, cell.size_bytes): cell for cell in journal.cells if not cell.looks}
    if not cells:
        return
    started_s = time.monotonic()
    course = _Course(machine, cells, told)
    for _ in range(_LOOKS):
        course.look(list(cells))
    across = [key for key in cells if key[1] in ACROSS]
    if _is_virtual() and course.stayed() and course.wait_for_move():
        course.look(across)
    while course.is_seen_in_part() and course.looks < _LOOKS_MAX:
        course.look(across)
    journal.cells[:] = _decide(journal.cells, course.compared, course.looks)
    journal.elapsed_s += time.monotonic() - started_s
    plans.write_journal(state, journal)


class _Course:
    """Looks at some cells of a plan."""

    def __init__(self, machine: Machine, cells: dict[_Key, plans.Cell], told: Told) -> None:
        self.looks = 0
        self.compared = {key: Compared() for key in cells}
        self._names = {
            key: contenders([cell.variant, *cell.finalists[:_FINALISTS]], None) for key, cell in cells.items()
        }
        self._machine = machine
        self._told = told

    def look(self, keys: list[_Key]) -> None:
        """Measures these once more."""
        self.looks += 1
        for index, key in enumerate(keys):
            self._told(index, len(keys), f"look {self.looks} of {max(_LOOKS, self.looks)}")
            _, situation, size_bytes = key
            names = self._names[key]
            rounds = max(_ROUNDS_MIN, min(_ROUNDS, _BYTES_A_LOOK // size_bytes))
            samples = self._machine.sample(
                names, situation, size_bytes, rounds=rounds, sample_ns=FINAL.sample_ns
            )
            self.compared[key].add(names, samples)

    def stayed(self) -> bool:
        """Whether the other core was in one place all the time."""
        return len(self._places()) == 1

    def is_seen_in_part(self) -> bool:
        """Whether the other core was near and far, and some were not seen under both."""
        return any(conditions != self._places() for conditions in self._conditions())

    def wait_for_move(self) -> bool:
        """Waits a little for the other core to be elsewhere, and tells whether it is."""
        (here,) = self._places()
        until_s = time.monotonic() + _WAIT_S
        while (left_s := until_s - time.monotonic()) > 0:
            self._told(int(_WAIT_S - left_s), int(_WAIT_S), f"waiting, since the other core is {here}")
            if self._machine.distance() != here:
                return True
            time.sleep(_POLL_S)
        return False

    def _conditions(self) -> list[frozenset[str]]:
        return [each.conditions for (_, situation, _), each in self.compared.items() if situation in ACROSS]

    def _places(self) -> frozenset[str]:
        return frozenset[str]().union(*self._conditions())


def _is_virtual() -> bool:
    try:
        return "hypervisor" in _CPUINFO.read_text()
    except OSError:
        return False


def _decide(cells: list[plans.Cell], compared: dict[_Key, Compared], looks: int) -> list[plans.Cell]:
    chosen: dict[tuple[bool, str], str] = {}
    found = []
    for cell in sorted(cells, key=lambda cell: cell.size_bytes):
        key = (cell.keep, cell.situation, cell.size_bytes)
        if key in compared:
            before = chosen.get(key[:2])
            incumbent = before if before in compared[key].names else None
            cell = decided(
                compared[key],
                cell.situation,
                cell.size_bytes,
                cell.keep,
                incumbent,
                tried=cell.tried,
                looks=looks,
            )
        chosen[key[:2]] = cell.variant
        found.append(cell)
    by_key = {(cell.keep, cell.situation, cell.size_bytes): cell for cell in found}
    return [by_key[cell.keep, cell.situation, cell.size_bytes] for cell in cells]
