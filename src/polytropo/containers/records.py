"""What is known of each container: its record, its files and its state now."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

from polytropo.errors import PolytropoError, storage_errors
from polytropo.names import check_name, unknown
from polytropo.state import Record, State, read_record, write_record

Network = Literal["host", "none"]
Status = Literal["created", "running", "exited"]

_ID_BYTES = 32
SHORT_ID_LENGTH = 12


class VolumeMount(msgspec.Struct, frozen=True, kw_only=True):
    """One `-v`: a volume of the tenant, or a path of the host, shown at `destination`."""

    destination: str
    read_only: bool = False
    volume: str | None = None
    host_path: str | None = None

    @property
    def source(self) -> str:
        return self.volume or self.host_path or ""


class Container(Record, kw_only=True):
    """One container as it was ordered, kept as container.json; it never changes."""

    id: str
    name: str
    tenant: str
    image: str
    """The image's name as it was given."""
    image_digest: str
    created_unix_s: float
    args: list[str]
    environment: dict[str, str]
    cwd: str
    user: str
    hostname: str
    network: Network = "host"
    read_only: bool = False
    terminal: bool = False
    stdin_open: bool = False
    remove_at_end: bool = False
    runtime: str = "runc"
    preload: bool = False
    """Whether its programs reach the service through shared memory where they can."""
    patient: bool = False
    """They keep to FUSE until that would have paid, and only read through it."""
    stop_signal: str = "SIGTERM"
    volumes: list[VolumeMount] = msgspec.field(default_factory=list)
    root: dict[str, Any]
    """The root's stack document, resolved: the image's name may mean another image later."""


class ProcessRecord(Record, kw_only=True):
    """The container's first process, kept as process.json from its creation to the clean-up after it."""

    pid: int
    start_ticks: int
    """When it started, in the kernel's clock; with `boot_id` tells it from a later process of that id."""
    boot_id: str
    monitor_pid: int
    started_unix_s: float


class ResultRecord(Record, kw_only=True):
    """How the container's last run ended, kept as result.json."""

    exit_status: int | None
    """None if nobody saw the end: the machine went down, or the monitor was killed."""
    started_unix_s: float
    finished_unix_s: float


class Files(msgspec.Struct, frozen=True):
    """Where the parts of one container lie."""

    directory: Path

    @property
    def trash(self) -> Path:
        """Where the directory goes at its removal; what is there is cleared as the rest of tmp/ is."""
        return self.directory.parent.parent / "tmp" / f"removed-{self.directory.name}"

    @property
    def record(self) -> Path:
        return self.directory / "container.json"

    @property
    def process(self) -> Path:
        return self.directory / "process.json"

    @property
    def result(self) -> Path:
        return self.directory / "result.json"

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle"

    @property
    def rootfs(self) -> Path:
        return self.bundle / "rootfs"

    @property
    def upper(self) -> Path:
        return self.directory / "upper"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def runtime_root(self) -> Path:
        return self.directory / "runtime"

    @property
    def runtime_log(self) -> Path:
        return self.directory / "runtime.log"

    @property
    def exits(self) -> Path:
        """Where the monitor writes the exit status, in a file named by the container's id."""
        return self.directory / "exits"

    @property
    def monitor_pid(self) -> Path:
        return self.directory / "monitor.pid"

    @property
    def client(self) -> Path:
        """Locked by the command that is attached to the container and will clean up after it."""
        return self.directory / "client"

    @property
    def paused(self) -> Path:
        """There while a commit holds the container's programs."""
        return self.directory / "paused"

    @property
    def etc(self) -> Path:
        """The container's own hosts, hostname and resolv.conf."""
        return self.directory / "etc"

    def volume(self, index: int) -> Path:
        return self.directory / "volumes" / str(index)


def files_of(state: State, container_id: str) -> Files:
    return Files(state.containers / container_id)


def new_id() -> str:
    return os.urandom(_ID_BYTES).hex()


@contextmanager
def created(state: State, container: Container) -> Iterator[Files]:
    """Makes the container's directory, whole or not at all, and holds its client lock for a while.

    Raises PolytropoError if the container's name is taken.
    """
    check_name("container", container.name)
    files = files_of(state, container.id)
    descriptor = None
    try:
        with (
            storage_errors(f"create the container {container.name}", state.home),
            state.lock("containers"),
            state.scratch("container") as scratch,
        ):
            _check_name_is_free(state, container.name)
            made = Files(scratch.path / "container")
            _make_files(made, container)
            # Locked before others can see it, or they would take it for an abandoned one.
            descriptor = hold_client_lock(made)
            made.directory.rename(files.directory)
        yield files
    finally:
        if descriptor is not None:
            os.close(descriptor)


