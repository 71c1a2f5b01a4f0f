"""`polytropo tenant`: the tenants of this host and what each may use."""

from typing import TYPE_CHECKING, Any

import click

from polytropo.cli.options import SIZE, TENANT, json_option

if TYPE_CHECKING:
    from polytropo.state import State


@click.group()
def tenant() -> None:
    """Create, look at and stop tenants.

    \b
    Example:
      polytropo tenant create shop --cpus 0-1 --memory 2GiB --cache 512MiB
    """


@tenant.command()
@click.argument("name")
@click.option("--cpus", metavar="LIST", help="CPUs that are its own, such as 1, 0-1 or 0,2.")
@click.option("--memory", type=SIZE, help="Memory of its service and containers together.")
@click.option("--cache", type=SIZE, help="The service's cache, part of that memory.")
@click.option(
    "--idle-timeout", type=click.IntRange(min=0), metavar="SECONDS", help="Life after the last mount (60)."
)
@json_option
def create(
    name: str,
    cpus: str | None,
    memory: int | None,
    cache: int | None,
    idle_timeout: int | None,
    as_json: bool,
) -> None:
    """Create a tenant.

    \b
    Example:
      polytropo tenant create shop --cpus 0-1 --memory 2GiB --cache 512MiB
    """
    from polytropo.cli.output import print_json
    from polytropo.state import State
    from polytropo.tenants import create_tenant

    made = create_tenant(
        State.open(), name, cpus=cpus, memory_bytes=memory, cache_bytes=cache, idle_timeout_s=idle_timeout
    )
    if as_json:
        print_json(made)
    else:
        click.echo(made.name)


@tenant.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List the tenants.

    \b
    Example:
      polytropo tenant list --json
    """
    from polytropo.cli.output import print_json, print_table
    from polytropo.state import State
    from polytropo.tenants import list_tenants

    state = State.open()
    shown = [_described(state, each.name) for each in list_tenants(state)]
    if as_json:
        print_json(shown)
        return
    rows = [
        (t["name"], t["cpus"] or "all", _size(t["memory_bytes"]), _size(t["cache_bytes"]), *_activity(t))
        for t in shown
    ]
    print_table(("name", "cpus", "memory", "cache", "service", "mounts"), rows)


@tenant.command()
@click.argument("name", type=TENANT)
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one tenant: its settings, its service, its mounts.

    \b
    Example:
      polytropo tenant show shop
    """
    from polytropo.cli.output import print_fields, print_json
    from polytropo.state import State
    from polytropo.tenants import UIDS_PER_TENANT, get_tenant
    from polytropo.units import format_duration, format_size

    state = State.open()
    get_tenant(state, name)
    shown = _described(state, name)
    if as_json:
        print_json(shown)
        return
    service, mount_count = _activity(shown)
    first = shown["uid_base"]
    print_fields(
        [
            ("name", shown["name"]),
            ("cpus", shown["cpus"] or "all"),
            ("memory", _size(shown["memory_bytes"])),
            ("cache", _size(shown["cache_bytes"])),
            ("memory in use", _size(shown["memory_used_bytes"], "not counted")),
            ("host user ids", f"{first} to {first + UIDS_PER_TENANT - 1}"),
            ("service", service),
            ("up for", "-" if shown["uptime_s"] is None else format_duration(shown["uptime_s"])),
            ("cpu time", "-" if shown["cpu_time_s"] is None else f"{shown['cpu_time_s']:.1f} s"),
            ("processes", shown["process_count"]),
            ("operations", f"{shown['operation_count']}, {shown['error_count']} with errors"),
            ("read", format_size(shown["read_bytes"])),
            ("written", format_size(shown["written_bytes"])),
            ("ends after", f"{shown['idle_timeout_s']} s without a mount"),
            ("mounts", mount_count),
            *(("", mount["mountpoint"]) for mount in shown["mounts"]),
        ]
    )


@tenant.command()
@click.argument("name", type=TENANT)
@click.option("--force", is_flag=True, help="Also while its mounts are in use; kills what does not end.")
def stop(name: str, force: bool) -> None:
    """Stop a tenant's containers and its service.

    \b
    Example:
      polytropo tenant stop shop
    """
    from polytropo.lifecycle import stop_tenant
    from polytropo.state import State
    from polytropo.tenants import get_tenant

    state = State.open()
    stop_tenant(state, get_tenant(state, name).name, force=force)


@tenant.command()
@click.argument("name", type=TENANT)
@click.option("--force", is_flag=True, help="With its containers and volumes, and the data in them.")
def rm(name: str, force: bool) -> None:
    """Remove a tenant that has no containers and no volumes.

    \b
    Example:
      polytropo tenant rm shop
    """
    from polytropo.lifecycle import remove_tenant
    from polytropo.state import State
    from polytropo.tenants import get_tenant

    state = State.open()
    remove_tenant(state, get_tenant(state, name).name, force=force)
    click.echo(name)


def _described(state: "State", name: str) -> dict[str, Any]:
    """A tenant's settings with what it does now: the one JSON shape of list and show."""
    import msgspec

    from polytropo.observe import tenant_stats
    from polytropo.tenants import get_tenant

    now: dict[str, Any] = msgspec.to_builtins(tenant_stats(state, name))
    settings: dict[str, Any] = msgspec.to_builtins(get_tenant(state, name))
    return settings | {key: value for key, value in now.items() if key != "tenant"}


def _activity(shown: dict[str, Any]) -> tuple[str, int]:
    return f"running, pid {shown['keeper_pid']}" if shown["running"] else "not running", len(shown["mounts"])


def _size(size_bytes: int | None, otherwise: str = "no limit") -> str:
    from polytropo.units import format_size

    return otherwise if size_bytes is None else format_size(size_bytes)
