"""Killed services and commands, full and read-only disks, missing rights and devices."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import POLYTROPO, Isolated
from tests.stacks import write_stack

_AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def kill_service(isolated: Isolated) -> None:
    """Keeper and worker at once, so that nobody is left to start the other anew."""
    (stats,) = isolated.json("stats")
    isolated.run("kill", "-STOP", str(stats["keeper_pid"]))
    isolated.run("kill", "-KILL", str(stats["worker_pid"]), str(stats["keeper_pid"]))


def dead(isolated: Isolated, mnt: Path) -> bool:
    # Who asks while the last device is being closed is told of the abort.
    told = isolated.run("ls", mnt, check=False).stderr
    return "not connected" in told or "connection abort" in told


def test_a_dead_mount_is_cleared_by_unmount(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.polytropo("mount", data, mnt)
    kill_service(isolated)
    assert dead(isolated, mnt)
    assert "is a dead mount of an ended service; clear it with" in isolated.refused("mount", data, mnt)
    isolated.polytropo("unmount", mnt)
    assert isolated.run("ls", mnt).stdout == ""
    isolated.polytropo("mount", data, mnt)
    assert isolated.run("cat", mnt / "file").stdout == "content\n"


def test_a_dead_mount_is_cleared_by_doctor(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.polytropo("mount", data, mnt)
    kill_service(isolated)
    told = isolated.polytropo("doctor").stdout
    assert f"mounts whose service is dead: {mnt}; clear them with `polytropo doctor --fix`" in told
    assert dead(isolated, mnt), "looking changes nothing"
    assert f"dead mounts cleared: {mnt}" in isolated.polytropo("doctor", "--fix").stdout
    assert isolated.run("ls", mnt).stdout == ""


def test_a_dead_mount_in_the_state_directory_is_cleared_by_prune(isolated: Isolated, data: Path) -> None:
    inside = isolated.state.containers / "c" / "root"
    inside.mkdir(parents=True)
    isolated.polytropo("mount", data, inside)
    kill_service(isolated)
    assert isolated.json("system", "prune")["mount_count"] == 1
    assert isolated.run("ls", inside, check=False).stdout == ""


def test_a_mount_whose_worker_died_goes_on(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.polytropo("mount", data, mnt)
    (before,) = isolated.json("stats")
    isolated.run("kill", "-KILL", str(before["worker_pid"]))
    (data / "later").write_text("later\n")
    assert isolated.run("cat", mnt / "file", mnt / "later").stdout == "content\nlater\n"
    (after,) = isolated.json("stats")
    assert after["keeper_pid"] == before["keeper_pid"] and after["worker_pid"] != before["worker_pid"]


def test_blocks_of_an_image_file_survive_a_killed_service(isolated: Isolated, data: Path, mnt: Path) -> None:
    upper = isolated.directory / "upper"
    upper.mkdir()
    content = bytearray(b"image" * 400_000)
    (data / "large").write_bytes(content)
    stack = write_stack(
        isolated.directory / "stack.json",
        {
            "kind": "union",
            "lowers": [{"kind": "dir", "path": str(data), "read_only": True, "coherence": "immutable"}],
            "upper": {"kind": "dir", "path": str(upper), "coherence": "exclusive"},
        },
    )
    isolated.polytropo("mount", stack, mnt)
    change = (
        "import os, sys; file = os.open(sys.argv[1], os.O_WRONLY)\n"
        "for at in (10, 500_000, 1_999_990): os.pwrite(file, b'changed', at)\n"
        "os.close(file)"  # the kernel passes on what it holds, and nothing more is asked
    )
    isolated.run(sys.executable, "-c", change, mnt / "large")
    kill_service(isolated)
    assert dead(isolated, mnt)
    isolated.polytropo("unmount", mnt)
    isolated.polytropo("mount", stack, mnt)
    for at in (10, 500_000, 1_999_990):
        content[at : at + 7] = b"changed"
    isolated.run("sh", "-c", f"cat {mnt}/large >{isolated.directory}/found")
    assert (isolated.directory / "found").read_bytes() == content
    assert (upper / "large").stat().st_blocks * 512 < 300_000


def test_a_silent_service_is_told_and_ended(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.polytropo("mount", data, mnt)
    (stats,) = isolated.json("stats")
    isolated.run("kill", "-STOP", str(stats["worker_pid"]))
    told = isolated.polytropo("doctor").stdout
    assert f"the mount at {mnt} does not answer" in told
    isolated.polytropo("tenant", "stop", "--force", "default")
    assert isolated.run("ls", mnt).stdout == ""


def test_a_keeper_that_hangs_is_ended_by_force(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.polytropo("mount", data, mnt)
    (stats,) = isolated.json("stats")
    isolated.run("kill", "-STOP", str(stats["keeper_pid"]))
    isolated.polytropo("tenant", "stop", "--force", "default")
    assert isolated.run("ls", mnt).stdout == ""
    isolated.polytropo("mount", data, mnt)
    assert isolated.run("cat", mnt / "file").stdout == "content\n"


def test_commands_killed_at_any_moment_leave_nothing_that_matters(
    isolated: Isolated, data: Path, mnt: Path
) -> None:
    dice = random.Random(1)
    for round_number in range(12):
        verb = ("mount", data, mnt) if round_number % 2 == 0 else ("unmount", mnt)
        process = subprocess.Popen(
            isolated.command(POLYTROPO, *verb), env=isolated.environment, stderr=subprocess.DEVNULL
        )
        time.sleep(dice.uniform(0, 0.25))
        process.kill()
        process.wait(30)
        # The command itself lives on in the namespace, where only a part of it was reached.
        isolated.run("sh", "-c", "pkill -KILL -x polytropo || true")
    isolated.polytropo("unmount", mnt, check=False)
    isolated.polytropo("mount", data, mnt)
    assert isolated.run("cat", mnt / "file").stdout == "content\n"
    isolated.polytropo("unmount", mnt)
    isolated.polytropo("tenant", "stop", "default")
    isolated.polytropo("system", "prune")
    assert list(isolated.state.tmp.iterdir()) == []
    assert "polytropo" not in isolated.run("cat", "/proc/self/mountinfo").stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_watch_ends_quietly(isolated: Isolated, number: signal.Signals) -> None:
    isolated.polytropo("tenant", "create", "shop")
    command = [sys.executable, "-m", "polytropo", "stats", "--watch", "--json", "--interval", "0.1"]
    with subprocess.Popen(
        command, env=isolated.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as watch:
        assert watch.stdout is not None and watch.stdout.readline().startswith(b"[{")
        watch.send_signal(number)
        _, told = watch.communicate(timeout=30)
        assert (watch.returncode, told) == (128 + number, b"")


def test_without_a_fuse_device(isolated: Isolated, data: Path, mnt: Path) -> None:
    devices = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    isolated.run("sh", "-c", devices)
    assert "/dev/fuse" in isolated.refused("mount", data, mnt)
    assert "there is no /dev/fuse" in isolated.polytropo("doctor", check=False).stdout
    isolated.run("umount", "--lazy", "/dev")
    isolated.polytropo("mount", data, mnt)


def test_a_full_state_directory(isolated: Isolated, mnt: Path) -> None:
    isolated.home.mkdir()
    isolated.run("mount", "-t", "tmpfs", "-o", "size=4m,mode=711", "none", isolated.home)
    isolated.polytropo("volume", "create", "orders")
    stack = isolated.directory / "stack.json"
    stack.write_text('{"version":1,"root":{"kind":"volume","name":"orders"}}')
    isolated.polytropo("mount", stack, mnt)
    isolated.run("sh", "-c", 'echo early >"$1/early" && sync "$1/early"', "sh", mnt)
    fill = isolated.run("dd", "if=/dev/zero", f"of={mnt}/big", "bs=64k", "count=200", check=False)
    assert fill.returncode == 1 and "No space left on device" in fill.stderr
    assert isolated.run("cat", mnt / "early").stdout == "early\n"
    assert "is full; free some space" in isolated.refused("tenant", "create", "shop")
    assert "is full; free some space" in isolated.refused("volume", "create", "more")
    assert isolated.run("cat", mnt / "early").stdout == "early\n"
    isolated.run("rm", mnt / "big")
    isolated.polytropo("volume", "create", "more")
    isolated.polytropo("unmount", mnt)
    isolated.polytropo("tenant", "stop", "default")


def test_a_state_directory_that_turned_read_only(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.home.mkdir()
    isolated.run("mount", "-t", "tmpfs", "-o", "size=4m,mode=711", "none", isolated.home)
    isolated.polytropo("tenant", "create", "shop")
    isolated.polytropo("volume", "create", "-t", "shop", "orders")
    isolated.run("mount", "-o", "remount,ro", isolated.home)
    for command in (
        ("tenant", "create", "more"),
        ("volume", "create", "-t", "shop", "more"),
        ("volume", "rm", "-t", "shop", "orders"),
        ("mount", "-t", "shop", data, mnt),
        ("system", "prune"),
        ("tenant", "rm", "--force", "shop"),
    ):
        assert "is read-only" in isolated.refused(*command), command
    assert [v["name"] for v in isolated.json("volume", "list")] == ["orders"]
    assert "is read-only" in isolated.polytropo("doctor", check=False).stdout


def test_a_disk_that_turns_read_only_in_the_middle_of_a_write(isolated: Isolated, mnt: Path) -> None:
    isolated.disk(isolated.home)
    isolated.run("chmod", "711", isolated.home)
    isolated.polytropo("volume", "create", "orders")
    stack = isolated.directory / "stack.json"
    stack.write_text('{"version":1,"root":{"kind":"volume","name":"orders"}}')
    isolated.polytropo("mount", stack, mnt)
    isolated.run("sh", "-c", 'echo early >"$1/early" && sync "$1/early"', "sh", mnt)
    write = 'exec 3>"$1/later"; echo first >&3; sync "$1/later"'
    script = f'{write}; echo on; read go; echo second >&3; sync "$1/later"'
    writer = subprocess.Popen(
        isolated.command("sh", "-c", script, "sh", mnt),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None and writer.stdout.readline() == "on\n"
    isolated.break_disk(isolated.home)
    told = writer.communicate("go\n")[1]
    assert writer.returncode != 0 and ("Read-only file system" in told or "Input/output error" in told), told
    refused = isolated.run("touch", mnt / "new", check=False)
    assert refused.returncode == 1 and "Read-only file system" in refused.stderr, refused.stderr
    # What was there before can be read, and the mount goes on.
    assert isolated.run("cat", mnt / "early").stdout == "early\n"
    assert isolated.run("head", "-1", mnt / "later").stdout == "first\n"
    isolated.polytropo("unmount", mnt)


def test_a_volume_in_use_is_not_removed(isolated: Isolated, mnt: Path) -> None:
    isolated.polytropo("volume", "create", "orders")
    isolated.polytropo("mount", "-", mnt, stdin='{"version":1,"root":{"kind":"volume","name":"orders"}}')
    assert f"is mounted at {mnt}" in isolated.refused("volume", "rm", "orders")
    isolated.polytropo("unmount", mnt)
    isolated.polytropo("volume", "rm", "orders")


def test_another_user_is_refused(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.polytropo("mount", data, mnt)
    (packages,) = (Path(sys.prefix) / "lib").glob("python3.*/site-packages")
    places = {
        isolated.directory / "src": Path(__file__).parents[2] / "src",
        isolated.directory / "site": packages,
    }
    for place, path in places.items():
        place.mkdir()
        isolated.run("mount", "--bind", path, place)
    command = [*_AS_NOBODY, "/usr/bin/python3", "-m", "polytropo", "stats"]
    done = isolated.run(*command, check=False, environment={"PYTHONPATH": ":".join(map(str, places))})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done
    assert "may not be used by this user" in done.stderr


def test_a_service_of_another_mount_namespace_is_told(isolated: Isolated, data: Path, mnt: Path) -> None:
    isolated.polytropo("mount", data, mnt)
    done = isolated.run(
        "unshare", "--mount", POLYTROPO, "mount", data, isolated.directory / "home", check=False
    )
    assert done.returncode == 1 and "runs in another mount namespace" in done.stderr


def test_a_service_that_cannot_start_is_told(isolated: Isolated, data: Path, mnt: Path) -> None:
    sentence = isolated.refused("mount", data, mnt, environment={"POLYTROPO_SERVICE_BIN": "/bin/false"})
    assert "the service of the tenant default ended with status 1 at its start" in sentence
    sentence = isolated.refused("mount", data, mnt, environment={"POLYTROPO_SERVICE_BIN": "/nonexistent"})
    assert "the service program /nonexistent is missing" in sentence
    assert [path.name for path in (isolated.state.tenants / "default/run").iterdir()] == ["service.log"]
