"""`make bench-cache`: which eviction policy misses least of what real programs read.

Programs are recorded by strace(1), then each policy is run on their blocks of 64 KiB at several cache sizes,
which are told as shares of the blocks that a trace has. Published policies see every use; `segmented FIFO`
and `trial` see what the service sees. `trial` is the one that crates/service/src/windows/policy.rs has. What
counts is not time, so that it may run beside other work.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cache.policies import OURS, PUBLISHED, Outcome, run
from benchmarks.cache.traces import record_all
from benchmarks.common.report import machine

REPOSITORY = Path(__file__).resolve().parents[2]
SHARES = (0.05, 0.1, 0.2, 0.4)
# Some policies take no fewer.
BLOCKS_MIN = 32
BASE = "FIFO"
# A question takes some 8 us, a miss that is read from the host's page cache some 30.
QUESTION_COST = 0.25

Cell = tuple[str, float]
Outcomes = dict[str, dict[Cell, Outcome]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-cache", description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    arguments = parser.parse_args()
    started_unix_s = time.time()
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as scratch:
        traces = record_all(Path(scratch))
    policies = [*PUBLISHED, *OURS]
    outcomes: Outcomes = {
        policy: {
            (name, share): run(policy, trace, max(BLOCKS_MIN, int(len(set(trace)) * share)))
            for name, trace in traces.items()
            for share in SHARES
        }
        for policy in policies
    }
    print(_table(traces, outcomes))
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = _document(traces, outcomes) | {"machine": machine(), "started_unix_s": started_unix_s}
    (arguments.out / "cache.json").write_text(json.dumps(document, indent=1) + "\n")
    _plot(traces, outcomes, arguments.out / "cache.png")


def _against_base(outcomes: Outcomes, policy: str, question_cost: float = 0.0) -> float:
    """The geometric mean over traces and sizes of what is missed, by what FIFO misses."""
    logs = [
        math.log((of.misses + question_cost * of.questions) / outcomes[BASE][cell].misses)
        for cell, of in outcomes[policy].items()
    ]
    return math.exp(sum(logs) / len(logs))


def _table(traces: dict[str, list[int]], outcomes: Outcomes) -> str:
    lines = [
        "| trace | uses | blocks | cache | " + " | ".join(outcomes) + " |",
        "|---" * (4 + len(outcomes)) + "|",
    ]
    for name, trace in traces.items():
        for share in SHARES:
            shown = [f"{of[name, share].misses / len(trace):.3f}" for of in outcomes.values()]
            start = [name, str(len(trace)), str(len(set(trace))), f"{share:.0%}"]
            lines.append("| " + " | ".join([*start, *shown]) + " |")
    means = [f"{_against_base(outcomes, policy):.3f}" for policy in outcomes]
    priced = [f"{_against_base(outcomes, policy, QUESTION_COST):.3f}" for policy in outcomes]
    lines.append("| " + " | ".join([f"mean, by {BASE}", "", "", "", *means]) + " |")
    lines.append("| " + " | ".join(["the same with questions", "", "", "", *priced]) + " |")
    return "\n".join(lines)


def _document(traces: dict[str, list[int]], outcomes: Outcomes) -> dict[str, Any]:
    return {
        "schema": 1,
        "title": "Misses of eviction policies on recorded programs",
        "block_bytes": 64 << 10,
        "question_cost": QUESTION_COST,
        "traces": {name: {"uses": len(trace), "blocks": len(set(trace))} for name, trace in traces.items()},
        "policies": {
            policy: {
                "misses_by_fifo": _against_base(outcomes, policy),
                "with_questions": _against_base(outcomes, policy, QUESTION_COST),
                "cells": [
                    {"trace": name, "share": share, "misses": of.misses, "questions": of.questions}
                    for (name, share), of in cells.items()
                ],
            }
            for policy, cells in outcomes.items()
        },
    }


def _plot(traces: dict[str, list[int]], outcomes: Outcomes, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, math.ceil(len(traces) / 2), figsize=(16, 7), layout="constrained")
    for axis, (name, trace) in zip(axes.flat, traces.items(), strict=False):
        for policy, cells in outcomes.items():
            ratios = [cells[name, share].misses / len(trace) for share in SHARES]
            axis.plot(SHARES, ratios, label=policy, marker=".", linewidth=2.5 if policy in OURS else 1)
        axis.set(title=name, xlabel="cache, share of all blocks", ylabel="missed, share of uses")
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
