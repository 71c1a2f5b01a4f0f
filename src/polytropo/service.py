"""The tenant's service seen from Python: starting it, and orders over its control socket."""

import errno
import json
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from polytropo import mounts
from polytropo.errors import PolytropoError, storage_errors
from polytropo.host import is_rootless
from polytropo.state import HeldLock, State
from polytropo.tenants import (
    Tenant,
    get_tenant,
    list_tenants,
    prepare_group,
    remove_group,
    run_dir,
    tenant_group,
)

if TYPE_CHECKING:
    from polytropo.compose import Stack

FUSE_DESCRIPTORS = "POLYTROPO_FUSE_FD"
"""Names descriptors of /dev/fuse, one a mount ("3,4"), for users who may not open it. The kernel takes only
those that were opened in the user namespace in which the service mounts."""

_START_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_FORCED_TIMEOUT_S = 5.0
_LINE_MAX_BYTES = 16 << 20
_LOG_MAX_BYTES = 4 << 20
_ATTEMPTS = 3
# Becomes the program named after the directory, in that directory.
_ENTER_DIRECTORY = 'cd -- "$1" || exit 125; shift; exec "$@"'
# Moves itself into the control groups named before "--" and becomes the program named after it.
_ENTER_GROUPS = 'while [ "$1" != -- ]; do echo 0 >"$1" || exit 125; shift; done; shift; exec "$@"'


class ServiceError(PolytropoError):
    """The service refused an order; `errno_name` ("EBUSY") may be None."""

    def __init__(self, sentence: str, errno_name: str | None = None) -> None:
        super().__init__(sentence)
        self.errno_name = errno_name


class ServiceGone(PolytropoError):
    """No service answers at the socket."""


class MountInfo(msgspec.Struct):
    """One mount of a service."""

    mount: int
    mountpoint: str
    kind: str
    since_unix_s: float
    dead: bool = False
    """Whether the worker behind it is gone, so that every access fails."""
    stack: dict[str, Any] | None = None
    """Its document, if it was asked for."""


