"""Starting a tenant's keeper, the process that takes a service's orders."""

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from polytropo.errors import PolytropoError, storage_errors
from polytropo.host import is_rootless
from polytropo.state import TUNING, State
from polytropo.tenants import Tenant, prepare_group, run_dir

FUSE_DESCRIPTORS = "POLYTROPO_FUSE_FD"
"""Names descriptors of /dev/fuse, one a mount ("3,4"), for users who may not open it. The kernel takes only
those that were opened in the user namespace in which the service mounts."""

COPY_ENGINE = "POLYTROPO_COPY"
"""By what services started from now on copy: tuned (the usual), libc or kernel."""
COPY_ENGINES = ("tuned", "libc", "kernel")

START_TIMEOUT_S = 30.0
_LOG_MAX_BYTES = 4 << 20
# Moves itself into the control groups named before "--" and becomes the program named after it.
_ENTER_GROUPS = 'while [ "$1" != -- ]; do echo 0 >"$1" || exit 125; shift; done; shift; exec "$@"'


def service_binary() -> Path:
    """The service's program: $POLYTROPO_SERVICE_BIN, or the one in this package."""
    given = os.environ.get("POLYTROPO_SERVICE_BIN")
    path = Path(given) if given else Path(__file__).parent / "_bin" / "polytropo-service"
    if not os.access(path, os.X_OK):
        advice = "correct POLYTROPO_SERVICE_BIN" if given else "run `make build`"
        raise PolytropoError(f"the service program {path} is missing or not executable; {advice}")
    return path


def start_keeper(state: State, tenant: Tenant) -> None:
    """Starts the tenant's keeper and waits until it takes orders. Raises PolytropoError."""
    devices = _given_devices() if is_rootless() else []
    directory = run_dir(state, tenant.name)
    with storage_errors(f"start the service of the tenant {tenant.name}", state.home):
        directory.mkdir(mode=0o700, exist_ok=True)
        log = _open_log(directory)
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
    except BaseException as error:
        os.close(read_end)
        if isinstance(error, OSError):
            raise PolytropoError(f"the service program cannot be started: {error.strerror}") from error
        raise
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
        f"--cache-bytes={tenant.cache_bytes}",
        f"--ready-fd={ready_fd}",
        f"--copy-engine={_copy_engine()}",
        f"--tuning-dir={state.home / TUNING}",
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


def _copy_engine() -> str:
    engine = os.environ.get(COPY_ENGINE) or COPY_ENGINES[0]
    if engine not in COPY_ENGINES:
        raise PolytropoError(f'{COPY_ENGINE} is "{engine}"; give one of {", ".join(COPY_ENGINES)}')
    return engine


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
    deadline = time.monotonic() + START_TIMEOUT_S
    ready, _, _ = select.select([read_end], [], [], START_TIMEOUT_S)
    if ready and os.read(read_end, 64):
        # It lives on without us; its end is init's to collect, or ours at our own end.
        process.returncode = 0
        return
    if not ready:
        process.kill()
        process.wait()
        raise PolytropoError(start_failure(state, tenant, f"was not ready after {START_TIMEOUT_S:g} s"))
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    raise PolytropoError(start_failure(state, tenant, f"{how} at its start"))


def start_failure(state: State, tenant: Tenant, what: str) -> str:
    """The sentence for a service that did not live: `what` happened, and its own last words."""
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
