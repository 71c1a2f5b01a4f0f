"""Commands about containers that exist: start, stop, kill, wait, rm, commit."""

import click

from polytropo.cli.options import CONTAINER
from polytropo.errors import PolytropoError

_STOP_TIMEOUT_S = 10


@click.command(context_settings={"allow_interspersed_args": True})
@click.option("-a", "--attach", is_flag=True, help="Stay with it; its status is ours.")
@click.argument("names", metavar="CONTAINER...", type=CONTAINER, nargs=-1, required=True)
@click.pass_context
def start(context: click.Context, attach: bool, names: tuple[str, ...]) -> None:
    """Start containers that have ended, with what they have written.

    \b
    Example:
      polytropo start db
    """
    from polytropo.containers import engine, foreground
    from polytropo.containers.rootless import find_inside
    from polytropo.state import State

    state = State.open()
    engine.reap_all(state)
    if attach and len(names) > 1:
        raise PolytropoError("only one container can be attached to; name one")
    for container in [find_inside(state, name) for name in names]:
        if attach:
            context.exit(foreground.start_attended(state, container))
        foreground.start_detached(state, container)
        click.echo(container.name)


@click.command()
@click.option(
    "-t",
    "--time",
    "timeout_s",
    type=click.IntRange(min=0),
    default=_STOP_TIMEOUT_S,
    metavar="SECONDS",
    help="How long it may take (10); then it is killed.",
)
@click.option("-a", "--all", "every", is_flag=True, help="All that run.")
@click.argument("names", metavar="CONTAINER...", type=CONTAINER, nargs=-1)
def stop(timeout_s: int, every: bool, names: tuple[str, ...]) -> None:
    """Ask containers to end, and end them.

    \b
    Example:
      polytropo stop -t 2 db
    """
    from polytropo.containers import engine, records
    from polytropo.containers.rootless import find_inside
    from polytropo.state import State

    state = State.open()
    engine.reap_all(state)
    chosen = records.all_containers(state) if every else [find_inside(state, name) for name in _some(names)]
    running = engine.stop_all(state, chosen, timeout_s)
    for name in running if every else [container.name for container in chosen]:
        click.echo(name)


@click.command()
@click.option("-s", "--signal", "signal_name", default="KILL", help="The signal (KILL).")
@click.argument("names", metavar="CONTAINER...", type=CONTAINER, nargs=-1, required=True)
def kill(signal_name: str, names: tuple[str, ...]) -> None:
    """Send containers a signal.

    \b
    Example:
      polytropo kill -s HUP web
    """
    from polytropo.containers import engine, records
    from polytropo.containers.rootless import find_inside
    from polytropo.state import State

    state = State.open()
    number = engine.parse_signal(signal_name)
    for container in [find_inside(state, name) for name in names]:
        process = records.process_of(records.files_of(state, container.id))
        if process is None or not engine.send_signal(process, number):
            raise PolytropoError(
                f"the container {container.name} does not run; `polytropo ps -a` shows its state"
            )
        click.echo(container.name)


@click.command()
@click.argument("names", metavar="CONTAINER...", type=CONTAINER, nargs=-1, required=True)
def wait(names: tuple[str, ...]) -> None:
    """Wait for containers to end and print their statuses.

    \b
    Example:
      polytropo wait job
    """
    from polytropo.containers import engine
    from polytropo.containers.rootless import find_inside
    from polytropo.state import State

    state = State.open()
    for container in [find_inside(state, name) for name in names]:
        status = engine.wait_for_status(state, container)
        click.echo("unknown" if status is None else str(status))


@click.command()
@click.option("-f", "--force", is_flag=True, help="Also one that runs.")
@click.option("-a", "--all", "every", is_flag=True, help="All of them.")
@click.argument("names", metavar="CONTAINER...", type=CONTAINER, nargs=-1)
def rm(force: bool, every: bool, names: tuple[str, ...]) -> None:
    """Remove containers and what they have written.

    \b
    Example:
      polytropo rm -f db
    """
    from polytropo.containers import engine, records
    from polytropo.containers.rootless import find_inside
    from polytropo.state import State

    state = State.open()
    engine.reap_all(state)
    chosen = records.all_containers(state) if every else [find_inside(state, name) for name in _some(names)]
    for container in {container.id: container for container in chosen}.values():
        engine.remove(state, container, force=force)
        click.echo(container.name)


@click.command()
@click.option("-a", "--author", default="", help="Who made it.")
@click.option("-m", "--message", default="", help="What was changed.")
@click.option("-c", "--change", "changes", multiple=True, metavar="INSTRUCTION", help="Change its settings.")
@click.argument("name", metavar="CONTAINER", type=CONTAINER)
@click.argument("image", required=False)
def commit(author: str, message: str, changes: tuple[str, ...], name: str, image: str | None) -> None:
    """Make an image of what a container has written, as a layer over its own image.

    \b
    Example:
      polytropo commit -c 'CMD ["sqlite3"]' db sqlite:1
    """
    from polytropo.containers import committing, engine
    from polytropo.containers.rootless import find_inside
    from polytropo.state import State

    state = State.open()
    engine.reap_all(state)
    container = find_inside(state, name)
    made = committing.commit(state, container, image, author=author, message=message, changes=changes)
    click.echo(made.digest)


def _some(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise click.UsageError("Name a container, or give --all.")
    return names
