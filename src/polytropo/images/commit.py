"""A container's changes as a new image."""

import json
import shlex
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polytropo.errors import storage_errors
from polytropo.images.config import LAYERS_MAX
from polytropo.images.errors import ImageError, shown
from polytropo.images.flatten import flattened
from polytropo.images.layers import use_layers
from polytropo.images.ownership import Ownership
from polytropo.images.references import normalized
from polytropo.images.store import Image, add_image
from polytropo.images.streams import ChunkReader
from polytropo.images.unpacking import add_unknown_layer
from polytropo.images.walk import Tree
from polytropo.state import State


def commit(
    state: State,
    base: Image,
    upper: Path,
    ownership: Ownership,
    *,
    name: str | None = None,
    author: str = "",
    message: str = "",
    changes: Sequence[str] = (),
    mounted: Collection[bytes] = (),
) -> Image:
    """Makes an image of `base` and a writable layer over it, which nobody should be writing meanwhile.

    What is empty there at one of the places `mounted` was made to mount something on it, and is left out.

    `changes` are instructions as in a Containerfile that change the configuration: CMD, ENTRYPOINT, ENV,
    EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR. Raises ImageError.
    """
    names = [] if name is None else [normalized(name)]
    config = json.loads(base.config_json)
    for change in changes:
        _apply(config, change)
    if len(base.diff_ids) >= LAYERS_MAX:
        raise ImageError(f"the image {base.id} has {LAYERS_MAX} layers already, and more cannot be used")
    with use_layers(state), storage_errors("read the container's files", upper), ExitStack() as trees:
        lowers = [
            trees.enter_context(Tree(path, record.ownership))
            for path, record in zip(base.layers, reversed(base.layer_records), strict=True)
        ]
        source = ChunkReader(flattened(trees.enter_context(Tree(upper, ownership)), lowers, mounted))
        layer = add_unknown_layer(state, source, needs_end=True)
        created = datetime.now(UTC).isoformat()
        config["rootfs"]["diff_ids"].append(layer.diff_id)
        config["created"] = created
        if author:
            config["author"] = author
        history = {"created": created, "created_by": "polytropo commit", "author": author, "comment": message}
        config["history"] = [*(config.get("history") or []), {k: v for k, v in history.items() if v}]
        return add_image(state, json.dumps(config, separators=(",", ":")).encode(), names)


def _apply(config: dict[str, Any], change: str) -> None:
    """Changes a configuration by one instruction."""
    word, _, rest = change.strip().partition(" ")
    instruction = _INSTRUCTIONS.get(word.upper())
    rest = rest.strip()
    if instruction is None or not rest:
        raise ImageError(
            f"{shown(change)} is no change; write {', '.join(sorted(_INSTRUCTIONS))} and a value,"
            " such as 'CMD [\"sh\"]'"
        )
    if not isinstance(config.get("config"), dict):
        config["config"] = {}
    instruction(config["config"], rest)


def _command(key: str) -> Callable[[dict[str, Any], str], None]:
    def apply(config: dict[str, Any], rest: str) -> None:
        config[key] = _words(rest) if rest.startswith("[") else ["/bin/sh", "-c", rest]

    return apply


def _plain(key: str) -> Callable[[dict[str, Any], str], None]:
    def apply(config: dict[str, Any], rest: str) -> None:
        config[key] = rest

    return apply


def _members(key: str) -> Callable[[dict[str, Any], str], None]:
    def apply(config: dict[str, Any], rest: str) -> None:
        words = _words(rest) if rest.startswith("[") else rest.split()
        config[key] = (config.get(key) or {}) | {word: {} for word in words}

    return apply


def _env(config: dict[str, Any], rest: str) -> None:
    for name, value in _pairs(rest):
        kept = [each for each in config.get("Env") or [] if not each.startswith(f"{name}=")]
        config["Env"] = [*kept, f"{name}={value}"]


def _label(config: dict[str, Any], rest: str) -> None:
    config["Labels"] = (config.get("Labels") or {}) | dict(_pairs(rest))


def _expose(config: dict[str, Any], rest: str) -> None:
    ports: dict[str, Any] = {port if "/" in port else f"{port}/tcp": {} for port in rest.split()}
    config["ExposedPorts"] = (config.get("ExposedPorts") or {}) | ports


def _pairs(rest: str) -> list[tuple[str, str]]:
    """NAME=VALUE words, or the old form NAME VALUE."""
    first, _, value = rest.partition(" ")
    if "=" not in first:
        return [(first, value.strip())]
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise ImageError(f"{shown(rest)} is no list of NAME=VALUE: {error}") from None
    if wrong := next((word for word in words if "=" not in word), None):
        raise ImageError(f"{shown(wrong)} is no NAME=VALUE")
    return [(name, value) for name, _, value in (word.partition("=") for word in words)]


def _words(rest: str) -> list[str]:
    try:
        words = json.loads(rest)
    except json.JSONDecodeError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ImageError(f'{shown(rest)} is no JSON list of words; write one like ["sh", "-c", "ls"]')
    return words


_INSTRUCTIONS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "CMD": _command("Cmd"),
    "ENTRYPOINT": _command("Entrypoint"),
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": _label,
    "STOPSIGNAL": _plain("StopSignal"),
    "USER": _plain("User"),
    "VOLUME": _members("Volumes"),
    "WORKDIR": _plain("WorkingDir"),
}
