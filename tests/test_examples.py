"""The examples do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Isolated

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def mnt(isolated: Isolated) -> Path:
    path = isolated.directory / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def data(isolated: Isolated) -> Path:
    path = isolated.directory / "data"
    path.mkdir()
    (path / "file").write_text("content\n")
    return path


def example(isolated: Isolated, name: str, *arguments: str | Path) -> str:
    return isolated.run(sys.executable, EXAMPLES / name, *arguments).stdout


def import_image(isolated: Isolated, directory: Path, name: str) -> None:
    archive = isolated.directory / "image.tar"
    subprocess.run(["tar", "-C", str(directory), "-cf", str(archive), "."], check=True, timeout=60)
    isolated.polytropo("image", "import", archive, "--name", name)


def test_every_example_is_listed_and_tried() -> None:
    files = {path.name for path in EXAMPLES.iterdir()} - {"README.md"}
    listed, tried = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert all(f"({name})" in listed and f'"{name}"' in tried for name in files)


def test_serve_directory(isolated: Isolated, data: Path, mnt: Path) -> None:
    told = example(isolated, "serve_directory.py", data, mnt)
    assert told == "         8  file\nwriting there: Read-only file system\n"
    assert isolated.run("ls", mnt).stdout == ""


def test_image_with_changes(isolated: Isolated, data: Path, mnt: Path) -> None:
    import_image(isolated, data, "debian")
    changes = isolated.directory / "changes"
    changes.mkdir()
    command = ("sh", "-c", "cat file; echo new >new; rm file")
    told = example(isolated, "image_with_changes.py", "debian", changes, mnt, *command)
    assert told == "content\n.wh.file\nnew\n"
    isolated.polytropo("volume", "create", "changes")
    isolated.polytropo("mount", EXAMPLES / "changes.json", mnt)
    assert isolated.run("cat", mnt / "file").stdout == "content\n", "the image stayed what it was"
    isolated.polytropo("unmount", mnt)


def test_failing_disk(isolated: Isolated, data: Path, mnt: Path) -> None:
    assert example(isolated, "failing_disk.py", data, mnt).splitlines() == [
        "the disk fills up: No space left on device; the file says 'one'",
        "the disk loses bytes: Input/output error; the file says 'one'",
        "the first write is short: saved; the file says 'one, two'",
    ]


def test_who_reads_what(isolated: Isolated, data: Path, mnt: Path) -> None:
    told = example(isolated, "who_reads_what.py", data, mnt, "sh", "-c", "cat file; echo 12 >new")
    lines = told.splitlines()
    assert lines[0] == "content" and lines[-1] == "read 8 B, wrote 3 B"
    assert any(line.startswith("create ") for line in lines)
    assert isolated.json("tenant", "list") == []
