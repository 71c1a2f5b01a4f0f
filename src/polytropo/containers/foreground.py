"""`run`, `start --attach` and `attach`: a container that the command stays with."""

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from polytropo.containers import engine, records
from polytropo.containers.attach import Attachment, forwarded_signals, raw_terminal, terminal_size
from polytropo.containers.order import Order, make_container
from polytropo.containers.records import Container, Files, ProcessRecord
from polytropo.containers.rootless import enter
from polytropo.errors import PolytropoError, storage_errors
from polytropo.state import State
from polytropo.tenants import get_tenant

LOST_STATUS = 125


def run(
    state: State, order: Order, *, detach: bool, cid_file: Path | None, tell: Callable[[str], None]
) -> int:
    """Makes and starts a container; returns its status, or 0 once it runs with `detach`.

    `tell` is called with the container's id if it is detached. Raises PolytropoError.
    """
    from polytropo.images import get_image

    enter(state, get_tenant(state, order.tenant).name)
    engine.reap_all(state)
    with ExitStack() as until_end:
        # Nobody removes the image until there is a container that needs it.
        with state.lock("images", shared=True):
            container = make_container(state, order, get_image(state, order.image))
            cid_descriptor = None if cid_file is None else _open_cid_file(cid_file)
            files = until_end.enter_context(records.created(state, container))
        try:
            if cid_file is not None and cid_descriptor is not None:
                _write_cid_file(cid_file, cid_descriptor, container.id)
            if not detach:
                return attended(state, container, files)
            with records.locked(state, container.id):
                engine.start(state, container, files)
        except BaseException:
            if container.remove_at_end:
                with suppress(PolytropoError):
                    engine.remove(state, container, force=True)
            raise
    tell(container.id)
    return 0


def start_detached(state: State, container: Container) -> None:
    """Starts a container again and leaves it. Raises PolytropoError."""
    with records.locked(state, container.id) as files:
        engine.start(state, container, files)


def start_attended(state: State, container: Container) -> int:
    """Starts a container again and stays with it to its end; returns its status. Raises PolytropoError."""
    files = records.files_of(state, container.id)
    descriptor = records.hold_client_lock(files)
    try:
        return attended(state, container, files)
    finally:
        os.close(descriptor)


def attended(state: State, container: Container, files: Files) -> int:
    """Starts a container, stays with it to its end, cleans up; returns its status. Raises PolytropoError."""
    attachments: list[Attachment] = []

    def attach(_process: ProcessRecord) -> None:
        # Before the program starts, so that nothing of its output is lost.
        attachments.append(Attachment(files.bundle))

    try:
        with records.locked(state, container.id):
            size = terminal_size() if container.terminal else None
            process = engine.start(state, container, files, size=size, before_start=attach)
        _carry(container, process, attachments[0])
    finally:
        for attachment in attachments:
            attachment.close()
    engine.wait(files, process)
    with records.locked(state, container.id):
        trouble = engine.service_trouble(container, files)
        finish = engine.put_away if container.remove_at_end else engine.clean_up
        status = finish(state, container, files)
    if trouble is not None:
        raise PolytropoError(trouble)
    if status is None:
        raise PolytropoError(f"the status of the container {container.name} was lost; its monitor was killed")
    return status


def _carry(container: Container, process: ProcessRecord, attachment: Attachment) -> None:
    resized = attachment.resize if container.terminal else None
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:  # it has ended already; its output is still to come
        attachment.carry(None)
        return
    try:
        with (
            forwarded_signals(descriptor, resized),
            raw_terminal(container.terminal and container.stdin_open),
        ):
            if resized is not None:
                resized()
            attachment.carry(0 if container.stdin_open else None)
    finally:
        os.close(descriptor)


def _open_cid_file(path: Path) -> int:
    with storage_errors("write the container id", path.parent):
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            raise PolytropoError(f"the file {path} exists; remove it or give another --cidfile") from None


def _write_cid_file(path: Path, descriptor: int, container_id: str) -> None:
    with storage_errors("write the container id", path.parent), os.fdopen(descriptor, "w") as file:
        file.write(container_id)
