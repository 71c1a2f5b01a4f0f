"""Names on a mount, asked for again and again with the library: what is kept is what the kernel says."""

import json
import re
import sys
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


EXECUTABLE = """
import os
for name, mode in (("program", 0o755), ("text", 0o644)):
    os.close(os.open(name, os.O_CREAT, mode))
ways = (os.X_OK, os.X_OK | os.R_OK, os.R_OK)
for _ in range(200):
    found = [os.access(name, way) for name in ("program", "text", "none", ".") for way in ways]
print(found)
"""


@pytest.mark.parametrize("flags", ["exec", "noexec"])
def test_what_may_be_executed_depends_on_the_mount(isolated: Isolated, library: Path, flags: str) -> None:
    mountpoint = mount(isolated, "exclusive, writes")
    isolated.run("mount", "-o", f"remount,bind,{flags}", mountpoint)
    place = OnMount(isolated, mountpoint)
    plain = place.run(sys.executable, "-c", EXECUTABLE, preload=False)
    done = place.run(sys.executable, "-c", EXECUTABLE)
    assert (done.stdout, done.stderr) == (plain.stdout, plain.stderr) and "True" in done.stdout
    assert ("[True, True, True, False" in done.stdout) == (flags == "exec")
    report = place.trace.read_text()
    assert place.in_process() > (2000 if flags == "exec" else 500), report


@pytest.mark.parametrize("kind", ["exclusive, writes", "union, writes"])
def test_what_is_mounted_inside_is_the_kernels(isolated: Isolated, library: Path, kind: str) -> None:
    """Names and listings where something else is mounted, by paths and by an open directory."""
    script = """
import os
for turn in range(12):
    os.mkdir(f"x{turn}")
    for again in range(3):
        assert os.listdir(f"x{turn}") == []
for turn in range(5):
    above = os.open("d", os.O_RDONLY | os.O_DIRECTORY)
    assert sorted(os.listdir("d")) == ["below", "beside"], os.listdir("d")
    own, other = os.stat("d").st_dev, os.stat("d/below").st_dev
    assert os.stat("beside", dir_fd=above).st_dev == own != other == os.stat("below", dir_fd=above).st_dev
    assert {entry.name: entry.stat().st_dev for entry in os.scandir("d")} == {"below": other, "beside": own}
    assert os.listdir("d/below") == ["theirs"], os.listdir("d/below")
    assert os.path.exists("d/below/theirs") and not os.path.exists("d/below/ours")
    assert not os.access("d/below/ours", os.F_OK)
    os.close(above)
print("as the kernel says")
"""
    prepare = "mkdir -p d/below d/beside && touch d/below/ours && mount -t tmpfs none d/below"
    words = f'{prepare} && touch d/below/theirs && exec "$0" -c "$1"'
    place = OnMount(isolated, mount(isolated, kind))
    done = place.run("sh", "-c", words, sys.executable, script)
    assert (done.returncode, done.stdout) == (0, "as the kernel says\n"), done