class ServiceClient:
    """Orders to one running service. Not for several threads at once."""

    def __init__(self, directory: Path, tenant: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        """Connects to the control socket in `directory`. Raises ServiceGone if nobody listens there."""
        self.tenant = tenant
        self._timeout_s = timeout_s
        self._socket = _connect(directory, tenant, timeout_s)
        self._pending = b""

    def __enter__(self) -> "ServiceClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    @property
    def keeper_pid(self) -> int:
        """The keeper's process id, as the kernel knows it."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid

    def mount(self, document: dict[str, Any], mountpoint: Path) -> int:
        """Mounts a checked stack document at the absolute path `mountpoint`; returns the mount's number."""
        answer = self.call("mount", stack=document, mountpoint=str(mountpoint))
        return int(answer["mount"])

    def unmount(self, mountpoint: Path, *, lazy: bool = False) -> None:
        self.call("unmount", mountpoint=str(mountpoint), lazy=lazy)

    def mounts(self, *, stacks: bool = False) -> list[MountInfo]:
        """What is mounted; with `stacks` each with its document."""
        answer = self.call("list", stacks=True) if stacks else self.call("list")
        return msgspec.convert(answer["mounts"], list[MountInfo], strict=False)

    def stats(self) -> dict[str, Any]:
        return self.call("stats")

    def status(self) -> dict[str, Any]:
        return self.call("status")

    def stop(self, *, force: bool = False) -> None:
        """Ends the service; refused while its mounts are in use, unless with `force`."""
        self.call("stop", force=force)

    def call(self, operation: str, **arguments: object) -> dict[str, Any]:
        """One order and its answer. Raises ServiceError for a refusal, ServiceGone if the service ended."""
        line = json.dumps({"op": operation, **arguments}).encode() + b"\n"
        try:
            self._socket.sendall(line)
            answer = json.loads(self._read_line())
        except TimeoutError:
            raise ServiceError(
                f"the service of the tenant {self.tenant} did not answer within {self._timeout_s:g} s;"
                f" `polytropo tenant stop --force {self.tenant}` ends it",
                "ETIMEDOUT",
            ) from None
        except (BrokenPipeError, ConnectionResetError):
            raise _gone(self.tenant) from None
        except ValueError as error:
            raise ServiceError(
                f"the service of the tenant {self.tenant} answered nonsense: {error}"
            ) from error
        return self._unpack(answer)

    def _unpack(self, answer: Any) -> dict[str, Any]:
        match answer:
            case {"ok": dict(result)}:
                return result
            case {"error": {"sentence": str(sentence), **rest}}:
                name = rest.get("errno")
                raise ServiceError(sentence, name if isinstance(name, str) else None)
            case _:
                raise ServiceError(f"the service of the tenant {self.tenant} answered neither ok nor error")

    def _read_line(self) -> bytes:
        while b"\n" not in self._pending:
            received = self._socket.recv(65536)
            if not received:
                raise _gone(self.tenant)
            self._pending += received
            if len(self._pending) > _LINE_MAX_BYTES:
                raise ValueError("its answer is too long")
        line, _, self._pending = self._pending.partition(b"\n")
        return line


def _gone(tenant: str) -> ServiceGone:
    return ServiceGone(f"the service of the tenant {tenant} is not running; the next mount starts it")


def _connect(directory: Path, tenant: str, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(timeout_s)
    try:
        # Through a descriptor, since a socket's address holds 107 bytes and state directories may lie deep.
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{descriptor}/control.sock")
        finally:
            os.close(descriptor)
    except OSError as error:
        connection.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET):
            raise _gone(tenant) from None
        raise PolytropoError(
            f"the service of the tenant {tenant} cannot be reached at {directory}/control.sock:"
            f" {error.strerror}; only its owner and root may"
        ) from error
    return connection


def service_binary() -> Path:
    """The service's program: $POLYTROPO_SERVICE_BIN, or the one in this package."""
    given = os.environ.get("POLYTROPO_SERVICE_BIN")
    path = Path(given) if given else Path(__file__).parent / "_bin" / "polytropo-service"
    if not os.access(path, os.X_OK):
        advice = "correct POLYTROPO_SERVICE_BIN" if given else "run `make build`"
        raise PolytropoError(f"the service program {path} is missing or not executable; {advice}")
    return path


def reach(state: State, tenant_name: str, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> ServiceClient | None:
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
        _start(state, tenant)
        client = reach(state, tenant.name)
    if client is None:
        raise PolytropoError(_start_failure(state, tenant, "ended right after its start"))
    return client


def service_lock(state: State, tenant_name: str) -> HeldLock:
    """Held while the tenant's service is started or removed."""
    return state.lock(f"service-{tenant_name}", timeout_s=_START_TIMEOUT_S * 2)


def mount(state: State, tenant_name: str | None, stack: "Stack", mountpoint: Path) -> Path:
    """Mounts `stack` at the directory `mountpoint` by the service of the tenant (None: the default one).

    Returns the mountpoint as the service knows it. Raises PolytropoError.
    """
    tenant = get_tenant(state, tenant_name)
    document = stack.to_document(state, tenant.name)
    mountpoint = _checked_mountpoint(mountpoint)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with start_or_reach(state, tenant) as client:
                _check_namespace(client)
                client.mount(document, mountpoint)
            return mountpoint
        except ServiceGone:
            # It was idle and ended just now, or it died; a new one gets the order.
            if attempt == _ATTEMPTS:
                raise PolytropoError(_start_failure(state, tenant, "ended while it mounted")) from None
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
        raise PolytropoError(f"nothing is mounted at {mountpoint}; `polytropo stats` lists the mounts")
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
    there = f"there are mounts at {', '.join(sorted(above))}" if above else "mount one with `polytropo mount`"
    raise PolytropoError(f"no stack is mounted at {path}; {there}")


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
        client = reach(state, tenant_name, timeout_s=_FORCED_TIMEOUT_S if force else _ANSWER_TIMEOUT_S)
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


def _start(state: State, tenant: Tenant) -> None:
    directory = run_dir(state, tenant.name)
    with storage_errors(f"start the service of the tenant {tenant.name}", state.home):
        directory.mkdir(mode=0o700, exist_ok=True)
        log = _open_log(directory)
    devices = _given_devices() if is_rootless() else []
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(
            _keeper_command(state, tenant, write_end, devices),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_keeper_environment(),
            pass_fds=(write_end, *devices),
            start_new_session=True,
        )
    except OSError as error:
        os.close(read_end)
        raise PolytropoError(f"the service program cannot be started: {error.strerror}") from error
    finally:
        os.close(log)
        os.close(write_end)
    try:
        _wait_until_ready(state, tenant, process, read_end)
    finally:
        os.close(read_end)


def _keeper_command(state: State, tenant: Tenant, ready_fd: int, devices: list[int]) -> list[str]:
    command = [
        str(service_binary()),
        "keeper",
        f"--run-dir={run_dir(state, tenant.name)}",
        f"--tenant={tenant.name}",
        f"--uid-base={tenant.uid_base}",
        f"--idle-timeout-s={tenant.idle_timeout_s}",
        f"--ready-fd={ready_fd}",
    ]
    if is_rootless():
        command += ["--rootless", *(f"--fuse-fd={device}" for device in devices)]
    group = prepare_group(state, tenant)
    if group is None:
        return command
    leaf = group.child("service")
    try:
        leaf.create()
    except PermissionError:
        return command
    return ["/bin/sh", "-c", _ENTER_GROUPS, "sh", *map(str, leaf.procs_files()), "--", *command]


def _given_devices() -> list[int]:
    text = os.environ.get(FUSE_DESCRIPTORS, "")
    try:
        devices = [int(number) for number in text.split(",") if number]
        for device in devices:
            os.fstat(device)
    except (ValueError, OSError):
        raise PolytropoError(
            f'{FUSE_DESCRIPTORS} is "{text}"; it names open descriptors of /dev/fuse, such as 3 or 3,4'
        ) from None
    return devices


def _keeper_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(("POLYTROPO_", "RUST_"))}
    return {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), **kept}


def _open_log(directory: Path) -> int:
    path = directory / "service.log"
    with suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_MAX_BYTES:
            path.rename(directory / "service.log.1")
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _wait_until_ready(
    state: State, tenant: Tenant, process: "subprocess.Popen[bytes]", read_end: int
) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    ready, _, _ = select.select([read_end], [], [], _START_TIMEOUT_S)
    if ready and os.read(read_end, 64):
        # It lives on without us; its end is init's to collect, or ours at our own end.
        process.returncode = 0
        return
    if not ready:
        process.kill()
        process.wait()
        raise PolytropoError(_start_failure(state, tenant, f"was not ready after {_START_TIMEOUT_S:g} s"))
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    raise PolytropoError(_start_failure(state, tenant, f"{how} at its start"))


def _start_failure(state: State, tenant: Tenant, what: str) -> str:
    path = run_dir(state, tenant.name) / "service.log"
    return f"the service of the tenant {tenant.name} {what}; {last_log_line(path)} (the whole log: {path})"


def last_log_line(path: Path) -> str:
    """The last line of a log, in a phrase."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"
    return f"it says: {lines[-1].strip()}" if lines else "it says nothing"
