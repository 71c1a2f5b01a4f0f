"""Tenants: their settings, the ids and the control group that belong to each."""

import os
from contextlib import suppress
from pathlib import Path

from polytropo.cgroups import Group, Limits
from polytropo.errors import PolytropoError, storage_errors
from polytropo.host import is_rootless
from polytropo.names import check_name, unknown
from polytropo.state import Record, State, read_record, write_record
from polytropo.units import format_cpus, format_size, parse_cpus

DEFAULT_TENANT = "default"
UIDS_PER_TENANT = 65536
_UID_FIRST = 1_000_000
_UID_MAX = 2**31
_MEMORY_MIN_BYTES = 64 << 20
_CACHE_DEFAULT_BYTES = 256 << 20


class Tenant(Record, kw_only=True):
    """One tenant's settings, kept as tenant.json."""

    name: str
    uid_base: int
    """First of the 65,536 host ids that its service and containers run under."""
    cpus: str | None = None
    """CPUs as the kernel lists them ("0-1"); None: all."""
    memory_bytes: int | None = None
    """Ceiling of service and containers together; None: the machine's."""
    cache_bytes: int = _CACHE_DEFAULT_BYTES
    """Ceiling of the service's cache, within `memory_bytes`."""
    idle_timeout_s: int = 60
    """How long the service stays after its last mount."""
    pids_max: int | None = 4096


def tenant_dir(state: State, name: str) -> Path:
    return state.tenants / name


def run_dir(state: State, name: str) -> Path:
    """Where the tenant's service keeps its socket, process id and log."""
    return tenant_dir(state, name) / "run"


def get_tenant(state: State, name: str | None = None) -> Tenant:
    """The tenant `name`; the default one (None) is made on first need.

    Raises PolytropoError, which lists what exists, for an unknown name.
    """
    name = check_name("tenant", DEFAULT_TENANT if name is None else name)
    try:
        return read_record(tenant_dir(state, name) / "tenant.json", Tenant)
    except FileNotFoundError:
        if name != DEFAULT_TENANT:
            known = tenant_names(state)
            raise unknown("tenant", name, known, f"make it with `polytropo tenant create {name}`") from None
    with suppress(TenantExists):
        return create_tenant(state, name)
    return read_record(tenant_dir(state, name) / "tenant.json", Tenant)  # another process was faster


class TenantExists(PolytropoError):
    """A tenant of that name is there already."""


def create_tenant(
    state: State,
    name: str,
    *,
    cpus: str | None = None,
    memory_bytes: int | None = None,
    cache_bytes: int | None = None,
    idle_timeout_s: int | None = None,
) -> Tenant:
    """Makes a tenant; everything is checked against the machine first. Raises PolytropoError."""
    check_name("tenant", name)
    settings: dict[str, int | str] = {}
    if cpus is not None:
        settings["cpus"] = _checked_cpus(cpus)
    if memory_bytes is not None:
        settings["memory_bytes"] = _checked_memory(memory_bytes)
    if idle_timeout_s is not None:
        settings["idle_timeout_s"] = idle_timeout_s
    settings["cache_bytes"] = _checked_cache(cache_bytes, memory_bytes)
    with state.lock("tenants"), storage_errors(f"create the tenant {name}", state.home):
        directory = tenant_dir(state, name)
        if (directory / "tenant.json").exists():
            raise TenantExists(f"the tenant {name} exists already; `polytropo tenant show {name}` shows it")
        tenant = Tenant(name=name, uid_base=_free_uid_base(state), **settings)  # type: ignore[arg-type]
        directory.mkdir(mode=0o711, exist_ok=True)
        run_dir(state, name).mkdir(mode=0o700, exist_ok=True)
        write_record(directory / "tenant.json", tenant)
    return tenant


def tenant_names(state: State) -> list[str]:
    """The names of all tenants, sorted."""
    with storage_errors("list the tenants", state.home):
        return sorted(path.parent.name for path in state.tenants.glob("*/tenant.json"))


def list_tenants(state: State) -> list[Tenant]:
    """All tenants by name; one that is removed meanwhile is left out."""
    found = []
    for name in tenant_names(state):
        with suppress(FileNotFoundError):
            found.append(read_record(tenant_dir(state, name) / "tenant.json", Tenant))
    return found


