"""`make bench-path`: files through shared memory beside the same through the kernel, in one run.

Single calls (one thread and two), whole programs, how many calls of theirs still reach the kernel, and small
files that another program or container has read before. Sides: the client of a channel,
unmodified programs with the preload library (asked for, or auto: by itself), our
FUSE door, kernel overlayfs, fuse-overlayfs and ext4 itself, all on one ext4 filesystem in memory. Rounds
alternate the sides and rotate their order; figures are medians. Needs root; works in namespaces of its own
and leaves nothing behind.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.common.host import ext4_in_memory
from benchmarks.common.report import Report
from benchmarks.path import places, programs, sharing, starts
from benchmarks.path.places import FUSE, OVERLAY, PRELOADED, Keeper, Place

REPOSITORY = Path(__file__).resolve().parents[2]
PROBE = REPOSITORY / "target" / "release" / "polytropo-path-probe"
PARTS = ("calls", "programs", "starts", "kernel", "sharing")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-path", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--time-ms", type=int, default=60, help="for each call of each round")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "path")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("bench-path: needs root, to mount")
    if not PROBE.exists():
        sys.exit(f"bench-path: {PROBE} is missing; run it as `make bench-path`, which builds it")
    if os.environ.get("BENCH_ISOLATED") != "1":
        os.environ["BENCH_ISOLATED"] = "1"
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable]
        os.execvp("unshare", [*words, "-m", "benchmarks.path", *sys.argv[1:]])
    scratch = ext4_in_memory(places.DISK_BYTES)
    keeper = Keeper(scratch / "run")
    parts = arguments.only or PARTS
    if "calls" in parts:
        report = Report("Calls through shared memory", ours=PRELOADED)
        _measure_calls(report, places.places_for_calls(scratch, keeper), arguments)
        _finish(report, arguments.out, "calls")
    if "programs" in parts or "kernel" in parts:
        lower = programs.fill(scratch / "lower")
        sides = places.places_for_programs(scratch, keeper, lower)
    if "programs" in parts:
        report = Report("Whole programs through shared memory", ours=PRELOADED)
        programs.measure(report, sides, arguments.rounds)
        _finish(report, arguments.out, "programs")
    if "starts" in parts:
        report = Report("Programs that live on the mount", ours=PRELOADED)
        starts.measure(report, scratch, keeper, arguments.rounds)
        _finish(report, arguments.out, "starts")
    if "kernel" in parts:
        report = Report("Storage calls that reach the kernel", ours=PRELOADED)
        programs.count_calls(report, [side for side in sides if side.side in (PRELOADED, FUSE, OVERLAY)])
        report.notes.append("Calls that name files of the mount, counted by strace.")
        _finish(report, arguments.out, "kernel")
    if "sharing" in parts:
        report = Report("Small files that others read before", ours=PRELOADED)
        sharing.measure(report, scratch, keeper, sharing.fill(scratch / "shared"), arguments.rounds)
        _finish(report, arguments.out, "sharing")


def _measure_calls(report: Report, sides: list[Place], arguments: argparse.Namespace) -> None:
    for number in range(arguments.rounds):
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            words = [str(PROBE), f"--time-ms={arguments.time_ms}", str(side.directory)]
            words += [f"--socket={side.socket}"] if side.socket else []
            words += ["--write"] if side.writable else []
            done = subprocess.run(
                words,
                check=True,
                stdout=subprocess.PIPE,
                env={**os.environ, **side.variables},
                timeout=places.TIMEOUT_S,
            )
            for metric, value in json.loads(done.stdout).items():
                report.add(metric, side.side, value)


def _finish(report: Report, directory: Path, name: str) -> None:
    report.notes.append("Everything lies on an ext4 filesystem on a loop device in memory.")
    report.write(directory, name)
    print(
        f"\n{report.title}\n\n{report.table()}\n\nwritten: {directory}/{name}.json and {name}.png", flush=True
    )


main()
