"""What the tests share: a machine of their own inside the machine, gone when the test ends."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import polytropo
from polytropo.cgroups import Group
from polytropo.service import service_binary
from polytropo.state import State
from polytropo.tenants import group_parent
from polytropo.trees import remove_tree

POLYTROPO = str(Path(sys.executable).parent / "polytropo")
COMMAND_TIMEOUT_S = 120.0
LIBRARY = Path(polytropo.__file__).parent / "_bin/libpolytropo_preload.so"
_UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def pytest_configure() -> None:
    """What was started in the background by a shell ignores SIGINT, and so would all that tests interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Isolated:
    """A private mount and process namespace with a state directory of its own.

    Whatever a test starts or mounts in it ends with it, also when the test dies.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / "home"
        self.environment = {
            "HOME": str(directory),
            "LC_ALL": "C.UTF-8",
            "PATH": f"{Path(POLYTROPO).parent}:{os.environ['PATH']}",
            "POLYTROPO_HOME": str(self.home),
            "POLYTROPO_SERVICE_BIN": str(service_binary()),
        }
        # Its first process ignores SIGCHLD, so that the kernel collects orphans.
        self._first = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", "trap '' CHLD; echo ready; exec sleep infinity"],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self._first.stdout is not None
        assert self._first.stdout.readline() == "ready\n", "unshare failed"
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text()
        self._first_pid = int(children)

    @property
    def state(self) -> State:
        return State.open(self.home)

    def command(self, *command: str | Path) -> list[str]:
        """The command line that runs `command` in here; for `subprocess.Popen`."""
        return ["nsenter", f"--target={self._first_pid}", "--mount", "--pid", "--", *map(str, command)]

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        stdin: str | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
        environment: dict[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a program in here; with `check` its failure is the test's, with all that it said."""
        done = subprocess.run(
            self.command(*command),
            input="" if stdin is None else stdin,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout_s,
            env=self.environment | (environment or {}),
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"{command} ended with status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def polytropo(self, *arguments: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Runs the command line in here."""
        return self.run(POLYTROPO, *arguments, **options)

    def refused(self, *arguments: str | Path, status: int = 1, **options: Any) -> str:
        """Runs a command line that has to fail with one clean sentence, and returns that sentence."""
        done = self.polytropo(*arguments, check=False, **options)
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.stderr.startswith("polytropo: "), done.stderr
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
        return done.stderr.removeprefix("polytropo: ").rstrip("\n")

    def disk(self, at: Path, megabytes: int = 64) -> None:
        """Mounts an ext4 filesystem of its own that turns read-only at its first error, as most hosts' do."""
        image = self.directory / "disk.img"
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        self.run("mkfs.ext4", "-q", "-F", image)
        at.mkdir(exist_ok=True)
        mounted = self.run("mount", "-o", "loop,errors=remount-ro", image, at, check=False)
        if mounted.returncode != 0:
            pytest.skip(f"no loop device here: {mounted.stderr.strip()}")

    def break_disk(self, at: Path) -> None:
        """Has the filesystem meet an error: the kernel makes it read-only under whoever writes to it."""
        device = Path(self.run("findmnt", "-no", "SOURCE", at).stdout.strip())
        Path(f"/sys/fs/ext4/{device.name}/trigger_fs_error").write_text("tried by a test")

    def json(self, *arguments: str | Path, **options: Any) -> Any:
        """Runs a command line with --json and returns what it printed."""
        return json.loads(self.polytropo(*arguments, "--json", **options).stdout)

    def close(self) -> None:
        os.kill(self._first.pid, signal.SIGKILL)
        self._first.wait()
        if self._first.stdout is not None:
            self._first.stdout.close()
        if self.home.exists():
            group = Group(group_parent(State(self.home)))
            group.kill()
            group.remove()


@contextlib.contextmanager
def machine() -> Iterator[Isolated]:
    """An isolated place of which nothing is left afterwards."""
    if os.geteuid() != 0:
        pytest.skip("needs root for a private mount namespace")
    # Not in pytest's own directory: that is closed to the users that programs in containers run as, and each
    # session that starts closes it again.
    directory = Path(tempfile.mkdtemp(prefix="polytropo-test-"))
    try:
        directory.chmod(0o711)
        place = Isolated(directory)
        try:
            yield place
        finally:
            place.close()
    finally:
        remove_tree(directory)


@pytest.fixture
def isolated() -> Iterator[Isolated]:
    with machine() as place:
        yield place


@pytest.fixture(scope="session")
def library() -> Path:
    if platform.machine() != "x86_64":
        pytest.skip("there is no preload library for this architecture")
    assert LIBRARY.is_file(), "run `make build` first"
    return LIBRARY
