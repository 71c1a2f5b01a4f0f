"""Where every command line begins. Commands that have to start at once are read without click."""

import gc
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from polytropo.cli import quick
from polytropo.cli.failures import drop_output

# Imports make many objects and no garbage; the usual 700 would have them looked through many times.
_GARBAGE_THRESHOLD = 50_000
_TERMINATED_STATUS = 143


def main() -> NoReturn:
    """Runs the command line of this process and exits with its status."""
    gc.set_threshold(_GARBAGE_THRESHOLD)
    do_without_extensions()
    signal.signal(signal.SIGTERM, _terminated)
    status = _status(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
    sys.stderr.flush()
    # Taking the interpreter apart takes longer than many a command; what had to be given back has been.
    os._exit(status)


def do_without_extensions() -> None:
    """Keeps msgspec from importing `typing_extensions`, which it can do without, where that is there.

    With what that imports it takes as long as all of a `run`'s other imports.
    """
    absent: Any = None
    sys.modules.setdefault("typing_extensions", absent)


def _status(arguments: list[str]) -> int:
    try:
        status = quick.run(arguments)
        if status is not None:
            return status
        from polytropo.cli.main import run

        return run(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    # Unwinds, so that temporary directories and locks are given back.
    raise SystemExit(_TERMINATED_STATUS)
