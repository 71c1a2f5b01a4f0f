"""`polytropo exec`: one more program in a container that runs."""

from typing import Any

import click

from polytropo.cli.options import CONTAINER, PATH


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Pass our input on.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Who it runs as.")
@click.option("-w", "--workdir", metavar="PATH", help="Where it starts.")
@click.option("-e", "--env", "environment", multiple=True, metavar="NAME[=VALUE]", help="Set a variable.")
@click.option("--env-file", "env_files", multiple=True, type=PATH, help="Set the variables in a file.")
@click.argument("name", metavar="CONTAINER", type=CONTAINER)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def execute(context: click.Context, /, **words: Any) -> None:
    """Run one more program in a container that runs; its status is ours.

    \b
    Example:
      polytropo exec -it db bash
    """
    from polytropo.cli import programs

    context.exit(programs.execute(**words))
