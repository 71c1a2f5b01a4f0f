"""Containers of an ordinary user, who has subordinate ids and may open the FUSE device."""

import subprocess
import sys
from pathlib import Path

import polytropo
from polytropo.service import service_binary
from tests.conftest import POLYTROPO, Isolated
from tests.service.test_rootless import give_subordinate_ids, let_users_open_fuse

_UID = 61234


class User:
    """An ordinary user of the machine with a state directory of its own."""

    def __init__(self, machine: Isolated) -> None:
        self._machine = machine
        self.directory = machine.directory / "u"
        self.directory.mkdir()
        machine.run("chown", f"{_UID}:{_UID}", self.directory)
        let_users_open_fuse(machine)
        give_subordinate_ids(machine)
        self._let_in()

    def polytropo(self, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        identity = (f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups")
        environment = (
            f"HOME={self.directory}",
            f"PATH={Path(POLYTROPO).parent}:/usr/bin:/bin:/usr/sbin:/sbin",
            f"POLYTROPO_HOME={self.directory / 'home'}",
        )
        command = self._machine.command("setpriv", *identity, "env", "-i", *environment, POLYTROPO, *words)
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd="/")

    def printed(self, *words: str | Path) -> str:
        done = self.polytropo(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _let_in(self) -> None:
        """Shows the program and its Python where they are, also below directories closed to others."""
        needed = {Path(sys.prefix), Path(sys.base_prefix), Path(polytropo.__file__).parent.parent}
        needed |= {service_binary().parent}
        closed = {p for path in needed for p in path.parents if not p.stat().st_mode & 0o001}
        for top in (p for p in closed if not closed & set(p.parents)):
            below = [path for path in sorted(needed) if path.is_relative_to(top)]
            script = ["set -e"]
            for i, path in enumerate(below):
                script += [
                    f"mkdir -p '{self.directory}/{i}'",
                    f"mount --bind '{path}' '{self.directory}/{i}'",
                ]
            script += [f"mount -t tmpfs -o mode=755 none '{top}'"]
            for i, path in enumerate(below):
                script += [f"mkdir -p '{path}'", f"mount --bind '{self.directory}/{i}' '{path}'"]
            self._machine.run("sh", "-c", "\n".join(script))


def test_a_user_runs_containers(isolated: Isolated, layout: Path) -> None:
    user = User(isolated)
    packed = isolated.directory / "image.tar"
    subprocess.run(["tar", "-C", layout, "-cf", packed, "."], check=True)
    packed.chmod(0o644)
    user.printed("image", "import", packed, "--name", "box")
    script = "id -u; echo x > /etc/new; cat /etc/greeting; stat -c %u:%g /etc/new"
    script += "; chown app /etc/new; stat -c %U /etc/new"
    shown = user.printed("run", "--rm", "box", "sh", "-c", script)
    assert shown.split() == ["0", "hello", "0:0", "app"]
    assert user.polytropo("run", "--rm", "box", "sh", "-c", "exit 9").returncode == 9
    user.printed("volume", "create", "data")
    user.printed(
        "run",
        "-d",
        "--name",
        "d",
        "-v",
        "data:/data",
        "-u",
        "app",
        "box",
        "sh",
        "-c",
        "trap 'exit 0' TERM; echo up; sleep 60 & wait",
    )
    assert user.printed("exec", "d", "id", "-un") == "app\n"
    assert user.printed("exec", "-u", "root", "d", "sh", "-c", "echo kept > /data/f; cat /data/f") == "kept\n"
    assert "d" in user.printed("ps") and user.printed("logs", "d") == "up\n"
    own = user.directory / "own"
    user.printed("cp", "d:/data/f", own)
    assert own.read_text() == "kept\n" and own.stat().st_uid == _UID
    user.printed("cp", own, "d:/tmp/copied")
    user.printed("commit", "d", "changed")
    user.printed("stop", "-t", "0", "d")
    user.printed("start", "d")
    user.printed("tenant", "stop", "default")
    user.printed("rm", "d")
    assert (
        user.printed("run", "--rm", "-v", "data:/data", "changed", "cat", "/tmp/copied", "/data/f")
        == "kept\n" * 2
    )
    assert "no user" in user.polytropo("run", "--rm", "-u", "nobody", "box").stderr
    assert list((user.directory / "home/containers").iterdir()) == []
