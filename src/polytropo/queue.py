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
    """A queue of at most `capacity` items (a power of two from 2 to 2**20) of at most `item_size` bytes each.

    Items are bytes: `put` takes whatever has a buffer, `get` gives `bytes`. Without a name the queue reaches
    other processes as an argument of `multiprocessing.Process`, or by its descriptor (`fileno`,
    `Queue.from_descriptor`). With a name, of 1 to 200 letters, digits, dots, underscores and hyphens,
    `Queue.attach(name)` finds it, for processes of the same user, until its maker releases it.

    Used with `with`, the maker closes the queue for all at the end, and everyone releases it. Threads may
    share a `Queue`; a child of `fork` becomes a participant of its own at the first use.

    Raises ValueError if a number or the name is out of its range, FileExistsError if the name is taken, and
    MemoryError or OSError if the memory is not to be had.
    """

    def __init__(self, capacity: int, item_size: int, *, name: str | None = None) -> None:
        self._native = _native.Queue.create(operator.index(capacity), operator.index(item_size), 1, name)
        self._name = name
        self._maker: int | None = os.getpid()

    @classmethod
    def attach(cls, name: str) -> Self:
        """Takes part in the queue of that name.

        Raises FileNotFoundError if there is none, and ValueError if what is there is no queue, or another
        version's.
        """
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

    def put(self, item: "Buffer", block: bool = True, timeout: float | None = None) -> None:
        """Puts `item` in, and waits for room, for ever or for `timeout` seconds.

        Raises Full if there was no room in that time, or now if `block` is false; Closed if the queue is
        closed, also while it waits; ValueError if the item has more than `item_size` bytes; Damaged.
        """
        try:
            self._native.put(item, _patience(block, timeout))
        except _native.Full:
            raise Full from None
        except (_native.Closed, _native.Damaged) as error:
            raise _translated(error) from None

    def put_nowait(self, item: "Buffer") -> None:
        """Puts `item` in, or raises Full; otherwise as `put`."""
        self.put(item, False)

    def get(self, block: bool = True, timeout: float | None = None) -> bytes:
        """Takes the next item, and waits for one, for ever or for `timeout` seconds.

        Raises Empty if there was none in that time, or now if `block` is false; Closed if the queue is closed
        and nothing is left; Damaged.
        """
        try:
            return self._native.get(_patience(block, timeout))
        except _native.Empty:
            raise Empty from None
        except (_native.Closed, _native.Damaged) as error:
            raise _translated(error) from None

    def get_nowait(self) -> bytes:
        """Takes the next item, or raises Empty; otherwise as `get`."""
        return self.get(False)

    def qsize(self) -> int:
        """How many items were there a moment ago, as `len`."""
        return len(self._native)

    def empty(self) -> bool:
        """Whether nothing was there a moment ago."""
        return self.qsize() == 0

    def full(self) -> bool:
        """Whether there was no room a moment ago."""
        return self.qsize() >= self.capacity

    def close(self) -> None:
        """Ends the queue for all: nothing goes in any more, what is in it can still be taken. Wakes who
        waits."""
        self._native.close()

    def release(self) -> None:
        """Ends this process's part in the queue, whose further use raises Closed. The maker's also takes the
        name away."""
        maker, self._maker = self._maker, None
        if maker == os.getpid() and self._name is not None:
            _native.Queue.unlink(self._name)
        self._native.release()

    def reap(self) -> int:
        """Repairs what dead processes left, and tells how many there were. Who waits does so by itself."""
        return self._native.reap()[0]

    def stats(self) -> Stats:
        """What was done with the queue so far, by all processes."""
        return Stats(*self._native.stats())

    def fileno(self) -> int:
        """The descriptor of the queue's memory; it stays the queue's."""
        return self._native.fileno()

    def __len__(self) -> int:
        return len(self._native)

    def __bool__(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        """Whether someone has closed the queue."""
        return self._native.is_closed()

    @property
    def name(self) -> str | None:
        """What others attach by, if anything."""
        return self._name

    @property
    def capacity(self) -> int:
        """How many items the queue holds."""
        return self._native.capacity

    @property
    def item_size(self) -> int:
        """Bytes of the largest item."""
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


def _patience(block: bool, timeout_s: float | None) -> float | None:
    if not block:
        return 0.0
    if timeout_s is not None and timeout_s < 0:
        raise ValueError(f"a timeout is not negative, but this one is {timeout_s} s")
    return timeout_s


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
