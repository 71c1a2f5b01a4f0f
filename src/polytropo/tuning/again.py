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
_FINALISTS = 4
_ROUNDS = 27
_ROUNDS_MIN = 6
_BYTES_A_LOOK = 256 << 20
# A virtual machine gets so long for each situation to be seen with the other core near and far.
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
    if _is_virtual():
        course.see_elsewhere()
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

    def see_elsewhere(self) -> None:
        """Looks again at what was seen with the other core in one place alone, once that is in another."""
        until_s = time.monotonic() + _WAIT_S
        while (left_s := until_s - time.monotonic()) > 0 and (keys := self._seen_in_one_place()):
            here = self._machine.distance()
            due = [key for key in keys if self.compared[key].conditions != {here}]
            if due:
                self.look(due)
            else:
                self._told(int(_WAIT_S - left_s), int(_WAIT_S), f"waiting, since the other core is {here}")
                time.sleep(_POLL_S)

    def _seen_in_one_place(self) -> list[_Key]:
        across = {key: each for key, each in self.compared.items() if key[1] in ACROSS}
        return [key for key, each in across.items() if len(each.conditions) == 1]


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
