"""What `run` and `exec` do, however their command line was read."""

import sys
from pathlib import Path


def run(
    *,
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
    share_image: bool,
    cidfile: Path | None,
    runtime: str,
    preload: bool | None,
    image: str,
    command: tuple[str, ...],
) -> int:
    """Runs a program in a new container; returns its status."""
    from polytropo.containers.foreground import run as run_container
    from polytropo.containers.order import Order
    from polytropo.containers.runtime import StartError
    from polytropo.preload_mode import mode_of
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
        share_image=share_image,
        terminal=tty,
        stdin_open=interactive,
        remove_at_end=remove,
        runtime=runtime,
        preload=mode_of(preload),
    )
    try:
        return run_container(State.open(), order, detach=detach, cid_file=cidfile, tell=print)
    except StartError as error:
        print(f"polytropo: {error}", file=sys.stderr)
        return error.status


def execute(
    *,
    interactive: bool,
    tty: bool,
    user: str | None,
    workdir: str | None,
    environment: tuple[str, ...],
    env_files: tuple[Path, ...],
    name: str,
    command: tuple[str, ...],
) -> int:
    """Runs one more program in a container that runs; returns its status."""
    from polytropo.containers import execution, order, rootless
    from polytropo.state import State

    state = State.open()
    wanted = execution.ExecOrder(
        command=command,
        environment=order.given_environment(environment, env_files),
        user=user,
        cwd=workdir,
        terminal=tty,
        stdin_open=interactive,
    )
    return execution.execute(state, rootless.find_inside(state, name), wanted)
