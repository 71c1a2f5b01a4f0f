"""Samples of several sides, taken in one run: medians, ratios, JSON, a table and a plot."""

import json
import os
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

SCHEMA = 1


class Report:
    """What one benchmark run measured. Every figure is a time (or a size): smaller is better."""

    def __init__(self, title: str, *, ours: str) -> None:
        self.title = title
        self.ours = ours
        self.units: dict[str, str] = {}
        self.samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.notes: list[str] = []
        self.started_unix_s = time.time()

    def add(self, metric: str, side: str, value: float, unit: str = "ns") -> None:
        self.units[metric] = unit
        self.samples[metric][side].append(value)

    def note_once(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def median(self, metric: str, side: str) -> float | None:
        found = self.samples[metric].get(side)
        return statistics.median(found) if found else None

    def ratio(self, metric: str, peer: str) -> float | None:
        """Our median by the peer's: below 1 we are ahead."""
        ours, theirs = self.median(metric, self.ours), self.median(metric, peer)
        return ours / theirs if ours is not None and theirs else None

    def peers(self) -> list[str]:
        found = dict.fromkeys(side for sides in self.samples.values() for side in sides)
        return [side for side in found if side != self.ours]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "title": self.title,
            "machine": machine(),
            "started_unix_s": self.started_unix_s,
            "elapsed_s": time.time() - self.started_unix_s,
            "notes": self.notes,
            "metrics": {
                metric: {
                    "unit": self.units[metric],
                    "sides": {
                        side: {
                            "median": statistics.median(values),
                            "min": min(values),
                            "max": max(values),
                            "samples": values,
                        }
                        for side, values in sides.items()
                    },
                    "ours_by_peer": {p: r for p in self.peers() if (r := self.ratio(metric, p)) is not None},
                }
                for metric, sides in self.samples.items()
            },
        }

    def table(self) -> str:
        """Markdown, as it stands in the README."""
        peers = self.peers()
        header = ["", self.ours, *peers, *(f"{self.ours} / {peer}" for peer in peers)]
        lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for metric in self.samples:
            unit = self.units[metric]
            figures = [_shown(self.median(metric, side), unit) for side in (self.ours, *peers)]
            ratios = ["" if (r := self.ratio(metric, p)) is None else f"{r:.2f}" for p in peers]
            lines.append("| " + " | ".join([metric, *figures, *ratios]) + " |")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def write(self, directory: Path, name: str) -> None:
        """Writes NAME.json and NAME.png."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.json").write_text(json.dumps(self.to_json(), indent=1) + "\n")
        self._plot(directory / f"{name}.png")

    def _plot(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        metrics = [m for m in self.samples if any(self.ratio(m, p) for p in self.peers())]
        peers = self.peers()
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.16 * len(metrics) * (len(peers) + 1)))
        height = 0.8 / max(1, len(peers))
        for i, peer in enumerate(peers):
            rows = [(y, r) for y, m in enumerate(metrics) if (r := self.ratio(m, peer)) is not None]
            axes.barh([y + i * height for y, _ in rows], [1 / r for _, r in rows], height, label=f"vs {peer}")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yticks([y + 0.4 - height / 2 for y in range(len(metrics))], metrics, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"times as fast as the peer (right of 1: {self.ours} is ahead)")
        axes.set_title(self.title)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=110)


def machine() -> dict[str, Any]:
    """What a reader needs to know of the machine to place the figures."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "kernel": platform.release(),
        "processor": names[0] if names else platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average_1min": os.getloadavg()[0],
    }


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "count":
        return f"{value:.0f}"
    if unit == "bytes":
        return f"{value / (1 << 20):.1f} MiB"
    for size, name in ((1e9, "s"), (1e6, "ms"), (1e3, "us")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} ns"
