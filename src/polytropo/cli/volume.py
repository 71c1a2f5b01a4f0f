"""`polytropo volume`: data that outlives containers."""

import click

from polytropo.cli.options import VOLUME, json_option, tenant_option


@click.group()
def volume() -> None:
    """Create, list and remove a tenant's volumes.

    \b
    Example:
      polytropo volume create orders
      polytropo run -v orders:/var/lib/orders debian ls /var/lib/orders
    """


@volume.command()
@click.argument("name")
@tenant_option
@json_option
def create(name: str, tenant: str | None, as_json: bool) -> None:
    """Create a volume.

    \b
    Example:
      polytropo volume create --tenant shop orders
    """
    from polytropo.cli.output import print_json
    from polytropo.state import State
    from polytropo.tenants import get_tenant
    from polytropo.volumes import create_volume

    state = State.open()
    made = create_volume(state, get_tenant(state, tenant).name, name)
    if as_json:
        print_json(made)
    else:
        click.echo(made.name)


@volume.command("list")
@tenant_option
@json_option
def list_command(tenant: str | None, as_json: bool) -> None:
    """List volumes, of all tenants unless one is named.

    \b
    Example:
      polytropo volume list --tenant shop --json
    """
    import msgspec

    from polytropo.cli.output import print_json, print_table
    from polytropo.state import State
    from polytropo.tenants import get_tenant
    from polytropo.units import format_size
    from polytropo.volumes import list_volumes, size_bytes, volume_data

    state = State.open()
    chosen = None if tenant is None else get_tenant(state, tenant).name
    shown = []
    for each in list_volumes(state, chosen):
        path = volume_data(state, each.tenant, each.name)
        shown.append(msgspec.to_builtins(each) | {"path": str(path), "size_bytes": size_bytes(path)})
    if as_json:
        print_json(shown)
        return
    rows = [(v["tenant"], v["name"], format_size(v["size_bytes"]), v["path"]) for v in shown]
    print_table(("tenant", "name", "size", "path"), rows)


@volume.command()
@click.argument("names", type=VOLUME, nargs=-1, required=True)
@tenant_option
def rm(names: tuple[str, ...], tenant: str | None) -> None:
    """Remove volumes and the data in them.

    \b
    Example:
      polytropo volume rm --tenant shop orders
    """
    from polytropo.lifecycle import remove_volume
    from polytropo.state import State
    from polytropo.tenants import get_tenant

    state = State.open()
    tenant_name = get_tenant(state, tenant).name
    for name in names:
        remove_volume(state, tenant_name, name)
        click.echo(name)
