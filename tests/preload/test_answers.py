"""Programs that come later ask the service for nothing that one of the same rights was told."""

import re
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.preload.test_names import mount
from tests.preload.test_shared_reads import OnMount

KINDS = ["exclusive, writes", "union, writes"]
WALKS = ["find . -ls", "grep -r line .", "ls -lR"]
FILL = """
for directory in $(seq 40); do
    mkdir -p d$directory/deeper
    for file in $(seq 5); do echo "line $file of $directory" > d$directory/deeper/f$file; done
done
"""
NOBODY = "setpriv --reuid=4711 --regid=4711 --clear-groups"


def filled(isolated: Isolated, kind: str) -> OnMount:
    place = OnMount(isolated, mount(isolated, kind))
    assert place.run("sh", "-c", f"chmod 755 .; {FILL}", preload=False).returncode == 0
    return place


def requests(place: OnMount) -> int:
    """Of the program of a run that asked most."""
    return max((int(count) for count in re.findall(r"requests (\d+)", place.trace.read_text())), default=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("walk", WALKS)
def test_the_second_program_asks_for_nothing(isolated: Isolated, library: Path, kind: str, walk: str) -> None:
    place = filled(isolated, kind)
    plain = place.run(*walk.split(), preload=False)
    first = place.run(*walk.split())
    asked = requests(place)
    again = place.run(*walk.split())
    assert sorted(first.stdout.splitlines()) == sorted(plain.stdout.splitlines()), first.stderr
    assert again.stdout == first.stdout
    assert asked > 60, "the first one had to ask"
    # Where it is, and what it closes.
    assert requests(place) < 10, place.trace.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_changes_between_programs_are_seen(isolated: Isolated, library: Path, kind: str) -> None:
    """By either door, while others of the same rights keep what they were told."""
    place = filled(isolated, kind)
    changes = [
        "echo other > d1/deeper/f1",
        "mv d2 d41",
        "rm d3/deeper/f2",
        "chmod 600 d4/deeper/f3",
        "mkdir d5/new; echo new > d5/new/file",
        "mv d6/deeper/f1 d7/deeper/f1",
        "ln -s d8 link",
        "truncate -s 3 d9/deeper/f5",
    ]
    script = "find . -printf '%P %m %s %y\\n' | sort; grep -r . . | sort"
    for number, change in enumerate(changes):
        assert place.run("sh", "-c", change, preload=number % 2 == 0).returncode == 0
        plain = place.run("sh", "-c", script, preload=False).stdout
        for _ in range(2):
            assert place.run("sh", "-c", script).stdout == plain, change


def test_other_rights_are_weighed_anew(isolated: Isolated, library: Path) -> None:
    place = filled(isolated, KINDS[0])
    closed = "chmod 700 d1 d2/deeper; chmod 600 d3/deeper/f1"
    assert place.run("sh", "-c", closed, preload=False).returncode == 0
    for _ in range(2):
        assert place.run("grep", "-r", "line", ".").stdout.count("\n") == 200
        script = f"{NOBODY} grep -r line . 2>&1 | sort"
        plain = place.run("sh", "-c", script, preload=False).stdout
        assert plain.count("Permission denied") == 3, plain
        assert place.run("sh", "-c", script).stdout == plain
