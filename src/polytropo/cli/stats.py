"""`polytropo stats`: what each tenant's service does."""

import time
from typing import TYPE_CHECKING

import click

from polytropo.cli.options import json_option, tenant_option

if TYPE_CHECKING:
    from polytropo.observe import TenantStats
    from polytropo.state import State

_ANSWERED = ("in the process", "by request")
_CLEAR = "\x1b[H\x1b[2J"


@click.command()
@tenant_option
@click.option("--operations", is_flag=True, help="Each mount with its operations, one by one.")
@click.option("--copies", is_flag=True, help="The memory copies of the private path, by situation and size.")
@click.option("--calls", is_flag=True, help="What became of the calls of preloaded programs.")
@click.option("--windows", is_flag=True, help="The cached bytes that programs read without a request.")
@click.option("--watch", is_flag=True, help="Again and again, until Ctrl-C.")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, metavar="SECONDS", help="Pause of --watch (2)."
)
@json_option
def stats(
    tenant: str | None,
    operations: bool,
    copies: bool,
    calls: bool,
    windows: bool,
    watch: bool,
    interval: float,
    as_json: bool,
) -> None:
    """Show what services do and use, for all tenants unless one is named.

    Operations and bytes count since a mount was made; memory and processor time are those of service and
    containers together. With --watch --json one line is printed each time.

    \b
    Example:
      polytropo stats
      polytropo stats --tenant shop --operations
      polytropo stats --copies
      polytropo stats --calls
      polytropo stats --windows
      polytropo stats --watch --json
    """
    from polytropo.state import State

    state = State.open()
    while True:
        shown = _read(state, tenant)
        if watch and not as_json:
            click.echo(_CLEAR, nl=False)
        if as_json:
            _print_json(shown, one_line=watch)
        elif operations:
            _print_operations(shown)
        elif copies:
            _print_copies(shown)
        elif calls:
            _print_calls(shown)
        elif windows:
            _print_windows(shown)
        else:
            _print_tenants(shown)
        if not watch:
            return
        time.sleep(interval)


def _read(state: "State", tenant: str | None) -> "list[TenantStats]":
    from polytropo.observe import all_stats, tenant_stats

    return all_stats(state) if tenant is None else [tenant_stats(state, tenant)]


def _print_json(shown: "list[TenantStats]", *, one_line: bool) -> None:
    import msgspec

    from polytropo.cli.output import print_json

    if one_line:
        click.echo(msgspec.json.encode(shown).decode())
    else:
        print_json(shown)


def _print_tenants(shown: "list[TenantStats]") -> None:
    from polytropo.cli.output import print_table
    from polytropo.units import format_duration, format_size

    rows = [
        (
            each.tenant,
            "-" if each.uptime_s is None else format_duration(each.uptime_s),
            _memory(each),
            "-" if each.cpu_time_s is None else f"{each.cpu_time_s:.1f} s",
            each.process_count,
            len(each.mounts),
            each.operation_count,
            format_size(each.read_bytes),
            format_size(each.written_bytes),
        )
        for each in shown
    ]
    print_table(("tenant", "up", "memory", "cpu", "procs", "mounts", "ops", "read", "written"), rows)


def _print_calls(shown: "list[TenantStats]") -> None:
    from polytropo.cli.output import print_table

    rows = [
        (each.tenant, name if name in _ANSWERED else f"by the kernel: {name}", count)
        for each in shown
        for name, count in sorted(each.calls.items(), key=lambda item: (item[0] not in _ANSWERED, -item[1]))
    ]
    print_table(("tenant", "answered", "calls"), rows)


def _print_windows(shown: "list[TenantStats]") -> None:
    from polytropo.cli.output import print_table
    from polytropo.units import format_size

    rows = [
        (
            each.tenant,
            format_size(each.windows.bytes_max),
            format_size(each.windows.bytes),
            each.windows.windows,
            each.windows.fills,
            each.windows.shown_again,
            each.windows.evictions,
            each.slabs.files,
            format_size(each.slabs.slab_bytes),
            each.slabs.hits,
        )
        for each in shown
    ]
    titles = ("tenant", "ceiling", "cached", "files", "filled", "asked again", "evicted")
    print_table((*titles, "small files", "in slabs", "reads of them"), rows)


def _memory(stats: "TenantStats") -> str:
    from polytropo.units import format_size

    if stats.memory_used_bytes is None:
        return "-"
    limit = "" if stats.memory_limit_bytes is None else f" of {format_size(stats.memory_limit_bytes)}"
    return f"{format_size(stats.memory_used_bytes)}{limit}"


def _print_operations(shown: "list[TenantStats]") -> None:
    from polytropo.cli.output import print_table
    from polytropo.units import format_ns

    rows = [
        (each.tenant, mount.mountpoint, name, ran.count, ran.errors, format_ns(ran.total_ns / ran.count))
        for each in shown
        for mount in each.mounts
        for name, ran in sorted(mount.operations.items())
        if ran.count
    ]
    print_table(("tenant", "mount", "operation", "count", "errors", "mean time"), rows)


def _print_copies(shown: "list[TenantStats]") -> None:
    from polytropo.cli.output import print_table
    from polytropo.units import format_size

    rows = [
        (each.tenant, situation, format_size(size_bytes), count)
        for each in shown
        for situation, sizes in each.copies.items()
        for size_bytes, count in sizes.items()
    ]
    print_table(("tenant", "situation", "from size", "copies"), rows)
