"""The shared-memory queue: one process, several, and some that are killed."""

import multiprocessing
import os
import queue as standard
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from polytropo.queue import Closed, Empty, Full, Queue

WAIT_S = 20.0


@pytest.fixture(params=["fork", "spawn"])
def context(request: pytest.FixtureRequest) -> BaseContext:
    context: BaseContext = multiprocessing.get_context(request.param)
    return context


@pytest.fixture
def queue() -> Iterator[Queue]:
    with Queue(8, 64) as made:
        yield made


def test_items_come_out_in_order(queue: Queue) -> None:
    for item in (b"one", bytearray(b"two"), memoryview(b"three"), b""):
        queue.put(item)
    assert len(queue) == 4
    assert [queue.get() for _ in range(4)] == [b"one", b"two", b"three", b""]
    assert (queue.capacity, queue.item_size) == (8, 64)


def test_full_and_empty_are_the_standard_ones(queue: Queue) -> None:
    with pytest.raises(standard.Empty):
        queue.get_nowait()
    with pytest.raises(Empty):
        queue.get(timeout=0.01)
    for number in range(8):
        queue.put_nowait(b"%d" % number)
    with pytest.raises(standard.Full):
        queue.put_nowait(b"x")
    with pytest.raises(Full):
        queue.put(b"x", timeout=0.01)
    assert [queue.get() for _ in range(8)] == [b"%d" % number for number in range(8)]


def test_arguments_are_those_of_the_standard_queues(queue: Queue) -> None:
    assert queue.empty() and not queue.full()
    for _ in range(8):
        queue.put(b"x", True, 1)
    assert queue.full() and queue.qsize() == 8
    with pytest.raises(Full):
        queue.put(b"x", False)
    assert [queue.get(True, 1.0) for _ in range(8)] == [b"x"] * 8
    with pytest.raises(Empty):
        queue.get(False, WAIT_S)


def test_wrong_arguments_are_refused(queue: Queue) -> None:
    with pytest.raises(ValueError, match="larger than the queue's items"):
        queue.put(b"x" * 65)
    with pytest.raises(ValueError, match="powers of two"):
        Queue(7, 64)
    with pytest.raises(ValueError, match="name has"):
        Queue(8, 64, name="../x")
    with pytest.raises(TypeError):
        queue.put("text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout"):
        queue.get(timeout=float("inf"))
    with pytest.raises(ValueError, match="timeout"):
        queue.put(b"x", timeout=-1)
    with Path(os.devnull).open("rb") as other, pytest.raises((ValueError, OSError)):
        Queue.from_descriptor(other.fileno())
    with pytest.raises(FileNotFoundError):
        Queue.attach("nobody-made-this")


def test_close_wakes_and_drains(queue: Queue) -> None:
    queue.put(b"last")
    queue.close()
    assert queue.closed
    with pytest.raises(Closed):
        queue.put(b"x")
    assert queue.get() == b"last"
    with pytest.raises(Closed):
        queue.get()


def test_release_while_another_thread_waits() -> None:
    queue = Queue(8, 64)
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            queue.get()
        except Closed as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    queue.close()
    queue.release()
    thread.join(WAIT_S)
    assert len(failures) == 1
    with pytest.raises(Closed):
        queue.put(b"x")


def test_waiting_lets_other_threads_run(queue: Queue) -> None:
    def put_late() -> None:
        time.sleep(0.05)
        queue.put(b"late")

    thread = threading.Thread(target=put_late)
    thread.start()
    assert queue.get(timeout=WAIT_S) == b"late"
    thread.join()


def test_names_and_descriptors() -> None:
    name = f"test-{os.getpid()}"
    with Queue(8, 64, name=name) as made:
        with pytest.raises(FileExistsError):
            Queue(8, 64, name=name)
        with Queue.attach(name) as other:
            other.put(b"by name")
        assert made.get() == b"by name"
        with pytest.raises(ValueError, match="not sealed"):
            Queue.from_descriptor(made.fileno())
    with pytest.raises(FileNotFoundError):
        Queue.attach(name)
    with Queue(8, 64) as made, Queue.from_descriptor(made.fileno()) as other:
        made.put(b"by descriptor")
        assert other.get() == b"by descriptor"


def _echo(incoming: Queue, outgoing: Queue) -> None:
    while True:
        try:
            outgoing.put(incoming.get())
        except Closed:
            return


def test_two_processes(context: BaseContext, queue: Queue) -> None:
    with Queue(8, 64) as answers:
        process = context.Process(target=_echo, args=(queue, answers))  # type: ignore[attr-defined]
        process.start()
        for number in range(500):
            queue.put(b"%d" % number, timeout=WAIT_S)
            if number >= 8:
                assert answers.get(timeout=WAIT_S) == b"%d" % (number - 8)
        queue.close()
        process.join(WAIT_S)
        assert process.exitcode == 0
        assert [answers.get() for _ in range(8)] == [b"%d" % number for number in range(492, 500)]


def _put_for_ever(queue: Queue, number: int) -> None:
    for item in range(1 << 40):
        queue.put(b"%d %d" % (number, item))


def test_killed_writers_stop_nobody(queue: Queue) -> None:
    context = multiprocessing.get_context("fork")
    last: dict[bytes, int] = {}
    for number in range(20):
        process = context.Process(target=_put_for_ever, args=(queue, number))
        process.start()
        taken = [queue.get(timeout=WAIT_S) for _ in range(50 + number)]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(WAIT_S)
        queue.reap()
        while len(queue):
            taken.append(queue.get(timeout=WAIT_S))
        for item in taken:
            writer, _, count = item.partition(b" ")
            assert int(count) == last.get(writer, -1) + 1, "an item was lost or came twice"
            last[writer] = int(count)
    for _ in range(3):
        for _ in range(8):
            queue.put_nowait(b"x")
        with pytest.raises(Full):
            queue.put_nowait(b"x")
        for _ in range(8):
            queue.get_nowait()
    assert queue.stats().lost_items == 0


def _wait_and_tell(queue: Queue, ready: Connection) -> None:
    ready.send(None)
    try:
        queue.get()
    except KeyboardInterrupt:
        ready.send("interrupted")


def test_a_wait_can_be_interrupted(queue: Queue) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_wait_and_tell, args=(queue, theirs))
    process.start()
    assert ours.poll(WAIT_S)
    ours.recv()
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert ours.poll(WAIT_S) and ours.recv() == "interrupted"
    process.join(WAIT_S)
