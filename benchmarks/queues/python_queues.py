"""`polytropo.queue.Queue` beside the standard library's queues between processes: items of 64 bytes."""

import multiprocessing
import multiprocessing.queues
import multiprocessing.synchronize
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from polytropo.queue import Queue

ITEM = b"x" * 64
CAPACITY = 1024


def _ours() -> tuple[Callable[[bytes], object], Callable[[], bytes]]:
    queue = Queue(CAPACITY, len(ITEM))
    return queue.put, queue.get


def _standard() -> tuple[Callable[[bytes], object], Callable[[], bytes]]:
    queue: multiprocessing.queues.Queue[bytes] = multiprocessing.get_context("fork").Queue(CAPACITY)
    return queue.put, queue.get


def _simple() -> tuple[Callable[[bytes], object], Callable[[], bytes]]:
    queue: multiprocessing.queues.SimpleQueue[bytes] = multiprocessing.get_context("fork").SimpleQueue()
    return queue.put, queue.get


QUEUES = {
    "polytropo.queue": _ours,
    "multiprocessing.Queue": _standard,
    "multiprocessing.SimpleQueue": _simple,
}


def _put(number: int, cpu: int, put: Callable[[bytes], object], start: Any) -> None:
    os.sched_setaffinity(0, {cpu})
    start.wait()
    for _ in range(number):
        put(ITEM)


def _get(number: int, cpu: int, get: Callable[[], bytes], start: Any) -> None:
    os.sched_setaffinity(0, {cpu})
    start.wait()
    for _ in range(number):
        get()


def once(queue: str, pairs: int, items: int) -> tuple[float, float]:
    """Items a second and processor nanoseconds an item; `pairs` processes put, as many get."""
    context = multiprocessing.get_context("fork")
    put, get = QUEUES[queue]()
    start = context.Barrier(2 * pairs + 1)
    cpus = sorted(os.sched_getaffinity(0))
    each = items // pairs
    processes = []
    for number in range(pairs):
        near, far = cpus[number % len(cpus)], cpus[(number + 1) % len(cpus)]
        processes.append(context.Process(target=_put, args=(each, near, put, start)))
        processes.append(context.Process(target=_get, args=(each, far, get, start)))
    for process in processes:
        process.start()
    before = os.times()
    start.wait()
    began = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - began
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return each * pairs / seconds, cpu_s / (each * pairs) * 1e9


def measure(repeats: int, items: int) -> list[dict[str, Any]]:
    results = []
    for pairs in (1, 2, 4):
        runs: dict[str, list[tuple[float, float]]] = {queue: [] for queue in QUEUES}
        for _ in range(repeats):
            for queue, outcomes in runs.items():
                outcomes.append(once(queue, pairs, items))
        for queue, outcomes in runs.items():
            rates = [rate for rate, _ in outcomes]
            print(
                f"   64 B Python {2 * pairs:3} processes {queue:28} "
                f"{statistics.median(rates) / 1e3:9.1f} k/s, "
                f"{statistics.median(cost for _, cost in outcomes):9.0f} cpu ns/item"
            )
            results.append(
                {
                    "queue": queue,
                    "processes": 2 * pairs,
                    "runs": [{"items_per_s": rate, "cpu_ns_per_item": cost} for rate, cost in outcomes],
                }
            )
    return results
