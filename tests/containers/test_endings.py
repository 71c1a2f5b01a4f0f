"""Commands and services that are killed: nothing stays that the next command does not clear."""

import random
import signal
import subprocess
import time

import pytest

from tests.conftest import POLYTROPO, Isolated
from tests.containers.conftest import leftovers, shell


def _settled(machine: Isolated) -> list[str]:
    """What is left after `system prune`."""
    machine.polytropo("system", "prune")
    return leftovers(machine)


def test_a_killed_command_leaves_the_container_running(box: Isolated) -> None:
    script = """
        polytropo run --rm --name k box sh -c 'echo up; sleep 1; echo later' > out & p=$!
        until grep -q up out; do sleep 0.05; done; kill -9 $p
        polytropo ps -q --no-trunc; polytropo logs -f k
    """
    shown = shell(box, f"cd {box.directory}; {script}").split()
    assert len(shown[0]) == 64 and shown[1:] == ["up", "later"]
    # Its monitor removes it at its end, although nobody waits.
    assert _settled(box) == []


def test_the_status_survives_the_command(box: Isolated) -> None:
    script = """
        polytropo run --name k box sh -c 'echo up; sleep 0.3; exit 5' > out & p=$!
        until grep -q up out; do sleep 0.05; done; kill -9 $p; polytropo wait k
    """
    assert shell(box, f"cd {box.directory}; {script}").split() == ["5"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_at_any_moment(box: Isolated, number: signal.Signals) -> None:
    dice = random.Random(number)
    box.polytropo("run", "--rm", "box", "true")
    for _ in range(8):
        # setpriv makes it a child of nsenter that gets the signal itself.
        command = box.command("sh", "-c", f"exec {POLYTROPO} run --rm box sleep 0.1")
        started = subprocess.Popen(
            command, env=box.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(dice.uniform(0.02, 0.4))
        _signal_child(started, number)
        started.wait(30)
    assert _settled(box) == []


def _signal_child(nsenter: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """nsenter into a process namespace stays as the parent of the program."""
    children = subprocess.run(
        ["ps", "--ppid", str(nsenter.pid), "-o", "pid="], capture_output=True, text=True, check=False
    ).stdout.split()
    for child in children:
        subprocess.run(["kill", f"-{int(number)}", child], stderr=subprocess.DEVNULL, check=False)


def test_a_service_that_is_killed(box: Isolated) -> None:
    script = """
        polytropo run --name s box sh -c 'echo up; sleep 1' > out 2> err & p=$!
        until grep -q up out; do sleep 0.05; done
        kill -9 $(polytropo tenant show default --json | grep keeper_pid | tr -dc 0-9)
        wait $p; echo $?; cat err
    """
    status, sentence = shell(box, f"cd {box.directory}; {script}").strip().split("\n")
    assert status == "125" and "the service of the tenant default ended while the container s ran" in sentence
    assert box.polytropo("start", "-a", "s").stdout == "up\n"
    box.polytropo("run", "-d", "--name", "t", "box", "sleep", "60")
    keeper = box.json("tenant", "show", "default")["keeper_pid"]
    box.run("kill", "-9", str(keeper))
    assert "service" in box.refused("exec", "t", "true", status=125)
    box.polytropo("rm", "-f", "s", "t")
    assert _settled(box) == []


def test_a_monitor_that_is_killed(box: Isolated) -> None:
    container_id = box.polytropo("run", "-d", "--name", "m", "box", "sleep", "60").stdout.strip()
    pid = (box.home / "containers" / container_id / "monitor.pid").read_text()
    box.run("kill", "-9", pid)
    assert [each["status"] for each in box.json("ps")] == ["running"]
    box.polytropo("kill", "m")
    assert box.polytropo("wait", "m").stdout == "unknown\n"
    box.polytropo("rm", "m")
    assert _settled(box) == []


def test_nothing_mounted_is_removed_with_a_container(box: Isolated) -> None:
    """Whatever else is mounted inside a container's directory is not the container's to remove."""
    precious = box.directory / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    container_id = box.polytropo("run", "-d", "--name", "b", "box", "true").stdout.strip()
    box.polytropo("wait", "b")
    place = box.home / "containers" / container_id / "bundle" / "rootfs"
    box.run("mount", "--bind", precious, place)
    assert "still mounted" in box.refused("rm", "b")
    box.run("umount", place)
    box.polytropo("rm", "b")
    assert (precious / "file").read_text() == "keep"
