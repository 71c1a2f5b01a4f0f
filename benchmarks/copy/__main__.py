"""`make bench-copy`: copies by the tuned plan beside memcpy(3) and the kernel's method, in one run.

First the fast search makes a plan; then plan, memcpy(3) and the kernel's method are measured anew in rounds
that
alternate them, so that no figure is one that the search chose for being low by chance. With `--exhaustive`
some sizes
are searched exhaustively as well, to compare what both searches find and what they take. Best on an idle
machine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.report import Report
from polytropo import _native
from polytropo.state import State
from polytropo.tuning.measure import LIBC, SIZES_BYTES, Machine, ratio_interval
from polytropo.tuning.memcpy import make_plan, tune
from polytropo.tuning.search import find
from polytropo.units import format_size

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = "plan"
SAMPLE_NS = 50_000
BEHIND_MAX = 1.05
HEADER = "| situation | size | variant | GB/s | memcpy(3) | kernel | gain on memcpy(3) | on kernel |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-copy", description=__doc__)
    parser.add_argument("--rounds", type=int, default=41, help="rounds a size and situation")
    parser.add_argument(
        "--exhaustive", nargs="*", type=int, metavar="BYTES", help="also searched exhaustively"
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    arguments = parser.parse_args()
    machine = Machine()
    with tempfile.TemporaryDirectory(prefix="bench-copy-") as home:
        journal, _ = tune(State.open(Path(home)))
    libc = os.confstr("CS_GNU_LIBC_VERSION") or "an unknown C library"
    kernel = _native.copy_kernel_method()
    report = Report("Memory copies by situation and size", ours=OURS)
    took_s = journal.elapsed_s
    report.notes.append(f"memcpy(3) of {libc}; the kernel's method here: {kernel}; search {took_s:.0f} s.")
    rows = [
        _measure(machine, report, make_plan(journal), situation, size_bytes, arguments.rounds)
        for situation in machine.situations()
        for size_bytes in SIZES_BYTES
    ]
    print(_table(rows))
    print("\n".join(_verdicts(rows)))
    if arguments.exhaustive is not None:
        rows += [
            _compare_searches(machine, s, size) for s in machine.situations() for size in arguments.exhaustive
        ]
    report.write(arguments.out, "copy")
    path = arguments.out / "copy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": rows}, indent=1) + "\n")
    print(f"\nwritten: {arguments.out}/copy.json and copy.png")


def _measure(
    machine: Machine, report: Report, plan: _native.CopyPlan, situation: str, size_bytes: int, rounds: int
) -> dict[str, Any]:
    variant, kernel = plan.get(False, situation, size_bytes), _native.copy_kernel_method()
    rounds = max(15, min(rounds, (2 << 30) // size_bytes))
    ours, libc, theirs = machine.sample(
        [variant, LIBC, kernel], situation, size_bytes, rounds=rounds, sample_ns=SAMPLE_NS
    )
    metric = f"{situation} {format_size(size_bytes)}"
    for side, values in ((OURS, ours), ("memcpy(3)", libc), ("kernel's method", theirs)):
        for value in values:
            report.add(metric, side, value)
    best = libc if statistics.median(libc) < statistics.median(theirs) else theirs
    return {
        "situation": situation,
        "size_bytes": size_bytes,
        "variant": variant,
        "gb_per_s": [size_bytes / statistics.median(values) for values in (ours, libc, theirs)],
        "by_libc": ratio_interval(ours, libc),
        "by_kernel": ratio_interval(ours, theirs),
        "by_best": ratio_interval(ours, best),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [HEADER, "|---" * 8 + "|"]
    for row in rows:
        speeds = " | ".join(f"{speed:.1f}" for speed in row["gb_per_s"])
        gains = " | ".join(
            f"{1 / median:.2f} ({1 / high:.2f}-{1 / low:.2f})"
            for median, low, high in (row["by_libc"], row["by_kernel"])
        )
        size = format_size(row["size_bytes"])
        lines.append(f"| {row['situation']} | {size} | {row['variant']} | {speeds} | {gains} |")
    return "\n".join(lines)


def _verdicts(rows: list[dict[str, Any]]) -> list[str]:
    behind = [row for row in rows if row["by_best"].high > BEHIND_MAX]
    ahead = max(rows, key=lambda row: 1 / row["by_kernel"].median)
    crossing = [
        r for r in rows if r["situation"] in ("fresh", "handed", "relayed") and r["size_bytes"] >= 16 << 10
    ]
    cold = [r for r in rows if r["situation"] == "cold" and r["size_bytes"] >= 1 << 20]
    told = [f"behind the best of both by more than 5 % (upper end of the interval): {_names(behind)}"]
    told.append(
        f"largest gain on the kernel's method: {1 / ahead['by_kernel'].median:.2f} ({_names([ahead])})"
    )
    for what, some in (("across cores from 16 KiB", crossing), ("cold from 1 MiB", cold)):
        if some:
            gains = [1 / row["by_libc"].median for row in some]
            told.append(f"gain on memcpy(3) {what}: {min(gains):.2f} to {max(gains):.2f}")
    return told


def _names(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{row['situation']} {format_size(row['size_bytes'])}" for row in rows) or "nowhere"


def _compare_searches(machine: Machine, situation: str, size_bytes: int) -> dict[str, Any]:
    """Both searches of one size, each from nothing, and their finds measured side by side."""
    found, elapsed_s = {}, {}
    for name, exhaustive in (("fast", False), ("exhaustive", True)):
        started_s = time.monotonic()
        found[name] = find(machine, situation, size_bytes, keep=False, exhaustive=exhaustive).variant
        elapsed_s[name] = time.monotonic() - started_s
    fast, thorough = machine.sample(
        list(found.values()), situation, size_bytes, rounds=41, sample_ns=SAMPLE_NS
    )
    ratio = ratio_interval(fast, thorough)
    share = elapsed_s["fast"] / elapsed_s["exhaustive"]
    print(
        f"{situation} {format_size(size_bytes)}: fast {found['fast']}, exhaustive {found['exhaustive']};"
        f" time {ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f}), search {elapsed_s['fast']:.1f} s"
        f" of {elapsed_s['exhaustive']:.1f} s ({share:.3f})",
        flush=True,
    )
    return {
        "searches": found,
        "situation": situation,
        "size_bytes": size_bytes,
        "elapsed_s": elapsed_s,
        "fast_by_exhaustive": ratio,
    }


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("bench-copy: interrupted; nothing was written")
