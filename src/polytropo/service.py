"""A tenant's service: started at need, told what to mount, stopped."""

import errno
import os
import select
import signal
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from polytropo import mounts
from polytropo.client import ANSWER_TIMEOUT_S, MountInfo, ServiceClient, ServiceError, ServiceGone
from polytropo.errors import PolytropoError
from polytropo.host import is_rootless
from polytropo.keeper import FUSE_DESCRIPTORS, START_TIMEOUT_S, service_binary, start_failure, start_keeper
from polytropo.state import HeldLock, State
from polytropo.tenants import (
    Tenant,
    get_tenant,
    list_tenants,
    remove_group,
    run_dir,
    tenant_group,
)

if TYPE_CHECKING:
    from polytropo.compose import Stack

__all__ = [
    "FUSE_DESCRIPTORS",
    "MountInfo",
    "ServiceClient",
    "ServiceError",
    "ServiceGone",
    "enter_command",
    "find_mount",
    "find_mount_above",
    "live_mounts",
    "mount",
    "reach",
    "service_binary",
    "service_lock",
    "start_or_reach",
    "stop",
    "unmount",
]

_STOP_TIMEOUT_S = 15.0
_FORCED_TIMEOUT_S = 5.0
_ATTEMPTS = 3
_PLACES_SHOWN = 10
# Becomes the program named after the directory, in that directory.
_ENTER_DIRECTORY = 'cd -- "$1" || exit 125; shift; exec "$@"'


