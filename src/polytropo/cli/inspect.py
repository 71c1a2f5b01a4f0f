"""`polytropo inspect`: all that is known of containers."""

import click

from polytropo.cli.options import CONTAINER


@click.command()
@click.option("--json", "_as_json", is_flag=True, help="Print JSON, as it does anyway.")
@click.argument("names", metavar="CONTAINER...", type=CONTAINER, nargs=-1, required=True)
def inspect(_as_json: bool, names: tuple[str, ...]) -> None:
    """Show all that is known of containers, as JSON.

    \b
    Example:
      polytropo inspect db
    """
    from polytropo.cli.output import print_json
    from polytropo.containers import describe, engine, records
    from polytropo.state import State

    state = State.open()
    engine.reap_all(state)
    print_json([describe.whole(state, records.find(state, name)) for name in names])
