"""What happens to containers: creation, start, end, clean-up, removal.

Any command may be killed at any moment. What it has made is found again in the container's directory:
a process.json without its process means that nobody has cleaned up yet, and whoever comes next does.
"""

import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from polytropo import mounts, service
from polytropo.compose import Dir, Layer, Stack, Volume
from polytropo.containers import private_path, records
from polytropo.containers.etc import write_etc
from polytropo.containers.records import Container, Files, ProcessRecord, ResultRecord
from polytropo.containers.rootless import is_outside
from polytropo.containers.runtime import Runtime, end_monitor
from polytropo.containers.spec import Bind, Machine, Process, runtime_spec, terminal_environment
from polytropo.containers.users import resolve_user
from polytropo.errors import PolytropoError, storage_errors
from polytropo.host import is_rootless
from polytropo.state import State, read_record
from polytropo.tenants import get_tenant, tenant_group

_EXIT_FILE_TIMEOUT_S = 10.0
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.002
MONITORS_GROUP = "monitors"


def start(
    state: State,
    container: Container,
    files: Files,
    *,
    size: tuple[int, int] | None = None,
    before_start: Callable[[ProcessRecord], None] | None = None,
) -> ProcessRecord:
    """Mounts the container's root and volumes and starts its program. Raises PolytropoError.

    `before_start` is called when the program waits to be started, with its streams in place. The
    container is locked by the caller. If this fails, nothing stays mounted or running.
    """
    runtime = Runtime(container, files)
    if records.is_alive(records.process_of(files)):
        raise PolytropoError(f"the container {container.name} runs already")
    try:
        with storage_errors(f"start the container {container.name}", state.home):
            _forget_last_run(container, files, runtime)
            with runtime.monitor(_monitor_group_files(state, container)) as monitor:
                binds = _mount_all(state, container, files)
                _write_bundle(state, container, files, binds, size)
                pid = monitor.create()
            process = _record_process(files, pid)
            if before_start is not None:
                before_start(process)
            runtime.start()
            return process
    except BaseException:
        # Also at Ctrl-C.
        with suppress(PolytropoError):
            _abandon(state, container, files)
            files.process.unlink(missing_ok=True)
            release_mounts(state, container, files)
        raise


def clean_up(state: State, container: Container, files: Files) -> int | None:
    """After the end of the container's process: keeps its status, gives all else back; the status.

    The container is locked by the caller. May be repeated after it was interrupted.
    """
    process = records.process_of(files)
    if process is None:
        if not files.result.exists():
            # The command that made it died before it noted the process; the runtime may still be at work.
            _abandon(state, container, files)
        release_mounts(state, container, files)
        return records.exit_status(container, files)
    result = _result(container, files, process)
    # The container has ended, so that its root can go meanwhile.
    with Runtime(container, files).deleting():
        release_mounts(state, container, files)
    with storage_errors(f"keep the status of the container {container.name}", state.home):
        records.write_quickly(files.result, result)
        files.process.unlink(missing_ok=True)
    return result.exit_status


def put_away(state: State, container: Container, files: Files) -> int | None:
    """As `clean_up` and `remove_files`, for a command that holds the client lock; returns the status.

    The container's monitor waits for that lock and does what nobody needs to wait for.
    """
    process = records.process_of(files)
    if process is None:
        raise PolytropoError(f"the container {container.name} has lost its record of what ran")
    result = _result(container, files, process)
    release_mounts(state, container, files)
    with storage_errors("remove the container", state.home):
        files.directory.rename(files.trash)
    return result.exit_status


def _result(container: Container, files: Files, process: ProcessRecord) -> ResultRecord:
    _wait_for_exit_file(container, files, process)
    status, finished = records.monitored_status(container, files)
    return ResultRecord(exit_status=status, started_unix_s=process.started_unix_s, finished_unix_s=finished)


