"""Orders to a running service over its control socket."""

import errno
import os
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec

from polytropo.errors import PolytropoError

ANSWER_TIMEOUT_S = 60.0
_LINE_MAX_BYTES = 16 << 20


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

    def __init__(self, directory: Path, tenant: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
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
        line = msgspec.json.encode({"op": operation, **arguments}) + b"\n"
        try:
            self._socket.sendall(line)
            answer = msgspec.json.decode(self._read_line())
        except TimeoutError:
            raise ServiceError(
                f"the service of the tenant {self.tenant} did not answer within {self._timeout_s:g} s;"
                f" `polytropo tenant stop --force {self.tenant}` ends it",
                "ETIMEDOUT",
            ) from None
        except (BrokenPipeError, ConnectionResetError):
            raise _gone(self.tenant) from None
        except (ValueError, msgspec.DecodeError) as error:
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
