"""A container with a terminal: keys, size, signals by key."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

from tests.conftest import POLYTROPO, Isolated


def _take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A command on a terminal of its own, with the keys in our hands."""

    def __init__(self, machine: Isolated, *command: str | Path) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(33, 99)
        self.process = subprocess.Popen(
            machine.command(*command),
            env=machine.environment | {"TERM": "vt100"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        self._shown = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def until(self, pattern: str, timeout_s: float = 60.0) -> str:
        """What is shown up to and with the pattern."""
        deadline = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self._shown)):
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} does not come; shown: {self._shown!r}"
            self._shown += os.read(self._ours, 4096).decode()
        before, self._shown = self._shown[: match.end()], self._shown[match.end() :]
        return before

    def close(self) -> int:
        status = self.process.wait(60)
        os.close(self._ours)
        return status


def _talk(terminal: Terminal) -> int:
    terminal.type("stty size; tty; echo $TERM; echo pro''mpt\r")
    shown = terminal.until("\nprompt\r\n")
    assert "33 99" in shown and "/dev/pts/0" in shown and "vt100" in shown
    terminal.resize(20, 50)
    # The size arrives with a signal, a moment later.
    terminal.type("until [ \"$(stty size)\" = '20 50' ]; do sleep 0.05; done; echo re''sized\r")
    terminal.until("\nresized\r\n")
    # One process does both, so that the key comes when it has the terminal.
    terminal.type("(echo sle''eping; exec sleep 100)\r")
    terminal.until("\nsleeping\r\n")
    terminal.type("\x03")
    terminal.type("echo aw''ake\r")
    terminal.until("\nawake\r\n")
    terminal.type("exit 3\r")
    return terminal.close()


def test_run_on_a_terminal(box: Isolated) -> None:
    assert _talk(Terminal(box, POLYTROPO, "run", "--rm", "-it", "box", "sh")) == 3


def test_exec_on_a_terminal(box: Isolated) -> None:
    box.polytropo("run", "-d", "--name", "t", "box", "sleep", "60")
    assert _talk(Terminal(box, POLYTROPO, "exec", "-it", "t", "sh")) == 3


def test_our_terminal_is_as_before(box: Isolated) -> None:
    command = f"stty -a > before; {POLYTROPO} run --rm -it box true; stty -a > after"
    assert Terminal(box, "sh", "-c", f"cd {box.directory}; {command}").close() == 0
    assert (box.directory / "before").read_text() == (box.directory / "after").read_text()
