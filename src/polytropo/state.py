"""The state directory: where images, tenants, containers and volumes are kept, and how it is shared.

Several commands use it at once and any of them may be killed: files are replaced whole, things that
take several steps are made in tmp/ and renamed into place, and flock(2) locks end with their holder.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import msgspec

from polytropo import mounts
from polytropo.errors import PolytropoError, storage_errors
from polytropo.host import is_rootless
from polytropo.trees import remove_tree

VERSION = 1
TUNING = "tuning"
"""Where plans of `polytropo tune` lie."""

# Mode of each directory of the layout. Layers may hold setuid programs, so other users stay out;
# a container's root has to be reachable for the ids that its programs run under.
LAYOUT = {
    "layers": 0o700,
    "images": 0o700,
    "tenants": 0o711,
    "containers": 0o711,
    "volumes": 0o700,
    "tmp": 0o700,
    "locks": 0o700,
}
_LOCK_POLL_S = 0.02

RecordT = TypeVar("RecordT", bound="Record")


class Record(msgspec.Struct, kw_only=True):
    """What is kept as one JSON file. A change that older programs would misread raises both versions."""

    VERSION: ClassVar[int] = 1
    version: int = 1


class _VersionOnly(msgspec.Struct):
    version: int


class Scratch(NamedTuple):
    """A directory in tmp/ that lives as long as its maker."""

    path: Path


class State:
    """An opened state directory. Make one with `State.open`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.layers = home / "layers"
        self.images = home / "images"
        self.tenants = home / "tenants"
        self.containers = home / "containers"
        self.volumes = home / "volumes"
        self.tmp = home / "tmp"
        self.locks = home / "locks"

    @classmethod
    def open(cls, home: Path | None = None) -> "State":
        """Opens the state directory, making or migrating it first where needed.

        `home` defaults to $POLYTROPO_HOME, /var/lib/polytropo for root, or the user's data directory.
        Raises PolytropoError for a directory of a newer version or of something else.
        """
        state = cls((home or default_home()).absolute())
        with storage_errors("open the state directory", state.home):
            if state._read_version() != VERSION:
                state._make_current()
        return state

    def lock(self, name: str, *, shared: bool = False, timeout_s: float | None = None) -> "HeldLock":
        """Holds the lock `name` inside a `with`; waits at most `timeout_s` seconds (None: for ever).

        Not re-entrant: a second `lock` of the same name in one process waits like that of another process.
        """
        return HeldLock(self._hold_lock(name, shared=shared, timeout_s=timeout_s))

    @contextmanager
    def scratch(self, prefix: str) -> Iterator[Scratch]:
        """A new directory in tmp/, removed at the end. If this process dies, `prune_scratch` removes it."""
        with storage_errors("make a temporary directory", self.home):
            path, descriptor = self._make_scratch(prefix)
        try:
            yield Scratch(path)
        finally:
            with storage_errors("remove a temporary directory", self.home):
                remove_tree(path)
            os.close(descriptor)

    def prune_scratch(self) -> int:
        """Removes what dead processes left in tmp/ and returns how many things that were."""
        removed = 0
        with storage_errors("clear temporary files", self.home), self.lock("tmp"):
            for path in sorted(self.tmp.iterdir()):
                removed += _remove_if_abandoned(path)
        return removed

    def _hold_lock(self, name: str, *, shared: bool, timeout_s: float | None) -> int:
        with storage_errors(f"take the lock {name}", self.home):
            descriptor = os.open(self.locks / name, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, timeout_s)
            except TimeoutError:
                os.close(descriptor)
                raise PolytropoError(
                    f"another polytropo command has held the lock {name} for {timeout_s:g} s;"
                    " wait for it to end and try again"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def _make_scratch(self, prefix: str) -> tuple[Path, int]:
        # Shared with other makers; keeps prune away between mkdir and flock.
        with self.lock("tmp", shared=True):
            path = self.tmp / f"{prefix}-{os.urandom(8).hex()}"
            path.mkdir(mode=0o700)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                os.close(descriptor)
                raise
            return path, descriptor

    def _read_version(self) -> int | None:
        """The layout's version; None when the directory has no version file."""
        try:
            text = (self.home / "version").read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            return None
        if not text.isdecimal():
            raise PolytropoError(
                f"the state directory {self.home} has a damaged version file;"
                f" write {VERSION} into {self.home / 'version'} if you know it to be right"
            )
        if int(text) > VERSION:
            raise PolytropoError(
                f"the state directory {self.home} has layout version {text}, this program knows up to"
                f" {VERSION}; use a newer polytropo or another POLYTROPO_HOME"
            )
        return int(text)

    def _make_current(self) -> None:
        self._check_is_ours()
        self.home.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.locks.mkdir(mode=0o700, exist_ok=True)
        with self.lock("layout"):
            # Another process may have done it while this one waited.
            for version in range(self._read_version() or 0, VERSION):
                _MIGRATIONS[version](self)
                write_atomically(self.home / "version", f"{version + 1}\n".encode())

    def _check_is_ours(self) -> None:
        with suppress(FileNotFoundError):
            names = {entry.name for entry in self.home.iterdir()} - {"lost+found", "version"}
            if names and not names & LAYOUT.keys():
                raise PolytropoError(
                    f"{self.home} holds other files and is no state directory;"
                    " set POLYTROPO_HOME to a new or empty directory"
                )


class HeldLock:
    """Releases a lock at the end of a `with`, or when `release` is called."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def __enter__(self) -> "HeldLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def default_home() -> Path:
    """Where state is kept when the caller names no place."""
    if home := os.environ.get("POLYTROPO_HOME"):
        return Path(home)
    if not is_rootless():
        return Path("/var/lib/polytropo")
    data = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    return (Path(data) if data.startswith("/") else Path.home() / ".local/share") / "polytropo"


def layout_version(state: State) -> int | None:
    """The version of a state directory, which is not changed; None when it has none yet.

    Raises PolytropoError for a newer or a damaged one.
    """
    with storage_errors("read the state directory", state.home):
        return state._read_version()


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replaces `path` by `content`: readers see the old or the new file whole, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Makes the names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_record(path: Path, record: Record) -> None:
    """Writes `record` as JSON in place of `path`, atomically."""
    with storage_errors(f"write {path.name}", path.parent):
        write_atomically(path, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Reads a JSON record. Raises FileNotFoundError, or PolytropoError if it is newer or damaged."""
    with storage_errors(f"read {path.name}", path.parent):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = None
    if content is None:
        raise FileNotFoundError(path)
    try:
        version = msgspec.json.decode(content, type=_VersionOnly).version
        if version > kind.VERSION:
            raise PolytropoError(
                f"{path} has version {version}, which this program does not know; use a newer polytropo"
            )
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise PolytropoError(
            f"{path} is damaged ({error}); restore it or remove what it describes"
        ) from error


def _flock(descriptor: int, operation: int, timeout_s: float | None) -> None:
    if timeout_s is None:
        fcntl.flock(descriptor, operation)
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            time.sleep(_LOCK_POLL_S)


def _remove_if_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            mounts.detach_ours(path.resolve())
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _migrate_0(state: State) -> None:
    """From a directory without a version file (new, or older than that file): all directories, closed."""
    for name, mode in LAYOUT.items():
        directory = state.home / name
        directory.mkdir(mode=mode, exist_ok=True)
        directory.chmod(mode)


# _MIGRATIONS[n] brings layout n to n + 1. Each may be interrupted and is then run again.
_MIGRATIONS: list[Callable[[State], None]] = [_migrate_0]