def hold_client_lock(files: Files) -> int:
    """A descriptor whose holder will clean up after the container; its death gives the lock back."""
    descriptor = os.open(files.client, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def is_attended(files: Files) -> bool:
    """Whether a living command takes care of the container."""
    try:
        descriptor = os.open(files.client, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def all_containers(state: State) -> list[Container]:
    """Every container, the oldest first; one that is removed meanwhile is left out."""
    found = []
    with storage_errors("list the containers", state.home):
        directories = list(state.containers.iterdir())
    for directory in directories:
        with suppress(FileNotFoundError):
            found.append(read_record(directory / "container.json", Container))
    return sorted(found, key=lambda container: container.created_unix_s)


def find(state: State, wanted: str) -> Container:
    """The container of the name, the id or the beginning of an id `wanted`. Raises PolytropoError."""
    containers = all_containers(state)
    for container in containers:
        if wanted in (container.name, container.id):
            return container
    matching = [c for c in containers if wanted and c.id.startswith(wanted)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise PolytropoError(f"{wanted} is the beginning of {len(matching)} container ids; give more of it")
    names = [container.name for container in containers]
    raise unknown("container", wanted, names, "make one with `polytropo run`")


@contextmanager
def locked(state: State, container_id: str) -> Iterator[Files]:
    """Holds the container for a change of its state. Raises PolytropoError if it has been removed."""
    files = files_of(state, container_id)
    gone = PolytropoError(f"the container {container_id[:SHORT_ID_LENGTH]} has just been removed")
    try:
        descriptor = os.open(files.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise gone from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not files.record.exists():
            raise gone
        yield files
    finally:
        os.close(descriptor)


def process_of(files: Files) -> ProcessRecord | None:
    """The record of the container's first process, which may have ended."""
    try:
        return read_record(files.process, ProcessRecord)
    except FileNotFoundError:
        return None


def result_of(files: Files) -> ResultRecord | None:
    try:
        return read_record(files.result, ResultRecord)
    except FileNotFoundError:
        return None


def is_alive(process: ProcessRecord | None) -> bool:
    """Whether the very process of the record still runs."""
    return (
        process is not None
        and process.boot_id == boot_id()
        and start_ticks(process.pid) == process.start_ticks
    )


def status_of(files: Files) -> Status:
    """The container's state now, also if no command has cleaned up after its end yet."""
    process = process_of(files)
    if process is None:
        return "exited" if files.result.exists() else "created"
    return "running" if is_alive(process) else "exited"


def exit_status(container: Container, files: Files) -> int | None:
    """What the monitor wrote at the end of the container's process, or what was kept of it."""
    if (result := result_of(files)) is not None:
        return result.exit_status
    return monitored_status(container, files)[0]


def monitored_status(container: Container, files: Files) -> tuple[int | None, float]:
    """The status in the monitor's exit file (None if it wrote none) and the time of the end."""
    path = files.exits / container.id
    try:
        return int(path.read_text()), path.stat().st_mtime
    except (FileNotFoundError, ValueError):
        return None, time.time()


def write_quickly(path: Path, record: Record) -> None:
    """Replaces a record that need not outlive a power cut, without waiting for the disk."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(msgspec.json.encode(record))
    temporary.rename(path)


def boot_id() -> str:
    """Differs from one start of the machine to the next."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When the process started; None if there is none or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The program's name, in parentheses, may hold anything.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _make_files(files: Files, container: Container) -> None:
    for directory in (
        files.directory,
        files.bundle,
        files.rootfs,
        files.runtime_root,
        files.exits,
        files.etc,
    ):
        directory.mkdir(mode=0o700)
    files.upper.mkdir(mode=0o755)
    files.upper.chmod(0o755)  # whatever the umask says
    for index in range(len(container.volumes)):
        files.volume(index).mkdir(mode=0o700, parents=True)
    if container.remove_at_end:
        write_quickly(files.record, container)
    else:
        write_record(files.record, container)


def _check_name_is_free(state: State, name: str) -> None:
    for container in all_containers(state):
        if container.name == name:
            raise PolytropoError(
                f"the name {name} is taken by the container {container.id[:SHORT_ID_LENGTH]};"
                f" take another or remove that one with `polytropo rm {name}`"
            )