def wait(files: Files, process: ProcessRecord, timeout_s: float | None = None) -> bool:
    """Waits for the end of the container's process; False if it still runs after `timeout_s`."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not records.is_alive(process):
            return True
        poll = select.poll()  # select(2) knows no descriptor above 1023
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
    finally:
        os.close(descriptor)


def wait_for_status(state: State, container: Container) -> int | None:
    """Waits for the end of the container and returns its status; None if nobody saw it end."""
    files = records.files_of(state, container.id)
    if (process := records.process_of(files)) is not None:
        wait(files, process)
        _wait_for_exit_file(container, files, process)
    status = records.exit_status(container, files)
    reap(state, container.id)
    return status


def send_signal(process: ProcessRecord, number: int) -> bool:
    """Sends a signal to the container's first process; False if it has ended."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not records.is_alive(process):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def stop(state: State, container: Container, timeout_s: float) -> bool:
    """Asks the container's program to end, after `timeout_s` ends it; False if it did not run."""
    return bool(stop_all(state, [container], timeout_s))


def stop_all(state: State, containers: list[Container], timeout_s: float) -> list[str]:
    """Stops containers within the same `timeout_s` and returns the names of those that ran."""
    running = []
    for container in containers:
        files = records.files_of(state, container.id)
        process = records.process_of(files)
        if process is not None and send_signal(process, stop_signal(container)):
            running.append((container, files, process))
    deadline = time.monotonic() + timeout_s
    for container, files, process in running:
        if not wait(files, process, max(0.0, deadline - time.monotonic())):
            kill(container, files, process)
    for container in containers:
        reap(state, container.id)
    return [container.name for container, _, _ in running]


def kill(container: Container, files: Files, process: ProcessRecord) -> None:
    """Ends the container's processes at once. Raises PolytropoError if they do not end."""
    send_signal(process, signal.SIGKILL)
    if not wait(files, process, _KILL_TIMEOUT_S):
        raise PolytropoError(
            f"the process {process.pid} of the container {container.name} does not end;"
            " it hangs in the kernel, `polytropo tenant stop --force` ends its service"
        )


def stop_signal(container: Container) -> int:
    """The signal by which the image wants to be stopped."""
    with suppress(PolytropoError):
        return parse_signal(container.stop_signal)
    return signal.SIGTERM


def parse_signal(text: str) -> int:
    """The number of a signal given as "TERM", "SIGTERM" or "15". Raises PolytropoError."""
    name = text.upper()
    if name.isdecimal() and int(name) in {int(number) for number in signal.valid_signals()}:
        return int(name)
    try:
        return int(signal.Signals[name if name.startswith("SIG") else f"SIG{name}"])
    except KeyError:
        raise PolytropoError(f'there is no signal "{text}"; `kill -l` lists them') from None


def remove(state: State, container: Container, *, force: bool) -> None:
    """Removes a container with its writable layer; one that runs only with `force`."""
    with records.locked(state, container.id) as files:
        process = records.process_of(files)
        if process is not None and records.is_alive(process):
            if not force:
                raise PolytropoError(
                    f"the container {container.name} runs; `polytropo stop {container.name}` stops it,"
                    " `polytropo rm -f` removes it as it is"
                )
            kill(container, files, process)
        clean_up(state, container, files)
        remove_files(state, files)


def remove_files(state: State, files: Files) -> None:
    """Removes the directory of a container that was cleaned up and is locked by the caller."""
    with storage_errors("remove the container", state.home), state.scratch("container") as scratch:
        # Gone at once for everybody else, and cleared later if this process is killed now.
        files.directory.rename(scratch.path / "container")
        # A service may just then have carried out the last order of a command that was killed. From now on it
        # finds that the place has moved.
        mounts.detach_ours(scratch.path.resolve())


def reap(state: State, container_id: str) -> None:
    """Cleans up after a container that has ended, and removes it if it was to be removed at its end."""
    try:
        with records.locked(state, container_id) as files:
            container = read_record(files.record, Container)
            if records.is_alive(records.process_of(files)):
                return
            clean_up(state, container, files)
            if container.remove_at_end:
                remove_files(state, files)
    except PolytropoError:
        if records.files_of(state, container_id).directory.exists():
            raise


def reap_all(state: State) -> tuple[int, list[PolytropoError]]:
    """Clears what killed commands left of containers; returns of how many, and what could not be cleared.

    A container that cannot be cleared is no trouble of commands about others.
    """
    cleared: int = 0
    troubles: list[PolytropoError] = []
    if is_outside():  # their monitors clean up, inside
        return cleared, troubles
    for container in records.all_containers(state):
        try:
            cleared += _reap_abandoned(state, container)
        except PolytropoError as error:
            troubles.append(error)
    return cleared, troubles


