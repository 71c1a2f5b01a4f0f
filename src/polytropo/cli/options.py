"""Options and argument types that several commands share, and the completion of names."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from polytropo.state import State, default_home
from polytropo.units import parse_size

Function = TypeVar("Function", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """A size such as 2GiB; the value is in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_size(value)


class _Name(click.ParamType[str]):
    """A name of something in the state directory; completed in the shell, looked up by the command."""

    def __init__(self, name: str, find: Callable[[State], Iterator[str]]) -> None:
        self.name = name
        self._find = find

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, context: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            # Not State.open: a completion must change nothing.
            names = sorted(set(self._find(State(default_home()))))
        except Exception:  # a shell that waits for words has no place for an error
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _tenants(state: State) -> Iterator[str]:
    return (path.parent.name for path in state.tenants.glob("*/tenant.json"))


def _volumes(state: State) -> Iterator[str]:
    return (path.parent.name for path in state.volumes.glob("*/*/volume.json"))


SIZE = Size()
TENANT = _Name("tenant", _tenants)
VOLUME = _Name("volume", _volumes)
PATH = click.Path(path_type=Path)


def tenant_option(function: Function) -> Function:
    """`--tenant NAME`, given as `tenant: str | None`; None is the default tenant."""
    return click.option("-t", "--tenant", type=TENANT, help="The tenant; without it the default one.")(
        function
    )


def json_option(function: Function) -> Function:
    """`--json`, given as `as_json: bool`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def yes_option(function: Function) -> Function:
    """`--yes`, given as `yes: bool`."""
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(function)
