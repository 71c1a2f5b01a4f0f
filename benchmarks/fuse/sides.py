"""The sides of the comparison: each mounts the same lower directories under an upper of its own."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from polytropo import service
from polytropo.compose import Dir, Stack, Union
from polytropo.state import State

OURS = "polytropo"
TIMEOUT_S = 600


class Side(Protocol):
    name: str

    def mount(self, lowers: list[Path], upper: Path, at: Path) -> None:
        """Mounts the union of `lowers` (topmost first) and `upper` at `at`."""

    def unmount(self, at: Path) -> None: ...

    def processes(self) -> list[int]:
        """The processes that serve the mount."""


def command(*words: str | Path, timeout_s: float = TIMEOUT_S) -> str:
    """Runs a program and returns what it printed; its failure ends the benchmark with all that it said."""
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


class KernelOverlay:
    name = "overlayfs"

    def mount(self, lowers: list[Path], upper: Path, at: Path) -> None:
        work = upper.with_name(upper.name + ".work")
        work.mkdir()
        command("mount", "-t", "overlay", "overlay", "-o", _options(lowers, upper, work), at)

    def unmount(self, at: Path) -> None:
        command("umount", at)

    def processes(self) -> list[int]:
        return []


class FuseOverlayfs:
    name = "fuse-overlayfs"

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def mount(self, lowers: list[Path], upper: Path, at: Path) -> None:
        work = upper.with_name(upper.name + ".work")
        work.mkdir()
        words = ["fuse-overlayfs", "-f", "-o", _options(lowers, upper, work), str(at)]
        self._process = subprocess.Popen(words)
        _wait_for_mount(at)

    def unmount(self, at: Path) -> None:
        command("umount", at)
        if self._process is not None:
            self._process.wait(TIMEOUT_S)
            self._process = None

    def processes(self) -> list[int]:
        return [] if self._process is None else [self._process.pid]


class Polytropo:
    name = OURS

    def __init__(self, state: State) -> None:
        self._state = state

    def mount(self, lowers: list[Path], upper: Path, at: Path) -> None:
        layers = [Dir(lower, read_only=True, coherence="immutable") for lower in lowers]
        stack = Stack(Union(layers, upper=Dir(upper, coherence="exclusive")))
        service.mount(self._state, None, stack, at)

    def unmount(self, at: Path) -> None:
        service.unmount(self._state, at)

    def processes(self) -> list[int]:
        client = service.reach(self._state, "default")
        if client is None:
            return []
        with client:
            status = client.status()
        return [status["keeper_pid"], status["worker_pid"]]


@contextmanager
def mounted(side: Side, lowers: list[Path], scratch: Path, upper: Path | None = None) -> Iterator[Path]:
    """A fresh mount (with a fresh upper unless one is given), gone at the end."""
    at = scratch / "at"
    fresh = scratch / "upper"
    for directory in (at, fresh):
        directory.mkdir()
    # What was done before must not be written out at this side's expense.
    command("sync")
    side.mount(lowers, upper or fresh, at)
    try:
        yield at
    finally:
        side.unmount(at)
        for directory in (fresh, fresh.with_name("upper.work")):
            shutil.rmtree(directory, ignore_errors=True)
        at.rmdir()


def resident_bytes(processes: list[int]) -> int:
    """The processes' share of memory (Pss: shared pages counted by the part that is theirs)."""
    total = 0
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total


def drop_caches() -> None:
    command("sync")
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def _options(lowers: list[Path], upper: Path, work: Path) -> str:
    return f"lowerdir={':'.join(map(str, lowers))},upperdir={upper},workdir={work}"


def _wait_for_mount(at: Path) -> None:
    deadline = time.monotonic() + 10
    while not at.is_mount():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing was mounted at {at} after 10 s")
        time.sleep(0.01)
