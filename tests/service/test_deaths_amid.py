"""A name that others made while a worker died of making it stays theirs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper

PRELOADED = """
import errno, os, sys
def ask():
    try:
        ASK
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]
for _ in range(100):
    os.stat("mine")
print("ready", flush=True)
sys.stdin.readline()
print(ask(), flush=True)
"""
LIBRARY = """
import errno, os, sys
from polytropo.fs import Files
files = Files(sys.argv[1], sys.argv[2])
files.stat("mine")
print("ready", flush=True)
sys.stdin.readline()
try:
    ASK
    print("done", flush=True)
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
"""
# What is asked, by system calls and by the library, and what others do meanwhile.
CASES = {
    "mkdir": ("os.mkdir('lock')", "files.mkdir('lock')", "mkdir lock"),
    "create": (
        "os.close(os.open('lock', os.O_CREAT | os.O_EXCL | os.O_WRONLY))",
        "files.open('lock', 'x').close()",
        "set -C; : >lock",
    ),
    "symlink": ("os.symlink('owner', 'lock')", "files.symlink('owner', 'lock')", ": >lock"),
    "link": ("os.link('mine', 'lock')", "files.link('mine', 'lock')", ": >lock"),
}
DELAY_MS = 1500


@pytest.mark.parametrize("operation", sorted(CASES))
@pytest.mark.parametrize("way", ["preloaded", "library"])
@pytest.mark.parametrize("taken", [True, False], ids=["taken", "free"])
def test_a_name_that_others_made_meanwhile_stays_theirs(
    isolated: Isolated, library: Path, operation: str, way: str, taken: bool
) -> None:
    keeper, mnt, data = Keeper(isolated), isolated.directory / "mnt", isolated.directory / "data"
    data.mkdir()
    mnt.mkdir()
    below = {"kind": "dir", "path": str(data), "coherence": "exclusive"}
    calls, files, others = CASES[operation]
    # The second one of a worker: the first was before, or is the program's second attempt.
    rule = {"operation": operation, "after": 1, "times": 1, "kill": True}
    rules = [rule | {"delay_ms": DELAY_MS}]
    stack = {"version": 1, "root": {"kind": "fault", "below": below, "rules": rules}, "channel_writes": True}
    keeper.do("mount", stack=stack, mountpoint=str(mnt))
    isolated.run("sh", "-c", f"cd {mnt} && : >mine && mkdir one && ln mine two && ln -s mine three")
    socket = keeper.run_dir / "channel/channel.sock"
    program: list[str | Path]
    if way == "preloaded":
        script = PRELOADED.replace("ASK", calls)
        settings = [f"LD_PRELOAD={library}", f"POLYTROPO_CHANNEL={socket}", f"POLYTROPO_MOUNT={mnt}"]
        program = ["env", f"--chdir={mnt}", *settings, "/usr/bin/python3", "-c", script]
    else:
        program = [sys.executable, "-c", LIBRARY.replace("ASK", files), mnt, socket]
    command = isolated.command(*program)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdin is not None and asking.stdout is not None
        assert asking.stdout.readline() == "ready\n"
        asking.stdin.write("go on\n")
        asking.stdin.flush()
        time.sleep(DELAY_MS / 1000 / 3)
        if taken:
            isolated.run("sh", "-c", f"cd {mnt} && {others}")
            before = os.lstat(data / "lock")
        out, _ = asking.communicate(timeout=30)
    log = keeper.log.read_text()
    print(log[-5000:])
    assert len([line for line in log.splitlines() if " ended: signal: " in line]) >= 1
    assert out == ("EEXIST\n" if taken else "done\n")
    if taken:
        assert os.lstat(data / "lock").st_ino == before.st_ino
    assert isolated.run("sh", "-c", f"cd {mnt} && ls -d lock").stdout == "lock\n"
    keeper.do("unmount", mountpoint=str(mnt))
    keeper.close()
