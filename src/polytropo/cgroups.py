"""Control groups of tenants, version 1 and 2 and the two side by side.

A tenant's group is `polytropo/<tenant>` under the root of each controller; its service lies in the leaf
`service`, each of its containers in a leaf of its own, so that one limit holds them together.
"""

import errno
import os
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from polytropo.errors import PolytropoError

WANTED = ("cpu", "cpuset", "memory", "pids")
_COUNTED_V1 = "cpuacct"  # version 2 counts processor time in every group
_V2_MAGIC = "cgroup2"
# What was killed gives its memory back first: 240 MiB took over 5 s where ten processes wanted each CPU.
_END_WAIT_S = 30.0
_POLL_S = 0.02


class Limits(NamedTuple):
    """What a tenant may use; None is no limit. `cpus` is a list as the kernel writes it ("0-1")."""

    cpus: str | None = None
    memory_bytes: int | None = None
    pids_max: int | None = None


class Hierarchies(NamedTuple):
    """Where this host mounts its control groups."""

    v1: Mapping[str, Path] = MappingProxyType({})
    """Mount point of each wanted controller of version 1."""
    v2: Path | None = None
    v2_controllers: frozenset[str] = frozenset()
    others: tuple[Path, ...] = ()
    """Mount points without a wanted controller; container runtimes make groups there too."""

    @classmethod
    def find(cls, mountinfo: str | None = None) -> "Hierarchies":
        """Reads the mount table of this process (`mountinfo` is its text)."""
        v1: dict[str, Path] = {}
        v2: Path | None = None
        others: dict[Path, None] = {}
        text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
        for line in text.splitlines():
            before, _, after = line.partition(" - ")
            mountpoint = Path(before.split()[4])
            kind, _, options = after.split(" ", 2)
            if kind == "cgroup":
                for name in set(options.split(" ")[-1].split(",")) & {*WANTED, _COUNTED_V1}:
                    v1.setdefault(name, mountpoint)
                others[mountpoint] = None
            elif kind == _V2_MAGIC and v2 is None:
                v2 = mountpoint
        controllers: frozenset[str] = frozenset()
        if v2 is not None:
            with suppress(OSError):
                controllers = frozenset((v2 / "cgroup.controllers").read_text().split())
        wanted = controllers & frozenset(WANTED) - v1.keys()
        if v2 is not None and not wanted:
            others[v2] = None
        return cls(v1, v2, wanted, tuple(root for root in others if root not in v1.values()))

    @property
    def controllers(self) -> frozenset[str]:
        """The wanted controllers that exist at all."""
        return (frozenset(self.v1) | self.v2_controllers) & frozenset(WANTED)

    @property
    def description(self) -> str:
        """How the host is set up: "version 1", "version 2", "version 1 and 2" or "none"."""
        versions = [name for name, there in (("1", self.v1), ("2", self.v2_controllers)) if there]
        return f"version {' and '.join(versions)}" if versions else "none"

    def roots(self) -> list[Path]:
        """The mount points that hold wanted controllers, each once."""
        roots = list(dict.fromkeys(self.v1.values()))
        if self.v2 is not None and self.v2_controllers:
            roots.append(self.v2)
        return roots


