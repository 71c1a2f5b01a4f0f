"""`polytropo system`: the state directory as a whole."""

import sys

import click

from polytropo.cli.options import json_option


@click.group()
def system() -> None:
    """See what takes space, clear what killed commands left, start anew.

    \b
    Example:
      polytropo system df
      polytropo system prune
    """


@system.command()
@click.option("-v", "--verbose", is_flag=True, help="Also image by image, alone and shared with others.")
@json_option
def df(verbose: bool, as_json: bool) -> None:
    """Show how much disk space is used for what.

    \b
    Example:
      polytropo system df --verbose
    """
    from polytropo import images
    from polytropo.cli.output import print_json, print_table
    from polytropo.maintenance import usage
    from polytropo.state import State
    from polytropo.units import format_size

    state = State.open()
    shown = usage(state)
    each = images.df(state).images if verbose else []
    if as_json:
        print_json({"kinds": shown, "images": each} if verbose else shown)
        return
    print_table(("kind", "count", "size"), [(u.kind, u.count, format_size(u.size_bytes)) for u in shown])
    if verbose:
        print()
        rows = [
            (name, image.digest[7:19], format_size(image.unique_bytes), format_size(image.shared_bytes))
            for image in each
            for name in image.names or ["-"]
        ]
        print_table(("image", "image id", "unique", "shared"), rows)


@system.command()
@json_option
def prune(as_json: bool) -> None:
    """Clear what killed commands and services left behind.

    Temporary files, dead mounts, halves of removed tenants and containers, layers that no image names, empty
    control groups. Nothing that is in use and nothing that was asked to be kept.

    \b
    Example:
      polytropo system prune
    """
    from polytropo.cli.output import print_fields, print_json
    from polytropo.maintenance import prune as prune_state
    from polytropo.state import State

    pruned = prune_state(State.open())
    if as_json:
        print_json(pruned)
        return
    print_fields(
        [
            ("temporary files", pruned.temporary_count),
            ("dead mounts", pruned.mount_count),
            ("tenants", pruned.tenant_count),
            ("containers", pruned.container_count),
            ("layers", pruned.layer_count),
            ("control groups", pruned.group_count),
        ]
    )


@system.command()
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
def reset(force: bool) -> None:
    """Stop everything and remove all images, containers, volumes and tenants.

    \b
    Example:
      polytropo system reset --force
    """
    from polytropo.errors import PolytropoError
    from polytropo.maintenance import reset as reset_state
    from polytropo.state import State

    state = State.open()
    if not force:
        if not sys.stdin.isatty():
            raise PolytropoError(f"this removes all that {state.home} holds; say so with --force")
        click.confirm(f"Remove all images, containers, volumes and tenants in {state.home}?", abort=True)
    reset_state(state, lambda what: click.echo(what, err=True))
