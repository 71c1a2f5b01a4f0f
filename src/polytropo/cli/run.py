"""`polytropo run`: a program in a new container."""

from typing import Any

import click

from polytropo.cli.options import IMAGE, PATH, TENANT


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--tenant", type=TENANT, help="The tenant; without it the default one.")
@click.option(
    "-v",
    "--volume",
    "volumes",
    multiple=True,
    metavar="SOURCE:PATH[:ro]",
    help="Show a volume or a path of the host.",
)
@click.option("-i", "--interactive", is_flag=True, help="Pass our input on.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("-d", "--detach", is_flag=True, help="Leave it in the background and print its id.")
@click.option("--rm", "remove", is_flag=True, help="Remove it at its end.")
@click.option("--name", help="Its name; without it one is made up.")
@click.option("-e", "--env", "environment", multiple=True, metavar="NAME[=VALUE]", help="Set a variable.")
@click.option("--env-file", "env_files", multiple=True, type=PATH, help="Set the variables in a file.")
@click.option("-w", "--workdir", metavar="PATH", help="Where it starts.")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Who it runs as.")
@click.option("--entrypoint", metavar="PROGRAM", help="Instead of the image's.")
@click.option("--hostname", metavar="NAME", help="Its host name.")
@click.option(
    "--network", type=click.Choice(["host", "none"]), default="host", help="The host's network, or none."
)
@click.option("--read-only", is_flag=True, help="Its root cannot be written to.")
@click.option(
    "--share-image",
    is_flag=True,
    help="Keep the image's files in memory once for all containers; opening them takes longer.",
)
@click.option("--cidfile", type=PATH, help="Write its id there.")
@click.option(
    "--preload/--no-preload",
    default=None,
    help="Reach files through shared memory: soon and also to write; by default to read, once it pays.",
)
@click.option("--runtime", default="runc", help="The OCI runtime: runc or crun.")
@click.argument("image", type=IMAGE)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(context: click.Context, /, **words: Any) -> None:
    """Run a program in a new container; its status is ours.

    \b
    Example:
      polytropo run --rm -it debian bash
      polytropo run -d --name db -v orders:/var/lib/db debian db-server
    """
    from polytropo.cli import programs

    context.exit(programs.run(**words))
