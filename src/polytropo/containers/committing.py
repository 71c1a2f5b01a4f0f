"""`commit`: what a container has written, as a new image."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from polytropo.containers import records
from polytropo.containers.private_path import MOUNTED
from polytropo.containers.records import Container, Files
from polytropo.containers.runtime import Runtime
from polytropo.errors import PolytropoError, storage_errors
from polytropo.host import host_ownership, is_rootless
from polytropo.state import State

if TYPE_CHECKING:
    from polytropo.images import Image


def commit(
    state: State,
    container: Container,
    name: str | None,
    *,
    author: str = "",
    message: str = "",
    changes: Sequence[str] = (),
) -> "Image":
    """Makes an image of the container's image and its writable layer; a running one stands still meanwhile.

    Raises PolytropoError.
    """
    from polytropo.images import get_image
    from polytropo.images.commit import commit as commit_layer

    with records.locked(state, container.id) as files:
        base = get_image(state, container.image_digest.removeprefix("sha256:"))
        with _standing_still(container, files):
            return commit_layer(
                state,
                base,
                files.upper,
                host_ownership(),
                name=name,
                author=author,
                message=message,
                changes=changes,
                mounted=MOUNTED,
            )


@contextmanager
def _standing_still(container: Container, files: Files) -> Iterator[None]:
    """Holds the container's programs, with all that they wrote in its writable layer."""
    if not records.is_alive(records.process_of(files)):
        yield
        return
    if is_rootless():
        # Without control groups programs cannot be held; they see to it themselves that files are whole.
        with storage_errors("write back the container's files", files.rootfs):
            _sync_filesystem(files)
        yield
        return
    runtime = Runtime(container, files)
    # If this process is killed now, the next command finds the file and lets the container go on.
    files.paused.touch(mode=0o600)
    try:
        runtime.call("pause", container.id)
        with storage_errors("write back the container's files", files.rootfs):
            _sync_filesystem(files)
        yield
    finally:
        runtime.call("resume", container.id)
        files.paused.unlink(missing_ok=True)


def _sync_filesystem(files: Files) -> None:
    """Brings what the kernel still holds back of the container's root to its service."""
    descriptor = os.open(files.rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(files.rootfs))
    finally:
        os.close(descriptor)


def resume_abandoned(container: Container, files: Files) -> None:
    """Lets a container go on whose commit was killed; the caller holds the container's lock."""
    if files.paused.exists():
        if records.is_alive(records.process_of(files)):
            try:
                Runtime(container, files).call("resume", container.id)
            except PolytropoError:
                if records.is_alive(records.process_of(files)):
                    raise
        files.paused.unlink(missing_ok=True)
