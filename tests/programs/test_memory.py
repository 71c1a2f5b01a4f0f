"""The memory of a service stays below its ceiling, however long and however it is used."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polytropo.cgroups import Hierarchies
from tests.conftest import Isolated
from tests.stacks import write_stack

# Seconds; an hour unless said otherwise.
DURATION_S = float(os.environ.get("POLYTROPO_SOAK_S", "3600"))
CEILING_BYTES = 256 << 20
# Above the ceiling and what the service has when nothing was asked of it yet.
TOLERANCE = 0.05
LARGE_FILES = 8
LARGE_BYTES = 160 << 20
SAMPLE_INTERVAL_S = 0.25

_LOAD = """
import os, random, sys, time
from pathlib import Path
from polytropo.fs import Files
what, mnt, socket, seconds = sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
end = time.monotonic() + seconds
dice = random.Random(what)
own = mnt / f"own-{what}"
own.mkdir()
rounds = 0

def reads_at_random(files):
    "More than the cache holds, so that windows come and go."
    buffer = bytearray(1 << 17)
    opened = [files.open(f"large{number}") for number in range(LARGE_FILES)]
    for _ in range(400):
        file = dice.choice(opened)
        file.seek(dice.randrange(LARGE_BYTES))
        file.readinto(buffer)
    for file in opened:
        file.close()

def reads_in_order(files):
    buffer = bytearray(1 << 20)
    with files.open(f"large{dice.randrange(LARGE_FILES)}") as file:
        while file.readinto(buffer):
            pass

def writes(files):
    path = f"own-{what}/file{dice.randrange(40)}"
    with files.open(path, "r+b" if files.exists(path) else "w+b") as file:
        for _ in range(dice.randrange(60)):
            file.seek(dice.randrange(8 << 20))
            file.write(bytes(dice.randrange(1, 1 << 16)))
        file.seek(0)
        file.read(1 << 20)
    if dice.random() < 0.2:
        (mnt / path).unlink()

def names(files):
    "Thousands of inodes that the kernel and channels learn of, and that go."
    for number in range(1500):
        path = own / f"small{number}"
        path.write_bytes(b"x" * dice.randrange(3000))
        files.stat(f"own-{what}/small{number}")
    for path in list(own.iterdir()):
        path.stat()
        path.unlink()

def through_the_kernel(files):
    # Only read: a file that the kernel has for writing is the kernel's alone.
    with open(mnt / f"large{dice.randrange(LARGE_FILES)}", "rb", buffering=0) as file:
        for _ in range(200):
            os.pread(file.fileno(), 1 << 16, dice.randrange(LARGE_BYTES))
    with open(own / "file", "w+b", buffering=0) as file:
        for _ in range(200):
            os.pwrite(file.fileno(), b"kernel" * 5000, dice.randrange(LARGE_BYTES))
            os.pread(file.fileno(), 1 << 16, dice.randrange(LARGE_BYTES))

work = globals()[what]
while time.monotonic() < end:
    # A program each time, as far as the service can tell.
    with Files(mnt, socket) as files:
        work(files)
    rounds += 1
print(rounds)
""".replace("LARGE_FILES", str(LARGE_FILES)).replace("LARGE_BYTES", str(LARGE_BYTES))

LOADS = ("reads_at_random", "reads_in_order", "writes", "names", "through_the_kernel")


class Memory:
    """What lies in the control group of a tenant's service and cannot be dropped."""

    def __init__(self, isolated: Isolated, keeper_pid: int) -> None:
        hierarchies = Hierarchies.find()
        lines = isolated.run("cat", f"/proc/{keeper_pid}/cgroup").stdout.splitlines()
        groups = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
        root = hierarchies.v1.get("memory")
        if root is not None:
            self.file = Path(f"{root}{groups['memory']}/memory.stat")
            self.counted: tuple[str, ...] = ("rss", "shmem")
        else:
            assert hierarchies.v2 is not None
            self.file = Path(f"{hierarchies.v2}{groups['']}/memory.stat")
            self.counted = ("anon", "shmem")

    def resident_bytes(self) -> dict[str, int]:
        found = dict(line.split() for line in self.file.read_text().splitlines())
        return {name: int(found[name]) for name in self.counted}


@pytest.mark.soak
@pytest.mark.timeout(DURATION_S + 300)
def test_resident_memory_stays_below_the_ceiling(isolated: Isolated) -> None:
    if "memory" not in Hierarchies.find().controllers:
        pytest.skip("this machine counts no memory by control groups")
    below, mnt = isolated.directory / "below", isolated.directory / "mnt"
    mnt.mkdir()
    for name in ("low", "upper"):
        (below / name).mkdir(parents=True)
    for number in range(LARGE_FILES):
        # Half of it is in an image layer, half is the container's own.
        place = below / ("low" if number % 2 == 0 else "upper") / f"large{number}"
        with place.open("wb") as file:
            file.truncate(LARGE_BYTES)
    isolated.polytropo("tenant", "create", "soak", "--cache", str(CEILING_BYTES))
    stack = write_stack(
        isolated.directory / "stack.json",
        {
            "kind": "union",
            "lowers": [
                {"kind": "dir", "path": str(below / "low"), "read_only": True, "coherence": "immutable"}
            ],
            "upper": {"kind": "dir", "path": str(below / "upper"), "coherence": "exclusive"},
        },
        channel_writes=True,
    )
    isolated.polytropo("mount", "--tenant", "soak", stack, mnt)
    (stats,) = isolated.json("stats")
    memory = Memory(isolated, stats["keeper_pid"])
    socket = isolated.home / "tenants" / "soak" / "run" / "channel" / "channel.sock"
    idle_bytes = sum(memory.resident_bytes().values())
    limit_bytes = idle_bytes + int(CEILING_BYTES * (1 + TOLERANCE))
    commands = [
        isolated.command(sys.executable, "-c", _LOAD, what, mnt, socket, str(DURATION_S)) for what in LOADS
    ]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    most_bytes, most, samples = 0, {}, 0
    while any(program.poll() is None for program in programs):
        now = memory.resident_bytes()
        samples += 1
        if sum(now.values()) > most_bytes:
            most_bytes, most = sum(now.values()), now
        time.sleep(SAMPLE_INTERVAL_S)
    rounds = {}
    for what, program in zip(LOADS, programs, strict=True):
        out, _ = program.communicate()
        assert program.returncode == 0, what
        rounds[what] = int(out)
    told = {"idle": idle_bytes, "most": most_bytes, "limit": limit_bytes, **most}
    print({name: f"{count / (1 << 20):.1f} MiB" for name, count in told.items()}, rounds)
    assert samples > DURATION_S and min(rounds.values()) > 0
    # Otherwise nothing was put to the test.
    assert most_bytes > CEILING_BYTES * 0.8
    assert most_bytes <= limit_bytes
    isolated.polytropo("unmount", mnt)
    isolated.polytropo("tenant", "rm", "--force", "soak")
