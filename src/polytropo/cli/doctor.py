"""`polytropo doctor`: what this host offers and lacks."""

import click

from polytropo.cli.options import json_option

_SIGNS = {"good": ("ok", "green"), "lacking": ("less", "yellow"), "missing": ("MISSING", "red")}


@click.command()
@click.option("--fix", is_flag=True, help="Clear mounts whose service is dead.")
@json_option
@click.pass_context
def doctor(context: click.Context, fix: bool, as_json: bool) -> None:
    """Say what this host offers, what it lacks and what to do.

    "less" works, without something that would be good to have. The status is 1 only when something that is
    needed is missing.

    \b
    Example:
      polytropo doctor
      polytropo doctor --fix
    """
    from polytropo.cli.output import print_json
    from polytropo.doctor import examine

    found = examine(fix=fix)
    if as_json:
        print_json(found)
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            word, colour = _SIGNS[finding.level]
            advice = f"; {finding.advice}" if finding.advice else ""
            sign = click.style(word.ljust(7), fg=colour)
            click.echo(f"{sign}  {finding.name.ljust(width)}  {finding.sentence}{advice}")
    if any(finding.level == "missing" for finding in found):
        context.exit(1)
