"""`make bench-preload`: what the preload library costs where it does nothing, and brings for hot reads.

One program makes the same calls on ext4, through FUSE, and preloaded; the sides alternate. Needs root; works
in a mount namespace of its own and leaves nothing behind.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.common.report import Report
from polytropo.preload import environment_on
from polytropo.state import State

REPOSITORY = Path(__file__).resolve().parents[2]
POLYTROPO = str(Path(sys.executable).parent / "polytropo")
FILE_BYTES = 16 << 20
STARTS = 200
TIMEOUT_S = 120.0
PRELOADED, FUSE, HOST = "preloaded", "FUSE", "host filesystem"
# Reads in sequence are measured 512 at a time.
_BATCHES = {"read 4 KiB in sequence": 512}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-preload", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("bench-preload: needs root, to mount")
    if os.environ.get("BENCH_ISOLATED") != "1":
        os.environ["BENCH_ISOLATED"] = "1"
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable]
        os.execvp("unshare", [*words, "-m", "benchmarks.path.preload", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="bench-preload-", dir=REPOSITORY / "target") as scratch:
        report = _measure(Path(scratch), arguments.rounds)
    report.write(arguments.out, "preload")
    print(report.table())
    print(f"\nwritten: {arguments.out}/preload.json and preload.png")


def _measure(scratch: Path, rounds: int) -> Report:
    os.environ["POLYTROPO_HOME"] = str(scratch / "home")
    data, mountpoint, program = scratch / "data", scratch / "mnt", scratch / "calls"
    data.mkdir()
    mountpoint.mkdir()
    (data / "file").write_bytes(os.urandom(FILE_BYTES))
    source = Path(__file__).with_name("calls.c")
    subprocess.run(["gcc", "-O2", "-o", program, source], check=True, timeout=TIMEOUT_S)
    stack = scratch / "stack.json"
    stack.write_text(f'{{"version":1,"root":{{"kind":"dir","path":"{data}","coherence":"immutable"}}}}')
    report = Report("Preloaded programs, hot reads of an immutable layer", ours=PRELOADED)
    subprocess.run([POLYTROPO, "mount", stack, mountpoint], check=True, timeout=TIMEOUT_S)
    try:
        library = environment_on(State.open(), "default", mountpoint, str(program))
        for _ in range(rounds):
            for side, directory in ((HOST, data), (FUSE, mountpoint), (PRELOADED, mountpoint)):
                environment = library if side == PRELOADED else {}
                for metric, value_ns in _calls(program, directory / "file", environment):
                    report.add(metric, side, value_ns)
                report.add("processor time of `true`", side, _start_ns(environment))
    finally:
        subprocess.run([POLYTROPO, "unmount", mountpoint], check=False, timeout=TIMEOUT_S)
    return report


def _calls(program: Path, file: Path, environment: Mapping[str, str]) -> list[tuple[str, float]]:
    done = subprocess.run(
        [program, file],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    figures = (line.rsplit(" ", 1) for line in done.stdout.splitlines())
    return [(name, float(value) / _BATCHES.get(name, 1)) for name, value in figures]


def _start_ns(environment: Mapping[str, str]) -> float:
    """The mean processor time of many short programs: the clock on the wall tells how busy the machine is."""
    complete = {**os.environ, **environment}
    seconds = 0.0
    for _ in range(STARTS):
        process = os.posix_spawn("/bin/true", ["true"], complete)
        _, _, usage = os.wait4(process, 0)
        seconds += usage.ru_utime + usage.ru_stime
    return seconds / STARTS * 1e9


if __name__ == "__main__":
    main()
