"""A worker that dies is replaced, and programs go on as if nothing had been."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper

EXCLUSIVE = {"coherence": "exclusive"}


@pytest.fixture
def keeper(isolated: Isolated) -> Iterator[Keeper]:
    keeper = Keeper(isolated, arguments=["--restarts=1000"])
    yield keeper
    # Shown when a test fails.
    print(keeper.log.read_text())
    keeper.close()


def kill_worker(keeper: Keeper) -> int:
    worker = keeper.inner_pid("worker_pid")
    keeper.place.run("kill", "-KILL", str(worker))
    return worker


def python(place: Isolated, program: str, *arguments: object) -> subprocess.Popen[str]:
    command = place.command("python3", "-c", program, *map(str, arguments))
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def heard(program: subprocess.Popen[str], line: str) -> None:
    assert program.stdout is not None
    assert program.stdout.readline() == line + "\n"


def told(program: subprocess.Popen[str], line: str) -> None:
    assert program.stdin is not None
    program.stdin.write(line + "\n")
    program.stdin.flush()


HOLDS_FILES = """
import fcntl, os, sys
os.chdir(sys.argv[1])
kept = open("kept", "w+b")
kept.write(b"before ")
kept.flush()
fcntl.flock(kept, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.makedirs("deep/er", exist_ok=True)
inside = os.open("deep", os.O_RDONLY)
os.rename("deep", "deeper")
listing = os.scandir("many")
seen = [next(listing).name for _ in range(10)]
print("ready", flush=True)
sys.stdin.readline()
kept.write(b"after")
kept.flush()
os.fsync(kept.fileno())
kept.seek(0)
assert kept.read() == b"before after"
assert os.listdir(inside) == ["er"]
os.mkdir("new", dir_fd=inside)
assert sorted(os.listdir("deeper")) == ["er", "new"]
seen += [entry.name for entry in listing]
assert sorted(seen) == sorted(os.listdir("many")), len(seen)
other = open("kept")
try:
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    raise SystemExit("the lock is gone")
except BlockingIOError:
    pass
assert open("file").read() == "content\\n"
print("done", flush=True)
"""


@pytest.mark.parametrize("options", [EXCLUSIVE, {"coherence": "shared"}], ids=["exclusive", "shared"])
def test_open_files_go_on(keeper: Keeper, data: Path, options: dict[str, str]) -> None:
    place, mnt = keeper.place, keeper.place.directory / "mnt"
    (data / "many").mkdir()
    for number in range(3000):
        (data / "many" / f"entry-{number}").touch()
    keeper.mount(data, mnt, **options)
    program = python(place, HOLDS_FILES, mnt)
    heard(program, "ready")
    first = kill_worker(keeper)
    told(program, "go on")
    heard(program, "done")
    assert program.wait(20) == 0
    assert keeper.inner_pid("worker_pid") != first
    assert keeper.mounts()[0]["dead"] is False
    assert (data / "kept").read_bytes() == b"before after"
    keeper.do("unmount", mountpoint=str(mnt))
