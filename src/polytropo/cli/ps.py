"""`polytropo ps`: the containers."""

from typing import Any

import click

from polytropo.cli.options import TENANT, json_option


@click.command()
@click.option("-a", "--all", "every", is_flag=True, help="Also those that do not run.")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@click.option("--no-trunc", "whole", is_flag=True, help="Whole ids and commands.")
@click.option("--tenant", type=TENANT, help="Only this tenant's.")
@json_option
def ps(every: bool, quiet: bool, whole: bool, tenant: str | None, as_json: bool) -> None:
    """List containers.

    \b
    Example:
      polytropo ps -a
    """
    from polytropo.cli.output import print_json, print_table
    from polytropo.containers import describe, engine, records
    from polytropo.state import State
    from polytropo.tenants import get_tenant

    state = State.open()
    if tenant is not None:
        get_tenant(state, tenant)
    engine.reap_all(state)
    shown = []
    for container in records.all_containers(state):
        if tenant in (None, container.tenant):
            described = describe.summary(state, container)
            if every or described["status"] == "running":
                shown.append(described)
    if as_json:
        print_json(shown)
        return
    if quiet:
        for each in shown:
            click.echo(each["id"] if whole else each["id"][: records.SHORT_ID_LENGTH])
        return
    rows = [_row(each, whole) for each in shown]
    print_table(("container id", "image", "command", "created", "status", "tenant", "name"), rows)


def _row(shown: dict[str, Any], whole: bool) -> tuple[object, ...]:
    from polytropo.containers import describe, records

    command = " ".join(shown["args"])
    if not whole and len(command) > 24:
        command = command[:23] + "…"
    container_id = shown["id"] if whole else shown["id"][: records.SHORT_ID_LENGTH]
    created = f"{describe.age(shown['created_unix_s'])} ago"
    return (
        container_id,
        shown["image"],
        command,
        created,
        describe.state_in_words(shown),
        shown["tenant"],
        shown["name"],
    )
