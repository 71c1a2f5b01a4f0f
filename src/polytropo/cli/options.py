"""Options and argument types that several commands share, and the completion of names."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from polytropo.state import State, default_home
from polytropo.units import parse_size

Function = TypeVar("Function", bound=Callable[..., Any])


def is_path(text: str) -> bool:
    """Whether a word that could name an image or a path is a path."""
    return text.startswith(("/", "./", "../")) or text in (".", "..") or text.endswith(".json")


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


def _images(state: State) -> Iterator[str]:
    import json

    for path in state.images.glob("*.json"):
        yield from json.loads(path.read_bytes()).get("names", [])


def _containers(state: State) -> Iterator[str]:
    import json

    for path in state.containers.glob("*/container.json"):
        yield json.loads(path.read_bytes())["name"]


class _Stack(_Name):
    """An image's name, or a path."""

    def shell_complete(
        self, context: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        paths = [CompletionItem(incomplete, type="file")] if is_path(incomplete) else []
        return super().shell_complete(context, param, incomplete) or paths


class _Mountpoint(click.Path):
    """A directory that one of our services mounted."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def shell_complete(
        self, context: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from polytropo.mounts import our_mounts

        try:
            found = sorted({str(mount.mountpoint) for mount in our_mounts()})
        except OSError:
            found = []
        matching = [CompletionItem(path) for path in found if path.startswith(incomplete)]
        return matching or [CompletionItem(incomplete, type="dir")]


SIZE = Size()
TENANT = _Name("tenant", _tenants)
VOLUME = _Name("volume", _volumes)
IMAGE = _Name("image", _images)
CONTAINER = _Name("container", _containers)
STACK = _Stack("stack", _images)
MOUNTPOINT = _Mountpoint()
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
