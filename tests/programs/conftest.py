"""Programs are run on both kinds of stacks, by root and by an ordinary user."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Isolated
from tests.stacks import PRIVATE, mount

ORDINARY_UID = 1  # daemon: an ordinary user that every Debian has


@dataclass(frozen=True)
class Desk:
    """A directory on a mounted stack, and who works in it."""

    place: Isolated
    directory: Path
    ordinary: bool
    variables: Mapping[str, str] = field(default_factory=dict)
    """With them programs load the preload library."""

    def without_preload(self) -> "Desk":
        """The same desk for programs that know nothing of shared memory."""
        return replace(self, variables={})

    def run(
        self, *command: str | Path, check: bool = True, timeout_s: float = 120, stdin: str | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a program here, as whoever this desk belongs to."""
        return self.place.run(*self.words(*command), check=check, timeout_s=timeout_s, stdin=stdin)

    def start(self, *command: str | Path, stdout: Any) -> "subprocess.Popen[bytes]":
        """Starts a program here that goes on running; end it with `kill`."""
        return subprocess.Popen(
            self.place.command(*self.words(*command)),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            env=self.place.environment,
        )

    def words(self, *command: str | Path) -> list[str]:
        identity = (
            [f"--reuid={ORDINARY_UID}", f"--regid={ORDINARY_UID}", "--clear-groups", "--inh-caps=-all"]
            if self.ordinary
            else []
        )
        settings = [f"--chdir={self.directory}", f"HOME={self.directory}", f"TMPDIR={self.directory}"]
        settings += [f"{name}={value}" for name, value in self.variables.items()]
        return ["setpriv", *identity, "env", *settings, *map(str, command)]

    def sh(self, script: str, *, check: bool = True, timeout_s: float = 120) -> str:
        """Runs a shell script here that stops at its first failure; returns what it printed."""
        return self.run("bash", "-euc", script, check=check, timeout_s=timeout_s).stdout


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kills what was started: the program itself, which is a child of the process that entered the place."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for child in children.read_text().split() if process.poll() is None else ():
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(int(child))
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
    process.wait(30)


@pytest.fixture(params=["dir-ordinary", "union-root", "private-union-root"])
def desk(request: pytest.FixtureRequest, isolated: Isolated) -> Iterator[Desk]:
    yield from desk_named(isolated, str(request.param))


@pytest.fixture(params=["dir-root", "union-ordinary", "private-dir-ordinary"])
def other_desk(request: pytest.FixtureRequest, isolated: Isolated) -> Iterator[Desk]:
    """The other half of kinds and users."""
    yield from desk_named(isolated, str(request.param))


def desk_named(isolated: Isolated, name: str) -> Iterator[Desk]:
    """A desk on the stack and for the user in its name: "union-ordinary"."""
    kind, _, user = name.rpartition("-")
    mounted = mount(isolated, kind)
    directory = mounted.at / "desk"
    isolated.run("mkdir", directory)
    if user == "ordinary":
        isolated.run("chown", f"{ORDINARY_UID}:{ORDINARY_UID}", directory)
    variables = mounted.preload_variables() if kind.startswith(PRIVATE) else {}
    yield Desk(isolated, directory, user == "ordinary", variables)
    mounted.unmount()
