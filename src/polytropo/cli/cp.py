"""`polytropo cp`: files between the host and a container."""

import click


@click.command()
@click.option("-a", "--archive", is_flag=True, help="Keep owners.")
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET")
def cp(archive: bool, source: str, target: str) -> None:
    """Copy files into a container or out of it; CONTAINER:PATH names one there, - is a tar archive.

    \b
    Example:
      polytropo cp db:/etc/db.conf .
      polytropo cp ./site web:/srv
      tar c site | polytropo cp - web:/srv
    """
    from polytropo.containers.transfer import transfer
    from polytropo.state import State

    transfer(State.open(), source, target, archive=archive)
