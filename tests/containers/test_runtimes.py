"""The whole life of a container under each OCI runtime."""

import shutil

import pytest

from tests.conftest import Isolated
from tests.containers.conftest import leftovers


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_life_under_each_runtime(box: Isolated, runtime: str) -> None:
    if shutil.which(runtime, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip(f"{runtime} is not installed")
    given = ("--runtime", runtime, "box")
    done = box.polytropo("run", "--rm", *given, "sh", "-c", "echo out; exit 3", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "")
    assert "not in the image" in box.refused("run", "--rm", *given, "no-such-program", status=127)
    box.polytropo("run", "-d", "--name", "c", *given, "sh", "-c", "echo up; sleep 600")
    assert box.polytropo("exec", "c", "cat", "/etc/greeting").stdout == "hello\n"
    assert box.polytropo("exec", "c", "sh", "-c", "exit 4", check=False).returncode == 4
    limits = box.polytropo("exec", "c", "cat", "/proc/1/cgroup").stdout
    assert "polytropo" in limits
    box.polytropo("stop", "-t", "0", "c")
    assert box.polytropo("logs", "c").stdout == "up\n"
    box.polytropo("start", "c")
    box.polytropo("rm", "-f", "c")
    box.polytropo("system", "prune")
    assert leftovers(box) == []
