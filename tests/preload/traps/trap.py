"""What the Python programs here share."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

UNAWARE: Mapping[str, str] = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def begin() -> None:
    """Opens and looks so often that the library does so by itself from now on."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with open("known", "w") as file:
        file.write("0123456789abcdefghijklmnopqrstuvwxyz")
    for _ in range(80):
        os.close(os.open("known", os.O_RDONLY))
        os.stat("known")


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or the name of its errno."""
    try:
        return function(*arguments)
    except OSError as error:
        return os.strerror(error.errno or 0)


def unaware(*command: str, **options: Any) -> str:
    """Runs a program without the library; what it printed."""
    done = subprocess.run(
        command, env=UNAWARE, stdout=subprocess.PIPE, text=True, timeout=30, check=False, **options
    )
    return str(done.stdout)


def sh(script: str, **options: Any) -> str:
    """Runs a shell, and all that it runs, without the library."""
    return unaware("sh", "-c", script, **options)


def in_child(function: Callable[[], Any]) -> int:
    """Runs it in a forked child; its exit status."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