def release_mounts(state: State, container: Container, files: Files) -> None:
    """Unmounts the container's root and volumes, also if their service is dead.

    Raises PolytropoError if something stays: what is mounted there must not be removed with the container.
    """
    for mount in reversed(_mounts_inside(files)):
        if mount.filesystem_type == mounts.FILESYSTEM_TYPE:
            _unmount(state, container.tenant, mount.mountpoint)
    if left := _mounts_inside(files):
        raise PolytropoError(
            f"{left[-1].mountpoint} is still mounted ({left[-1].filesystem_type}); unmount it and try again"
        )


def _mounts_inside(files: Files) -> list[mounts.Mount]:
    directory = files.directory.resolve()
    return [mount for mount in mounts.mount_table() if mount.mountpoint.is_relative_to(directory)]


@contextmanager
def mounted_root(state: State, container: Container) -> Iterator[int]:
    """A descriptor of the container's root directory: of its process if it runs, else mounted meanwhile."""
    with records.locked(state, container.id) as files:
        own_mount = False
        if records.is_alive(records.process_of(files)):
            descriptor = process_root(container, files)
        else:
            own_mount = not mounts.top_mount(files.rootfs)
            if own_mount:
                service.mount(state, container.tenant, _root_stack(container), files.rootfs)
            descriptor = os.open(files.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
            if own_mount:
                release_mounts(state, container, files)


def process_root(container: Container, files: Files) -> int:
    """A descriptor of the root that the container's process sees. Raises PolytropoError."""
    ended = PolytropoError(f"the container {container.name} has just ended; start it and try again")
    if (process := records.process_of(files)) is None:
        raise ended
    try:
        descriptor = os.open(f"/proc/{process.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ended from error
    if not records.is_alive(process):  # the id may be another process's by now
        os.close(descriptor)
        raise ended
    return descriptor


def _reap_abandoned(state: State, container: Container) -> bool:
    files = records.files_of(state, container.id)
    process = records.process_of(files)
    if files.paused.exists():
        from polytropo.containers.committing import resume_abandoned

        with records.locked(state, container.id):
            resume_abandoned(container, files)
    if process is None and not container.remove_at_end and not _has_leftovers(container, files):
        return False
    if records.is_alive(process) and not (files.runtime_root / container.id / "exec.fifo").exists():
        return False
    if records.is_attended(files):
        return False
    with records.locked(state, container.id):
        process = records.process_of(files)
        if process is not None and records.is_alive(process):
            # Its command died before it started the program.
            if not Runtime(container, files).waits_for_start or records.is_attended(files):
                return False
            kill(container, files, process)
        clean_up(state, container, files)
        if container.remove_at_end:
            remove_files(state, files)
    return True


def _abandon(state: State, container: Container, files: Files) -> None:
    """Ends a container that was not brought to its start, however far it came."""
    end_monitor(container.id)
    Runtime(container, files).delete()
    group = tenant_group(state, container.tenant).child(container.id)
    if group.exists():
        group.kill()
        group.remove()


def _has_leftovers(container: Container, files: Files) -> bool:
    return (files.runtime_root / container.id).exists()


def _forget_last_run(container: Container, files: Files, runtime: Runtime) -> None:
    runtime.delete()
    for path in (files.process, files.result, files.exits / container.id):
        path.unlink(missing_ok=True)
    for name in ("attach", "ctl", "winsz"):
        (files.bundle / name).unlink(missing_ok=True)


def _mount_all(state: State, container: Container, files: Files) -> list[Bind]:
    service.mount(state, container.tenant, _root_stack(container), files.rootfs)
    binds = []
    for index, volume in enumerate(container.volumes):
        mountpoint = files.volume(index)
        layer, inside = _volume_layer(volume)
        service.mount(state, container.tenant, Stack(layer), mountpoint)
        binds.append(Bind(mountpoint / inside, volume.destination, volume.read_only))
    return binds


def _root_stack(container: Container) -> Stack:
    return Stack.from_document(container.root)


def _volume_layer(volume: records.VolumeMount) -> tuple[Layer, str]:
    """What to mount for a volume, and the name in it that is meant."""
    if volume.volume is not None:
        return Volume(volume.volume, read_only=volume.read_only), ""
    path = Path(volume.host_path or "/")
    if path.is_dir():
        return Dir(path, read_only=volume.read_only, coherence="shared"), ""
    # A service shows directories; of this one the container sees the one file.
    return Dir(path.parent, read_only=volume.read_only, coherence="shared"), path.name


def _write_bundle(
    state: State, container: Container, files: Files, binds: list[Bind], size: tuple[int, int] | None
) -> None:
    root = os.open(files.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        user = resolve_user(root, container.user)
        private = private_path.prepare(state, container, files, root)
    finally:
        os.close(root)
    taken = {bind.destination for bind in binds}
    own = [*write_etc(container, files), *private.binds]
    binds = [bind for bind in own if bind.destination not in taken] + binds
    group = tenant_group(state, container.tenant)
    environment = terminal_environment(
        {**container.environment, **private.environment}, user, container.hostname, container.terminal
    )
    process = Process(container.args, environment, container.cwd, user, container.terminal, size)
    machine = Machine(
        rootfs=files.rootfs,
        hostname=container.hostname,
        own_network=container.network == "none",
        read_only=container.read_only,
        binds=binds,
        cgroup_path=f"/{group.path}/{container.id}" if not is_rootless() and group.exists() else None,
        rootless=is_rootless(),
        unified_cgroups=not group.hierarchies.v1 and group.hierarchies.v2 is not None,
    )
    path = files.bundle / "config.json"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(runtime_spec(process, machine)))


def _monitor_group_files(state: State, container: Container) -> list[Path]:
    """Where monitors live: with the tenant, apart from the containers that they watch."""
    group = tenant_group(state, container.tenant)
    if is_rootless():
        return []
    if not group.exists():
        service.start_or_reach(state, get_tenant(state, container.tenant)).close()  # makes it, where it can
        if not group.exists():
            return []
    leaf = group.child(MONITORS_GROUP)
    try:
        if not leaf.exists():
            leaf.create()
    except PermissionError:
        return []
    return leaf.procs_files()


def _record_process(files: Files, pid: int) -> ProcessRecord:
    ticks = records.start_ticks(pid)
    if ticks is None:
        raise PolytropoError("the container's process ended before it was started")
    try:
        monitor_pid = int(files.monitor_pid.read_text())
    except (OSError, ValueError):
        monitor_pid = 0
    process = ProcessRecord(
        pid=pid,
        start_ticks=ticks,
        boot_id=records.boot_id(),
        monitor_pid=monitor_pid,
        started_unix_s=time.time(),
    )
    records.write_quickly(files.process, process)
    return process


def _wait_for_exit_file(container: Container, files: Files, process: ProcessRecord) -> None:
    """The monitor writes it just after the end of the process; not if the monitor was killed too."""
    path, deadline = files.exits / container.id, time.monotonic() + _EXIT_FILE_TIMEOUT_S
    while not path.exists() and time.monotonic() < deadline:
        if process.monitor_pid == 0 or records.start_ticks(process.monitor_pid) is None:
            return
        time.sleep(_POLL_S)


def _unmount(state: State, tenant_name: str, mountpoint: Path) -> None:
    try:
        client = service.reach(state, tenant_name)
        if client is not None:
            with client:
                client.unmount(mountpoint, lazy=True)
                return
    except (service.ServiceError, service.ServiceGone) as error:
        if mounts.top_mount(mountpoint) is None:
            return
        if isinstance(error, service.ServiceError) and error.errno_name not in ("EINVAL", "ENOENT", None):
            raise
    with suppress(PolytropoError):
        mounts.detach(mountpoint)


def service_trouble(container: Container, files: Files) -> str | None:
    """The sentence to say if the service behind the container's root is gone."""
    try:
        os.statvfs(files.rootfs)  # unlike attributes, this is always asked of the service
        return None
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            return None
    kept = "" if container.remove_at_end else f"; `polytropo rm {container.name}` removes what is left"
    return (
        f"the service of the tenant {container.tenant} ended while the container {container.name} ran{kept}"
    )
