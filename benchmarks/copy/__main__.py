"""`make bench-copy`: copies by the tuned plan beside memcpy(3) and the kernel's method, in one run.

First the fast search makes a plan; then plan, memcpy(3) and the kernel's method are measured anew in rounds
of a drawn order, so that no figure is one that the search chose for being low by chance. memcpy(3) is
measured twice in each round: how far it is from itself is what the measurement errs by. Then the same three
ways are given to services, whose programs read, write and copy files through shared memory. With `--searches
too` some sizes are searched exhaustively as well, to compare what both searches find and what they take;
`--searches only` does nothing else. Best on an idle machine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.report import Report
from benchmarks.copy import system
from benchmarks.copy.searches import compare_searches, write_json
from polytropo import _native
from polytropo.state import State
from polytropo.tuning.measure import ACROSS, LIBC, SIZES_BYTES, Machine, Samples, ratio_interval
from polytropo.tuning.memcpy import make_plan, tune
from polytropo.tuning.weights import recorded
from polytropo.units import format_ns, format_size

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = "plan"
SAMPLE_NS = 50_000
PASSES = 5
BEHIND_MAX = 1.05
PATH_HEADER = (
    "| private path | plan | memcpy(3) | kernel | gain on memcpy(3) | on kernel | memcpy(3) on itself |"
)
HEADER = "| situation | size | variant | GB/s | memcpy(3) | kernel | gain on memcpy(3) | on kernel |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-copy", description=__doc__)
    parser.add_argument("--rounds", type=int, default=75, help="rounds a size and situation")
    parser.add_argument(
        "--searches", choices=("no", "too", "only"), default="no", help="compare both searches"
    )
    parser.add_argument("--system-rounds", type=int, default=15, help="rounds of the private path")
    parser.add_argument("--time-ms", type=int, default=200, help="for each of its figures in each round")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    arguments = parser.parse_args()
    machine = Machine()
    searches = [] if arguments.searches == "no" else compare_searches(machine)
    if arguments.searches == "only":
        write_json(arguments.out / "copy-searches.json", {"searches": searches})
        return
    libc = os.confstr("CS_GNU_LIBC_VERSION") or "an unknown C library"
    kernel = _native.copy_kernel_method()
    report = Report("Memory copies by situation and size", ours=OURS)
    with tempfile.TemporaryDirectory(prefix="bench-copy-") as home:
        journal, plan_file = tune(State.open(Path(home)), weights=recorded())
        took_s = journal.elapsed_s
        report.notes.append(
            f"memcpy(3) of {libc}; the kernel's method here: {kernel}; search {took_s:.0f} s."
        )
        plan = make_plan(journal)
        taken = _measure(machine, plan, arguments.rounds)
        rows = [
            row
            for situation in machine.situations()
            for size_bytes in SIZES_BYTES
            for row in _rows(report, plan, situation, size_bytes, taken[situation, size_bytes])
        ]
        print(_table(rows))
        print("\n".join(_verdicts(rows)), flush=True)
        felt = _measure_path(report, plan_file.parent, arguments.system_rounds, arguments.time_ms)
    report.write(arguments.out, "copy")
    result = arguments.out / "copy.json"
    more = {"rows": rows, "path": felt, "searches": searches}
    write_json(result, json.loads(result.read_text()) | more)
    print(f"\nwritten: {arguments.out}/copy.json and copy.png")


def _measure(machine: Machine, plan: _native.CopyPlan, rounds: int) -> dict[tuple[str, int], Samples]:
    """Everything several times over: the machine changes meanwhile, and each time is on other memory."""
    taken: dict[tuple[str, int], list[Samples]] = {}
    for _ in range(PASSES):
        for situation in machine.situations():
            for size_bytes in SIZES_BYTES:
                variant = plan.get(False, situation, size_bytes)
                share = max(5, min(rounds // PASSES, (1 << 29) // size_bytes))
                samples = machine.sample(
                    [variant, LIBC, _native.copy_kernel_method(), LIBC],
                    situation,
                    size_bytes,
                    rounds=share,
                    sample_ns=SAMPLE_NS,
                )
                taken.setdefault((situation, size_bytes), []).append(samples)
    return {cell: Samples.joined(several) for cell, several in taken.items()}


def _rows(
    report: Report, plan: _native.CopyPlan, situation: str, size_bytes: int, taken: Samples
) -> list[dict[str, Any]]:
    variant = plan.get(False, situation, size_bytes)
    return [
        _row(report, situation, size_bytes, condition, variant, part)
        for condition, part in taken.parts().items()
    ]


def _row(
    report: Report,
    situation: str,
    size_bytes: int,
    condition: str,
    variant: str,
    samples: Sequence[Sequence[float]],
) -> dict[str, Any]:
    ours, libc, theirs, again = samples
    metric = f"{situation} {format_size(size_bytes)}" + (f", {condition}" if condition else "")
    for side, values in ((OURS, ours), ("memcpy(3)", libc), ("kernel's method", theirs)):
        for value in values:
            report.add(metric, side, value)
    best = libc if statistics.median(libc) < statistics.median(theirs) else theirs
    return {
        "situation": situation,
        "condition": condition,
        "size_bytes": size_bytes,
        "variant": variant,
        "gb_per_s": [size_bytes / statistics.median(values) for values in (ours, libc, theirs)],
        "by_libc": ratio_interval(ours, libc),
        "by_kernel": ratio_interval(ours, theirs),
        "by_best": ratio_interval(ours, best),
        "by_itself": ratio_interval(again, libc),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [HEADER, "|---" * 8 + "|"]
    for row in rows:
        speeds = " | ".join(f"{speed:.1f}" for speed in row["gb_per_s"])
        gains = f"{_gain(row['by_libc'])} | {_gain(row['by_kernel'])}"
        size = format_size(row["size_bytes"])
        situation = ", ".join(filter(None, (row["situation"], row["condition"])))
        lines.append(f"| {situation} | {size} | {row['variant']} | {speeds} | {gains} |")
    return "\n".join(lines)


def _verdicts(rows: list[dict[str, Any]]) -> list[str]:
    behind = [row for row in rows if row["by_best"].high > BEHIND_MAX]
    ahead = max(rows, key=lambda row: 1 / row["by_kernel"].median)
    crossing = [r for r in rows if r["situation"] in ACROSS and r["size_bytes"] >= 16 << 10]
    cold = [r for r in rows if r["situation"] == "cold" and r["size_bytes"] >= 1 << 20]
    told = [f"behind the best of both by more than 5 % (upper end of the interval): {_names(behind)}"]
    told.append(
        f"largest gain on the kernel's method: {1 / ahead['by_kernel'].median:.2f} ({_names([ahead])})"
    )
    for what, some in (("across cores from 16 KiB", crossing), ("cold from 1 MiB", cold)):
        if some:
            gains = [1 / row["by_libc"].median for row in some]
            told.append(f"gain on memcpy(3) {what}: {min(gains):.2f} to {max(gains):.2f}")
    told.append(_own_error(rows))
    return told


def _own_error(rows: list[dict[str, Any]]) -> str:
    """How far memcpy(3) is from itself, and whether the intervals say so."""
    apart = [row for row in rows if not row["by_itself"].low <= 1 <= row["by_itself"].high]
    errors = sorted(abs(row["by_itself"].median - 1) for row in rows)
    worst = max(rows, key=lambda row: abs(row["by_itself"].median - 1))
    return (
        f"memcpy(3) beside itself: off by {errors[len(errors) // 2]:.1%} in the middle cell and"
        f" {errors[-1]:.1%} at most ({_names([worst])}); the 95 % interval misses 1 in {len(apart)} of"
        f" {len(rows)} cells (1 in 20 is chance): {_names(apart)}"
    )


def _measure_path(report: Report, tuning_dir: Path, rounds: int, time_ms: int) -> dict[str, Any]:
    """What programs feel of it: times, beside the others' in the same round."""
    if reason := system.why_not():
        print(f"\nprivate path: skipped, {reason}")
        return {}
    samples = system.measure(tuning_dir, rounds, time_ms)
    sides = {"tuned": OURS, "libc": "memcpy(3)", "kernel": "kernel's method"}
    print(f"\n{PATH_HEADER}\n" + "|---" * 7 + "|")
    told = {}
    for figure, by_engine in samples.items():
        for engine, side in sides.items():
            for value in by_engine[engine]:
                report.add(f"path: {figure}", side, value)
        ours, libc, kernel = (by_engine[engine] for engine in sides)
        told[figure] = {
            "by_libc": ratio_interval(ours, libc),
            "by_kernel": ratio_interval(ours, kernel),
            "by_itself": ratio_interval(by_engine[system.AGAIN], libc),
        }
        times = " | ".join(format_ns(statistics.median(values)) for values in (ours, libc, kernel))
        gains = " | ".join(_gain(ratio) for ratio in told[figure].values())
        print(f"| {figure} | {times} | {gains} |", flush=True)
    return told


def _gain(ratio: tuple[float, float, float]) -> str:
    median, low, high = ratio
    return f"{1 / median:.2f} ({1 / high:.2f}-{1 / low:.2f})"


def _names(rows: list[dict[str, Any]]) -> str:
    names = (
        " ".join(filter(None, (row["situation"], format_size(row["size_bytes"]), row["condition"])))
        for row in rows
    )
    return ", ".join(names) or "nowhere"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("bench-copy: interrupted; nothing was written")
