"""What is done on each mount. Each workload adds its figures to the report under its side's name."""

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.host import command
from benchmarks.common.report import Report
from benchmarks.fuse.sides import (
    Polytropo,
    Side,
    drop_caches,
    mounted,
    mounted_read_only,
    page_cache_bytes,
    resident_bytes,
)

MIB = 1 << 20
BIG = "srv/big"
BIG_BYTES = 64 * MIB
HUGE = "srv/huge"
HUGE_BYTES = 1024 * MIB
MANY = "srv/many"
WRITE_BACK = ", with write-back"
# `run --share-image`: passthrough in a root that can be written to.
SHARED = ", image shared"
MANY_FILES = 500


@dataclass(frozen=True)
class Place:
    """Where a run works and on what."""

    probe: Path
    lowers: list[Path]
    source_tar: Path
    scratch: Path
    cold: bool


def probe(place: Place, *words: str | Path) -> dict[str, tuple[int, int]]:
    """Runs the probe; gives units and nanoseconds by figure."""
    figures = json.loads(command(place.probe, *words))
    return {name: (figure["units"], figure["elapsed_ns"]) for name, figure in figures.items()}


def per_unit(figure: tuple[int, int], scale: int = 1) -> float:
    units, elapsed_ns = figure
    return elapsed_ns * scale / units


def image_tree(place: Place, side: Side, report: Report) -> None:
    """Walk and read the whole image, first cold, then hot."""
    with mounted(side, place.lowers, place.scratch) as at:
        if place.cold:
            drop_caches()
            report.add("walk cold, per entry", side.name, per_unit(probe(place, "walk", at)["walk"]))
        else:
            probe(place, "walk", at)
        report.add("walk hot, per entry", side.name, per_unit(probe(place, "walk", at)["walk"]))
    with mounted(side, place.lowers, place.scratch) as at:
        usr = at / "usr"
        if place.cold:
            drop_caches()
            figure = probe(place, "read-tree", usr)["read_tree_bytes"]
            report.add("read tree cold, per MiB", side.name, per_unit(figure, MIB))
        else:
            probe(place, "read-tree", usr)
        figure = probe(place, "read-tree", usr)["read_tree_bytes"]
        report.add("read tree hot, per MiB", side.name, per_unit(figure, MIB))


def lower_file(place: Place, side: Side, report: Report) -> None:
    """Read one big file of the image, in sequence and at random."""
    with mounted(side, place.lowers, place.scratch) as at:
        big = at / BIG
        if place.cold:
            drop_caches()
            figure = probe(place, "read-random", big, "--count", "2000")["read_random_calls"]
            report.add("random read 4 KiB cold", side.name, per_unit(figure))
            drop_caches()
            figure = probe(place, "read-sequential", big)["read_sequential_bytes"]
            report.add("sequential read cold, per MiB", side.name, per_unit(figure, MIB))
        else:
            probe(place, "read-sequential", big)
        figure = probe(place, "read-sequential", big, "--rounds", "8")["read_sequential_bytes"]
        report.add("sequential read hot, per MiB", side.name, per_unit(figure, MIB))
        figure = probe(place, "read-random", big, "--count", "100000")["read_random_calls"]
        report.add("random read 4 KiB hot", side.name, per_unit(figure))
    if isinstance(side, Polytropo):
        with mounted(side.with_passthrough(True), place.lowers, place.scratch) as at:
            probe(place, "read-sequential", at / BIG)
            figure = probe(place, "read-sequential", at / BIG, "--rounds", "8")["read_sequential_bytes"]
            report.add(f"sequential read hot, per MiB{SHARED}", side.name, per_unit(figure, MIB))


def read_only_image(place: Place, side: Side, report: Report) -> None:
    """An image that nobody can write to, with and without passthrough; what a second mount of it takes."""
    if isinstance(side, Polytropo):
        _read_only(place, side.with_passthrough(True), report, "")
        _read_only(place, side.with_passthrough(False), report, ", passthrough off")
    else:
        _read_only(place, side, report, "")
        _read_only(place, side, report, ", passthrough off")


