"""A queue of bytes between processes, in shared memory.

    with Queue(1024, 64) as queue:              # 1024 items of at most 64 bytes
        Process(target=work, args=(queue,)).start()
        queue.put(b"hello")

Items come out in the order in which they went in, each to one reader. A process that is killed, at
whatever moment, stops nobody else: what it was putting in was never there, what it had put in is delivered,
and what it had taken out is counted as lost.
"""

import multiprocessing.context
import operator
import os
import queue as standard
from multiprocessing import reduction
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from polytropo.errors import PolytropoError

try:
    from polytropo import _native
except ImportError as error:
    raise ImportError("polytropo's native module is not built; run `make build`") from error

if TYPE_CHECKING:
    from typing_extensions import Buffer

Full = standard.Full
Empty = standard.Empty


class Closed(PolytropoError):
    """The queue was closed: nothing goes in any more, and to a reader, nothing is left."""


class Damaged(PolytropoError):
    """The queue's memory holds what no process that keeps to the rules writes there."""


class Stats(NamedTuple):
    """What was done with a queue, by all processes."""

    put: int
    taken: int
    sleeps: int
    wakes: int
    lost_puts: int
    """Items whose process died before they were in the queue."""
    lost_items: int
    """Items whose reader died while it took them."""
    rescued: int
    """Items of dead processes that the living delivered."""


class Queue:
    """A queue of at most `capacity` items (a power of two) of at most `item_size` bytes.

    Without a name it reaches other processes as an argument of `multiprocessing.Process`, or by its
    descriptor (`fileno`, `Queue.from_descriptor`). With a name, `Queue.attach(name)` finds it, until its
    maker releases it.
    """

    def __init__(self, capacity: int, item_size: int, *, name: str | None = None) -> None:
        self._native = _native.Queue.create(operator.index(capacity), operator.index(item_size), 1, name)
        self._name = name
        self._maker: int | None = os.getpid()

    @classmethod
    def attach(cls, name: str) -> Self:
        """Takes part in the queue of that name."""
        return cls._of(_native.Queue.attach(name), name)

    @classmethod
    def from_descriptor(cls, descriptor: int) -> Self:
        """Takes part in the queue of a descriptor that a `fileno` gave; it stays the caller's.

        Refuses memory that the other process could take away from under this one: queues with names.
        """
        return cls._of(_native.Queue.from_descriptor(descriptor, True), None)

    @classmethod
    def _of(cls, native: "_native.Queue", name: str | None) -> Self:
        queue = cls.__new__(cls)
        queue._native, queue._name, queue._maker = native, name, None
        return queue

    def put(self, item: "Buffer", *, timeout: float | None = None) -> None:
        """Puts `item` in; raises Full if there is no room for `timeout` seconds (None: waits)."""
        try:
            self._native.put(item, timeout)
        except _native.Full:
            raise Full from None
        except (_native.Closed, _native.Damaged) as error:
            raise _translated(error) from None

    def put_nowait(self, item: "Buffer") -> None:
        """Puts `item` in, or raises Full."""
        self.put(item, timeout=0.0)

    def get(self, *, timeout: float | None = None) -> bytes:
        """Takes an item; raises Empty if there is none for `timeout` seconds (None: waits).

        Raises Closed if the queue is closed and nothing is left.
        """
        try:
            return self._native.get(timeout)
        except _native.Empty:
            raise Empty from None
        except (_native.Closed, _native.Damaged) as error:
            raise _translated(error) from None

    def get_nowait(self) -> bytes:
        """Takes an item, or raises Empty."""
        return self.get(timeout=0.0)

    def close(self) -> None:
        """Ends the queue for all: nothing goes in any more, what is in it can still be taken."""
        self._native.close()

    def release(self) -> None:
        """Ends this process's part in the queue. The maker's release also takes the name away."""
        maker, self._maker = self._maker, None
        if maker == os.getpid() and self._name is not None:
            _native.Queue.unlink(self._name)
        self._native.release()

    def reap(self) -> int:
        """Repairs what dead processes left, and tells how many there were. Who waits does so by itself."""
        return self._native.reap()[0]

    def stats(self) -> Stats:
        return Stats(*self._native.stats())

    def fileno(self) -> int:
        """The descriptor of the queue's memory."""
        return self._native.fileno()

    def __len__(self) -> int:
        return len(self._native)

    def __bool__(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        return self._native.is_closed()

    @property
    def name(self) -> str | None:
        return self._name

    @property
    def capacity(self) -> int:
        return self._native.capacity

    @property
    def item_size(self) -> int:
        return self._native.item_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """The maker closes the queue for all; everyone releases it."""
        if self._maker == os.getpid():
            self.close()
        self.release()

    def __reduce__(self) -> tuple[object, ...]:
        if multiprocessing.context.get_spawning_popen() is None:
            if self._name is None:
                raise TypeError(
                    "a queue without a name is passed to a process when that is made, not pickled later"
                )
            return (type(self).attach, (self._name,))
        return (_rebuilt, (type(self), reduction.DupFd(self.fileno()), self._name))

    def __repr__(self) -> str:
        return f"<Queue name={self._name!r} descriptor={self._descriptor_or_none()}>"

    def _descriptor_or_none(self) -> int | None:
        try:
            return self.fileno()
        except _native.Closed:
            return None


class _Duplicate(Protocol):
    def detach(self) -> int: ...


def _rebuilt(cls: type[Queue], duplicate: _Duplicate, name: str | None) -> Queue:
    descriptor = duplicate.detach()
    try:
        return cls._of(_native.Queue.from_descriptor(descriptor, name is None), name)
    finally:
        os.close(descriptor)


def _translated(error: Exception) -> PolytropoError:
    kind = Closed if isinstance(error, _native.Closed) else Damaged
    return kind(str(error))
