"""`exec`: one more program in a container that runs."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from polytropo.containers import engine, private_path, records
from polytropo.containers.attach import forwarded_signals, terminal_size
from polytropo.containers.order import check_words
from polytropo.containers.records import Container, Files
from polytropo.containers.runtime import Runtime
from polytropo.containers.spec import Process, process_section, terminal_environment
from polytropo.containers.users import resolve_user
from polytropo.errors import PolytropoError, storage_errors
from polytropo.state import State


class ExecOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What `polytropo exec` was asked for; None is what the container has."""

    command: Sequence[str]
    environment: Mapping[str, str]
    user: str | None = None
    cwd: str | None = None
    terminal: bool = False
    stdin_open: bool = False


def execute(state: State, container: Container, order: ExecOrder) -> int:
    """Runs a program in the container and returns its status. Raises PolytropoError."""
    files = records.files_of(state, container.id)
    if not records.is_alive(records.process_of(files)):
        raise PolytropoError(
            f"the container {container.name} does not run; start it with `polytropo start {container.name}`"
        )
    if order.terminal and not sys.stdin.isatty():
        raise PolytropoError("there is no terminal to pass on; leave --tty away")
    root = engine.process_root(container, files)
    try:
        user = resolve_user(root, container.user if order.user is None else order.user)
        given = container.environment | dict(order.environment)
        given |= private_path.environment(container, root, given)
    finally:
        os.close(root)
    check_words(order.command, order.environment)
    environment = terminal_environment(given, user, container.hostname, order.terminal)
    # Also told by the runtime itself, but only some time after the program has begun.
    size = terminal_size() if order.terminal else None
    process = Process(order.command, environment, order.cwd or container.cwd, user, order.terminal, size)
    with (
        storage_errors(f"run a program in the container {container.name}", files.directory),
        _document(files.directory, msgspec.json.encode(process_section(process))) as document,
    ):
        return _run(container, files, order, document)


@contextmanager
def _document(directory: Path, content: bytes) -> Iterator[Path]:
    """A file for the runtime to read, gone at the end."""
    path = directory / f"exec-{os.urandom(8).hex()}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _run(container: Container, files: Files, order: ExecOrder, document: Path) -> int:
    log = document.with_name(f"{document.name}.log")
    runtime = Runtime(container, files, log=log)
    command = runtime.command("exec", "--process", str(document), container.id)
    try:
        program = subprocess.Popen(
            command, stdin=None if order.stdin_open or order.terminal else subprocess.DEVNULL, cwd="/"
        )
        pidfd = os.pidfd_open(program.pid)
        try:
            # On a terminal the runtime gets the keyboard's signals from the kernel, as we do.
            with forwarded_signals(pidfd, None, keyboard=not sys.stdin.isatty()):
                status = program.wait()
        finally:
            os.close(pidfd)
        if failure := runtime.logged_failure("exec"):
            # It has said so itself, on the stream that it shares with the program.
            return failure.status
        return 128 - status if status < 0 else status
    finally:
        log.unlink(missing_ok=True)
