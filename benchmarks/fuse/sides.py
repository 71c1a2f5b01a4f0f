"""The sides of the comparison: each mounts the same lower directories under an upper of its own."""

import fcntl
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from benchmarks.common.host import TIMEOUT_S, command, in_group
from polytropo import service
from polytropo.cgroups import Group
from polytropo.compose import Dir, Stack, Union
from polytropo.state import State
from polytropo.tenants import tenant_group

OURS = "polytropo"
TENANT = "bench"
RINGS_SWITCH = Path("/sys/module/fuse/parameters/enable_uring")
# Tests that turn the switch hold it, too.
RINGS_LOCK = Path("/tmp/polytropo-enable-uring.lock")


class Side(Protocol):
    name: str

    def mount(self, lowers: list[Path], upper: Path | None, at: Path) -> None:
        """Mounts the union of `lowers` (topmost first) and `upper` at `at`; without one, for reading only."""

    def unmount(self, at: Path) -> None: ...

    def processes(self) -> list[int]:
        """The processes that serve the mount."""


class KernelOverlay:
    name = "overlayfs"

    def mount(self, lowers: list[Path], upper: Path | None, at: Path) -> None:
        command("mount", "-t", "overlay", "overlay", "-o", _options(lowers, upper), at)

    def unmount(self, at: Path) -> None:
        command("umount", at)

    def processes(self) -> list[int]:
        return []


class FuseOverlayfs:
    name = "fuse-overlayfs"

    def __init__(self, group: Group | None = None) -> None:
        self._group = group
        self._processes: dict[Path, subprocess.Popen[bytes]] = {}

    def mount(self, lowers: list[Path], upper: Path | None, at: Path) -> None:
        words = ["fuse-overlayfs", "-f", "-o", _options(lowers, upper), str(at)]
        if self._group is not None:
            words = in_group(self._group, *words)
        self._processes[at] = subprocess.Popen(words)
        _wait_for_mount(at)

    def unmount(self, at: Path) -> None:
        command("umount", at)
        self._processes.pop(at).wait(TIMEOUT_S)

    def processes(self) -> list[int]:
        return [process.pid for process in self._processes.values()]


class Polytropo:
    name = OURS

    def __init__(
        self,
        state: State,
        passthrough: bool | None = None,
        tenant: str | None = None,
        write_back: bool | None = None,
    ) -> None:
        self._state = state
        self._passthrough = passthrough
        self._tenant = tenant
        self._write_back = write_back

    def with_passthrough(self, passthrough: bool) -> "Polytropo":
        return Polytropo(self._state, passthrough, self._tenant, self._write_back)

    def with_write_back(self) -> "Polytropo":
        return Polytropo(self._state, self._passthrough, self._tenant, True)

    @contextmanager
    def over_rings(self) -> Iterator["Polytropo | None"]:
        """The same by FUSE over io_uring, in a service of its own; None where the kernel has none."""
        with _rings_switched_on() as offered:
            if not offered:
                yield None
                return
            with self.in_tenant() as (rings, _):
                yield rings

    @contextmanager
    def in_tenant(self, *limits: str) -> Iterator[tuple["Polytropo", Group]]:
        """The same in a tenant of its own, and that tenant's group."""
        tool = Path(sys.executable).parent / "polytropo"
        command(tool, "tenant", "create", TENANT, *limits)
        try:
            yield Polytropo(self._state, self._passthrough, TENANT), tenant_group(self._state, TENANT)
        finally:
            command(tool, "tenant", "rm", "--force", TENANT)

    def mount(self, lowers: list[Path], upper: Path | None, at: Path) -> None:
        layers = [Dir(lower, read_only=True, coherence="immutable") for lower in lowers]
        writable = None if upper is None else Dir(upper, coherence="exclusive")
        stack = Stack(Union(layers, upper=writable), self._passthrough, write_back=self._write_back)
        service.mount(self._state, self._tenant, stack, at)

    def unmount(self, at: Path) -> None:
        service.unmount(self._state, at)

    def processes(self) -> list[int]:
        client = service.reach(self._state, self._tenant or "default")
        if client is None:
            return []
        with client:
            status = client.status()
        return [status["keeper_pid"], status["worker_pid"]]


@contextmanager
def _rings_switched_on() -> Iterator[bool]:
    """Switches FUSE over io_uring on for new mounts of the whole machine, then back to what it was."""
    with RINGS_LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            before = RINGS_SWITCH.read_text()
            RINGS_SWITCH.write_text("Y")
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            RINGS_SWITCH.write_text(before)


@contextmanager
def mounted(side: Side, lowers: list[Path], scratch: Path, name: str = "at") -> Iterator[Path]:
    """A mount with a fresh upper, gone at the end."""
    at = scratch / name
    fresh = scratch / f"{name}.upper"
    for directory in (at, fresh):
        directory.mkdir()
    # What was done before must not be written out at this side's expense.
    command("sync")
    side.mount(lowers, fresh, at)
    try:
        yield at
    finally:
        side.unmount(at)
        for directory in (fresh, fresh.with_name(f"{name}.upper.work")):
            shutil.rmtree(directory, ignore_errors=True)
        at.rmdir()


@contextmanager
def mounted_read_only(side: Side, lowers: list[Path], scratch: Path, name: str) -> Iterator[Path]:
    """A mount that nobody can write to, gone at the end."""
    at = scratch / name
    at.mkdir()
    side.mount(lowers, None, at)
    try:
        yield at
    finally:
        side.unmount(at)
        at.rmdir()


def resident_bytes(processes: list[int]) -> int:
    """The processes' share of memory (Pss: shared pages counted by the part that is theirs)."""
    total = 0
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total


def page_cache_bytes() -> int:
    """What the machine holds of files in memory, other programs' included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) << 10
    raise SystemExit("/proc/meminfo does not tell what is cached")


def drop_caches() -> None:
    command("sync")
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def _options(lowers: list[Path], upper: Path | None) -> str:
    lowerdir = f"lowerdir={':'.join(map(str, lowers))}"
    if upper is None:
        return lowerdir
    work = upper.with_name(upper.name + ".work")
    work.mkdir()
    return f"{lowerdir},upperdir={upper},workdir={work}"


def _wait_for_mount(at: Path) -> None:
    deadline = time.monotonic() + 10
    while not at.is_mount():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing was mounted at {at} after 10 s")
        time.sleep(0.01)
