"""Which ends a `cp` has, and the copy between them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polytropo.containers import copying, engine
from polytropo.containers.copying import Place
from polytropo.containers.rootless import find_inside
from polytropo.errors import PolytropoError
from polytropo.state import State


def transfer(state: State, source: str, target: str, *, archive: bool) -> None:
    """Copies between the host and a container, as a person named the ends. Raises PolytropoError."""
    (from_name, from_path), (to_name, to_path) = _split(source), _split(target)
    if (from_name is None) == (to_name is None):
        raise PolytropoError(
            f"either {source} or {target} has to be in a container, written as CONTAINER:PATH"
        )
    name = from_name if from_name is not None else to_name
    assert name is not None
    with engine.mounted_root(state, find_inside(state, name)) as root, _host_root() as host:
        if from_name is not None:
            inside = Place(root, from_path or "/", source)
            if to_path == "-":
                _refuse_terminal(sys.stdout.isatty(), "standard output")
                copying.pack(inside, sys.stdout.buffer)
            else:
                copying.copy(inside, Place(host, _absolute(to_path), target), archive=archive)
        else:
            inside = Place(root, to_path or "/", target)
            if from_path == "-":
                _refuse_terminal(sys.stdin.isatty(), "standard input")
                copying.unpack(sys.stdin.buffer, inside, archive=archive)
            else:
                copying.copy(Place(host, _absolute(from_path), source), inside, archive=archive)


def _split(text: str) -> tuple[str | None, str]:
    """Container and path; no container for a path of the host, which may hold colons after a slash."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or name in ("", ".", ".."):
        return None, text
    return name, path


def _absolute(path: str) -> str:
    """`path` from the root, with the slash or dot at its end that means something to cp."""
    return path if path.startswith("/") else f"{Path.cwd()}/{path}"


@contextmanager
def _host_root() -> Iterator[int]:
    descriptor = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _refuse_terminal(is_terminal: bool, what: str) -> None:
    if is_terminal:
        raise PolytropoError(f"{what} is a terminal, which has no use for an archive; redirect it")
