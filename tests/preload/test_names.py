"""Names on a mount, asked for again and again with the library: what is kept is what the kernel says."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.preload.conftest import Compile
from tests.preload.test_shared_reads import OnMount


def mount(isolated: Isolated, kind: str) -> Path:
    """A mount of an empty directory, or of a union with nothing in it."""
    directory, lower = isolated.directory / "names", isolated.directory / "lower"
    mountpoint = isolated.directory / "mnt"
    for made in (directory, lower, mountpoint):
        made.mkdir(mode=0o755)
    upper: dict[str, object] = {
        "kind": "dir",
        "path": str(directory),
        "coherence": "shared" if kind == "shared" else "exclusive",
    }
    root = upper
    if kind.startswith("union"):
        below = {"kind": "dir", "path": str(lower), "coherence": "immutable", "read_only": True}
        root = {"kind": "union", "lowers": [below], "upper": upper}
    document = {"version": 1, "root": root, "channel_writes": kind.endswith("writes")}
    stack = isolated.directory / "stack.json"
    stack.write_text(json.dumps(document))
    isolated.polytropo("mount", stack, mountpoint)
    return mountpoint


@pytest.mark.parametrize("kind", ["exclusive", "exclusive, writes", "union, writes", "shared"])
def test_names_are_as_the_kernel_says(
    isolated: Isolated, library: Path, compile_program: Compile, kind: str
) -> None:
    """Between changes by this process and others; with other rights, roots and directories."""
    program = compile_program("names")
    place = OnMount(isolated, mount(isolated, kind))
    # Of a shared one the kernel keeps nothing, so each question of the program's own is a request.
    done = place.run(program, "15" if kind == "shared" else "150")
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done
    report = place.trace.read_text()
    if kind.endswith("writes"):
        # Those of the first process, the others are its children.
        assert max(map(int, re.findall(r"in the process (\d+)", report))) > 10_000, report


@pytest.mark.parametrize("kind", ["exclusive", "exclusive, writes", "union, writes", "shared"])
def test_directories_are_as_the_kernel_says(
    isolated: Isolated, library: Path, compile_program: Compile, kind: str
) -> None:
    """Listed and walked through while names change, and descriptors are duplicated, inherited, made real."""
    program = compile_program("directories")
    place = OnMount(isolated, mount(isolated, kind))
    done = place.run(program, "15" if kind == "shared" else "150")
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done
    if kind.endswith("writes"):
        report = place.trace.read_text()
        assert max(map(int, re.findall(r"in the process (\d+)", report))) > 300, report
