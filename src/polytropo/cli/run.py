"""`polytropo run`: a program in a new container."""

from pathlib import Path

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
@click.option("--cidfile", type=PATH, help="Write its id there.")
@click.option("--runtime", default="runc", help="The OCI runtime: runc or crun.")
@click.argument("image", type=IMAGE)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(
    context: click.Context,
    tenant: str | None,
    volumes: tuple[str, ...],
    interactive: bool,
    tty: bool,
    detach: bool,
    remove: bool,
    name: str | None,
    environment: tuple[str, ...],
    env_files: tuple[Path, ...],
    workdir: str | None,
    user: str | None,
    entrypoint: str | None,
    hostname: str | None,
    network: str,
    read_only: bool,
    cidfile: Path | None,
    runtime: str,
    image: str,
    command: tuple[str, ...],
) -> None:
    """Run a program in a new container; its status is ours.

    \b
    Example:
      polytropo run --rm -it debian bash
      polytropo run -d --name db -v orders:/var/lib/db debian db-server
    """
    from polytropo.containers.foreground import run as run_container
    from polytropo.containers.order import Order
    from polytropo.containers.runtime import StartError
    from polytropo.state import State

    order = Order(
        image=image,
        command=command,
        tenant=tenant,
        name=name,
        volumes=volumes,
        environment=environment,
        env_files=env_files,
        cwd=workdir,
        user=user,
        entrypoint=entrypoint,
        hostname=hostname,
        network="none" if network == "none" else "host",
        read_only=read_only,
        terminal=tty,
        stdin_open=interactive,
        remove_at_end=remove,
        runtime=runtime,
    )
    try:
        status = run_container(State.open(), order, detach=detach, cid_file=cidfile, tell=click.echo)
    except StartError as error:
        click.echo(f"polytropo: {error}", err=True)
        status = error.status
    context.exit(status)
