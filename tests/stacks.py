"""Stacks on real mounts, for tests that run programs on them."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import Isolated

KINDS = ("dir", "union")
# A union of which the kernel reads the lowers itself, whatever their size.
PASSING = "passing-union"
# A union of which the kernel holds back writes.
WRITING_BACK = "writing-back-union"
# In front of a kind: programs may also write through shared memory.
PRIVATE = "private-"
# A union that programs may only read through shared memory, as roots of containers are.
READING = f"{PRIVATE}reading-union"


@dataclass(frozen=True)
class Mounted:
    """A stack of one kind mounted at `at`; `below` holds the directories that it stands on."""

    place: Isolated
    at: Path
    below: Path
    kind: str

    def unmount(self) -> None:
        self.place.polytropo("unmount", self.at)

    def preload_variables(self) -> dict[str, str]:
        """The variables with which programs in the same namespace load the preload library for this mount."""
        shown = self.place.polytropo("on", "--preload", self.at, "--", "env").stdout
        variables = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        wanted = ("LD_PRELOAD", "POLYTROPO_CHANNEL", "POLYTROPO_MOUNT")
        assert all(variables.get(name) for name in wanted), shown
        return {name: variables[name] for name in wanted}


def document(kind: str, below: Path) -> dict[str, Any]:
    """A stack document of one kind over directories in `below`, which are made."""
    if kind == READING:
        return document("union", below)
    if kind.startswith(PRIVATE):
        return {**document(kind.removeprefix(PRIVATE), below), "channel_writes": True}
    upper, low, lowest = (below / name for name in ("upper", "low", "lowest"))
    for directory in (upper, low, lowest):
        directory.mkdir(parents=True, exist_ok=True)
    exclusive = {"kind": "dir", "path": str(upper), "coherence": "exclusive"}
    if kind == "dir":
        return {"version": 1, "root": exclusive}
    lowers = [
        {"kind": "dir", "path": str(path), "read_only": True, "coherence": "immutable"}
        for path in (low, lowest)
    ]
    stack = {"version": 1, "root": {"kind": "union", "lowers": lowers, "upper": exclusive}}
    options: dict[str, dict[str, Any]] = {
        "union": {},
        PASSING: {"passthrough": True, "passthrough_min_bytes": 0},
        WRITING_BACK: {"write_back": True},
    }
    return {**stack, **options[kind]}


def write_stack(path: Path, root: Mapping[str, object], **options: object) -> Path:
    """Writes a stack document with this root."""
    path.write_text(json.dumps({"version": 1, "root": root, **options}))
    return path


def mount(place: Isolated, kind: str, name: str = "stack") -> Mounted:
    """Mounts an empty stack (or one whose lowers were filled before under the same name)."""
    below = place.directory / f"{name}.below"
    at = place.directory / name
    at.mkdir(exist_ok=True)
    file = place.directory / f"{name}.json"
    file.write_text(json.dumps(document(kind, below)))
    for directory in (below, *below.iterdir(), at):
        directory.chmod(0o755)
    place.polytropo("mount", file, at)
    return Mounted(place, at, below, kind)


def fill(low: Path, lowest: Path, plain: Path) -> None:
    """Fills two lower layers and a plain directory so that the layers' union is the plain one."""
    for name in ("a", "b"):
        for layer in (low, lowest):
            (layer / name).mkdir(parents=True)
            (layer / name / "d").mkdir()
    (lowest / "a" / "a").write_bytes(b"lowest" * 1000)
    (low / "a" / "b").write_bytes(b"low" * 30_000)
    # Large enough to be copied up in blocks.
    (low / "b" / "a").write_bytes(b"many" * 150_000)
    with (lowest / "b" / "b").open("wb") as sparse:
        sparse.write(b"data" * 50_000)
        sparse.truncate(800_000)
    (lowest / "a" / "gone").write_bytes(b"hidden")
    (low / "a" / ".wh.gone").write_bytes(b"")
    (lowest / "b" / "d" / "hidden").write_bytes(b"hidden")
    (low / "b" / "d" / ".wh..wh..opq").write_bytes(b"")
    (lowest / "c").symlink_to("a/a")
    (low / "d").write_bytes(b"")
    os.setxattr(low / "d", "user.one", b"from below")
    for layer in (lowest, low):
        shutil.copytree(
            layer,
            plain,
            symlinks=True,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(".wh.*", "gone", "hidden"),
        )
