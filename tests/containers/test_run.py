"""`run` and its options, on the real service and the real runtime."""

import json
from pathlib import Path

import pytest

from polytropo import service
from tests.conftest import Isolated
from tests.containers.conftest import leftovers, shell


def test_status_streams_and_environment(box: Isolated) -> None:
    script = 'echo out; echo err >&2; echo "$FROM_IMAGE $GIVEN $INHERITED $FROM_FILE $HOME $(pwd)"; exit 7'
    env_file = box.directory / "env"
    env_file.write_text("# a comment\nFROM_FILE=file\nGIVEN=overridden\n\n")
    given = ("-e", "GIVEN=given", "-e", "INHERITED", "--env-file", env_file)
    done = box.polytropo(
        "run", "--rm", *given, "box", "sh", "-c", script,
        check=False, environment={"INHERITED": "from here"},
    )  # fmt: skip
    assert done.returncode == 7
    assert done.stdout == "out\nyes given from here file /root /home/app\n"
    assert done.stderr == "err\n"
    assert leftovers(box) == []


def test_the_image_says_what_runs(box: Isolated) -> None:
    assert box.polytropo("run", "--rm", "box").stdout == "default\n"
    assert box.polytropo("run", "--rm", "--entrypoint", "echo", "box", "a", "b").stdout == "a b\n"
    assert box.polytropo("run", "--rm", "--entrypoint", '["echo","-n"]', "box", "a").stdout == "a"
    refused = box.refused("run", "--rm", "--entrypoint", "", "box", status=125)
    assert "names no program" in refused
    assert box.polytropo("run", "--rm", "-w", "/made/here", "box", "pwd").stdout == "/made/here\n"


def test_users_and_rights(box: Isolated) -> None:
    status = "grep -E 'Cap(Eff|Bnd|Inh)|NoNewPrivs|Seccomp:' /proc/self/status; id -u; id -g; id -G"
    as_root = box.polytropo("run", "--rm", "box", "sh", "-c", status).stdout.split()
    # Docker's 14 capabilities, none inheritable; a filter; privileges may be gained by setuid programs.
    assert as_root == [
        "CapInh:", "0000000000000000", "CapEff:", "00000000a80425fb", "CapBnd:", "00000000a80425fb",
        "NoNewPrivs:", "0", "Seccomp:", "2", "0", "0", "0",
    ]  # fmt: skip
    as_app = box.polytropo("run", "--rm", "-u", "app", "box", "sh", "-c", status).stdout.split()
    assert as_app[3] == "0000000000000000" and as_app[5] == "00000000a80425fb"
    assert as_app[-4:] == ["1000", "1000", "1000", "10"]
    assert "no user" in box.refused("run", "--rm", "-u", "nobody", "box", status=125)


def test_surroundings(box: Isolated) -> None:
    host = Path("/etc/hosts").read_text()
    shown = box.polytropo("run", "--rm", "--name", "here", "box", "cat", "/etc/hosts", "/etc/hostname").stdout
    assert shown.startswith(host) and "here" in shown.removeprefix(host)
    look = (
        "hostname; cat /etc/hostname; ls /sys/class/net; grep -c alone /etc/hosts; echo x > /etc/resolv.conf"
    )
    alone = ("--network", "none", "--hostname", "alone")
    shown = box.polytropo("run", "--rm", *alone, "box", "sh", "-c", look).stdout
    assert shown.split() == ["alone", "alone", "lo", "1"]
    probe = "test -c /dev/null && test -d /dev/shm && echo x > /dev/shm/x && ls -d /proc/self /sys/kernel"
    assert box.polytropo("run", "--rm", "box", "sh", "-c", probe).stdout.split() == [
        "/proc/self",
        "/sys/kernel",
    ]
    closed = (
        "cat /proc/kcore | wc -c; ls /sys/firmware | wc -l; echo 1 > /proc/sys/kernel/panic || echo closed"
    )
    assert box.polytropo("run", "--rm", "box", "sh", "-c", closed).stdout.split() == ["0", "0", "closed"]


def test_read_only_root(box: Isolated) -> None:
    script = "echo x > /tmp/x && echo x > /run/x && cat /tmp/x; echo y > /etc/y || echo refused"
    assert box.polytropo("run", "--rm", "--read-only", "box", "sh", "-c", script).stdout.split() == [
        "x",
        "refused",
    ]


@pytest.mark.parametrize("options", [(), ("--share-image",)], ids=["by itself", "shared"])
def test_an_image_that_containers_share(box: Isolated, options: tuple[str, ...]) -> None:
    """The kernel reads the program's file itself if it is told to, until the container changes it."""
    box.polytropo("run", "-d", "--name", "here", *options, "box", "sleep", "1000")
    client = service.reach(box.state, "default")
    assert client is not None
    with client:
        (mount,) = client.mounts()
        opened = client.call("open_files", mount=mount.mount)["open_files"]
    assert {file["bytes"] for file in opened} == ({"passthrough"} if options else set())
    script = (
        "echo more >> /etc/greeting && cat /etc/greeting && cat /etc/passwd > /tmp/copy && wc -l < /tmp/copy"
    )
    assert box.polytropo("exec", "here", "sh", "-c", script).stdout.split() == ["hello", "more", "2"]
    assert box.polytropo("run", "--rm", *options, "box", "cat", "/etc/greeting").stdout == "hello\n"
    box.polytropo("rm", "--force", "here")
    assert leftovers(box) == []