class Group:
    """One control group by its `path` under every controller's root ("polytropo/shop")."""

    def __init__(self, path: str, hierarchies: Hierarchies | None = None) -> None:
        self.path = path
        self.hierarchies = hierarchies or Hierarchies.find()

    def child(self, name: str) -> "Group":
        return Group(f"{self.path}/{name}", self.hierarchies)

    def directories(self) -> list[Path]:
        return [root / self.path for root in self.hierarchies.roots()]

    def exists(self) -> bool:
        return any(directory.is_dir() for directory in self.directories())

    def create(self, limits: Limits | None = None) -> None:
        """Makes the group and its parents, ready to take processes, and sets `limits`.

        Raises OSError (PermissionError where this user may not), PolytropoError for a refused limit.
        """
        for root in self.hierarchies.roots():
            if root == self.hierarchies.v2:
                _make_v2(root, self.path, self.hierarchies.v2_controllers)
            else:
                _make_v1(root, self.path)
        if limits is not None:
            self._set_limits(limits)

    def procs_files(self) -> list[Path]:
        """The files that take a process id to move it here; "0" is the writer."""
        return [directory / "cgroup.procs" for directory in self.directories()]

    def pids(self) -> set[int]:
        """The processes in the group and below it."""
        found: set[int] = set()
        for directory in self.directories():
            # Unlike Path.rglob it passes over groups that go meanwhile.
            for place, _, _ in os.walk(directory):
                with suppress(OSError):
                    found.update(int(pid) for pid in Path(place, "cgroup.procs").read_text().split())
        return found - {0}

    def memory_bytes(self) -> int | None:
        """What the group uses now; None where it is not counted."""
        if (root := self.hierarchies.v1.get("memory")) is not None:
            return _read_int(root / self.path / "memory.usage_in_bytes")
        if self.hierarchies.v2 is not None:
            return _read_int(self.hierarchies.v2 / self.path / "memory.current")
        return None

    def cpu_time_ns(self) -> int | None:
        """The processor time that the group has used; None where it is not counted."""
        if (root := self.hierarchies.v1.get(_COUNTED_V1)) is not None:
            return _read_int(root / self.path / "cpuacct.usage")
        if self.hierarchies.v2 is not None:
            with suppress(OSError, ValueError):
                for line in (self.hierarchies.v2 / self.path / "cpu.stat").read_text().splitlines():
                    name, _, value = line.partition(" ")
                    if name == "usage_usec":
                        return int(value) * 1000
        return None

    def kill(self) -> None:
        """Ends all processes of the group at once and waits for them to go, a bounded time."""
        deadline = time.monotonic() + _END_WAIT_S
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise PolytropoError(
                    f"processes {', '.join(map(str, sorted(pids)))} of the group {self.path} do not end;"
                    " they hang in the kernel, look into dmesg"
                )
            time.sleep(_POLL_S)

    def remove(self, *, wait_s: float = _END_WAIT_S) -> None:
        """Removes the group and those below it; waits `wait_s` for processes that are about to end.

        Raises PolytropoError if some stay.
        """
        deadline = time.monotonic() + wait_s
        for directory in self._everywhere():
            while not _remove_tree(directory):
                if time.monotonic() > deadline:
                    raise PolytropoError(
                        f"the control group {directory} still holds processes"
                        f" {', '.join(map(str, sorted(self.pids())))}; end them and try again"
                    )
                time.sleep(_POLL_S)

    def remove_if_empty(self) -> None:
        """Removes the group where it holds neither processes nor groups."""
        for directory in self._everywhere():
            with suppress(OSError):
                directory.rmdir()

    def _everywhere(self) -> list[Path]:
        return [root / self.path for root in (*self.hierarchies.roots(), *self.hierarchies.others)]

    def _set_limits(self, limits: Limits) -> None:
        cpus, memory = limits.cpus, limits.memory_bytes
        where, v2 = self._places(), self.hierarchies.v2
        if cpus is not None and (directory := where.get("cpuset")):
            _write(directory / "cpuset.cpus", cpus)
        elif cpus is not None and (directory := where.get("cpu")):
            _limit_cpu_time(directory, cpus, v2=v2 is not None and directory.is_relative_to(v2))
        if directory := where.get("memory"):
            unified = v2 is not None and directory.is_relative_to(v2)
            name, unlimited = ("memory.max", "max") if unified else ("memory.limit_in_bytes", "-1")
            _write(directory / name, unlimited if memory is None else str(memory))
        if directory := where.get("pids"):
            _write(directory / "pids.max", "max" if limits.pids_max is None else str(limits.pids_max))

    def _places(self) -> dict[str, Path]:
        places = {name: root / self.path for name, root in self.hierarchies.v1.items()}
        if self.hierarchies.v2 is not None:
            places |= {name: self.hierarchies.v2 / self.path for name in self.hierarchies.v2_controllers}
        return places


def empty_groups(parent: str, hierarchies: Hierarchies | None = None) -> list[Group]:
    """The groups right below `parent` that hold no process."""
    hierarchies = hierarchies or Hierarchies.find()
    names: set[str] = set()
    for root in hierarchies.roots():
        with suppress(FileNotFoundError, NotADirectoryError):
            names.update(entry.name for entry in (root / parent).iterdir() if entry.is_dir())
    groups = [Group(f"{parent}/{name}", hierarchies) for name in sorted(names)]
    return [group for group in groups if not group.pids()]


def _make_v1(root: Path, path: str) -> None:
    directory = root
    for part in path.split("/"):
        parent, directory = directory, directory / part
        if (parent / "memory.use_hierarchy").exists() and _read_int(parent / "memory.use_hierarchy") == 0:
            with suppress(OSError):  # the root's can be fixed at 0; our own is set below
                _write(parent / "memory.use_hierarchy", "1")
        directory.mkdir(mode=0o755, exist_ok=True)
        for name in ("cpuset.mems", "cpuset.cpus"):
            # A new cpuset is empty, and an empty one takes no process.
            if (directory / name).exists() and not (directory / name).read_text().strip():
                _write(directory / name, (parent / name).read_text().strip())


def _make_v2(root: Path, path: str, controllers: Iterable[str]) -> None:
    directory = root
    for part in path.split("/"):
        for name in sorted(controllers):
            if name not in (directory / "cgroup.subtree_control").read_text().split():
                _write(directory / "cgroup.subtree_control", f"+{name}")
        directory = directory / part
        directory.mkdir(mode=0o755, exist_ok=True)


def _limit_cpu_time(directory: Path, cpus: str, *, v2: bool) -> None:
    # Without cpusets the number of CPUs can still be held, only not which ones.
    from polytropo.units import parse_cpus

    period_us = 100_000
    quota_us = len(parse_cpus(cpus)) * period_us
    if v2:
        _write(directory / "cpu.max", f"{quota_us} {period_us}")
    else:
        _write(directory / "cpu.cfs_period_us", str(period_us))
        _write(directory / "cpu.cfs_quota_us", str(quota_us))


def _write(path: Path, value: str) -> None:
    try:
        # One write(2): the kernel takes the whole value or refuses it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except PermissionError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise PolytropoError(f"the kernel refuses {value} for the file {path}: {reason}") from error


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _remove_tree(directory: Path) -> bool:
    """Removes a group and those below it; False while one of them holds processes."""
    try:
        children = [entry for entry in directory.iterdir() if entry.is_dir()]
    except FileNotFoundError:
        return True
    if not all([_remove_tree(child) for child in children]):
        return False
    try:
        directory.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return True
