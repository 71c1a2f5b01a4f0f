"""A worker that dies while a notice of it waits in the kernel, for what only another worker can answer."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper, directory_stack, wait_until

# Where data begins is told once the kernel has passed on what it holds: a notice that waits for these writes.
_SEEKS = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.pwrite(file, b"x" * 5000, 1 << 20)
print("ready", flush=True)
assert os.lseek(file, 0, os.SEEK_DATA) == 1 << 20
assert os.pread(file, 9000, 1 << 20) == b"x" * 5000
print("done", flush=True)
"""
DELAY_MS = 3000


def waiting(keeper: Keeper, data: Path) -> "tuple[subprocess.Popen[str], str]":
    """A program whose question waits for a notice, and the worker that gave it."""
    mnt = keeper.place.directory / "mnt"
    mnt.mkdir()
    stack = directory_stack(data, coherence="exclusive")
    rules = [{"operation": "write", "delay_ms": DELAY_MS}]
    stack["root"] = {"kind": "fault", "below": stack["root"], "rules": rules}
    keeper.do("mount", stack=stack, mountpoint=str(mnt))
    program = subprocess.Popen(
        keeper.place.command("python3", "-c", _SEEKS, mnt / "sparse"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert program.stdout is not None and program.stdout.readline() == "ready\n"
    worker = keeper.inner_pid("worker_pid")
    wait_until(lambda: "D" in states(keeper.place, worker, ".flush"), "a notice waits in the kernel")
    return program, str(worker)


def states(place: Isolated, pid: int, thread: str) -> Sequence[str]:
    """Of the threads of that process whose names end so: "D" is one that no signal reaches."""
    told = place.run("sh", "-c", f"cat /proc/{pid}/task/*/stat", check=False).stdout.splitlines()
    named = (line.partition("(")[2].rpartition(") ") for line in told)
    return [state[0] for name, _, state in named if name.endswith(thread)]


def test_another_takes_over_all_the_same(isolated: Isolated, data: Path) -> None:
    keeper = Keeper(isolated)
    program, worker = waiting(keeper, data)
    isolated.run("kill", "-KILL", worker)
    out, _ = program.communicate(timeout=30)
    assert (program.returncode, out) == (0, "done\n"), keeper.log.read_text()
    assert "but for a notice" in keeper.log.read_text()
    assert (data / "sparse").read_bytes()[1 << 20 :] == b"x" * 5000
    keeper.do("unmount", mountpoint=str(isolated.directory / "mnt"))
    keeper.close()


@pytest.mark.parametrize("end", ["no restarts", "stop", "signal", "killed"])
def test_programs_get_errors_where_nobody_takes_over(isolated: Isolated, data: Path, end: str) -> None:
    keeper = Keeper(isolated, arguments=["--restarts=0"] if end == "no restarts" else ["--restarts=1000"])
    mnt = isolated.directory / "mnt"
    program, worker = waiting(keeper, data)
    keeper_pid = str(keeper.inner_pid("keeper_pid"))
    if end == "killed":
        isolated.run("kill", "-STOP", keeper_pid)
        isolated.run("kill", "-KILL", worker, keeper_pid)
        # Nobody is left who could do it.
        isolated.run("umount", "--force", "--lazy", mnt)
    else:
        isolated.run("kill", "-KILL", worker)
    if end == "stop":
        keeper.do("stop", force=True)
    elif end == "signal":
        isolated.run("kill", "-TERM", keeper_pid)
    out, _ = program.communicate(timeout=30)
    assert program.returncode == 1 and re.search(r"Error: \[Errno (5|103|107)\]", out), out
    if end == "no restarts":
        assert keeper.mounts()[0]["dead"] is True
        keeper.do("unmount", mountpoint=str(mnt))
    keeper.close()
