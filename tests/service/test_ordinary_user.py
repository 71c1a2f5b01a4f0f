"""An ordinary user: state in the user's own directory, a service in a user namespace."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polytropo.service import service_binary
from tests.conftest import Isolated

UID = 65534
_AS_USER = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups")
# /dev/fuse as distributions have it; a host may keep it to root.
_OPEN_DEVICE = (
    "mkdir $1/dev && mount -t tmpfs none $1/dev && mknod $1/dev/fuse c 10 229 && chmod 666 $1/dev/fuse"
    " && mount --bind $1/dev/fuse /dev/fuse"
)


class User:
    """The user nobody, who sees this clone's package at a place that everybody may read."""

    def __init__(self, place: Isolated) -> None:
        self.place = place
        self.home = place.directory / "user"
        self.home.mkdir()
        os.chown(self.home, UID, UID)
        (packages,) = (Path(sys.prefix) / "lib").glob("python3.*/site-packages")
        self.python = f"/usr/bin/{packages.parent.name}"
        if not Path(self.python).exists():
            pytest.skip(f"{self.python} is not there, and the user may not run this environment's own")
        shown = {"src": Path(__file__).parents[2] / "src", "site": packages, "bin": service_binary().parent}
        for name, path in shown.items():
            (place.directory / name).mkdir()
            place.run("mount", "--bind", path, place.directory / name)
        self.environment = {
            "HOME": str(self.home),
            "POLYTROPO_HOME": "",
            "POLYTROPO_SERVICE_BIN": str(place.directory / "bin" / service_binary().name),
            "PYTHONPATH": f"{place.directory / 'src'}:{place.directory / 'site'}",
            "XDG_DATA_HOME": str(self.home / "data"),
        }

    def run(self, *command: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
        return self.place.run(*_AS_USER, *command, environment=self.environment, **options)

    def polytropo(self, *arguments: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
        return self.run(self.python, "-m", "polytropo", *arguments, **options)

    def directory(self, name: str) -> Path:
        path = self.home / name
        path.mkdir()
        os.chown(path, UID, UID)
        return path


@pytest.fixture
def user(isolated: Isolated) -> User:
    isolated.run("sh", "-c", _OPEN_DEVICE, "sh", isolated.directory)
    return User(isolated)


def test_a_user_mounts_and_runs_programs_there(user: User) -> None:
    data, mnt = user.directory("data"), user.directory("mnt")
    (data / "file").write_text("content\n")
    (data / "file").chmod(0o644)
    user.polytropo("mount", data, mnt)
    assert list(mnt.iterdir()) == [] and user.run("ls", mnt).stdout == "", "the mount is the service's own"
    done = user.polytropo("on", mnt, "--", "sh", "-c", "pwd; cat file; echo new >new; exit 5", check=False)
    assert (done.returncode, done.stdout) == (5, f"{mnt}\ncontent\n"), done
    assert (data / "new").read_text() == "new\n" and (data / "new").stat().st_uid == UID
    assert user.polytropo("on", mnt, "--", "stat", "-c", "%U", "new").stdout.strip() in ("root", "nobody")
    (stats,) = json.loads(user.polytropo("stats", "--json").stdout)
    assert stats["running"] and stats["mounts"][0]["mountpoint"] == str(mnt)
    user.polytropo("unmount", mnt)
    assert "no stack is mounted" in user.polytropo("on", mnt, "--", "true", check=False).stderr
    assert (user.home / "data/polytropo/version").stat().st_uid == UID
    user.polytropo("system", "reset", "--force")
    assert not (user.home / "data/polytropo").exists()


def test_owners_of_a_users_volume_are_kept(user: User) -> None:
    mnt = user.directory("mnt")
    user.polytropo("volume", "create", "orders")
    user.polytropo("mount", "-", mnt, stdin='{"version":1,"root":{"kind":"volume","name":"orders"}}')
    user.polytropo("on", mnt, "--", "sh", "-c", "echo 1 >order; chmod 640 order; mkdir d; ln -s order link")
    told = user.polytropo("on", mnt, "--", "stat", "-c", "%a %u %g %F", "order", "d", "link").stdout
    assert told.splitlines() == ["640 0 0 regular file", "755 0 0 directory", "777 0 0 symbolic link"]
    below = user.home / "data/polytropo/volumes/default/orders/data/order"
    assert os.getxattr(below, "user.polytropo.stat") == b"100640 0 0 0"
    user.polytropo("tenant", "stop", "--force", "default")


@pytest.mark.parametrize("owner", [0, 33])
def test_a_user_changes_an_image(user: User, owner: int) -> None:
    if owner != 0:  # other owners than root take subordinate ids
        for name in ("subuid", "subgid"):
            file = user.place.directory / name
            file.write_text(f"{UID}:500000:65536\n")
            user.place.run("mount", "--bind", file, f"/etc/{name}")
    tree, upper, mnt = user.directory("tree"), user.directory("upper"), user.directory("mnt")
    (tree / "file").write_text("content\n")
    owners = (f"--owner={owner}", f"--group={owner}")
    user.run("tar", *owners, "-C", tree, "-cf", user.home / "image.tar", "file")
    user.polytropo("image", "import", user.home / "image.tar", "--name", "tiny")
    user.polytropo("mount", "tiny", mnt, "--upper", upper)
    script = "stat -c %u:%g file; echo more >>file; mkdir d; stat -c %u:%g file d; cat file"
    told = user.polytropo("on", mnt, "--", "sh", "-c", script).stdout
    assert told.splitlines() == [f"{owner}:{owner}", f"{owner}:{owner}", "0:0", "content", "more"]
    # What was appended is in the upper; the bytes before may still be the image's alone.
    assert (upper / "file").stat().st_uid == UID and (upper / "file").read_bytes()[8:] == b"more\n"
    user.polytropo("unmount", mnt)
    user.polytropo("mount", "tiny", mnt)
    assert user.polytropo("on", mnt, "cat", "file").stdout == "content\n"
    user.polytropo("tenant", "stop", "--force", "default")


def test_a_users_dead_service_is_cleared(user: User) -> None:
    data, mnt = user.directory("data"), user.directory("mnt")
    user.polytropo("mount", data, mnt)
    (stats,) = json.loads(user.polytropo("stats", "--json").stdout)
    user.run("kill", "-KILL", str(stats["keeper_pid"]))
    assert "nothing is mounted at" in user.polytropo("unmount", mnt, check=False).stderr
    user.polytropo("mount", data, mnt)
    user.polytropo("on", mnt, "--", "touch", "alive")
    assert (data / "alive").exists()
    user.polytropo("unmount", mnt)


def test_doctor_speaks_to_a_user(user: User) -> None:
    findings = json.loads(user.polytropo("doctor", "--json", check=False).stdout)
    levels = {finding["name"]: finding["level"] for finding in findings}
    assert (levels["fuse-device"], levels["fuse"], levels["user-namespaces"]) == ("good", "good", "good")
    assert levels["subordinate-ids"] == "lacking" and levels["control-groups"] == "lacking"


def test_a_closed_device_is_told(isolated: Isolated) -> None:
    user = User(isolated)
    if isolated.run(*_AS_USER, "test", "-w", "/dev/fuse", check=False).returncode == 0:
        isolated.run("sh", "-c", _OPEN_DEVICE.replace("666", "600"), "sh", isolated.directory)
    done = user.polytropo("mount", user.directory("data"), user.directory("mnt"), check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "/dev/fuse" in done.stderr, done
    told = user.polytropo("doctor", check=False)
    assert told.returncode == 1 and "/dev/fuse may not be opened by this user" in told.stdout


# A process of the user holds a user namespace. Root enters it and opens the device there, still as its owner;
# then becomes the user, who is root in there, and runs what follows.
_GIVE_DEVICE = """
import ctypes, os, subprocess, sys
holder = subprocess.Popen([*sys.argv[1].split(), "unshare", "-Ur", "sh", "-c", "echo; read x"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
holder.stdout.readline()
namespace = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY)
assert ctypes.CDLL(None, use_errno=True).setns(namespace, 0) == 0, os.strerror(ctypes.get_errno())
os.dup2(os.open("/dev/fuse", os.O_RDWR), 7)
os.setresgid(0, 0, 0)
os.setresuid(0, 0, 0)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def test_a_device_may_come_opened(isolated: Isolated) -> None:
    user = User(isolated)
    data, mnt = user.directory("data"), user.directory("mnt")
    (data / "file").write_text("content\n")
    (data / "file").chmod(0o644)
    user.environment["POLYTROPO_FUSE_FD"] = "7"
    words = f"{user.python} -m polytropo"
    script = (
        f"{words} mount {data} {mnt} && {words} on {mnt} -- cat file && {words} tenant stop --force default"
    )
    command = (sys.executable, "-c", _GIVE_DEVICE, " ".join(_AS_USER), "sh", "-c", script)
    done = isolated.run(*command, environment=user.environment)
    assert done.stdout == "content\n", done


def test_wrong_descriptors_are_told(user: User) -> None:
    user.environment["POLYTROPO_FUSE_FD"] = "7,x"
    done = user.polytropo("mount", user.directory("data"), user.directory("mnt"), check=False)
    assert 'POLYTROPO_FUSE_FD is "7,x"; it names open descriptors' in done.stderr
