"""Preloaded programs outlive their worker: open files stay right, and they come back to shared memory."""

import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper
from tests.stacks import PRIVATE, document, fill

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def keeper(isolated: Isolated) -> Iterator[Keeper]:
    keeper = Keeper(isolated, arguments=["--restarts=100000"])
    yield keeper
    # Shown when a test fails.
    print(keeper.log.read_text()[-20_000:])
    keeper.close()


class Mounted:
    """A stack whose programs may write through shared memory."""

    def __init__(self, keeper: Keeper, kind: str, library: Path) -> None:
        self.keeper, self.place = keeper, keeper.place
        self.mnt, self.plain = self.place.directory / "mnt", self.place.directory / "plain"
        self.below = self.place.directory / "below"
        self.library, self.trace = library, self.place.directory / "trace"
        self.plain.mkdir(mode=0o755)
        self.mnt.mkdir()
        stack = document(PRIVATE + kind, self.below)
        if kind != "dir":
            fill(self.below / "low", self.below / "lowest", self.plain)
        keeper.do("mount", stack=stack, mountpoint=str(self.mnt))

    def variables(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(self.library),
            "POLYTROPO_CHANNEL": str(self.keeper.run_dir / "channel/channel.sock"),
            "POLYTROPO_MOUNT": str(self.mnt),
            "POLYTROPO_TRACE": "1",
            "POLYTROPO_TRACE_FILE": str(self.trace),
        }

    def python(self, program: str) -> subprocess.Popen[str]:
        """A preloaded program that works in the mount."""
        settings = [f"{name}={value}" for name, value in self.variables().items()]
        command = ["env", f"--chdir={self.mnt}", *settings, "/usr/bin/python3", "-c", program]
        return subprocess.Popen(
            self.place.command(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def report(self) -> str:
        (line,) = self.trace.read_text().splitlines()
        return line


def say(program: subprocess.Popen[str], line: str) -> None:
    assert program.stdin is not None
    program.stdin.write(line + "\n")
    program.stdin.flush()


def hear(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline().rstrip("\n")


READS_ON = """
import os, sys, time
kept = os.open("large", os.O_RDONLY)
for _ in range(100):
    assert os.pread(kept, 10, 70_000) == b"x" * 10
print("ready", flush=True)
sys.stdin.readline()
print(os.pread(kept, 5, 70_000).decode(), flush=True)
# Until the pause before another channel is over.
for _ in range(200):
    file = os.open("large", os.O_RDONLY)
    for _ in range(20):
        os.pread(file, 100, 0)
    os.close(file)
    time.sleep(0.005)
for _ in range(20_000):
    assert os.pread(kept, 5, 70_000) == b"other"
    assert os.stat("large").st_size == 200_000
print("done", flush=True)
"""


@pytest.mark.parametrize("kind", ["dir", "union"])
def test_a_program_sees_what_others_write_after_a_death_and_reads_in_memory_again(
    keeper: Keeper, library: Path, kind: str
) -> None:
    mounted = Mounted(keeper, kind, library)
    large = mounted.mnt / "large"
    mounted.place.run("sh", "-c", f"head -c 200000 /dev/zero | tr '\\0' x >{large}")
    program = mounted.python(READS_ON)
    assert hear(program) == "ready"
    assert keeper.kill_worker() is not None
    # Through the kernel, and so by the next worker.
    mounted.place.run("sh", "-c", f"printf other | dd of={large} bs=1 seek=70000 conv=notrunc status=none")
    say(program, "go on")
    assert hear(program) == "other"
    assert hear(program) == "done"
    assert program.wait(20) == 0
    counted = re.search(r"answered in the process (\d+)", mounted.report())
    assert counted is not None and int(counted[1]) > 40_000, mounted.report()


WATCHES = """
import ctypes, os, select, struct, sys
libc = ctypes.CDLL(None)
queue = libc.inotify_init()
assert libc.inotify_add_watch(queue, b".", 0x100) > 0
print("ready", flush=True)
while select.select([queue], [], [], 20)[0]:
    told = os.read(queue, 4096)
    while told:
        length = struct.unpack_from("I", told, 12)[0]
        print(told[16 : 16 + length].rstrip(bytes(1)).decode(), flush=True)
        told = told[16 + length :]
print("nothing", flush=True)
"""

MAKES_FILES = """
import os, sys, time
def make(name):
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
for number in range(100):
    make(f"early{number}")
print("ready", flush=True)
sys.stdin.readline()
# Until the pause before another channel is over.
for _ in range(200):
    for _ in range(20):
        os.stat("early1")
    make("early1")
    time.sleep(0.005)
make("late")
print("done", flush=True)
"""


@pytest.mark.parametrize("kind", ["dir", "union"])
def test_who_watches_hears_of_changes_after_a_death(keeper: Keeper, library: Path, kind: str) -> None:
    """Without a call of its own, by which it could tell the next worker that it does."""
    mounted = Mounted(keeper, kind, library)
    maker = mounted.python(MAKES_FILES)
    assert hear(maker) == "ready"
    watcher = mounted.python(WATCHES)
    assert hear(watcher) == "ready"
    assert keeper.kill_worker() is not None
    say(maker, "go on")
    assert hear(maker) == "done"
    assert hear(watcher) == "late"
    watcher.kill()
    assert (maker.wait(20), watcher.wait(20)) == (0, -9)


BEGINS_LATE = """
import os, sys
for _ in range(300):
    os.stat("early1")
print("channel", flush=True)
sys.stdin.readline()
for _ in range(int(sys.stdin.readline())):
    os.close(os.open("early1", os.O_WRONLY))
    os.path.exists("nothing")
"""


@pytest.mark.parametrize("noticed", [0, 3])
def test_who_begins_to_watch_after_a_death_hears_of_changes(
    keeper: Keeper, library: Path, noticed: int
) -> None:
    """Whether or not it has found its channel ended by then, before there would be another one."""
    mounted = Mounted(keeper, "dir", library)
    mounted.place.run("touch", str(mounted.mnt / "early1"))
    watcher = mounted.python(BEGINS_LATE + WATCHES)
    assert hear(watcher) == "channel"
    assert keeper.kill_worker() is not None
    # Of the next worker.
    maker = mounted.python(MAKES_FILES)
    assert hear(maker) == "ready"
    say(watcher, f"go on\n{noticed}")
    assert hear(watcher) == "ready"
    say(maker, "go on")
    assert hear(maker) == "done"
    assert hear(watcher) == "late"
    watcher.kill()
    assert (maker.wait(20), watcher.wait(20)) == (0, -9)


@pytest.mark.parametrize("kind", ["dir", "union"])
@pytest.mark.parametrize(("actors", "seed"), [(1, 11), (2, 12), (3, 13)])
def test_random_operations_of_preloaded_programs_with_kills_answer_as_on_the_host(
    keeper: Keeper, library: Path, kind: str, actors: int, seed: int
) -> None:
    compare_with_kills(Mounted(keeper, kind, library), seed, actors, 1200)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["dir", "union"])
@pytest.mark.parametrize("seed", range(200, 206))
def test_many_random_operations_of_preloaded_programs_with_kills(
    keeper: Keeper, library: Path, kind: str, seed: int
) -> None:
    compare_with_kills(Mounted(keeper, kind, library), seed, 1 + seed % 3, 20_000)


def compare_with_kills(mounted: Mounted, seed: int, actors: int, steps: int) -> None:
    keeper, place = mounted.keeper, mounted.place
    words = ["--seed", str(seed), "--steps", str(steps), "--actors", str(actors), "--named"]
    words += [f"--variable={name}={value}" for name, value in mounted.variables().items()]
    command = place.command(
        sys.executable, "-m", "tests.reference", str(mounted.mnt), str(mounted.plain), *words
    )
    environment = place.environment | {"PYTHONPATH": str(REPOSITORY)}
    compared = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    dice, kills = random.Random(seed), 0
    while compared.poll() is None:
        time.sleep(dice.uniform(0.03, 0.12))
        kills += keeper.kill_worker() is not None
    out, _ = compared.communicate(timeout=60)
    assert compared.returncode == 0, out
    assert kills > 3
    told = mounted.trace.read_text().splitlines()
    assert len(told) == (actors + 1) // 2
    assert all(re.search(r"answered in the process [1-9]", line) for line in told), told
