"""A keeper started by hand, for tests that talk to it over its socket."""

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from polytropo.service import service_binary
from tests.conftest import Isolated

UID_BASE = 3_000_000
_WAIT_S = 30.0


class Keeper:
    """A running keeper and, through `ask`, its answers."""

    def __init__(self, place: Isolated, *, idle_timeout_s: int = 3600, arguments: Sequence[str] = ()) -> None:
        self.place = place
        self.run_dir = place.directory / "run"
        self.run_dir.mkdir(exist_ok=True)
        read_end, write_end = os.pipe()
        self.log = self.run_dir / "log"
        own = [f"--run-dir={self.run_dir}", f"--uid-base={UID_BASE}", f"--ready-fd={write_end}"]
        own += [f"--idle-timeout-s={idle_timeout_s}", "--tenant=tried"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                place.command(service_binary(), "keeper", *own, *arguments),
                pass_fds=(write_end,),
                stderr=log,
                cwd="/",
            )
        os.close(write_end)
        ready, _, _ = select.select([read_end], [], [], _WAIT_S)
        told = os.read(read_end, 64) if ready else b""
        os.close(read_end)
        assert told == b"ready\n", self.log.read_text()
        self._connection = self.connect()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_WAIT_S)
        # Through a link, since a socket's address holds 107 bytes.
        directory = os.open(self.run_dir, os.O_PATH)
        connection.connect(f"/proc/self/fd/{directory}/control.sock")
        os.close(directory)
        return connection

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """What the keeper answers, be it "ok" or "error"."""
        return ask(self._connection, {"op": operation, **arguments})

    def do(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """An order that must succeed."""
        answer = self.ask(operation, **arguments)
        assert "ok" in answer, answer
        result: dict[str, Any] = answer["ok"]
        return result

    def refused(self, operation: str, **arguments: Any) -> tuple[str, str | None]:
        """An order that must fail: the sentence and the error's name."""
        answer = self.ask(operation, **arguments)
        assert "error" in answer, answer
        return answer["error"]["sentence"], answer["error"]["errno"]

    def mount(self, source: Path, mountpoint: Path, **options: Any) -> None:
        mountpoint.mkdir(exist_ok=True)
        self.do("mount", stack=directory_stack(source, **options), mountpoint=str(mountpoint))

    def mounts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.do("list")["mounts"]
        return found

    def inner_pid(self, which: str) -> int:
        """The keeper's or worker's process id as seen in the namespace that it runs in."""
        pid: int = self.do("status")[which]
        return pid

    def kill_worker(self) -> int | None:
        """Says which it was; None if it is dead already and there is no other yet."""
        worker = self.do("status")["worker_pid"]
        if worker is None or self.place.run("kill", "-KILL", str(worker), check=False).returncode != 0:
            return None
        return int(worker)

    def close(self) -> None:
        self._connection.close()
        self.process.kill()
        self.process.wait(_WAIT_S)


def ask(connection: socket.socket, order: object) -> dict[str, Any]:
    connection.sendall(json.dumps(order).encode() + b"\n")
    answer: dict[str, Any] = json.loads(read_line(connection))
    return answer


def read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        received = connection.recv(65536)
        if not received:
            break
        line += received
    return line


def directory_stack(path: Path, **options: Any) -> dict[str, Any]:
    return {"version": 1, "root": {"kind": "dir", "path": str(path), **options}}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {_WAIT_S:g} s: {what}"
        time.sleep(0.02)
