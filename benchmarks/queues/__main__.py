"""`make bench-queues`: our queues beside their rivals, and Python's, in one run; tables, JSON and a plot.

Every queue waits by the same policy; threads are pinned; rivals take turns within each repetition; figures
are medians, with the smallest and the largest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.report import machine
from benchmarks.queues import python_queues, tables

REPOSITORY = Path(__file__).resolve().parents[2]
MEASURES = ("items_per_s", "cpu_ns_per_item")
WAITS = ("sleeps_per_item", "wakes_per_item", "vain_spins_per_item")
TIMES = ("put", "get", "transfer")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-queues", description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run-ms", type=int, default=120)
    parser.add_argument("--threads", default="1,2,4,8,16,32,64")
    parser.add_argument("--sizes", default="8,64,4096")
    parser.add_argument("--python-items", type=int, default=20_000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    load_before = os.getloadavg()
    started = time.time()
    native = _native(arguments)
    python = python_queues.measure(arguments.repeats, arguments.python_items)
    report = {
        "schema": 1,
        "machine": machine(),
        "started_unix_s": started,
        "elapsed_s": time.time() - started,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "native": [_summary(measured) for measured in native],
        "python": [_summary(measured) for measured in python],
    }
    path = arguments.out / "queues.json"
    path.write_text(_compact(report))
    plot(report, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(tables.markdown(report))
    print(*(path.with_suffix(suffix) for suffix in (".md", ".json", ".png")))
    if load_before[0] > 1:
        print(
            f"note: the machine was busy when this began (load average {load_before[0]:.1f})", file=sys.stderr
        )


def _native(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    build = ["cargo", "build", "--release", "--locked", "-p", "polytropo-bench-queues", "--features", "cpp"]
    subprocess.run(build, cwd=REPOSITORY, check=True)
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        command = [str(REPOSITORY / "target/release/polytropo-bench-queues"), "--output", output.name]
        command += ["--repeats", str(arguments.repeats), "--run-ms", str(arguments.run_ms)]
        command += ["--threads", arguments.threads, "--sizes", arguments.sizes]
        subprocess.run(command, check=True)
        found: list[dict[str, Any]] = json.loads(Path(output.name).read_text())
        return found


def _compact(report: dict[str, Any]) -> str:
    """JSON with a line for each queue and number of threads."""
    parts = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items() if type(value) is not list
    ]
    for key, values in report.items():
        if type(values) is list:
            lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in values)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _spread(values: list[float]) -> dict[str, float]:
    return {
        name: float(f"{value:.4g}")
        for name, value in (("median", statistics.median(values)), ("min", min(values)), ("max", max(values)))
    }


def _summary(measured: dict[str, Any]) -> dict[str, Any]:
    runs = measured["runs"]
    summary = {name: value for name, value in measured.items() if name != "runs"}
    for measure in (*MEASURES, *(name for name in WAITS if name in runs[0])):
        summary[measure] = _spread([run[measure] for run in runs])
    for kind in TIMES:
        if kind in runs[0]:
            summary[kind] = {part: _spread([run[kind][part] for run in runs]) for part in runs[0][kind]}
    return summary


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    native = report["native"]
    rows = sorted({(one["item_bytes"], one["method"]) for one in native})
    columns: list[tuple[str, Any]] = [
        ("million items a second", lambda one: _scaled(one["items_per_s"], 1e6)),
        ("processor ns an item", lambda one: _scaled(one["cpu_ns_per_item"], 1)),
        ("median item transfer, ns", lambda one: _scaled(one["transfer"]["median_ns"], 1)),
    ]
    figure, grid = pyplot.subplots(len(rows), len(columns), figsize=(18, 4.2 * len(rows)), squeeze=False)
    for row, (size, method) in zip(grid, rows, strict=True):
        chosen = [one for one in native if (one["item_bytes"], one["method"]) == (size, method)]
        for axes, (label, value) in zip(row, columns, strict=True):
            for queue in dict.fromkeys(one["queue"] for one in chosen):
                points = sorted((one["threads"], *value(one)) for one in chosen if one["queue"] == queue)
                threads, medians, below, above = zip(*points, strict=True)
                ours = queue.startswith("RCQ")
                axes.errorbar(
                    threads, medians, yerr=(below, above), label=queue, capsize=2,
                    linewidth=2.2 if ours else 1, linestyle="-" if ours else "--", marker="o", markersize=3,
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("threads")
            axes.set_title(f"{size} bytes, {method}: {label}")
        row[0].legend(fontsize=7)
    load = report["load_average"]["before"][0]
    figure.suptitle(f"medians with smallest and largest; load average at the beginning {load:.1f}")
    figure.tight_layout()
    figure.savefig(path, dpi=60)


def _scaled(spread: dict[str, float], by: float) -> tuple[float, float, float]:
    median = spread["median"]
    return median / by, (median - spread["min"]) / by, (spread["max"] - median) / by


if __name__ == "__main__":
    main()
