"""`polytropo image`: what containers are made from."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from polytropo.cli.options import IMAGE, PATH, json_option

if TYPE_CHECKING:
    from polytropo.images import Image


@click.group()
def image() -> None:
    """Import, make, list, name and remove images.

    \b
    Example:
      polytropo image bootstrap debian
      polytropo image import app.tar.gz --name app:1
    """


@image.command("import")
@click.argument("source")
@click.option("-n", "--name", help="The image's name, NAME[:TAG]; without it the archive's own.")
@json_option
def import_command(source: str, name: str | None, as_json: bool) -> None:
    """Import an OCI image layout (a directory) or an archive, - for standard input.

    \b
    Example:
      polytropo image import ./layout --name app:1
      podman save app | polytropo image import -
    """
    from polytropo.cli.output import progress
    from polytropo.images import import_image
    from polytropo.state import State

    if source == "-" and sys.stdin.isatty():
        raise click.UsageError("standard input is a terminal; pipe an archive into it, or name a file")
    state = State.open()
    with progress("Importing") as told:
        place = sys.stdin.buffer if source == "-" else Path(source)
        images = import_image(state, place, name=name, progress=told)
    _print_made(images, as_json)


@image.command()
@click.argument("name")
@click.option("--suite", default="bookworm", show_default=True, help="The Debian release.")
@click.option("--include", multiple=True, help="Packages to add as a second layer, separated by commas.")
@click.option("--mirror", help="Where to get packages; without it from where this machine gets its own.")
@json_option
def bootstrap(name: str, suite: str, include: tuple[str, ...], mirror: str | None, as_json: bool) -> None:
    """Make an image of minimal Debian.

    \b
    Example:
      polytropo image bootstrap debian --include sqlite3,busybox
    """
    from polytropo.cli.output import progress
    from polytropo.images.bootstrap import bootstrap as make
    from polytropo.state import State

    state = State.open()
    with progress("Bootstrapping") as told:
        made = make(state, name, suite=suite, include=include, mirror=mirror, progress=told)
    _print_made([made], as_json)


@image.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List images.

    \b
    Example:
      polytropo image list --json
    """
    from datetime import datetime

    from polytropo.cli.output import print_json, print_table
    from polytropo.images import damaged_images, list_images
    from polytropo.state import State
    from polytropo.units import format_size

    state = State.open()
    images = list_images(state)
    for sentence in damaged_images(state):
        click.echo(f"polytropo: {sentence}", err=True)
    if as_json:
        print_json([_shown(each) for each in images])
        return
    rows = []
    for each in images:
        when = datetime.fromtimestamp(each.imported_unix_s).strftime("%Y-%m-%d %H:%M")
        for name in each.names or ["<none>"]:
            rows.append((name, each.id, len(each.layers), format_size(each.size_bytes), when))
    print_table(("name", "id", "layers", "size", "imported"), rows)


@image.command()
@click.argument("name", type=IMAGE)
@json_option
def show(name: str, as_json: bool) -> None:
    """Show an image: its names, layers and configuration.

    \b
    Example:
      polytropo image show debian
    """
    from polytropo.cli.output import print_fields, print_json
    from polytropo.images import get_image
    from polytropo.state import State
    from polytropo.units import format_size

    found = get_image(State.open(), name)
    if as_json:
        print_json(_shown(found))
        return
    config = found.config
    fields: list[tuple[str, object]] = [
        ("names", ", ".join(found.names)),
        ("digest", found.digest),
        ("size", format_size(found.size_bytes)),
        ("created", found.created),
        ("entrypoint", " ".join(config.entrypoint)),
        ("command", " ".join(config.cmd)),
        ("directory", config.working_dir),
        ("user", config.user),
        ("ports", ", ".join(config.exposed_ports)),
        ("volumes", ", ".join(config.volumes)),
    ]
    fields += [("environment", each) for each in config.env]
    for record in found.layer_records:
        fields.append(("layer", f"{record.diff_id} {format_size(record.size_bytes)}"))
    print_fields([(title, value) for title, value in fields if value])


@image.command()
@click.argument("name", type=IMAGE)
@click.option("-o", "--output", type=PATH, help="The archive to write; without it standard output.")
def save(name: str, output: Path | None) -> None:
    """Write an image as an archive that podman, docker and `image import` read.

    \b
    Example:
      polytropo image save app:1 -o app.tar
      polytropo image save app:1 | ssh host polytropo image import -
    """
    from polytropo.cli.output import progress
    from polytropo.images import get_image
    from polytropo.images.save import save
    from polytropo.state import State

    if output is None and sys.stdout.isatty():
        raise click.UsageError("standard output is a terminal; name a file with -o, or use a pipe")
    state = State.open()
    with progress("Saving") as told:
        save(state, get_image(state, name), output or sys.stdout.buffer, progress=told)


@image.command()
@click.argument("name", type=IMAGE)
@click.argument("new_name")
def tag(name: str, new_name: str) -> None:
    """Give an image another name.

    \b
    Example:
      polytropo image tag debian base:12
    """
    from polytropo.images import tag_image
    from polytropo.state import State

    tag_image(State.open(), name, new_name)


@image.command()
@click.argument("names", type=IMAGE, nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="Also if containers use it, or if it has several names.")
def rm(names: tuple[str, ...], force: bool) -> None:
    """Remove images: the name, and with the last one the image.

    \b
    Example:
      polytropo image rm app:1
    """
    from polytropo.images import remove_image
    from polytropo.lifecycle import image_users
    from polytropo.state import State

    state = State.open()
    for name in names:
        removed = remove_image(state, name, users=lambda digest: image_users(state, digest), force=force)
        click.echo(removed or name)


def _print_made(images: "list[Image]", as_json: bool) -> None:
    from polytropo.cli.output import print_json

    if as_json:
        print_json([_shown(each) for each in images])
        return
    for each in images:
        click.echo(f"{each.id}  {', '.join(each.names)}")


def _shown(image: "Image") -> dict[str, Any]:
    import msgspec

    return {
        "digest": image.digest,
        "names": image.names,
        "size_bytes": image.size_bytes,
        "architecture": image.architecture,
        "created": image.created,
        "imported_unix_s": image.imported_unix_s,
        "layers": [msgspec.to_builtins(record) for record in image.layer_records],
        "config": msgspec.to_builtins(image.config),
    }
