"""Containers that stay: ps, logs, exec, stop, start, rm, inspect, and tenants that end under them."""

import json

from tests.conftest import Isolated
from tests.containers.conftest import leftovers, shell


def test_a_container_in_the_background(box: Isolated) -> None:
    container_id = box.polytropo("run", "-d", "--name", "bg", "box", "sleep", "60").stdout.strip()
    (shown,) = box.json("ps")
    assert (shown["id"], shown["status"], shown["tenant"]) == (container_id, "running", "default")
    assert "Up" in box.polytropo("ps").stdout
    assert "runs" in box.refused("rm", "bg")
    assert "runs already" in box.refused("start", "bg")
    assert box.polytropo("stop", "-t", "0", container_id[:12]).stdout == "bg\n"
    assert box.json("ps") == []
    (shown,) = box.json("ps", "-a")
    assert (shown["status"], shown["exit_status"]) == ("exited", 137)
    assert "Exited (137)" in box.polytropo("ps", "-a").stdout
    assert "does not run" in box.refused("exec", "bg", "true", status=125)
    assert "does not run" in box.refused("kill", "bg")
    box.polytropo("rm", "bg")
    assert '"bg"' in box.refused("inspect", "bg")
    assert leftovers(box) == []


def test_what_was_written_outlives_the_end(box: Isolated) -> None:
    count = "n=$(cat /n 2>/dev/null || echo 0); echo $((n + 1)) > /n; cat /n; exit $((n + 1))"
    assert box.polytropo("run", "--name", "c", "box", "sh", "-c", count, check=False).returncode == 1
    assert box.polytropo("start", "-a", "c", check=False).stdout == "2\n"
    box.polytropo("start", "c")
    assert box.polytropo("wait", "c").stdout == "3\n"
    assert box.polytropo("logs", "c").stdout == "1\n2\n3\n"
    # Another container of the image does not see it.
    assert box.polytropo("run", "--rm", "box", "sh", "-c", count, check=False).stdout == "1\n"


def test_signals_reach_the_program(box: Isolated) -> None:
    trap = "trap 'echo got it; exit 9' TERM USR1; echo ready; while :; do sleep 0.05; done"
    waits = 'until grep -q ready "$OUT"; do sleep 0.05; done'
    script = f"""
        OUT=$(mktemp); polytropo run --name t box sh -c "$TRAP" >$OUT & p=$!
        {waits}; kill -TERM $p; wait $p; echo $?; cat $OUT; polytropo rm t
        polytropo run -d --name d box sh -c "$TRAP" >/dev/null
        until polytropo logs d | grep -q ready; do sleep 0.05; done
        polytropo kill -s USR1 d; polytropo wait d; polytropo start d; polytropo stop d
        polytropo inspect d | grep exit_status
    """
    shown = shell(box, script, environment={"TRAP": trap, "TMPDIR": str(box.directory)}).split("\n")
    assert shown[:5] == ["9", "ready", "got it", "t", "d"]
    assert shown[5] == "9" and '"exit_status": 9,' in shown[-2]


def test_exec(box: Isolated) -> None:
    box.polytropo("run", "-d", "--name", "e", "-e", "A=1", "box", "sh", "-c", "echo x > /made; sleep 60")
    script = (
        'until [ -e /made ]; do :; done; cat; id -un; pwd; echo "$A $B $FROM_IMAGE"; hostname >&2; exit 4'
    )
    options = ("-i", "-u", "app", "-w", "/tmp", "-e", "B=2")
    done = box.polytropo("exec", *options, "e", "sh", "-c", script, check=False, stdin="in\n")
    assert (done.returncode, done.stdout) == (4, "in\napp\n/tmp\n1 2 yes\n")
    assert done.stderr.strip()
    groups = box.polytropo("exec", "e", "cat", "/proc/self/cgroup").stdout
    assert json.loads(box.polytropo("inspect", "e").stdout)[0]["id"] in groups
    for command, status in (("nothing", 127), ("/etc", 126)):
        done = box.polytropo("exec", "e", command, check=False)
        assert done.returncode == status and command in done.stderr
    assert "no user" in box.refused("exec", "-u", "nobody", "e", "true", status=125)
    assert "terminal" in box.refused("exec", "-t", "e", "true", status=125)
    assert "PATH" in box.polytropo("exec", "e", "env").stdout


