"""Clients of `polytropo.fs` outlive their service's worker, and connect again."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper
from tests.stacks import PRIVATE, document

CLIENT = """
import errno, os, sys, time
from polytropo.fs import Files
files = Files(sys.argv[1], sys.argv[2])
file = files.open("kept", "w+")
file.write(b"before ")
reader = files.open("read")
assert reader.read() == b"content"
gone = files.open("gone", "w+")
replaced = files.open("replaced", "w+")
late = [files.open("read"), files.open("read")]
print("ready", flush=True)
sys.stdin.readline()
# Through the kernel by now, and right.
file.write(b"after")
file.fsync()
assert file.pread(100, 0) == b"before after" and file.tell() == 12
assert reader.pread(100, 0) == b"CONTENT", reader.pread(100, 0)
for lost in (gone, replaced):
    try:
        lost.pread(1, 0)
        raise SystemExit("another file was read")
    except OSError as error:
        assert error.errno in (errno.ENOENT, errno.ESTALE), error
assert files.kernel_calls == 0
# Until there is another channel.
deadline = time.monotonic() + 30
while True:
    before = files.kernel_calls
    assert files.read_bytes("read") == b"CONTENT"
    assert sorted(files.listdir()) == ["kept", "read", "replaced"]
    if files.kernel_calls == before:
        break
    assert time.monotonic() < deadline
    time.sleep(0.02)
# Files of the former channel that find out only now do not end this one.
channel, before = files._channel, files.kernel_calls
for one in late:
    assert one.pread(100, 0) == b"CONTENT"
    # Whoever took the channel for ended makes another one after this.
    time.sleep(files._pause_s)
    files.stat("read")
assert files._channel is channel and files.kernel_calls == before
files.mkdir("directory")
files.write_bytes("directory/new", b"new")
with files.open("directory/new", "r+") as new:
    new.pwrite(b"N", 0)
    assert new.pread(3, 0) == b"New"
assert file.pread(100, 0) == b"before after"
assert files.kernel_calls == before
print("done", flush=True)
"""


@pytest.fixture
def keeper(isolated: Isolated) -> Iterator[Keeper]:
    keeper = Keeper(isolated)
    yield keeper
    # Shown when a test fails.
    print(keeper.log.read_text())
    keeper.close()


def test_a_client_goes_on_and_connects_again(keeper: Keeper) -> None:
    place, mnt = keeper.place, keeper.place.directory / "mnt"
    mnt.mkdir()
    keeper.do("mount", stack=document(f"{PRIVATE}dir", place.directory / "below"), mountpoint=str(mnt))
    place.run("sh", "-c", f"printf content >{mnt}/read")
    program = client(place, mnt, keeper.run_dir / "channel/channel.sock")
    assert program.stdout is not None and program.stdin is not None
    assert program.stdout.readline() == "ready\n"
    assert keeper.kill_worker() is not None
    # By the next worker.
    place.run("sh", "-c", f"cd {mnt} && printf CONTENT >read && rm gone && : >other && mv other replaced")
    program.stdin.write("go on\n")
    program.stdin.flush()
    assert program.stdout.readline() == "done\n"
    assert program.wait(20) == 0


def client(place: Isolated, mnt: Path, socket: Path) -> subprocess.Popen[str]:
    command = place.command(sys.executable, "-c", CLIENT, mnt, socket)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
