"""The command `polytropo`: finds the module of a command, and turns every failure into one sentence."""

import importlib
import os
from typing import Any

import click

from polytropo import __version__
from polytropo.cli.failures import PROGRAM, RUN_FAMILY, RUN_FAMILY_STATUS, printable, status_of
from polytropo.cli.quick import COMPLETE_VARIABLE

# Where each command lives. Only the module of the command that was asked for is imported.
COMMANDS = {
    "commit": "polytropo.cli.container:commit",
    "completion": "polytropo.cli.completion:completion",
    "cp": "polytropo.cli.cp:cp",
    "doctor": "polytropo.cli.doctor:doctor",
    "image": "polytropo.cli.image:image",
    "exec": "polytropo.cli.exec:execute",
    "inspect": "polytropo.cli.inspect:inspect",
    "kill": "polytropo.cli.container:kill",
    "logs": "polytropo.cli.logs:logs",
    "mount": "polytropo.cli.mount:mount",
    "on": "polytropo.cli.mount:on",
    "ps": "polytropo.cli.ps:ps",
    "rm": "polytropo.cli.container:rm",
    "run": "polytropo.cli.run:run",
    "start": "polytropo.cli.container:start",
    "stats": "polytropo.cli.stats:stats",
    "stop": "polytropo.cli.container:stop",
    "system": "polytropo.cli.system:system",
    "tenant": "polytropo.cli.tenant:tenant",
    "tune": "polytropo.cli.tune:tune",
    "umount": "polytropo.cli.mount:unmount",
    "unmount": "polytropo.cli.mount:unmount",
    "volume": "polytropo.cli.volume:volume",
    "wait": "polytropo.cli.container:wait",
}
ALIASES = frozenset({"umount"})  # work, but are not listed


class LazyGroup(click.Group):
    """A group whose commands are imported at use."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(COMMANDS.keys() - ALIASES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        place = COMMANDS.get(name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(context, arguments)
        context.find_root().meta["polytropo.command"] = name
        return name, command, rest


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
@click.option("--debug", is_flag=True, envvar="POLYTROPO_DEBUG", help="Show tracebacks of failures.")
def cli(debug: bool) -> None:
    """Containers on storage services of their own, one service a tenant.

    \b
    Example:
      polytropo image bootstrap debian
      polytropo run -it debian bash
    """


def run(arguments: list[str]) -> int:
    """Runs one command line and returns the status for the shell; failures are told on stderr."""
    context_meta: dict[str, Any] = {}
    debug = _debug_wanted(arguments)
    try:
        with cli.make_context(PROGRAM, _completed(arguments)) as context:
            context_meta = context.meta
            cli.invoke(context)
            return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        return _misuse(error, context_meta)
    except click.Abort:
        return status_of(KeyboardInterrupt(), None)
    except BaseException as error:
        return status_of(error, context_meta.get("polytropo.command"), debug=debug)


def _misuse(error: click.ClickException, meta: dict[str, Any]) -> int:
    message = error.format_message().rstrip(".")
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(message)
        return error.exit_code
    context = error.ctx if isinstance(error, click.UsageError) else None
    where = context.command_path if context else PROGRAM
    message = printable(message[:1].lower() + message[1:])
    click.echo(f"{PROGRAM}: {message}; see `{where} --help`", err=True)
    return RUN_FAMILY_STATUS if meta.get("polytropo.command") in RUN_FAMILY else error.exit_code


def _debug_wanted(arguments: list[str]) -> bool:
    """Whether --debug stands before the command; asked early, for failures before it is parsed."""
    before = arguments[: next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)]
    return "--debug" in before or os.environ.get("POLYTROPO_DEBUG", "") not in ("", "0")


def _completed(arguments: list[str]) -> list[str]:
    """The arguments, unless a shell asks for completions: then these are printed and that was all."""
    if instruction := os.environ.get(COMPLETE_VARIABLE):
        from click.shell_completion import shell_complete

        raise click.exceptions.Exit(shell_complete(cli, {}, PROGRAM, COMPLETE_VARIABLE, instruction))
    return arguments
