"""A worker that dies is replaced, and programs go on as if nothing had been."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper, directory_stack
from tests.stacks import document, fill

REPOSITORY = Path(__file__).resolve().parents[2]
EXCLUSIVE = {"coherence": "exclusive"}


@pytest.fixture
def keeper(isolated: Isolated) -> Iterator[Keeper]:
    keeper = Keeper(isolated, arguments=["--restarts=100000"])
    yield keeper
    # Shown when a test fails.
    print(keeper.log.read_text())
    keeper.close()


def kill_worker(keeper: Keeper) -> int | None:
    """Says which it was; None if it is dead already and there is no other yet."""
    worker = keeper.do("status")["worker_pid"]
    if worker is None or keeper.place.run("kill", "-KILL", str(worker), check=False).returncode != 0:
        return None
    return int(worker)


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


def test_one_death_is_one_however_many_doors(isolated: Isolated) -> None:
    keeper = Keeper(isolated)
    places = [isolated.directory / f"mnt{number}" for number in range(9)]
    for number, mnt in enumerate(places):
        data = isolated.directory / f"data{number}"
        data.mkdir()
        (data / "file").write_text(f"{number}\n")
        keeper.mount(data, mnt, **EXCLUSIVE)
    kill_worker(keeper)
    for number, mnt in enumerate(places):
        assert isolated.run("cat", mnt / "file", timeout_s=10).stdout == f"{number}\n"
    assert "too often" not in keeper.log.read_text()
    keeper.close()


@pytest.mark.parametrize("kind", ["exclusive", "shared", "union"])
@pytest.mark.parametrize("actors", [1, 2])
def test_random_operations_with_kills_answer_as_on_the_host(
    keeper: Keeper, data: Path, kind: str, actors: int
) -> None:
    place, mnt, plain = keeper.place, keeper.place.directory / "mnt", keeper.place.directory / "plain"
    plain.mkdir(mode=0o755)
    mnt.mkdir()
    (data / "file").unlink()
    if kind == "union":
        below = place.directory / "below"
        stack = document("union", below)
        fill(below / "low", below / "lowest", plain)
    else:
        stack = directory_stack(data, coherence=kind)
    keeper.do("mount", stack=stack, mountpoint=str(mnt))
    words = ["--seed", "7", "--steps", "2500", "--actors", str(actors), "--closed"]
    command = place.command(sys.executable, "-m", "tests.reference", str(mnt), str(plain), *words)
    environment = place.environment | {"PYTHONPATH": str(REPOSITORY)}
    compared = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    dice, kills = random.Random(1), 0
    while compared.poll() is None:
        time.sleep(dice.uniform(0.02, 0.2))
        kills += kill_worker(keeper) is not None
    out, _ = compared.communicate(timeout=60)
    assert compared.returncode == 0, out
    assert kills > 5
