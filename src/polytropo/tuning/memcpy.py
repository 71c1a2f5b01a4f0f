"""`polytropo tune memcpy`: searches every size in every situation and makes a plan of what it finds."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from polytropo import _native
from polytropo.state import State
from polytropo.tuning import plans
from polytropo.tuning.again import look_again
from polytropo.tuning.measure import SIZES_BYTES, Machine
from polytropo.tuning.search import find
from polytropo.tuning.weights import Weights

Told = Callable[[int, int | None, str], None]


def tune(
    state: State,
    *,
    situations: Sequence[str] | None = None,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    exhaustive: bool = False,
    restart: bool = False,
    weights: Weights | None = None,
    told: Told = lambda done, total, what: None,
) -> tuple[plans.Journal, Path]:
    """Searches, and saves the plan; goes on where an interrupted search ended, unless `restart`.

    What is found is saved size by size, so an interruption (KeyboardInterrupt) loses one size at most.
    `weights` tell what is copied: that is searched first and with the most care. Returns what was found and
    where the plan is.
    """
    machine = Machine()
    wanted = situations or machine.situations()
    with state.lock("tuning", timeout_s=5):
        journal = None if restart else plans.read_journal(state)
        if journal is None or journal.exhaustive != exhaustive:
            journal = plans.Journal(exhaustive=exhaustive, surroundings=plans.surroundings(), cells=[])
        rows = [(keep, situation) for keep in (False, True) for situation in by_weight(wanted, weights)]
        for row, (keep, situation) in enumerate(rows):
            _search_row(
                state, machine, journal, keep, situation, sizes_bytes, weights, (row, len(rows)), told
            )
        look_again(state, machine, journal, told)
        return journal, plans.save(state, make_plan(journal))


def by_weight(situations: Sequence[str], weights: Weights | None) -> list[str]:
    """Those in which the most bytes are copied first, so that an interrupted search knows them."""
    share = dict.fromkeys(situations, 0.0)
    for (situation, _), weight in (weights or {}).items():
        if situation in share:
            share[situation] += weight
    return sorted(share, key=lambda situation: -share[situation])


def _search_row(
    state: State,
    machine: Machine,
    journal: plans.Journal,
    keep: bool,
    situation: str,
    sizes_bytes: Sequence[int],
    weights: Weights | None,
    place: tuple[int, int],
    told: Told,
) -> None:
    known = {
        cell.size_bytes: cell for cell in journal.cells if (cell.keep, cell.situation) == (keep, situation)
    }
    heirs: tuple[str, ...] = ()
    incumbent: str | None = None
    row, rows = place
    for index, size_bytes in enumerate(sizes_bytes):
        begin = 1000 * (row * len(sizes_bytes) + index)
        total = 1000 * rows * len(sizes_bytes)
        what = f"{situation}{' (keep)' if keep else ''}, {size_bytes} B"
        if size_bytes in known:
            incumbent = known[size_bytes].variant
            continue
        started_s = time.monotonic()
        found = find(
            machine,
            situation,
            size_bytes,
            keep=keep,
            exhaustive=journal.exhaustive,
            heirs=heirs,
            incumbent=incumbent,
            weight=weights.get((situation, size_bytes), 0.0) if weights else None,
            progress=partial(_report, told, begin, total, what),
        )
        heirs, incumbent = found.ranking, found.cell.variant
        journal.elapsed_s += time.monotonic() - started_s
        journal.cells.append(found.cell)
        plans.write_journal(state, journal)


def _report(told: Told, begin: int, total: int, what: str, done: int, of: int) -> None:
    told(begin + 1000 * done // of, total, what)


def make_plan(journal: plans.Journal) -> _native.CopyPlan:
    """The plan of what was found; sizes and situations that were not searched keep their defaults."""
    plan = _native.CopyPlan.default()
    for cell in sorted(journal.cells, key=lambda cell: cell.size_bytes):
        plan.set(cell.keep, cell.situation, cell.size_bytes, cell.variant)
    return plan
