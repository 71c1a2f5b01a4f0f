"""Whole programs on each mount: hot, on files of the image, with what they write going to the upper."""

import os
import time
from pathlib import Path

from benchmarks.common.host import command
from benchmarks.common.report import Report
from benchmarks.fuse.sides import Polytropo, Side, mounted, mounted_read_only
from benchmarks.fuse.workloads import SHARED, Place, elapsed_ns
from benchmarks.path import programs

READER = "srv/reader"
READ = "srv/medium"
READ_BYTES = 4 << 20
STARTS = 50
# Below the image's `srv`.
ON_FILES = ("git status", "grep -r", "compile a C project")

_READER_C = """
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
static char block[1 << 16];
int main(int count, char **words) {
    int file = count > 1 ? open(words[1], O_RDONLY) : -1;
    long got = -1;
    while (file >= 0 && (got = read(file, block, sizeof block)) > 0) {}
    return got == 0 ? 0 : 1;
}
"""


def fill(directory: Path) -> None:
    """What the programs work on, into `directory`: a repository, a C project and a static program."""
    programs.fill(directory / "srv")
    source = directory.parent / "reader.c"
    source.write_text(_READER_C)
    command("gcc", "-O2", "-static", "-o", directory / READER, source)
    (directory / READ).write_bytes(os.urandom(READ_BYTES))


def whole_programs(place: Place, side: Side, report: Report) -> None:
    """`git status`, `grep -r` and a C build, each once before it is timed."""
    _whole_programs(place, side, report, "")
    if isinstance(side, Polytropo):
        _whole_programs(place, side.with_passthrough(True), report, SHARED)


def _whole_programs(place: Place, side: Side, report: Report, how: str) -> None:
    with mounted(side, place.lowers, place.scratch) as at:
        for name in ON_FILES:
            words: tuple[str | Path, ...] = ("env", "-C", at / "srv", *programs.PROGRAMS[name])
            elapsed_ns(*words)
            report.add(f"{name}{how}", side.name, min(elapsed_ns(*words) for _ in range(3)))


def static_program(place: Place, side: Side, report: Report) -> None:
    """A static program of the image, which nothing can be loaded into, reads a file of it."""
    with mounted(side, place.lowers, place.scratch) as at:
        report.add("static program: start, read 4 MiB", side.name, _start_ns(at))
    if isinstance(side, Polytropo):
        side = side.with_passthrough(True)
        with mounted(side, place.lowers, place.scratch) as at:
            report.add(f"static program: start, read 4 MiB{SHARED}", side.name, _start_ns(at))
    with mounted_read_only(side, place.lowers, place.scratch, "one") as at:
        report.add("static program: start, read 4 MiB, read-only", side.name, _start_ns(at))


def _start_ns(at: Path) -> float:
    words = [str(at / READER), str(at / READ)]
    elapsed: list[int] = []
    for _ in range(STARTS):
        start = time.perf_counter_ns()
        _, status = os.waitpid(os.posix_spawn(words[0], words, {}), 0)
        elapsed.append(time.perf_counter_ns() - start)
        if status != 0:
            raise SystemExit(f"{' '.join(words)}: status {os.waitstatus_to_exitcode(status)}")
    return sum(sorted(elapsed)[: STARTS // 2]) / (STARTS // 2)