def test_volumes_and_host_paths(box: Isolated) -> None:
    box.polytropo("volume", "create", "data")
    there = box.directory / "there"
    there.mkdir()
    (there / "file").write_text("from the host\n")
    box.polytropo(
        "run", "--rm", "-v", "data:/data", "-v", f"{there}:/there", "-v", f"{there}/file:/etc/one:ro", "box",
        "sh", "-c", "cp /there/file /data/copy; cat /etc/one > /there/back; ! echo x > /etc/one",
    )  # fmt: skip
    assert (there / "back").read_text() == "from the host\n"
    assert (there / "file").read_text() == "from the host\n"
    shown = box.polytropo(
        "run",
        "--rm",
        "-v",
        "data:/data:ro",
        "box",
        "sh",
        "-c",
        "cat /data/copy; echo x > /data/x || echo refused",
    ).stdout
    assert shown == "from the host\nrefused\n"
    # A second program sees what the first one writes, while both run.
    box.polytropo(
        "run", "-d", "--name", "writer", "-v", "data:/d", "box", "sh", "-c", "echo 1 > /d/one; sleep 60"
    )
    wait = "until [ -e /d/one ]; do sleep 0.05; done; cat /d/one"
    assert box.polytropo("run", "--rm", "-v", "data:/d", "box", "sh", "-c", wait).stdout == "1\n"
    assert "used by the container writer" in box.refused("volume", "rm", "data")
    box.polytropo("rm", "-f", "writer")
    box.polytropo("volume", "rm", "data")


def test_statuses_of_what_cannot_run(box: Isolated) -> None:
    for command, status in (("nothing", 127), ("/nothing", 127), ("/etc", 126), ("/bin/not-executable", 126)):
        sentence = box.refused("run", "--rm", "box", command, status=status)
        assert command.removeprefix("/") in sentence
    assert leftovers(box) == []


def test_what_does_not_exist_is_named(box: Isolated) -> None:
    assert '"nope"' in box.refused("run", "nope", status=125)
    assert '"nope"' in box.refused("run", "--tenant", "nope", "box", status=125)
    assert '"nope"' in box.refused("run", "-v", "nope:/x", "box", status=125)
    assert "/nope" in box.refused("run", "-v", "/nope:/x", "box", status=125)
    assert "not understood" in box.refused("run", "-v", "/etc", "box", status=125)
    assert "absolute" in box.refused("run", "-v", "/etc:x", "box", status=125)
    assert "root" in box.refused("run", "-v", "/etc:/", "box", status=125)
    assert "absolute" in box.refused("run", "-w", "x", "box", status=125)
    assert "NAME=VALUE" in box.refused("run", "-e", "=x", "box", status=125)
    assert "runtime" in box.refused("run", "--runtime", "x", "box", status=125)
    assert "cannot name" in box.refused("run", "--name", "a/b", "box", status=125)
    assert "not valid UTF-8" in box.refused("run", "box", "echo", "\udcff", status=125)
    assert "not valid UTF-8" in box.refused("run", "-e", "A=\udcff", "box", status=125)
    assert "UTF-8" in box.refused("run", "-w", "/\udcff", "box", status=125)
    assert "UTF-8" in box.refused("run", "-v", "/etc:/\udcff", "box", status=125)
    assert leftovers(box) == []


def test_names_ids_and_cidfile(box: Isolated) -> None:
    cid_file = box.directory / "cid"
    box.polytropo("run", "--name", "one", "--cidfile", cid_file, "box", "true")
    container_id = cid_file.read_text()
    assert "exists" in box.refused("run", "--cidfile", cid_file, "box", status=125)
    assert "taken" in box.refused("run", "--name", "one", "box", status=125)
    (shown,) = json.loads(box.polytropo("inspect", container_id[:6]).stdout)
    assert (shown["id"], shown["name"], shown["exit_status"]) == (container_id, "one", 0)
    started = shell(
        box, "for i in 1 2 3; do polytropo run -d --name same box sleep 9 2>/dev/null & done; wait"
    )
    assert len(started.split()) == 1


def test_input_and_large_output(box: Isolated) -> None:
    data = "0123456789abcdef" * (1 << 16)
    assert box.polytropo("run", "--rm", "-i", "box", "cat", stdin=data).stdout == data
    # Without -i there is nothing to read.
    assert box.polytropo("run", "--rm", "box", "cat", stdin=data).stdout == ""


def test_several_at_once(box: Isolated) -> None:
    script = "for i in 1 2 3 4; do polytropo run --rm box echo $i & done; wait"
    assert sorted(shell(box, script).split()) == ["1", "2", "3", "4"]
    assert leftovers(box) == []
