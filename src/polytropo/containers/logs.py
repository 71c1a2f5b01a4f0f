"""The output that a container's monitor kept."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from polytropo.containers.records import Files

_LINE_MAX_BYTES = 1 << 20
_FOLLOW_POLL_S = 0.1


@dataclass(frozen=True)
class Entry:
    """One write of the container: a line, or a part of a long or unfinished one."""

    time: str
    stream: str
    ends_line: bool
    text: bytes


def print_log(
    files: Files, *, tail: int | None, timestamps: bool, follow: bool, is_running: Callable[[], bool]
) -> None:
    """Writes the container's output to our own streams; with `follow` until the container ends."""
    try:
        log = files.log.open("rb")
    except FileNotFoundError:
        return
    with log:
        fresh = _Printer(timestamps)
        for entry in _last_lines(_entries(log), tail):
            fresh.print(entry)
        while follow:
            running = is_running()  # asked first, so that what came just before the end is not missed
            for entry in _entries(log):
                fresh.print(entry)
            if not running:
                return
            time.sleep(_FOLLOW_POLL_S)


class _Printer:
    def __init__(self, timestamps: bool) -> None:
        self._timestamps = timestamps
        self._inside_line = {"stdout": False, "stderr": False}

    def print(self, entry: Entry) -> None:
        stream = sys.stderr.buffer if entry.stream == "stderr" else sys.stdout.buffer
        if self._timestamps and not self._inside_line[entry.stream]:
            stream.write(entry.time.encode() + b" ")
        stream.write(entry.text + (b"\n" if entry.ends_line else b""))
        stream.flush()
        self._inside_line[entry.stream] = not entry.ends_line


def _entries(log: BinaryIO) -> Iterator[Entry]:
    """The entries from the file's position to its end; an unfinished one is left for later."""
    while True:
        start = log.tell()
        line = log.readline(_LINE_MAX_BYTES)
        if not line.endswith(b"\n"):
            if len(line) < _LINE_MAX_BYTES:
                log.seek(start, os.SEEK_SET)
                return
            continue
        fields = line[:-1].split(b" ", 3)
        if len(fields) == 4 and fields[1] in (b"stdout", b"stderr"):
            when, stream = fields[0].decode(errors="replace"), fields[1].decode()
            yield Entry(when, stream, fields[2] != b"P", fields[3])


def _last_lines(entries: Iterator[Entry], count: int | None) -> Iterator[Entry]:
    """The entries of the last `count` lines."""
    if count is None:
        yield from entries
        return
    lines: deque[list[Entry]] = deque(maxlen=count + 1)
    lines.append([])
    for entry in entries:
        lines[-1].append(entry)
        if entry.ends_line:
            lines.append([])
    kept = list(lines)
    if not kept[-1]:
        kept.pop()
    for line in kept[max(0, len(kept) - count) :]:
        yield from line