def test_logs(box: Isolated) -> None:
    script = "echo one; echo two >&2; printf three; sleep 0.2; echo"
    script += "; head -c 100000 /dev/zero | tr '\\0' x; echo; echo end"
    box.polytropo("run", "--name", "l", "box", "sh", "-c", script)
    done = box.polytropo("logs", "l")
    assert done.stdout == "one\nthree\n" + "x" * 100000 + "\nend\n" and done.stderr == "two\n"
    assert box.polytropo("logs", "--tail", "1", "l").stdout == "end\n"
    assert len(box.polytropo("logs", "--tail", "2", "l").stdout) == 100001 + 4
    assert box.polytropo("logs", "--tail", "0", "l").stdout == ""
    stamped = box.polytropo("logs", "-t", "--tail", "1", "l").stdout
    assert stamped.startswith("20") and stamped.endswith(" end\n")
    slow = "for i in 1 2 3; do echo $i; sleep 0.2; done"
    box.polytropo("run", "-d", "--name", "f", "box", "sh", "-c", slow)
    assert box.polytropo("logs", "-f", "f").stdout == "1\n2\n3\n"


def test_a_tenant_that_stops_and_one_that_goes(box: Isolated) -> None:
    box.polytropo("tenant", "create", "shop")
    for name, status in (("one", 3), ("two", 4)):
        trap = f"trap 'exit {status}' TERM; sleep 60 & wait"
        box.polytropo("run", "-d", "--tenant", "shop", "--name", name, "box", "sh", "-c", trap)
    box.polytropo("run", "-d", "--name", "other", "box", "sleep", "60")
    assert "container" in box.refused("tenant", "rm", "shop")
    for name in ("one", "two"):  # their traps are set once they sleep
        box.polytropo("exec", name, "sh", "-c", "until ps | grep -q '[s]leep 60'; do sleep 0.05; done")
    box.polytropo("tenant", "stop", "shop")
    statuses = {each["name"]: (each["status"], each["exit_status"]) for each in box.json("ps", "-a")}
    assert statuses == {"one": ("exited", 3), "two": ("exited", 4), "other": ("running", None)}
    box.polytropo("start", "one")
    assert box.polytropo("exec", "one", "echo", "again").stdout == "again\n"
    box.polytropo("tenant", "rm", "--force", "shop")
    assert [each["name"] for each in box.json("ps", "-a")] == ["other"]
    box.polytropo("rm", "-f", "other")
    assert leftovers(box) == []


def test_an_image_in_use_stays(box: Isolated) -> None:
    box.polytropo("run", "--name", "user", "box", "true")
    assert "user" in box.refused("image", "rm", "box")
    box.polytropo("image", "rm", "--force", "box")
    box.polytropo("system", "prune")
    assert box.polytropo("start", "-a", "user").stdout == ""
    box.polytropo("rm", "user")
    box.polytropo("system", "prune")
    assert not list((box.home / "layers").glob("sha256/*"))


def test_limits_hold_containers_too(box: Isolated) -> None:
    box.polytropo("tenant", "create", "small", "--cpus", "0", "--memory", "96MiB")
    # tail keeps all that it may have to print; the kernel ends it, and neither the shell nor the service.
    script = (
        "grep Cpus_allowed_list /proc/self/status; head -c 300000000 /dev/zero | tail -c 250000000 | wc -c"
    )
    done = box.polytropo("run", "--name", "hog", "--tenant", "small", "box", "sh", "-c", script)
    assert done.stdout.split() == ["Cpus_allowed_list:", "0", "0"] and "Killed" in done.stderr
    assert box.polytropo("start", "-a", "hog").stdout.split()[:2] == ["Cpus_allowed_list:", "0"]
    box.polytropo("rm", "hog")