def reach(state: State, tenant_name: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> ServiceClient | None:
    """A client of the tenant's service if it runs."""
    try:
        return ServiceClient(run_dir(state, tenant_name), tenant_name, timeout_s=timeout_s)
    except ServiceGone:
        return None


def start_or_reach(state: State, tenant: Tenant) -> ServiceClient:
    """A client of the tenant's service, which is started if it does not run. Raises PolytropoError."""
    if client := reach(state, tenant.name):
        return client
    with service_lock(state, tenant.name):
        if client := reach(state, tenant.name):  # another command was faster
            return client
        start_keeper(state, tenant)
        client = reach(state, tenant.name)
    if client is None:
        raise PolytropoError(start_failure(state, tenant, "ended right after its start"))
    return client


def service_lock(state: State, tenant_name: str) -> HeldLock:
    """Held while the tenant's service is started or removed."""
    return state.lock(f"service-{tenant_name}", timeout_s=START_TIMEOUT_S * 2)


def mount(state: State, tenant_name: str | None, stack: "Stack", mountpoint: Path) -> Path:
    """Mounts `stack` at the directory `mountpoint` by the service of the tenant (None: the default one).

    Returns the mountpoint as the service knows it. Raises PolytropoError.
    """
    tenant = get_tenant(state, tenant_name)
    # What was looked up by name must not be cleared before it is mounted.
    with state.lock("layers", shared=True) if stack.has_names else nullcontext():
        return _mount(state, tenant, stack, _checked_mountpoint(mountpoint))


def _mount(state: State, tenant: Tenant, stack: "Stack", mountpoint: Path) -> Path:
    document = stack.to_document(state, tenant.name)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with start_or_reach(state, tenant) as client:
                _check_namespace(client)
                client.mount(document, mountpoint)
            return mountpoint
        except ServiceGone:
            # It was idle and ended just now, or it died; a new one gets the order.
            if attempt == _ATTEMPTS:
                raise PolytropoError(start_failure(state, tenant, "ended while it mounted")) from None
    raise AssertionError("the loop returns or raises")


def unmount(state: State, mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmounts what a service mounted at `mountpoint`; clears the mount too if its service is dead.

    Raises PolytropoError, also when nothing of ours is mounted there.
    """
    mountpoint = Path(os.path.realpath(mountpoint))
    found = find_mount(state, mountpoint)
    if found is not None:
        tenant, _ = found
        with ServiceClient(run_dir(state, tenant), tenant) as client:
            client.unmount(mountpoint, lazy=lazy)
        return
    top = mounts.top_mount(mountpoint)
    if top is None:
        places = [info.mountpoint for _, infos in live_mounts(state) for info in infos]
        raise PolytropoError(f"nothing is mounted at {mountpoint}; {_there_are(places)}")
    if top.filesystem_type != mounts.FILESYSTEM_TYPE:
        raise PolytropoError(
            f"{mountpoint} is a {top.filesystem_type} mount and none of polytropo's; use umount for it"
        )
    if not mounts.is_dead(mountpoint):
        raise PolytropoError(
            f"{mountpoint} belongs to a service of another state directory or user;"
            " set POLYTROPO_HOME to that directory and try again"
        )
    mounts.detach(mountpoint)


def find_mount(state: State, mountpoint: Path) -> tuple[str, MountInfo] | None:
    """Which tenant's running service has a mount at `mountpoint`, and that mount."""
    for tenant, infos in live_mounts(state):
        for info in infos:
            if info.mountpoint == str(mountpoint):
                return tenant, info
    return None


def find_mount_above(state: State, path: Path) -> str:
    """The tenant whose running service has `path` on one of its mounts. Raises PolytropoError."""
    above: dict[str, str] = {}
    for tenant, infos in live_mounts(state):
        above |= {info.mountpoint: tenant for info in infos}
    for place in (path, *path.parents):
        if tenant_name := above.get(str(place)):
            return tenant_name
    raise PolytropoError(f"no stack is mounted at {path}; {_there_are(above)}")


def _there_are(places: Iterable[str]) -> str:
    shown = sorted(places)
    if not shown:
        return "there are no mounts; make one with `polytropo mount`"
    more = f" and {len(shown) - _PLACES_SHOWN} more" if len(shown) > _PLACES_SHOWN else ""
    return f"there are mounts at {', '.join(shown[:_PLACES_SHOWN])}{more}"


def live_mounts(state: State) -> Iterator[tuple[str, list[MountInfo]]]:
    """The mounts of every running service, tenant by tenant."""
    for tenant in list_tenants(state):
        client = reach(state, tenant.name)
        if client is None:
            continue
        with client, suppress(ServiceGone):
            yield tenant.name, client.mounts()


def stop(state: State, tenant_name: str, *, force: bool = False) -> bool:
    """Ends the tenant's service and removes its control group; False if it did not run.

    Refused while its mounts are in use, unless with `force`. Raises PolytropoError.
    """
    with service_lock(state, tenant_name):
        client = reach(state, tenant_name, timeout_s=_FORCED_TIMEOUT_S if force else ANSWER_TIMEOUT_S)
        if client is not None:
            with client:
                _end(client, tenant_name, force=force)
        group = tenant_group(state, tenant_name)
        if force and group.exists():
            group.kill()
        if force and not is_rootless():
            # What had to be killed could not unmount; an ordinary user's mounts end with their namespace.
            mounts.clear_dead_mounts(source=tenant_name)
        remove_group(state, tenant_name)
        return client is not None


def enter_command(state: State, tenant_name: str, directory: Path, command: list[str]) -> list[str]:
    """The command line that runs `command` in `directory` where a service of an ordinary user mounts."""
    enter = [str(service_binary()), "enter", "--run-dir", str(run_dir(state, tenant_name)), "--"]
    return [*enter, "/bin/sh", "-c", _ENTER_DIRECTORY, "sh", str(directory), *command]


def _end(client: ServiceClient, tenant_name: str, *, force: bool) -> None:
    try:
        process = os.pidfd_open(client.keeper_pid)
    except ProcessLookupError:
        return
    try:
        try:
            client.stop(force=force)
        except ServiceGone:
            pass
        except ServiceError as error:
            if not force or error.errno_name != "ETIMEDOUT":
                raise
            signal.pidfd_send_signal(process, signal.SIGKILL)
        if not _wait_for_end(process, _STOP_TIMEOUT_S):
            if not force:
                raise PolytropoError(
                    f"the service of the tenant {tenant_name} does not end;"
                    f" try `polytropo tenant stop --force {tenant_name}`"
                )
            signal.pidfd_send_signal(process, signal.SIGKILL)
            _wait_for_end(process, _STOP_TIMEOUT_S)
    finally:
        os.close(process)


def _wait_for_end(process: int, timeout_s: float) -> bool:
    ready, _, _ = select.select([process], [], [], timeout_s)
    return bool(ready)


def _checked_mountpoint(path: Path) -> Path:
    mountpoint = Path(os.path.realpath(path))
    try:
        is_directory = mountpoint.is_dir()
    except OSError as error:
        is_directory = False
        if error.errno == errno.ENOTCONN:
            raise PolytropoError(
                f"{mountpoint} is a dead mount of an ended service;"
                f" clear it with `polytropo unmount {mountpoint}`"
            ) from error
    if not is_directory:
        problem = "is not a directory" if mountpoint.exists() else "does not exist"
        raise PolytropoError(f"the mount point {mountpoint} {problem}; make it with mkdir")
    if not is_rootless() and (top := mounts.top_mount(mountpoint)) is not None:
        raise PolytropoError(
            f"the mount point {mountpoint} is in use by a {top.filesystem_type} mount;"
            " unmount that or take another directory"
        )
    return mountpoint


def _check_namespace(client: ServiceClient) -> None:
    # A service mounts where it was started; elsewhere its mounts would not show.
    if is_rootless():
        return
    try:
        theirs = Path(f"/proc/{client.keeper_pid}/ns/mnt").stat()
    except OSError:
        return
    if theirs.st_ino != Path("/proc/self/ns/mnt").stat().st_ino:
        raise PolytropoError(
            f"the service of the tenant {client.tenant} runs in another mount namespace;"
            f" stop it with `polytropo tenant stop {client.tenant}`, or use another POLYTROPO_HOME here"
        )
