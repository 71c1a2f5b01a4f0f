"""What each tenant's service does and uses: its own counters beside those of its control group."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from polytropo.service import ServiceGone, reach
from polytropo.state import State
from polytropo.tenants import get_tenant, list_tenants, tenant_group

Copies = dict[str, dict[int, int]]
"""How many memory copies there were between programs and the service, on both sides: by situation (those of
`polytropo tune memcpy`) and the least size in bytes."""


class OperationStats(msgspec.Struct, kw_only=True):
    """One kind of operation on one mount."""

    count: int = 0
    errors: int = 0
    total_ns: int = 0


class ChannelStats(msgspec.Struct, kw_only=True):
    """What programs did through shared memory."""

    channels: int = 0
    channels_opened: int = 0
    requests: int = 0
    to_kernel: int = 0
    """Requests that were left to the kernel."""
    errors: int = 0
    calls: dict[str, int] = {}
    """What became of the calls of preloaded programs, as they told, which may be a lie."""


class MountStats(msgspec.Struct, kw_only=True):
    """One mount of a service, since it was made."""

    mount: int
    mountpoint: str
    door: int = 0
    """Mounts of one stack have one door, and tell what it did for all of them."""
    operations: dict[str, OperationStats] = {}
    read_bytes: int = 0
    written_bytes: int = 0
    over_rings: int = 0
    """How many of all operations came over io_uring; the others came from the device."""
    given_up: int = 0
    """Requests that were answered EIO since several workers died of them."""
    copies: Copies = {}
    channels: ChannelStats = msgspec.field(default_factory=ChannelStats)


class WindowStats(msgspec.Struct, kw_only=True):
    """Cached bytes of files that programs read without a request, of all mounts together. What is read
    there nobody counts."""

    bytes_max: int = 0
    bytes: int = 0
    held_bytes: int = 0
    """Of these, for writes that the layers have not got yet."""
    answers_bytes: int = 0
    """Of these, for answers that programs of the same rights share."""
    windows: int = 0
    fills: int = 0
    """Blocks of 64 KiB that were read from layers."""
    shown_again: int = 0
    """Blocks that programs asked for and that were there: by these the service learns what is used."""
    evictions: int = 0


class SlabStats(msgspec.Struct, kw_only=True):
    """Small files of images, which all mounts together have once. What lies here is a part of the cache."""

    slab_bytes: int = 0
    files: int = 0
    file_bytes: int = 0
    """Of these files. A slab's rest is not filled yet, or was left by files that moved."""
    hits: int = 0
    """Reads that were answered from here."""
    fills: int = 0
    """Files that were read from layers."""
    evictions: int = 0


_Counts = TypeVar("_Counts", WindowStats, SlabStats)


class PastStats(msgspec.Struct, kw_only=True):
    """What a worker's mounts did that are gone."""

    operations: dict[str, OperationStats] = {}
    read_bytes: int = 0
    written_bytes: int = 0
    over_rings: int = 0
    """How many of all operations came over io_uring; the others came from the device."""
    given_up: int = 0
    """Requests that were answered EIO since several workers died of them."""
    copies: Copies = {}
    channels: ChannelStats = msgspec.field(default_factory=ChannelStats)
    windows: WindowStats = msgspec.field(default_factory=WindowStats)
    slabs: SlabStats = msgspec.field(default_factory=SlabStats)


class _ServiceStats(msgspec.Struct, kw_only=True):
    past: list[PastStats] = []
    uptime_s: float = 0.0
    worker_pid: int | None = None
    keeper_pid: int | None = None
    rss_bytes: int | None = None
    mounts: list[MountStats] = []


class TenantStats(msgspec.Struct, kw_only=True):
    """One tenant now. What is not counted here, or not running, is None."""

    tenant: str
    running: bool
    uptime_s: float | None = None
    keeper_pid: int | None = None
    worker_pid: int | None = None
    service_rss_bytes: int | None = None
    memory_used_bytes: int | None
    memory_limit_bytes: int | None
    cpu_time_s: float | None
    process_count: int
    operation_count: int = 0
    error_count: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    over_rings: int = 0
    """How many of all operations came over io_uring; the others came from the device."""
    given_up: int = 0
    """Requests that were answered EIO since several workers died of them."""
    copies: Copies = {}
    request_count: int = 0
    """Of programs at channels."""
    calls: dict[str, int] = {}
    """What became of the calls of preloaded programs, as they told."""
    windows: WindowStats = msgspec.field(default_factory=WindowStats)
    slabs: SlabStats = msgspec.field(default_factory=SlabStats)
    mounts: list[MountStats] = []


def tenant_stats(state: State, name: str) -> TenantStats:
    """The figures of one tenant. Raises PolytropoError for an unknown one."""
    tenant = get_tenant(state, name)
    group = tenant_group(state, name)
    cpu_time_ns = group.cpu_time_ns()
    stats = TenantStats(
        tenant=name,
        running=False,
        memory_used_bytes=group.memory_bytes(),
        memory_limit_bytes=tenant.memory_bytes,
        cpu_time_s=None if cpu_time_ns is None else cpu_time_ns / 1e9,
        process_count=len(group.pids()),
    )
    client = reach(state, name)
    if client is None:
        return stats
    with client, suppress(ServiceGone):  # it may end while it is asked
        _add_service(stats, client.stats())
        stats.keeper_pid = client.keeper_pid
    return stats


def all_stats(state: State) -> list[TenantStats]:
    """The figures of every tenant."""
    return [tenant_stats(state, tenant.name) for tenant in list_tenants(state)]


def _add_service(stats: TenantStats, answer: dict[str, Any]) -> None:
    told = msgspec.convert(answer, _ServiceStats, strict=False)
    # Mounts of one stack share a door, and each shows all that the door did.
    doors: list[MountStats | PastStats] = [*{mount.door: mount for mount in told.mounts}.values(), *told.past]
    operations = [each for door in doors for each in door.operations.values()]
    stats.running = True
    stats.uptime_s = told.uptime_s
    stats.worker_pid = told.worker_pid
    stats.service_rss_bytes = told.rss_bytes
    stats.mounts = told.mounts
    stats.operation_count = sum(each.count for each in operations)
    stats.error_count = sum(each.errors for each in operations)
    stats.request_count = sum(door.channels.requests for door in doors)
    stats.calls = {}
    for door in doors:
        for name, count in door.channels.calls.items():
            stats.calls[name] = stats.calls.get(name, 0) + count
    stats.read_bytes = sum(door.read_bytes for door in doors)
    stats.written_bytes = sum(door.written_bytes for door in doors)
    stats.copies = sum_copies(door.copies for door in doors)
    stats.windows = _sum(WindowStats(), (past.windows for past in told.past))
    stats.slabs = _sum(SlabStats(), (past.slabs for past in told.past))


def _sum(summed: _Counts, each: Iterable[_Counts]) -> _Counts:
    """Those of several workers of a service."""
    for counts in each:
        for field in counts.__struct_fields__:
            setattr(summed, field, getattr(summed, field) + getattr(counts, field))
    return summed


def sum_copies(each: Iterable[Copies]) -> Copies:
    """All of them together, small sizes first."""
    summed: Copies = {}
    for copies in each:
        for situation, sizes in copies.items():
            row = summed.setdefault(situation, {})
            for size_bytes, count in sizes.items():
                row[size_bytes] = row.get(size_bytes, 0) + count
    return {situation: dict(sorted(row.items())) for situation, row in summed.items()}
