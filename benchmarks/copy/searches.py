"""The fast search beside the exhaustive one: what they find and what they take.

All sizes would take hours, so these are some, in every situation, each searched from nothing over the whole
space of variants.
"""

import json
import time
from pathlib import Path
from typing import Any

from polytropo.tuning.choice import Compared
from polytropo.tuning.measure import Machine
from polytropo.tuning.search import find
from polytropo.units import format_size

SIZES_BYTES = (4 << 10, 64 << 10)
SAMPLE_NS = 50_000
ROUNDS = 81


def compare_searches(machine: Machine) -> list[dict[str, Any]]:
    """Compares both in every situation, prints each and the sum."""
    cells = [_compare(machine, s, size) for s in machine.situations() for size in SIZES_BYTES]
    fast_s, thorough_s = (sum(cell["elapsed_s"][name] for cell in cells) for name in ("fast", "exhaustive"))
    worst = max(float(cell["fast_by_exhaustive"].median) for cell in cells)
    mean = sum(cell["fast_by_exhaustive"].median for cell in cells) / len(cells)
    print(
        f"all {len(cells)} cells: the fast search took {fast_s:.1f} s of {thorough_s:.1f} s"
        f" ({fast_s / thorough_s:.3f}); its plan takes {mean:.3f} of the exhaustive plan's time on average,"
        f" {worst:.3f} at most",
        flush=True,
    )
    return cells


def _compare(machine: Machine, situation: str, size_bytes: int) -> dict[str, Any]:
    found, elapsed_s, tried = {}, {}, 0
    for name, exhaustive in (("fast", False), ("exhaustive", True)):
        started_s = time.monotonic()
        cell = find(machine, situation, size_bytes, keep=False, exhaustive=exhaustive).cell
        elapsed_s[name] = time.monotonic() - started_s
        found[name], tried = cell.variant, cell.tried
    names = list(dict.fromkeys(found.values()))
    compared = Compared()
    compared.add(names, machine.sample(names, situation, size_bytes, rounds=ROUNDS, sample_ns=SAMPLE_NS))
    ratio = compared.by(found["fast"], found["exhaustive"])
    print(
        f"{situation} {format_size(size_bytes)}, {tried} variants: fast {found['fast']}, exhaustive"
        f" {found['exhaustive']}; time {ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f}), search"
        f" {elapsed_s['fast']:.1f} s of {elapsed_s['exhaustive']:.1f} s",
        flush=True,
    )
    return {
        "searches": found,
        "situation": situation,
        "size_bytes": size_bytes,
        "elapsed_s": elapsed_s,
        "fast_by_exhaustive": ratio,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