def _read_only(place: Place, side: Side, report: Report, name: str) -> None:
    # The second mount has one layer more, or ours would be the first one seen twice.
    more = place.scratch / "more"
    more.mkdir()
    second = [more, *place.lowers]
    try:
        with (
            mounted_read_only(side, place.lowers, place.scratch, "one") as one,
            mounted_read_only(side, second, place.scratch, "two") as two,
        ):
            if place.cold:
                drop_caches()
            probe(place, "read-tree", one / "usr")
            figure = probe(place, "read-tree", one / "usr")["read_tree_bytes"]
            report.add(f"read-only tree hot, per MiB{name}", side.name, per_unit(figure, MIB))
            probe(place, "read-sequential", one / BIG)
            figure = probe(place, "read-sequential", one / BIG, "--rounds", "8")["read_sequential_bytes"]
            report.add(f"read-only sequential hot, per MiB{name}", side.name, per_unit(figure, MIB))
            words = ("chroot", one, "/usr/bin/python3", "-Sc", "import json")
            started = min(elapsed_ns(*words) for _ in range(5))
            report.add(f"read-only: start python3 hot{name}", side.name, started)
            before = page_cache_bytes()
            probe(place, "read-tree", two / "usr")
            probe(place, "read-sequential", two / BIG)
            taken = max(0, page_cache_bytes() - before)
            report.add(f"memory for a second mount of the image{name}", side.name, taken, "bytes")
    finally:
        more.rmdir()


def upper_file(place: Place, side: Side, report: Report) -> None:
    """Write one big new file, then overwrite blocks of it, fsync included; ours also as volumes do."""
    _upper_file(place, side, report, "")
    if isinstance(side, Polytropo):
        _upper_file(place, side.with_write_back(), report, WRITE_BACK)


def _upper_file(place: Place, side: Side, report: Report, how: str) -> None:
    with mounted(side, place.lowers, place.scratch) as at:
        big = at / "srv" / "new"
        words = ("write-sequential", big, "--size-bytes", str(BIG_BYTES))
        report.add(
            f"sequential write and fsync, per MiB{how}",
            side.name,
            per_unit(probe(place, *words)["write_sequential_bytes"], MIB),
        )
        figure = probe(place, "write-random", big, "--count", "20000")["write_random_calls"]
        report.add(f"random write 4 KiB hot, one fsync{how}", side.name, per_unit(figure))
        if place.cold:
            drop_caches()
            figure = probe(place, "write-random", big, "--count", "2000")["write_random_calls"]
            report.add(f"random write 4 KiB cold, one fsync{how}", side.name, per_unit(figure))


def small_files(place: Place, side: Side, report: Report) -> None:
    """Create, stat and unlink 5,000 files of 1 KiB. Ours also as volumes are served."""
    _small_files(place, side, report, "")
    if isinstance(side, Polytropo):
        _small_files(place, side.with_write_back(), report, WRITE_BACK)


def _small_files(place: Place, side: Side, report: Report, how: str) -> None:
    with mounted(side, place.lowers, place.scratch) as at:
        directory = at / "srv" / "small"
        directory.mkdir()
        for name, figure in probe(place, "create-stat-unlink", directory).items():
            report.add(f"{name} a file of 1 KiB{how}", side.name, per_unit(figure))


def threads(place: Place, side: Side, report: Report) -> None:
    """One thread and two at the same work; ours by both transports."""
    _threads(place, side, report, "")
    if isinstance(side, Polytropo):
        with side.over_rings() as rings:
            if rings is None:
                report.note_once("The kernel does not offer FUSE over io_uring: its rows are missing.")
                return
            _threads(place, rings, report, ", io_uring")
            _small_files(place, rings, report, ", io_uring")


def _threads(place: Place, side: Side, report: Report, how: str) -> None:
    with mounted(side, place.lowers, place.scratch) as at:
        for count in (1, 2):
            directory = at / "srv" / f"by{count}"
            directory.mkdir()
            figures = probe(place, "together", at / BIG, directory, "--threads", str(count))
            many = "one thread" if count == 1 else f"{count} threads"
            reads, made = per_unit(figures["direct_reads"]), per_unit(figures["made_files"])
            report.add(f"direct read 4 KiB, {many}{how}", side.name, reads)
            report.add(f"create, stat, unlink, {many}{how}", side.name, made)


