"""The OCI runtime specification of a container: what Docker gives a program, and our mounts."""

import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from polytropo.containers.rootless import maps_group
from polytropo.containers.seccomp import default_filter
from polytropo.containers.users import User

# Docker's default set.
CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
_MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READ_ONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_NOFILE_WANTED = _NPROC_WANTED = 1 << 20
_SHM_BYTES = 64 << 20
_TTY_GROUP = 5
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Bind(msgspec.Struct, frozen=True):
    """A file or directory of the host shown at `destination`."""

    source: Path
    destination: str
    read_only: bool = False


class Process(msgspec.Struct, frozen=True):
    """A program to be run in a container."""

    args: Sequence[str]
    environment: Mapping[str, str]
    cwd: str
    user: User
    terminal: bool = False
    size: tuple[int, int] | None = None
    """Rows and columns of the terminal."""


class Machine(msgspec.Struct, frozen=True):
    """What surrounds the program."""

    rootfs: Path
    hostname: str
    own_network: bool
    read_only: bool
    binds: Sequence[Bind]
    cgroup_path: str | None
    unified_cgroups: bool
    rootless: bool = False


def process_section(process: Process) -> dict[str, Any]:
    """The `process` part, which is also what the runtime's exec takes."""
    bounding = list(CAPABILITIES)
    # An ordinary user starts with none; it may gain them from the files it executes.
    held = bounding if process.user.uid == 0 else []
    section: dict[str, Any] = {
        "terminal": process.terminal,
        "user": {
            "uid": process.user.uid,
            "gid": process.user.gid,
            "additionalGids": list(process.user.groups),
        },
        "args": list(process.args),
        "env": [f"{name}={value}" for name, value in process.environment.items()],
        "cwd": process.cwd,
        "capabilities": {"bounding": bounding, "effective": held, "permitted": held, "inheritable": []},
        "rlimits": _rlimits(),
        "noNewPrivileges": False,
    }
    if process.size is not None:
        section["consoleSize"] = {"height": process.size[0], "width": process.size[1]}
    return section


def runtime_spec(process: Process, machine: Machine) -> dict[str, Any]:
    """The whole of config.json."""
    namespaces = ["pid", "ipc", "uts", "mount"]
    namespaces += ["network"] if machine.own_network else []
    namespaces += ["cgroup"] if machine.unified_cgroups else []
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in namespaces],
        "rootfsPropagation": "private",
        "maskedPaths": list(_MASKED_PATHS),
        "readonlyPaths": list(_READ_ONLY_PATHS),
        "seccomp": default_filter(frozenset(CAPABILITIES)),
    }
    if not machine.rootless:
        linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    if machine.cgroup_path is not None:
        linux["cgroupsPath"] = machine.cgroup_path
    return {
        "ociVersion": "1.0.2",
        "process": process_section(process),
        "root": {"path": str(machine.rootfs), "readonly": machine.read_only},
        "hostname": machine.hostname,
        "mounts": _mounts(machine),
        "linux": linux,
    }


def _mounts(machine: Machine) -> list[dict[str, Any]]:
    closed = ("nosuid", "noexec", "nodev")
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    # A terminal belongs to the group tty, where there is one.
    terminals += [f"gid={_TTY_GROUP}"] if maps_group(_TTY_GROUP) else []
    mounts = [
        _mount("/proc", "proc", "proc", *closed),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", *terminals),
        _mount("/dev/mqueue", "mqueue", "mqueue", *closed),
        _mount("/dev/shm", "tmpfs", "shm", *closed, "mode=1777", f"size={_SHM_BYTES}"),
    ]
    if machine.rootless:
        # Only the owner of a network may mount its sysfs; the host's comes with its control groups.
        mounts.append(_mount("/sys", "none", "/sys", "rbind", *closed, "ro"))
    else:
        mounts.append(_mount("/sys", "sysfs", "sysfs", *closed, "ro"))
        mounts.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", *closed, "relatime", "ro"))
    if machine.read_only:
        # Programs expect to write there, also where all else is read-only.
        for path, mode in (("/run", "755"), ("/tmp", "1777"), ("/var/tmp", "1777")):
            mounts.append(_mount(path, "tmpfs", "tmpfs", "nosuid", "nodev", f"mode={mode}", "tmpcopyup"))
    # A mount on a directory hides what was mounted below it before.
    for bind in sorted(machine.binds, key=lambda bind: bind.destination.count("/")):
        access = "ro" if bind.read_only else "rw"
        mounts.append(
            _mount(bind.destination, "bind", str(bind.source), "rbind", "rprivate", "nosuid", "nodev", access)
        )
    taken = {bind.destination for bind in machine.binds}
    return [m for m in mounts if m["type"] == "bind" or m["destination"] not in taken]


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def _rlimits() -> list[dict[str, Any]]:
    limits = []
    for name, wanted in (("RLIMIT_NOFILE", _NOFILE_WANTED), ("RLIMIT_NPROC", _NPROC_WANTED)):
        _, hard = resource.getrlimit(getattr(resource, name))
        # More than the hard limit may be refused even to root.
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        limits.append({"type": name, "soft": value, "hard": value})
    return limits


def terminal_environment(
    environment: Mapping[str, str], user: User, hostname: str, terminal: bool
) -> dict[str, str]:
    """`environment` with what every program may expect in it."""
    complete = {"PATH": DEFAULT_PATH, "container": "polytropo", "HOSTNAME": hostname}
    if terminal:
        complete["TERM"] = os.environ.get("TERM") or "xterm"
    complete |= environment
    complete.setdefault("HOME", user.home)
    return complete
