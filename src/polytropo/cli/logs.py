"""`polytropo logs`: what a container has printed."""

import click

from polytropo.cli.options import CONTAINER


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on until it ends.")
@click.option("--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines.")
@click.option("-t", "--timestamps", is_flag=True, help="With the time of each line.")
@click.argument("name", metavar="CONTAINER", type=CONTAINER)
def logs(follow: bool, tail: int | None, timestamps: bool, name: str) -> None:
    """Show what a container has printed.

    \b
    Example:
      polytropo logs -f --tail 20 db
    """
    from polytropo.containers import records
    from polytropo.containers.logs import print_log
    from polytropo.state import State

    state = State.open()
    files = records.files_of(state, records.find(state, name).id)

    def is_running() -> bool:
        return files.record.exists() and records.status_of(files) == "running"

    print_log(files, tail=tail, timestamps=timestamps, follow=follow, is_running=is_running)
