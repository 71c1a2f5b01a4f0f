"""What this host offers, what it lacks, and what to do about it: one finding, one sentence."""

import errno
import os
import pwd
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from polytropo import hostprobe, mounts
from polytropo.cgroups import WANTED, Hierarchies
from polytropo.errors import PolytropoError
from polytropo.host import is_rootless
from polytropo.hostprobe import ProbeError
from polytropo.service import FUSE_DESCRIPTORS, service_binary
from polytropo.state import VERSION, State, default_home, layout_version
from polytropo.tenants import UIDS_PER_TENANT
from polytropo.units import format_size

Level = Literal["good", "lacking", "missing"]

_FUSE_OLDEST = (7, 31)
_NOFILE_WANTED = 16384
_NOFILE_NEEDED = 1024
_FREE_WANTED_BYTES = 2 << 30
_FREE_NEEDED_BYTES = 64 << 20
_PROGRAM_TIMEOUT_S = 20.0


class Finding(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One thing about the host. "missing": something needed is not there; "lacking": works with less."""

    name: str
    level: Level
    sentence: str
    advice: str | None = None


def examine(home: Path | None = None, *, fix: bool = False) -> list[Finding]:
    """Looks at everything; changes nothing unless `fix` clears dead mounts."""
    home = home or default_home()
    found: list[Finding] = []
    for name, check in _CHECKS.items():
        try:
            found += check(name, home, fix)
        except PolytropoError as error:
            found.append(_finding(name, "missing", error.sentence))
        except (OSError, subprocess.TimeoutExpired) as error:
            found.append(_finding(name, "lacking", f"could not be examined: {error}"))
    return found


def _finding(name: str, level: Level, sentence: str, advice: str | None = None) -> Finding:
    return Finding(name=name, level=level, sentence=sentence, advice=advice)


def _service(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    program = service_binary()
    done = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=_PROGRAM_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        yield _finding(
            name, "missing", f"{program} does not run here: {done.stderr.strip()}", "build it on this host"
        )
    else:
        yield _finding(name, "good", f"{program} runs ({done.stdout.strip()})")


def _fuse_device(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    device = Path("/dev/fuse")
    if not device.exists():
        yield _finding(name, "missing", "there is no /dev/fuse", "load the module with `modprobe fuse`")
    elif os.access(device, os.R_OK | os.W_OK):
        yield _finding(name, "good", "/dev/fuse is there and may be opened")
    elif os.environ.get(FUSE_DESCRIPTORS):
        yield _finding(name, "good", f"/dev/fuse comes opened, by {FUSE_DESCRIPTORS}")
    else:
        advice = "as root, run `chmod 0666 /dev/fuse` and make it last with a udev rule"
        yield _finding(name, "missing", "/dev/fuse may not be opened by this user", advice)


def _fuse_kernel(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    try:
        kernel = hostprobe.fuse()
    except ProbeError as error:
        yield _finding(
            name, "lacking", f"FUSE could not be tried: {error}", "see fuse-device and user-namespaces"
        )
        return
    version = f"the kernel speaks FUSE {kernel.major}.{kernel.minor}"
    if (kernel.major, kernel.minor) < _FUSE_OLDEST:
        oldest = ".".join(map(str, _FUSE_OLDEST))
        yield _finding(
            name, "missing", f"{version}, {oldest} is the oldest that works", "use Linux 5.4 or newer"
        )
        return
    yield _finding(name, "good", version)
    yield _passthrough(kernel)
    yield _io_uring(kernel)


def _passthrough(kernel: hostprobe.Fuse) -> Finding:
    name = "fuse-passthrough"
    if kernel.passthrough and not is_rootless():
        return _finding(
            name,
            "good",
            "the kernel can read image files itself (FUSE passthrough), as for `run --read-only`",
        )
    if kernel.passthrough:
        return _finding(
            name, "lacking", "the kernel has FUSE passthrough, but for root only; reads are cached"
        )
    return _finding(
        name,
        "lacking",
        "the kernel has no FUSE passthrough; reads are cached instead",
        "use Linux 6.9 or newer",
    )


def _io_uring(kernel: hostprobe.Fuse) -> Finding:
    name, parameter = "fuse-io-uring", Path("/sys/module/fuse/parameters/enable_uring")
    if kernel.io_uring:
        return _finding(
            name, "good", "the kernel offers FUSE over io_uring; services started from now on use it"
        )
    if parameter.exists():
        return _finding(
            name,
            "good",
            "FUSE over io_uring is switched off in the kernel; services use /dev/fuse. "
            f"To have a queue for each CPU, as root: echo Y > {parameter}, then restart services",
        )
    return _finding(
        name, "good", "the kernel has no FUSE over io_uring (Linux 6.14 and newer do); services use /dev/fuse"
    )


def _user_namespaces(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    try:
        hostprobe.user_namespace()
    except ProbeError as error:
        advice = "set user.max_user_namespaces above 0 and kernel.unprivileged_userns_clone to 1 with sysctl"
        yield _finding(name, "missing", f"user namespaces cannot be made: {error}", advice)
        return
    yield _finding(name, "good", "user namespaces can be made")


def _idmapped_mounts(name: str, home: Path, _fix: bool) -> Iterator[Finding]:
    if is_rootless():
        yield _finding(name, "good", "idmapped mounts are not needed by an ordinary user's services")
        return
    place = _existing(home)
    try:
        hostprobe.idmapped_mounts(place)
    except ProbeError as error:
        advice = "use Linux 5.12 or newer with ext4, xfs or btrfs, or set POLYTROPO_HOME to such a filesystem"
        yield _finding(
            name, "missing", f"the filesystem of {place} cannot be mounted with ids mapped: {error}", advice
        )
        return
    yield _finding(name, "good", f"the filesystem of {place} can be mounted with ids mapped")


def _subordinate_ids(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    if not is_rootless():
        yield _finding(name, "good", "subordinate ids are not needed by root")
        return
    helpers = [program for program in ("newuidmap", "newgidmap") if shutil.which(program) is None]
    if helpers:
        yield _finding(
            name,
            "lacking",
            f"{' and '.join(helpers)} not found; programs see one user id only",
            "install uidmap",
        )
        return
    user = _user()
    uids, gids = _subordinate("/etc/subuid", user), _subordinate("/etc/subgid", user)
    if min(uids, gids) < UIDS_PER_TENANT:
        advice = f"as root, run `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`"
        yield _finding(
            name, "lacking", f"{user} has {min(uids, gids)} subordinate ids; programs see few users", advice
        )
        return
    yield _finding(name, "good", f"{user} has {uids} subordinate user ids and {gids} group ids")


def _control_groups(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    found = Hierarchies.find()
    what = f"control groups of {found.description}" if found.controllers else "no control groups"
    lost = sorted(set(WANTED) - found.controllers)
    if lost:
        advice = "switch them on in the kernel's command line or mount them below /sys/fs/cgroup"
        yield _finding(
            name, "lacking", f"{what}, without {', '.join(lost)}: tenants are not held to them", advice
        )
    elif is_rootless():
        advice = "run as root for tenants with limits of their own"
        yield _finding(name, "lacking", f"{what} may be limited by root only", advice)
    else:
        yield _finding(name, "good", f"{what} with {', '.join(WANTED)}")


def _landlock(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    abi = hostprobe.landlock_abi()
    if abi == 0:
        yield _finding(
            name,
            "lacking",
            "Landlock is absent; services are confined without it",
            "boot with lsm=landlock,...",
        )
    else:
        yield _finding(name, "good", f"Landlock, version {abi}, confines services")


def _seccomp(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    if actions.exists():
        yield _finding(name, "good", "seccomp confines services and containers")
    else:
        yield _finding(
            name, "missing", "the kernel has no seccomp", "use a kernel with CONFIG_SECCOMP_FILTER"
        )


def _runtime(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    there = [program for program in ("runc", "crun") if shutil.which(program)]
    if there:
        yield _finding(name, "good", f"containers are run by {' or '.join(there)}")
    else:
        yield _finding(name, "missing", "neither runc nor crun is installed", "run `apt-get install runc`")
    if not shutil.which("conmon"):
        advice = "run `apt-get install conmon`"
        yield _finding(name, "missing", "conmon, which watches containers, is not installed", advice)
    profile = Path("/usr/share/containers/seccomp.json")
    if not profile.exists():
        advice = "run `apt-get install golang-github-containers-common`"
        yield _finding(name, "missing", f"the system call profile {profile} is not there", advice)


def _bootstrap(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    if program := shutil.which("mmdebstrap"):
        yield _finding(name, "good", f"{program} can make Debian images")
    else:
        advice = "run `apt-get install mmdebstrap`"
        yield _finding(
            name, "lacking", "`polytropo image bootstrap` needs mmdebstrap, which is not there", advice
        )


def _preload(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    import platform

    from polytropo.preload_files import library_source
    from polytropo.preload_mode import VARIABLE, mode_of

    if platform.machine() != "x86_64":
        yield _finding(name, "good", f"programs use FUSE alone: there is no library for {platform.machine()}")
    elif not library_source().exists():
        advice = "run `make build`, or install Polytropo anew"
        yield _finding(name, "lacking", f"programs use FUSE alone: {library_source()} is missing", advice)
    elif mode_of(None) == "off":
        yield _finding(name, "good", f"programs use FUSE alone, since {VARIABLE} is off")
    else:
        yield _finding(name, "good", "programs can reach files through shared memory")


def _open_files(name: str, _home: Path, _fix: bool) -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "any number of" if hard == resource.RLIM_INFINITY else str(hard)
    sentence = f"a service may have {shown} files open"
    advice = f"raise the limit to {_NOFILE_WANTED} in /etc/security/limits.conf or the service manager"
    if hard == resource.RLIM_INFINITY or hard >= _NOFILE_WANTED:
        yield _finding(name, "good", sentence)
    else:
        yield _finding(
            name, "lacking" if hard >= _NOFILE_NEEDED else "missing", f"{sentence}, which is few", advice
        )


def _state_directory(name: str, home: Path, _fix: bool) -> Iterator[Finding]:
    place = _existing(home)
    version = layout_version(State(home)) if place == home else None
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        why = "read-only" if _is_read_only(place) else "closed to this user"
        yield _finding(name, "missing", f"{place} is {why}", "set POLYTROPO_HOME to a directory of your own")
        return
    if place != home:
        yield _finding(name, "good", f"{home} will be made at first use")
    else:
        shown = f"version {version}" if version is not None else f"no version yet, becomes {VERSION}"
        yield _finding(name, "good", f"{home} may be used ({shown})")
    yield _free_space(place)


def _free_space(place: Path) -> Finding:
    status = os.statvfs(place)
    free_bytes = status.f_bavail * status.f_frsize
    sentence = f"{place} has {format_size(free_bytes)} free"
    if free_bytes >= _FREE_WANTED_BYTES:
        return _finding("free-space", "good", sentence)
    advice = "free some space (`polytropo system prune`) or set POLYTROPO_HOME to a larger filesystem"
    return _finding(
        "free-space", "lacking" if free_bytes >= _FREE_NEEDED_BYTES else "missing", sentence, advice
    )


def _mounts(name: str, home: Path, fix: bool) -> Iterator[Finding]:
    ours = mounts.our_mounts()
    states = {mount.mountpoint: hostprobe.answers(mount.mountpoint) for mount in ours}
    silent = [path for path, answer in states.items() if answer is None]
    dead = [path for path, answer in states.items() if answer in (errno.ENOTCONN, errno.ECONNABORTED)]
    for path in silent:
        advice = "end its service with `polytropo tenant stop --force`; if it has none, use `umount --force`"
        yield _finding(name, "lacking", f"the mount at {path} does not answer", advice)
    if dead and fix:
        for path in dead:
            mounts.detach(path)
        yield _finding(name, "good", f"dead mounts cleared: {_listed(dead)}")
    elif dead:
        advice = "clear them with `polytropo doctor --fix`"
        yield _finding(name, "lacking", f"mounts whose service is dead: {_listed(dead)}", advice)
    else:
        yield _finding(name, "good", f"{len(ours) - len(silent)} mounts, none of them dead")


_CHECKS: dict[str, Callable[[str, Path, bool], Iterator[Finding]]] = {
    "service": _service,
    "fuse-device": _fuse_device,
    "fuse": _fuse_kernel,
    "user-namespaces": _user_namespaces,
    "idmapped-mounts": _idmapped_mounts,
    "subordinate-ids": _subordinate_ids,
    "control-groups": _control_groups,
    "landlock": _landlock,
    "seccomp": _seccomp,
    "runtime": _runtime,
    "bootstrap": _bootstrap,
    "preload": _preload,
    "open-files": _open_files,
    "state-directory": _state_directory,
    "mounts": _mounts,
}


def _existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _is_read_only(place: Path) -> bool:
    return bool(os.statvfs(place).f_flag & os.ST_RDONLY)


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _subordinate(path: str, name: str) -> int:
    """How many subordinate ids a name has."""
    total = 0
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        parts = line.split(":")
        if len(parts) == 3 and parts[0] in (name, str(os.geteuid())) and parts[2].isdecimal():
            total += int(parts[2])
    return total
