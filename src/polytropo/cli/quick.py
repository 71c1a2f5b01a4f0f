"""The command lines of `run` and `exec`, read without click, whose import takes a third of a short `run`.

Only plain ones: whatever is not understood at once, mistakes and `--help` among them, is left to click. The
tables repeat what `cli/run.py` and `cli/exec.py` declare; a test holds them together by random command lines.
"""

import os
from collections.abc import Mapping
from typing import Any

from polytropo.cli.failures import status_of

COMPLETE_VARIABLE = "_POLYTROPO_COMPLETE"

FLAG, OFF, ONE, MANY = "flag", "off", "one", "many"
_EITHER_WAY = {
    "-i": ("interactive", FLAG),
    "--interactive": ("interactive", FLAG),
    "-t": ("tty", FLAG),
    "--tty": ("tty", FLAG),
    "-e": ("environment", MANY),
    "--env": ("environment", MANY),
    "--env-file": ("env_files", MANY),
    "-w": ("workdir", ONE),
    "--workdir": ("workdir", ONE),
    "-u": ("user", ONE),
    "--user": ("user", ONE),
}
_RUN = {
    **_EITHER_WAY,
    "--tenant": ("tenant", ONE),
    "-v": ("volumes", MANY),
    "--volume": ("volumes", MANY),
    "-d": ("detach", FLAG),
    "--detach": ("detach", FLAG),
    "--rm": ("remove", FLAG),
    "--name": ("name", ONE),
    "--entrypoint": ("entrypoint", ONE),
    "--hostname": ("hostname", ONE),
    "--network": ("network", ONE),
    "--read-only": ("read_only", FLAG),
    "--share-image": ("share_image", FLAG),
    "--cidfile": ("cidfile", ONE),
    "--runtime": ("runtime", ONE),
    "--preload": ("preload", FLAG),
    "--no-preload": ("preload", OFF),
}
# For each command: its options, its name for the first word after them, defaults.
TABLES: dict[str, tuple[Mapping[str, tuple[str, str]], str, Mapping[str, str | None]]] = {
    "run": (_RUN, "image", {"network": "host", "runtime": "runc", "preload": None}),
    "exec": (_EITHER_WAY, "name", {}),
}
_PATHS = ("env_files", "cidfile")
_NETWORKS = ("host", "none")


def run(arguments: list[str]) -> int | None:
    """Runs the command line and returns its status; None, with nothing done, if click is to read it."""
    if COMPLETE_VARIABLE in os.environ or "POLYTROPO_DEBUG" in os.environ:
        return None
    words = parse(arguments)
    if words is None:
        return None
    from polytropo.cli import programs

    try:
        return programs.run(**words) if arguments[0] == "run" else programs.execute(**words)
    except BaseException as error:
        return status_of(error, arguments[0])


def parse(arguments: list[str]) -> dict[str, Any] | None:
    """What click would make of a command line; None for one that is not plain."""
    if not arguments or arguments[0] not in TABLES:
        return None
    table, first, defaults = TABLES[arguments[0]]
    values: dict[str, Any] = {}
    for name, kind in table.values():
        flag = defaults.get(name, False)
        values[name] = {FLAG: flag, OFF: flag, ONE: defaults.get(name), MANY: ()}[kind]
    rest = arguments[1:]
    while rest and rest[0].startswith("-"):
        taken = _take_option(table, values, rest)
        if taken is None:
            return None
        rest = rest[taken:]
    if not rest or not rest[0] or (arguments[0] == "exec" and len(rest) < 2):
        return None
    if values.get("network", "host") not in _NETWORKS:
        return None
    _make_paths(values)
    return values | {first: rest[0], "command": tuple(rest[1:])}


def _take_option(table: Mapping[str, tuple[str, str]], values: dict[str, Any], rest: list[str]) -> int | None:
    """Notes the option in front of `rest` and returns how many words it takes; None if it is not plain."""
    word, equals, value = rest[0].partition("=")
    if word.startswith("--"):
        known = table.get(word)
        if known is None or (known[1] in (FLAG, OFF) and equals):
            return None
        if known[1] in (FLAG, OFF):
            values[known[0]] = known[1] == FLAG
            return 1
        return _note(values, known, [value] if equals else rest[1:2], 1 if equals else 2)
    letters = rest[0][1:]
    if not letters:
        return None
    for place, letter in enumerate(letters, start=1):
        known = table.get(f"-{letter}")
        if known is None:
            return None
        if known[1] != FLAG:
            attached = letters[place:]
            return _note(values, known, [attached] if attached else rest[1:2], 1 if attached else 2)
        values[known[0]] = True
    return 1


def _note(values: dict[str, Any], known: tuple[str, str], value: list[str], words: int) -> int | None:
    if not value or not value[0] or value[0].startswith(("-", "=")):
        return None
    name, kind = known
    values[name] = (*values[name], value[0]) if kind == MANY else value[0]
    return words


def _make_paths(values: dict[str, Any]) -> None:
    if values.get("cidfile") is None and not values["env_files"]:
        return
    from pathlib import Path

    values["env_files"] = tuple(map(Path, values["env_files"]))
    if values.get("cidfile") is not None:
        values["cidfile"] = Path(values["cidfile"])
