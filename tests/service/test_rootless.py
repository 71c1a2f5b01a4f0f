"""The service of an ordinary user, with a FUSE device that the user may open or is given."""

import json
import os
import select
import shutil
import subprocess
from pathlib import Path

import pytest

from polytropo.service import service_binary
from tests.conftest import Isolated

_UID = 61234
# Speaks to a keeper as its user would: one order a line, one answer a line.
_CLIENT = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1] + "/control.sock")
lines = connection.makefile("rw")
for order in sys.stdin:
    lines.write(order)
    lines.flush()
    print(lines.readline(), end="")
"""


class User:
    """An ordinary user with a directory, a copy of the program and a keeper."""

    def __init__(self, place: Isolated) -> None:
        self.place = place
        # Short, since a socket's address holds 107 bytes.
        self.home = place.directory / "u"
        for name in ("run", "data", "mnt"):
            (self.home / name).mkdir(parents=True)
        (self.home / "data" / "file").write_text("content\n")
        self.program = self.home / "polytropo-service"
        shutil.copy(service_binary(), self.program)
        place.run("chown", "-R", f"{_UID}:{_UID}", self.home)
        self.log = self.home / "log"

    def command(self, *words: str | Path) -> list[str]:
        identity = (f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups")
        return self.place.command("setpriv", *identity, "env", "-i", "PATH=/usr/bin:/bin", *words)

    def run(self, *words: str | Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(*words),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd="/",
        )

    def start(self, prefix: list[str]) -> None:
        """Starts the keeper by `prefix` and waits until it is ready; it ends with the namespace."""
        read_end, write_end = os.pipe()
        options = [f"--run-dir={self.home / 'run'}", "--uid-base=0", "--idle-timeout-s=3600", "--rootless"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*prefix, str(self.program), "keeper", *options, f"--ready-fd={write_end}"],
                pass_fds=(write_end,),
                stderr=log,
                cwd="/",
            )
        os.close(write_end)
        ready, _, _ = select.select([read_end], [], [], 30)
        told = os.read(read_end, 64) if ready else b""
        os.close(read_end)
        assert told == b"ready\n", self.log.read_text()

    def wait(self) -> None:
        self._process.wait(30)

    def orders(self, *orders: dict[str, object]) -> list[dict[str, dict[str, object]]]:
        lines = "".join(json.dumps(order) + "\n" for order in orders)
        done = self.run("/usr/bin/python3", "-c", _CLIENT, self.home / "run", stdin=lines)
        assert done.returncode == 0, done.stderr + self.log.read_text()
        return [json.loads(line) for line in done.stdout.splitlines()]

    def inside(self, script: str) -> "subprocess.CompletedProcess[str]":
        enter = (self.program, "enter", "--run-dir", self.home / "run", "--")
        return self.run(*enter, "sh", "-c", script, "sh", self.home / "mnt")

    def stack(self) -> dict[str, object]:
        return {"version": 1, "root": {"kind": "dir", "path": str(self.home / "data"), "ownership": "xattr"}}

    def mount(self) -> dict[str, object]:
        return {"op": "mount", "stack": self.stack(), "mountpoint": str(self.home / "mnt")}


@pytest.fixture
def user(isolated: Isolated) -> User:
    return User(isolated)


def let_users_open_fuse(place: Isolated) -> None:
    """The device as most hosts have it: open to all."""
    node = "mount -t tmpfs none /mnt && mknod -m 0666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse"
    place.run("sh", "-c", node)


def give_subordinate_ids(place: Isolated) -> None:
    # newuidmap(1) works for users that have a name.
    users = place.directory / "passwd"
    users.write_text(Path("/etc/passwd").read_text() + f"tried:x:{_UID}:{_UID}::/tmp:/bin/sh\n")
    place.run("mount", "--bind", users, "/etc/passwd")
    for name in ("subuid", "subgid"):
        file = place.directory / name
        file.write_text(f"{_UID}:500000:65536\n")
        place.run("mount", "--bind", file, f"/etc/{name}")


@pytest.mark.parametrize("subordinate", [False, True])
def test_a_user_mounts_and_works(isolated: Isolated, user: User, subordinate: bool) -> None:
    let_users_open_fuse(isolated)
    if subordinate:
        give_subordinate_ids(isolated)
    user.start(user.command())
    (mounted,) = user.orders(user.mount())
    assert "ok" in mounted, mounted
    done = user.inside(
        'cd "$1" && cat file && echo x >new && chmod 4750 new && ln new twin && stat -c %u:%h new'
    )
    assert (done.stdout, done.stderr) == ("content\n0:2\n", "")
    # The mount is in the namespace of the service alone, and what it made is the user's on the host.
    assert not any((user.home / "mnt").iterdir())
    assert (user.home / "data" / "new").stat().st_uid == _UID
    given = user.inside('chown 33:33 "$1/new" && stat -c %u:%g "$1/new"')
    if subordinate:
        assert given.stdout == "33:33\n"
    else:
        assert "Invalid argument" in given.stderr
        assert "files can belong to this user alone" in user.log.read_text()
    assert user.inside("exec nonesuch").returncode == 127

    status, listed, ended = user.orders({"op": "status"}, {"op": "list"}, {"op": "stop"})
    assert "ok" in ended and len(listed["ok"]["mounts"]) == 1  # type: ignore[arg-type]
    worker = status["ok"]["worker_pid"]
    user.wait()
    assert "no service answers" in user.inside("true").stderr
    assert isolated.run("test", "-d", f"/proc/{worker}/fd/3", check=False).returncode == 1


def test_a_user_is_told_why_not(user: User) -> None:
    """This device is root's alone, as it is on some hosts."""
    user.place.run("chmod", "0600", "/dev/fuse")
    user.start(user.command())
    (refused,) = user.orders(user.mount())
    assert refused["error"]["errno"] == "EACCES"
    assert "let this user read and write /dev/fuse" in str(refused["error"]["sentence"])


def test_a_device_that_root_opened(isolated: Isolated, user: User) -> None:
    """Root makes the user's namespace, opens the device in it and hands it on."""
    holder = subprocess.Popen(
        user.command("unshare", "--user", "--map-root-user", "sh", "-c", "echo; exec sleep 1000"),
        stdout=subprocess.PIPE,
        cwd="/",
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"\n"
    holder_pid = isolated.run("pgrep", "-n", "-u", str(_UID), "sleep").stdout.strip()
    script = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.setns(os.pidfd_open(int(sys.argv[1])), 0x10000000) == 0, os.strerror(ctypes.get_errno())
device = os.open("/dev/fuse", os.O_RDWR)
os.set_inheritable(device, True)
os.setresgid(0, 0, 0)
os.setresuid(0, 0, 0)
os.execv(sys.argv[2], sys.argv[2:] + [f"--fuse-fd={device}"])
"""
    user.start(isolated.command("/usr/bin/python3", "-c", script, holder_pid))
    first, second = user.orders(user.mount(), user.mount() | {"mountpoint": str(user.home / "run")})
    assert "ok" in first, first
    # The same stack again needs no device of its own.
    assert "ok" in second, second
    assert user.inside('cat "$1/file"').stdout == "content\n"
    holder.kill()
    holder.wait(10)
