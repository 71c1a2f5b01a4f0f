"""Runs the command line as a person would, and shows it."""

import os
import subprocess
import sys
import time
from pathlib import Path

_TIMEOUT_S = 600
_BOLD, _DIM, _PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")


def step(text: str) -> None:
    print(f"\n{_BOLD}== {text}{_PLAIN}", flush=True)


def say(text: str) -> None:
    print(f"   {text}", flush=True)


class Shell:
    """The command `polytropo` on one state directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._program = Path(sys.executable).parent / "polytropo"
        self._environment = os.environ | {"POLYTROPO_HOME": str(home)}

    def polytropo(self, *words: str, show: bool = False, stdin: str = "") -> str:
        """Runs one command and returns what it printed; its failure ends the demo with its words."""
        print(f"{_DIM}$ polytropo {' '.join(words)}{_PLAIN}", flush=True)
        done = subprocess.run(
            [str(self._program), *words],
            env=self._environment,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if show and done.stdout:
            print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            raise SystemExit(f"demo: `polytropo {' '.join(words)}` ended with status {done.returncode}")
        return done.stdout

    def until(self, what: str, *words: str, expected: str, timeout_s: float = 20.0) -> None:
        """Runs a command in a container until it prints what is expected."""
        deadline = time.monotonic() + timeout_s
        printed = ""
        while time.monotonic() < deadline:
            done = subprocess.run(
                [str(self._program), *words],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
            printed = done.stdout + done.stderr
            if expected in done.stdout:
                return
            time.sleep(0.2)
        raise SystemExit(f"demo: {what} did not come up within {timeout_s:g} s; it said: {printed.strip()}")
