"""Copies as they are felt: reads, writes and a file copied through shared memory, and files of an image read
by an unmodified program, with each way to copy.

Each way has a service of its own on one ext4 filesystem in memory, and memcpy(3) has two: services differ by
where their memory lies, so all are started anew several times, and how far the two are from each other is
what the measurement errs by. Rounds alternate them in an order that is drawn. Needs root; works in namespaces
of its own.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.host import ext4_in_memory
from benchmarks.path.places import DISK_BYTES, TIMEOUT_S, Keeper

REPOSITORY = Path(__file__).resolve().parents[2]
PROBE = REPOSITORY / "target" / "release" / "polytropo-path-probe"
AGAIN = "libc-again"
ENGINES = {"tuned": "tuned", "libc": "libc", AGAIN: "libc", "kernel": "kernel"}
"""By name, what the service is told to copy by."""
ROUNDS_A_START = 3
LARGE_BYTES = 64 << 20
READ = "cat of 512 MiB, preloaded"
READ_TIMES = 8

Samples = dict[str, dict[str, list[float]]]


def measure(tuning_dir: Path, rounds: int, time_ms: int) -> Samples:
    """Nanoseconds by figure and engine, a value each round. Raises SystemExit where it cannot be measured."""
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable]
    words += ["-m", "benchmarks.copy.system", f"--tuning-dir={tuning_dir}"]
    words += [f"--rounds={rounds}", f"--time-ms={time_ms}"]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False, timeout=1800)
    if done.returncode != 0:
        sys.exit("bench-copy: the private path could not be measured")
    samples: Samples = json.loads(done.stdout)
    return samples


def why_not() -> str | None:
    """Why the private path cannot be measured here."""
    if os.geteuid() != 0:
        return "mounting needs root"
    return None if PROBE.exists() else f"{PROBE} is missing; `make build` makes it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tuning-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--time-ms", type=int, required=True)
    arguments = parser.parse_args()
    scratch = ext4_in_memory(DISK_BYTES)
    samples: Samples = {}
    dice = random.Random(1)
    for begin in range(0, arguments.rounds, ROUNDS_A_START):
        place = scratch / f"start-{begin}"
        place.mkdir()
        places = {
            engine: _Place(place, engine, arguments.tuning_dir)
            for engine in dice.sample(list(ENGINES), len(ENGINES))
        }
        for _ in range(min(ROUNDS_A_START, arguments.rounds - begin)):
            for engine in dice.sample(list(ENGINES), len(ENGINES)):
                for figure, value in places[engine].run(arguments.time_ms).items():
                    samples.setdefault(figure, {}).setdefault(engine, []).append(value)
        for each in places.values():
            each.close()
        shutil.rmtree(place)
    print(json.dumps(samples))


class _Place:
    """One engine's service with a mount."""

    def __init__(self, scratch: Path, engine: str, tuning_dir: Path) -> None:
        directory = scratch / engine
        directory.mkdir()
        (directory / "large").write_bytes(random.Random(1).randbytes(1 << 20) * (LARGE_BYTES >> 20))
        options = (f"--copy-engine={ENGINES[engine]}", f"--tuning-dir={tuning_dir}", "--channel-writes")
        self.keeper = Keeper(scratch / f"run-{engine}", *options)
        root: dict[str, object] = {"kind": "dir", "path": str(directory), "coherence": "exclusive"}
        self.at = self.keeper.mount(root, scratch / f"at-{engine}")
        layer: dict[str, object] = {"kind": "dir", "path": str(directory), "coherence": "immutable"}
        self.layer = self.keeper.mount({**layer, "read_only": True}, scratch / f"layer-{engine}")
        self.variables = self.keeper.variables(self.layer)

    def close(self) -> None:
        """Ends the service and what it mounted."""
        for at in (self.layer, self.at):
            subprocess.run(["umount", "--lazy", at], check=True, timeout=TIMEOUT_S)
        self.keeper.process.terminate()
        self.keeper.process.wait(timeout=TIMEOUT_S)

    def run(self, time_ms: int) -> dict[str, float]:
        words = [str(PROBE), str(self.at), f"--socket={self.keeper.gate}", "--throughput"]
        told = subprocess.run(
            [*words, f"--time-ms={time_ms}"], stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_S
        )
        figures: dict[str, float] = json.loads(told.stdout)
        figures[READ] = self._read()
        return figures

    def _read(self) -> float:
        started_ns = time.monotonic_ns()
        subprocess.run(
            ["cat", *[str(self.layer / "large")] * READ_TIMES],
            env={**os.environ, **self.variables},
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=TIMEOUT_S,
        )
        return float(time.monotonic_ns() - started_ns)


if __name__ == "__main__":
    main()
