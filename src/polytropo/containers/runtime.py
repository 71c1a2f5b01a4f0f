"""The OCI runtime (runc, crun) and the monitor (conmon) that stays with each container.

The monitor is the parent of the container's first process: it keeps the log, carries the terminal and
the standard streams, and writes the exit status down, whatever happens to the command that started it.
"""

import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from polytropo.cgroups import Hierarchies
from polytropo.containers.records import Container, Files
from polytropo.errors import PolytropoError
from polytropo.host import is_rootless

RUNTIMES = ("runc", "crun")
_COMMAND_TIMEOUT_S = 60.0
_LOG_TAIL_BYTES = 1 << 16
_GATE_TIMEOUT_S = 5.0
_GATE_POLL_S = 0.001
_POLL_S = 0.005
_SYNC_MAX_BYTES = 1 << 20

# What the monitor runs at the container's end: if the command that is attached to it is gone, or there never
# was one, another one cleans up; if it has put the container away, the rest is done here.
# $1: the container's directory; $2: where that goes at its removal; $3: the id; the five words of the command
# that cleans up; the words that call the runtime.
_AT_EXIT = """
dir=$1 trash=$2 id=$3; shift 3
flock "$dir/client" true
[ ! -e "$dir/process.json" ] || exec "$1" "$2" "$3" "$4" "$5"
shift 5
[ ! -d "$trash/runtime/$id" ] || "$@" --root "$trash/runtime" delete --force "$id"
exec rm -rf --one-file-system -- "$trash"
"""
# crun refuses hosts where version 2 of control groups has controllers beside version 1 ("cgroups in hybrid
# mode not supported"). With version 2 out of its sight it uses version 1 alone, as runc does.
_WITHOUT_UNIFIED = 'umount -- "$0" && exec "$@"'

NOT_EXECUTABLE_STATUS = 126
NOT_FOUND_STATUS = 127
FAILED_STATUS = 125


class StartError(PolytropoError):
    """The runtime could not start a program; `status` is what podman would answer."""

    def __init__(self, sentence: str, status: int = FAILED_STATUS) -> None:
        super().__init__(sentence)
        self.status = status