def untar(place: Place, side: Side, report: Report) -> None:
    """Unpack a source tree, then remove it."""
    with mounted(side, place.lowers, place.scratch) as at:
        directory = at / "srv" / "source"
        directory.mkdir()
        report.add(
            "untar a source tree", side.name, elapsed_ns("tar", "-xf", place.source_tar, "-C", directory)
        )
        report.add("rm -r the source tree", side.name, elapsed_ns("rm", "-r", directory))


def copy_up(place: Place, side: Side, report: Report) -> None:
    """First change of one big and of many small files of the image."""
    with mounted(side, place.lowers, place.scratch) as at:
        probe(place, "read-sequential", at / BIG)
        figure = probe(place, "first-write", at / BIG)["first_write"]
        report.add("first write to a 64 MiB image file", side.name, per_unit(figure))
        files = sorted((at / MANY).iterdir())
        start = time.perf_counter_ns()
        for path in files:
            with path.open("ab", buffering=0) as file:
                file.write(b"x")
        report.add(
            "first append to a small image file", side.name, (time.perf_counter_ns() - start) / len(files)
        )


def copy_up_huge(place: Place, side: Side, report: Report) -> None:
    """First write to a file of 1 GiB of the image, then to 200 other places; first change of its mode."""
    if shutil.disk_usage(place.scratch).free < 2 * HUGE_BYTES:
        raise SystemExit(f"{place.scratch}: too little space for a copy of a file of {HUGE_BYTES} bytes")
    with mounted(side, place.lowers, place.scratch) as at:
        probe(place, "read-sequential", at / HUGE)
        figure = probe(place, "first-write", at / HUGE)["first_write"]
        report.add("first write to a 1 GiB image file", side.name, per_unit(figure))
        with (at / HUGE).open("r+b", buffering=0) as file:
            start = time.perf_counter_ns()
            for place_number in range(200):
                file.seek((place_number * 7919 % 200) * 5 * MIB)
                file.write(b"x")
            os.fsync(file.fileno())
            report.add("200 writes all over it and fsync", side.name, time.perf_counter_ns() - start)
    with mounted(side, place.lowers, place.scratch) as at:
        start = time.perf_counter_ns()
        (at / HUGE).chmod(0o600)
        report.add("chmod of a 1 GiB image file", side.name, time.perf_counter_ns() - start)


def memory(place: Place, side: Side, report: Report) -> None:
    """What the side's processes hold: right after mounting, and after the tree was walked and read."""
    if not side.processes() and side.name == "overlayfs":
        return
    with mounted(side, place.lowers, place.scratch) as at:
        report.add("memory after mounting", side.name, resident_bytes(side.processes()), "bytes")
        probe(place, "walk", at)
        probe(place, "read-tree", at / "usr")
        report.add("memory after walk and read", side.name, resident_bytes(side.processes()), "bytes")


def runc_start(place: Place, side: Side, report: Report) -> None:
    """`true` in the same runc on this root."""
    _runc_start(place, side, report, "")
    if isinstance(side, Polytropo):
        _runc_start(place, side.with_passthrough(True), report, SHARED)


def _runc_start(place: Place, side: Side, report: Report, how: str) -> None:
    with mounted(side, place.lowers, place.scratch) as at:
        bundle = place.scratch / "bundle"
        bundle.mkdir()
        try:
            command("runc", "spec", "--bundle", bundle)
            config = json.loads((bundle / "config.json").read_text())
            config["process"]["terminal"] = False
            config["process"]["args"] = ["/bin/true"]
            config["process"].pop("rlimits", None)
            config["root"] = {"path": str(at), "readonly": False}
            (bundle / "config.json").write_text(json.dumps(config))
            words = (
                "runc",
                "--root",
                place.scratch / "runc",
                "run",
                "--bundle",
                bundle,
                f"bench-{os.getpid()}",
            )
            command(*words)
            for _ in range(3):
                report.add(f"runc run true{how}", side.name, elapsed_ns(*words))
        finally:
            shutil.rmtree(bundle)


def elapsed_ns(*words: str | Path) -> int:
    """How long a program takes, its start included. Its failure ends the benchmark."""
    start = time.perf_counter_ns()
    done = subprocess.run(list(map(str, words)), capture_output=True, stdin=subprocess.DEVNULL, check=False)
    elapsed = time.perf_counter_ns() - start
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}: status {done.returncode}\n{done.stderr.decode()}")
    return elapsed