def remove_tenant_files(state: State, name: str) -> None:
    """Removes the tenant's settings, its volumes and its control group; its service has ended before."""
    with (
        state.lock("tenants"),
        storage_errors(f"remove the tenant {name}", state.home),
        state.scratch("tenant") as scratch,
    ):
        remove_group(state, name)
        # Out of sight at once, the settings last: what is killed here can be asked for again.
        for path in (state.volumes / name, tenant_dir(state, name)):
            with suppress(FileNotFoundError):
                path.rename(scratch.path / path.parent.name)


def group_parent(state: State) -> str:
    """The control group above those of all tenants in `state`.

    State directories other than the machine's own get a group of their own, since their tenants may have
    the same names.
    """
    home = os.path.realpath(state.home)
    if home == "/var/lib/polytropo":
        return "polytropo"
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]  # hashlib loads all of OpenSSL
    except ImportError:
        from hashlib import sha256

    return f"polytropo-{sha256(home.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


def tenant_group(state: State, name: str) -> Group:
    """The tenant's control group, which may not exist yet."""
    return Group(f"{group_parent(state)}/{name}")


def prepare_group(state: State, tenant: Tenant) -> Group | None:
    """Makes the tenant's control group with its limits; None where this user or host has no control groups.

    Raises PolytropoError if limits were asked for and root cannot set them.
    """
    group = tenant_group(state, tenant.name)
    if not group.hierarchies.controllers:
        return None
    limits = Limits(tenant.cpus, tenant.memory_bytes, tenant.pids_max)
    try:
        with state.lock("cgroups"):
            group.create(limits)
            return group
    except OSError as error:
        if not is_rootless() and (tenant.cpus or tenant.memory_bytes):
            raise PolytropoError(
                f"the limits of the tenant {tenant.name} cannot be set: {error.strerror} at {error.filename};"
                " `polytropo doctor` says what this host offers"
            ) from error
        return None


def remove_group(state: State, name: str) -> None:
    """Removes the tenant's control group, if there is one, and with the last one the group above."""
    group = tenant_group(state, name)
    with state.lock("cgroups"):
        group.remove()
        Group(group_parent(state), group.hierarchies).remove_if_empty()


def online_cpus() -> list[int]:
    """The CPUs that this machine has switched on."""
    try:
        return parse_cpus(Path("/sys/devices/system/cpu/online").read_text().strip())
    except OSError:
        return sorted(os.sched_getaffinity(0))


def memory_total_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _checked_cpus(text: str) -> str:
    cpus, there = parse_cpus(text), online_cpus()
    missing = sorted(set(cpus) - set(there))
    if missing:
        raise PolytropoError(
            f"this machine has no CPU {format_cpus(missing)}; it has the CPUs {format_cpus(there)}"
        )
    return format_cpus(cpus)


def _checked_memory(memory_bytes: int) -> int:
    total = memory_total_bytes()
    if memory_bytes > total:
        raise PolytropoError(
            f"{format_size(memory_bytes)} of memory is more than the machine's {format_size(total)};"
            " ask for less"
        )
    if memory_bytes < _MEMORY_MIN_BYTES:
        raise PolytropoError(
            f"{format_size(memory_bytes)} of memory is too little for a service and containers;"
            f" give at least {format_size(_MEMORY_MIN_BYTES)}"
        )
    return memory_bytes


def _checked_cache(cache_bytes: int | None, memory_bytes: int | None) -> int:
    if cache_bytes is None:
        return min(_CACHE_DEFAULT_BYTES, (memory_bytes or memory_total_bytes()) // 4)
    most = memory_bytes if memory_bytes is not None else memory_total_bytes()
    if cache_bytes > most:
        raise PolytropoError(
            f"a cache of {format_size(cache_bytes)} does not fit into {format_size(most)} of memory;"
            " make the cache smaller or the memory larger"
        )
    return cache_bytes


def _free_uid_base(state: State) -> int:
    taken = [(t.uid_base, t.uid_base + UIDS_PER_TENANT) for t in list_tenants(state)]
    taken += _subordinate_ranges("/etc/subuid") + _subordinate_ranges("/etc/subgid")
    for base in range(_UID_FIRST, _UID_MAX - UIDS_PER_TENANT, UIDS_PER_TENANT):
        if all(base + UIDS_PER_TENANT <= first or end <= base for first, end in taken):
            return base
    raise PolytropoError("all user id ranges are taken; remove a tenant or free ranges in /etc/subuid")


def _subordinate_ranges(path: str) -> list[tuple[int, int]]:
    ranges = []
    with suppress(OSError):
        for line in Path(path).read_text(errors="replace").splitlines():
            parts = line.split(":")
            if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
                ranges.append((int(parts[1]), int(parts[1]) + int(parts[2])))
    return ranges
