"""How a command that failed ends: one sentence on stderr, and a status for the shell."""

import os
import sys

from polytropo.errors import PolytropoError

PROGRAM = "polytropo"
# Commands that answer with a program's status: failures of ours get one of their own, as with podman.
RUN_FAMILY = frozenset({"run", "exec", "on"})
RUN_FAMILY_STATUS = 125
_INTERRUPTED_STATUS = 130


def status_of(error: BaseException, command: str | None, *, debug: bool = False) -> int:
    """Tells what ended `command` and returns the status; what is no failure of a command is raised again."""
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED_STATUS
    if isinstance(error, BrokenPipeError):
        drop_output()
        return 0
    if isinstance(error, PolytropoError):
        sentence = str(error)
    elif isinstance(error, Exception):
        what = f"{type(error).__name__}: {error}".replace("\n", " ")
        sentence = f"an error in polytropo itself, {what}; run it again with --debug and report what it shows"
    else:
        raise error
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"{PROGRAM}: {printable(sentence)}", file=sys.stderr)
    return RUN_FAMILY_STATUS if command in RUN_FAMILY else 1


def drop_output() -> None:
    """Whoever read our output has gone; Python's own flush at exit must not complain about it."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


def printable(cell: object) -> str:
    """Text that a terminal shows and does not obey: names may come from hostile archives."""
    text = "" if cell is None else str(cell)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
