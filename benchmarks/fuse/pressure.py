"""A file of twice the memory that its readers have, and what a second container of one image takes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common.host import command, in_group
from benchmarks.common.report import Report
from benchmarks.fuse.sides import (
    FuseOverlayfs,
    KernelOverlay,
    Polytropo,
    Side,
    drop_caches,
    mounted,
    mounted_read_only,
    page_cache_bytes,
    resident_bytes,
)
from benchmarks.fuse.workloads import BIG, HUGE, HUGE_BYTES, MIB, SHARED, Place, per_unit, probe
from polytropo.cgroups import Group, Limits

EXT4 = "ext4"
LIMIT_BYTES = HUGE_BYTES // 2
CALLS = 20_000
GROUP = "polytropo-bench-pressure"


def twice_the_memory(place: Place, side: Side, report: Report) -> None:
    """Read a file of twice the memory that program and service have together, in sequence and at random."""
    if not place.cold:
        report.note_once("Caches cannot be dropped here: the rows of little memory are missing.")
        return
    with limited(side) as (inside, group):
        if group is None:
            report.note_once("No group can have a memory limit here: the rows of little memory are missing.")
            return
        with mounted(inside, place.lowers, place.scratch) as at:
            _read(place, at / HUGE, group, report, side.name, "")
        if isinstance(inside, Polytropo):
            inside = inside.with_passthrough(True)
        with mounted_read_only(inside, place.lowers, place.scratch, "one") as at:
            _read(place, at / HUGE, group, report, side.name, ", read-only")
        if isinstance(side, KernelOverlay):
            for name in ("", ", read-only"):
                _read(place, place.lowers[0] / HUGE, group, report, EXT4, name)


def _read(place: Place, file: Path, group: Group, report: Report, side: str, name: str) -> None:
    drop_caches()
    # A first pass in sequence decides what is in memory when the others begin.
    for what, words, scale in (
        ("", ("read-sequential", file), MIB),
        ("sequential read, per MiB", ("read-sequential", file), MIB),
        ("random read 4 KiB", ("read-random", file, "--count", str(CALLS)), 1),
    ):
        figures = json.loads(command(*in_group(group, place.probe, *words)))
        (figure,) = figures.values()
        if what:
            value = per_unit((figure["units"], figure["elapsed_ns"]), scale)
            report.add(f"file of twice the memory: {what}{name}", side, value)


@contextmanager
def limited(side: Side) -> Iterator[tuple[Side, Group | None]]:
    """The side with all that serves it, and a group for its programs, under one limit of memory."""
    if isinstance(side, Polytropo):
        with side.in_tenant("--memory", str(LIMIT_BYTES), "--cache", str(LIMIT_BYTES // 4)) as (ours, group):
            programs = group.child("programs")
            programs.create()
            yield ours, programs
        return
    group = Group(GROUP)
    if "memory" not in group.hierarchies.controllers:
        yield side, None
        return
    group.create(Limits(memory_bytes=LIMIT_BYTES))
    try:
        yield FuseOverlayfs(group) if isinstance(side, FuseOverlayfs) else side, group
    finally:
        group.remove()


def second_container(place: Place, side: Side, report: Report) -> None:
    """What a first and a second container of one image take in memory when they read the same files of it."""
    if not place.cold:
        report.note_once("Caches cannot be dropped here: the rows of containers' memory are missing.")
        return
    _second_container(place, side, report, "")
    if isinstance(side, Polytropo):
        _second_container(place, side.with_passthrough(True), report, SHARED)


def _second_container(place: Place, side: Side, report: Report, how: str) -> None:
    drop_caches()
    with mounted(side, place.lowers, place.scratch, "first") as first:
        taken = [_taken(place, side, first)]
        with mounted(side, place.lowers, place.scratch, "second") as second:
            taken.append(_taken(place, side, second))
    for which, value in zip(("first", "second"), taken, strict=True):
        report.add(f"memory for the {which} container of an image{how}", side.name, value, "bytes")


def _taken(place: Place, side: Side, at: Path) -> int:
    before = page_cache_bytes() + resident_bytes(side.processes())
    probe(place, "read-tree", at / "usr")
    probe(place, "read-sequential", at / BIG)
    return max(0, page_cache_bytes() + resident_bytes(side.processes()) - before)