class Runtime:
    """The runtime's commands for one container."""

    def __init__(self, container: Container, files: Files, *, log: Path | None = None) -> None:
        self._container = container
        self._files = files
        self._log = log or files.runtime_log
        self._words = _calling(container.runtime)

    @property
    def knows_container(self) -> bool:
        """Whether the runtime keeps something of the container."""
        return (self._files.runtime_root / self._container.id).exists()

    @property
    def waits_for_start(self) -> bool:
        """Whether the container was created, but never started."""
        return self._gate.exists()

    @property
    def _gate(self) -> Path:
        return self._files.runtime_root / self._container.id / "exec.fifo"

    def command(self, operation: str, *arguments: str) -> list[str]:
        return [*self._words, *self._options(), operation, *arguments]

    def call(self, operation: str, *arguments: str) -> None:
        """Runs one command of the runtime. Raises StartError with what it said."""
        self._finish(operation, self._begin(operation, *arguments))

    def _begin(self, operation: str, *arguments: str) -> "subprocess.Popen[bytes]":
        self._log.unlink(missing_ok=True)
        return subprocess.Popen(
            self.command(operation, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
        )

    def _finish(self, operation: str, command: "subprocess.Popen[bytes]") -> None:
        try:
            _, said = command.communicate(timeout=_COMMAND_TIMEOUT_S)
        except BaseException as error:
            command.kill()
            command.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise StartError(
                f"{self._container.runtime} {operation} did not end within {_COMMAND_TIMEOUT_S:g} s"
            ) from None
        if command.returncode != 0:
            raise self.failure(operation, said.decode(errors="replace"))

    def start(self) -> None:
        """Lets the program of a created container begin. Raises StartError."""
        if not self._open_gate():
            self.call("start", self._container.id)

    def _open_gate(self) -> bool:
        """Does what the runtime's own `start` does, in a tenth of a millisecond instead of twenty.

        runc's first process waits until somebody reads from this FIFO, crun's until somebody writes to it.
        False if it is not so.
        """
        if self._container.runtime == "crun":
            return self._write_to_gate()
        try:
            gate = os.open(self._gate, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            poll = select.poll()
            poll.register(gate, select.POLLIN)
            if not poll.poll(_GATE_TIMEOUT_S * 1000) or not os.read(gate, 64):
                return False
            self._gate.unlink(missing_ok=True)
            return True
        except OSError:
            return False
        finally:
            os.close(gate)

    def _write_to_gate(self) -> bool:
        deadline = time.monotonic() + _GATE_TIMEOUT_S
        while True:
            try:
                gate = os.open(self._gate, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                break
            except OSError as error:
                # ENXIO: the first process is not there yet.
                if error.errno != errno.ENXIO or time.monotonic() > deadline:
                    return False
                time.sleep(_GATE_POLL_S)
        try:
            self._gate.unlink(missing_ok=True)
            return os.write(gate, b"\0") == 1
        except OSError:
            return False
        finally:
            os.close(gate)

    def delete(self) -> None:
        """Ends what is left of the container and makes the runtime forget it."""
        with self.deleting():
            pass

    @contextmanager
    def deleting(self) -> Iterator[None]:
        """`delete`, while the caller does something else."""
        command = self._begin("delete", "--force", self._container.id) if self.knows_container else None
        try:
            yield
        finally:
            if command is not None:
                self._finish("delete", command)

    @contextmanager
    def monitor(self, groups: list[Path]) -> Iterator["Monitor"]:
        """Starts the container's monitor in `groups`; it does nothing before `Monitor.create`.

        Raises StartError.
        """
        self._log.unlink(missing_ok=True)
        with ExitStack() as until_end:
            told, tell = _pipe(until_end)
            gate, opened = _pipe(until_end)
            try:
                with (self._files.directory / "monitor.log").open("wb") as log:
                    process = subprocess.Popen(
                        self._monitor_command(),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        cwd="/",
                        env=_monitor_environment(tell.fileno(), gate.fileno()),
                        pass_fds=(tell.fileno(), gate.fileno()),
                        start_new_session=True,
                    )
            except OSError as error:
                raise StartError(f"the monitor cannot be started: {error.strerror}") from error
            tell.close()
            gate.close()
            monitor = Monitor(self, process, told, opened, groups)
            try:
                yield monitor
            finally:
                monitor.dismiss()

    def created_pid(self, answer: bytes) -> int:
        """The id of the container's first process in what the monitor answered. Raises StartError."""
        import msgspec

        for line in answer.splitlines():
            try:
                value: Any = msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue
            if isinstance(value, dict):
                pid = value.get("data", value.get("pid"))
                if isinstance(pid, int) and pid > 0:
                    return pid
                raise self.failure("create", str(value.get("message", "")))
        raise self.failure("create", self._monitor_words())

    def failure(self, operation: str, otherwise: str) -> StartError:
        """The sentence and status for the runtime's last error; `otherwise` where its log has none."""
        text = self._last_error() or otherwise.strip() or "it says nothing"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return _start_error(self._container.runtime, operation, lines[-1] if lines else text)

    def logged_failure(self, operation: str) -> StartError | None:
        """What the runtime itself failed at, if its log says so."""
        said = self._last_error()
        return (
            _start_error(self._container.runtime, operation, said.strip().splitlines()[-1]) if said else None
        )

    def _options(self) -> list[str]:
        files = self._files
        return ["--root", str(files.runtime_root), "--log", str(self._log), "--log-format", "json"]

    def _monitor_command(self) -> list[str]:
        container, files = self._container, self._files
        command = [
            find_program("conmon"),
            "--api-version",
            "1",
            "--cid",
            container.id,
            "--cuuid",
            container.id,
        ]
        command += ["--name", container.name, "--runtime", self._words[0], "--bundle", str(files.bundle)]
        for option in (*self._words[1:], *self._options()):
            command += ["--runtime-arg", option]
        command += ["--conmon-pidfile", str(files.monitor_pid), "--log-path", f"k8s-file:{files.log}"]
        command += ["--container-pidfile", str(files.directory / "container.pid")]
        command += ["--exit-dir", str(files.exits), "--persist-dir", str(files.exits), "--full-attach"]
        command += ["--no-sync-log", "--log-level", "error"]
        command += ["--terminal"] if container.terminal else []
        command += ["--stdin"] if container.stdin_open else []
        reap = [sys.executable, "-m", "polytropo.containers.reap"]
        reap += [str(files.directory.parent.parent), container.id]
        places = [str(files.directory), str(files.trash), container.id]
        command += ["--exit-command", "/bin/sh"]
        for argument in ("-c", _AT_EXIT, "sh", *places, *reap, *self._words):
            command += ["--exit-command-arg", argument]
        return command

    def _monitor_words(self) -> str:
        try:
            said = (self._files.directory / "monitor.log").read_text(errors="replace").strip()
        except OSError:
            said = ""
        return said or "the monitor ended without an answer"

    def _last_error(self) -> str:
        import msgspec

        try:
            with self._log.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_TAIL_BYTES))
                lines = log.read().splitlines()
        except OSError:
            return ""
        for line in reversed(lines):
            try:
                entry: Any = msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue
            if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
                return str(entry.get("msg", ""))
        return ""


class Monitor:
    """A monitor that has neither forked nor called the runtime yet."""

    def __init__(
        self,
        runtime: Runtime,
        process: "subprocess.Popen[bytes]",
        told: BinaryIO,
        opened: BinaryIO,
        groups: list[Path],
    ) -> None:
        self._runtime = runtime
        self._process = process
        self._told = told
        self._opened = opened
        self._groups = groups
        self._refusal: OSError | None = None
        # The kernel takes some 10 ms to move a process, and there is work to be done meanwhile.
        self._joining = threading.Thread(target=self._join)
        self._joining.start()

    def create(self) -> int:
        """Creates the container; returns the id of its first process, which waits for `Runtime.start`.

        Raises StartError.
        """
        self._joining.join()
        if self._refusal is not None:
            raise self._refusal
        self._opened.write(b"go")
        self._opened.close()
        try:
            answer = _read_answer(self._told)
        finally:
            self._process.wait()  # it goes on in a process of its own
        return self._runtime.created_pid(answer)

    def dismiss(self) -> None:
        """Ends it if it was not to create anything after all."""
        self._joining.join()
        if not self._opened.closed:
            self._process.kill()
            self._process.wait()

    def _join(self) -> None:
        try:
            for procs in self._groups:
                procs.write_text(str(self._process.pid))
        except OSError as error:
            self._refusal = error


def end_monitor(container_id: str) -> None:
    """Kills the container's monitor, and the runtime where it still creates the container.

    Raises PolytropoError if they do not end.
    """
    deadline = time.monotonic() + _COMMAND_TIMEOUT_S
    while processes := _processes_of(container_id):
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise PolytropoError(f"the monitor {processes[0]} of the container {container_id} does not end")
        time.sleep(_POLL_S)


def _processes_of(container_id: str) -> list[int]:
    """The ids of the container's monitor and of its runtime's commands."""
    found = []
    wanted = container_id.encode()
    for directory in Path("/proc").iterdir():
        name = directory.name
        if not name.isdecimal():
            continue
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in words and (b"--cid" in words or b"--root" in words):
            found.append(int(name))
    return found


def _calling(runtime: str) -> list[str]:
    """The words that call a runtime on this host."""
    program = find_program(runtime)
    if runtime != "crun" or is_rootless():
        return [program]
    hierarchies = Hierarchies.find()
    if hierarchies.v2 is None or not hierarchies.v1:
        return [program]
    return [
        find_program("unshare"),
        "--mount",
        "/bin/sh",
        "-c",
        _WITHOUT_UNIFIED,
        str(hierarchies.v2),
        program,
    ]


def find_program(name: str) -> str:
    """The path of an installed program. Raises PolytropoError with what to install."""
    places = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/bin:/sbin:/bin"
    for place in places.split(":"):
        path = f"{place}/{name}"
        if place.startswith("/") and os.access(path, os.X_OK) and os.path.isfile(path):  # noqa: PTH113
            return path
    raise PolytropoError(f"the program {name} is missing; install Debian's package {name}")


def _start_error(runtime: str, operation: str, said: str) -> StartError:
    missing = "executable file" in said and "not found" in said
    if missing or ("exec" in said and "no such file or directory" in said):
        return StartError(f"the program is not in the image: {_tail(said)}", NOT_FOUND_STATUS)
    if "exec" in said and ("permission denied" in said or "is a directory" in said):
        return StartError(f"the program cannot be executed: {_tail(said)}", NOT_EXECUTABLE_STATUS)
    return StartError(f"{runtime} {operation} failed: {said}")


def _tail(said: str) -> str:
    """What follows runc's chain of "unable to start container process"."""
    return said.rpartition("container process: ")[2].strip()


def _monitor_environment(told_fd: int, gate_fd: int) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("POLYTROPO_", "XDG_RUNTIME"))
    }
    path = os.environ.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return {"PATH": path, "_OCI_SYNCPIPE": str(told_fd), "_OCI_STARTPIPE": str(gate_fd), **kept}


def _pipe(until: ExitStack) -> tuple[BinaryIO, BinaryIO]:
    read_end, write_end = os.pipe()
    reader = until.enter_context(os.fdopen(read_end, "rb", buffering=0))
    writer = until.enter_context(os.fdopen(write_end, "wb", buffering=0))
    return cast(BinaryIO, reader), cast(BinaryIO, writer)


def _read_answer(stream: BinaryIO) -> bytes:
    received = b""
    while len(received) < _SYNC_MAX_BYTES and (block := stream.read(1 << 16)):
        received += block
        if b"\n" in received:
            break
    return received
