"""The command's own terminal or streams, tied to those of a container through its monitor."""

import errno
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from polytropo.errors import PolytropoError

_PACKET_MAX_BYTES = 32 << 10
_STDOUT, _STDERR = 2, 3
_NOT_FORWARDED = {
    signal.SIGCHLD,
    signal.SIGPIPE,
    signal.SIGURG,
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGWINCH,
}
# Ours to obey: job control, and what only a fault of our own raises.
_NOT_FORWARDED |= {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT, signal.SIGPROF}
_NOT_FORWARDED |= {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGABRT,
    signal.SIGTRAP,
}
_NOT_FORWARDED |= {signal.SIGSYS, signal.SIGXCPU, signal.SIGVTALRM, signal.SIGALRM}


class Attachment:
    """A connection to the monitor of a container that was created."""

    def __init__(self, bundle: Path) -> None:
        """Raises PolytropoError if the monitor does not listen."""
        self._bundle = bundle
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        # Through a descriptor, since a socket's address holds 107 bytes and state directories may lie deep.
        directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.connect(f"/proc/self/fd/{directory}/attach")
        except OSError as error:
            self._socket.close()
            raise PolytropoError(f"the container's monitor does not answer: {error.strerror}") from error
        finally:
            os.close(directory)

    def close(self) -> None:
        self._socket.close()

    def resize(self) -> None:
        """Tells the container's terminal the size of ours."""
        if (size := terminal_size()) is None:
            return
        with suppress(OSError):  # the monitor has gone, or its pipe is full
            pipe = os.open(self._bundle / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(pipe, b"1 %d %d\n" % size)
            finally:
                os.close(pipe)

    def carry(self, stdin: int | None) -> None:
        """Carries bytes both ways until the container's streams end; `stdin` None: it gets no input."""
        self._socket.setblocking(False)
        pending = memoryview(b"")
        reading = stdin is not None
        poll = select.poll()
        while True:
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if pending else 0))
            if stdin is not None and reading and not pending:
                poll.register(stdin, select.POLLIN)
            elif stdin is not None:
                with suppress(KeyError):
                    poll.unregister(stdin)
            for descriptor, _events in poll.poll():
                if descriptor == self._socket.fileno():
                    if not self._take_output():
                        return
                    pending = self._give(pending)
                elif not pending and stdin is not None:
                    data = _read_some(stdin)
                    if data:
                        pending = self._give(memoryview(data))
                    else:
                        reading = False
                        self._end_input()

    def _take_output(self) -> bool:
        """Passes on one packet if there is one; False at the end."""
        try:
            packet = self._socket.recv(_PACKET_MAX_BYTES + 1)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        if not packet:
            return False
        if packet[0] in (_STDOUT, _STDERR):
            _write_all(1 if packet[0] == _STDOUT else 2, memoryview(packet)[1:])
        return True

    def _give(self, data: memoryview) -> memoryview:
        """Sends what the monitor takes now and returns the rest."""
        while data:
            try:
                sent = self._socket.send(data[:_PACKET_MAX_BYTES])
            except BlockingIOError:
                break
            except (BrokenPipeError, ConnectionResetError):
                return memoryview(b"")
            data = data[sent:]
        return data

    def _end_input(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)


def terminal_size(descriptor: int = 0) -> tuple[int, int] | None:
    """Rows and columns of our terminal."""
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:
        return None
    return size.lines, size.columns


@contextmanager
def raw_terminal(wanted: bool) -> Iterator[None]:
    """Hands every key on unread while the container has the terminal."""
    if not wanted or not os.isatty(0):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)  # keeps what was typed ahead
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextmanager
def forwarded_signals(
    process: int, resized: Callable[[], None] | None = None, *, keyboard: bool = True
) -> Iterator[None]:
    """Passes the signals that we get to the process of the descriptor `process`, for a while.

    Without `keyboard` those are ignored that the terminal sends to the whole process group.
    """

    def forward(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, number)

    def window(_number: int, _frame: FrameType | None) -> None:
        if resized is not None:
            resized()

    before: dict[int, Any] = {}
    try:
        ignored = () if keyboard else (signal.SIGINT, signal.SIGQUIT)
        for number in map(int, signal.valid_signals() - _NOT_FORWARDED):
            if number < signal.SIGRTMIN:
                before[number] = signal.signal(number, signal.SIG_IGN if number in ignored else forward)
        before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, window)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_some(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _PACKET_MAX_BYTES)
    except OSError as error:
        if error.errno == errno.EIO:  # the terminal has gone
            return b""
        raise


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except BrokenPipeError:
            # Nobody reads any more; the container is not to be held up by that.
            return
