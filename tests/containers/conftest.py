"""A small image that every container test runs: busybox, two users, a few links that lead astray."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.images.archives import Layout, config_of, directory, member, symlink, tar

BUSYBOX = Path("/bin/busybox")
IMAGE = "box"


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout of the image."""
    path = tmp_path_factory.mktemp("image") / "layout"
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    names = ["bin", "dev", "etc", "home", "home/app", "proc", "root", "run", "sys", "usr", "var"]
    base = [directory(name) for name in names]
    base += [directory("tmp", mode=0o1777)]
    base += [member("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)]
    base += [symlink(f"bin/{name}", "busybox") for name in applets if name != "busybox"]
    users = b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"
    top = [
        member("etc/passwd", users),
        member("etc/group", b"root:x:0:\napp:x:1000:\nwheel:x:10:app\n"),
        member("etc/greeting", b"hello\n"),
        symlink("out", "/etc"),
        symlink("up", "../../../../../../etc"),
        member("bin/not-executable", b"#!/bin/sh\n"),
    ]
    made = Layout(path)
    config = {"Cmd": ["sh", "-c", "echo default"], "Env": ["FROM_IMAGE=yes"], "WorkingDir": "/home/app"}
    layers = [tar(base), tar(top)]
    made.image(layers, config=config_of(layers, **config))
    return path


@pytest.fixture
def box(isolated: Isolated, layout: Path) -> Iterator[Isolated]:
    """A machine that has the image under the name `box`."""
    isolated.polytropo("image", "import", layout, "--name", IMAGE)
    yield isolated


def shell(machine: Isolated, script: str, **options: object) -> str:
    """Runs a script of /bin/sh on the machine, with `polytropo` as a command; returns what it printed."""
    return machine.run("sh", "-c", script, **options).stdout  # type: ignore[arg-type]


def leftovers(machine: Isolated, timeout_s: float = 15.0) -> list[str]:
    """What containers leave behind if nobody clears it, once what was about to end has ended."""
    deadline = time.monotonic() + timeout_s
    while (found := _leftovers(machine)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _leftovers(machine: Isolated) -> list[str]:
    found = [f"directory {path.name}" for path in (machine.home / "containers").iterdir()]
    found += [f"scratch {path.name}" for path in (machine.home / "tmp").iterdir()]
    mounts = machine.run("cat", "/proc/self/mounts").stdout.splitlines()
    found += [line for line in mounts if f"{machine.home}/containers/" in line]
    processes = machine.run("ps", "-eo", "args").stdout.splitlines()
    found += [line for line in processes if line.startswith(("conmon", "/usr/bin/conmon", "runc"))]
    return found
