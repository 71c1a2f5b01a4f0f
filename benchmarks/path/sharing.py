"""Programs and containers that come second: what one was given, the next one finds."""

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common.report import Report
from benchmarks.path import places
from benchmarks.path.places import FUSE, FUSE_OVERLAYFS, OVERLAY, PRELOADED, Keeper, Place
from benchmarks.path.programs import run, timed

FILES = 1200
DIRECTORIES = 12
SMALL_BYTES = 4096
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
# Opens, reads and closes each file once.
READ_ALL = ("grep", "-rc", "needle", "small")


def fill(directory: Path) -> Path:
    """Small files of one size."""
    for number in range(FILES):
        place = directory / "small" / f"d{number % DIRECTORIES:02}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"f{number:04}").write_bytes(f"needle {number} ".encode().ljust(SMALL_BYTES, b"."))
    return directory


def measure(report: Report, scratch: Path, keeper: Keeper, lower: Path, rounds: int) -> None:
    """Each round mounts the image twice on each side: only the host and the service know of it."""
    makers: dict[str, Callable[[str], Place]] = {
        PRELOADED: lambda name: _preloaded(scratch, keeper, lower, name),
        FUSE: lambda name: Place(FUSE, _union(scratch, keeper, lower, name)),
        OVERLAY: lambda name: Place(OVERLAY, places.overlayfs(scratch, lower, name)),
        FUSE_OVERLAYFS: lambda name: Place(FUSE_OVERLAYFS, places.fuse_overlayfs(scratch, lower, name)),
    }
    sides = list(makers)
    for number in range(rounds):
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            first, second = (makers[side](f"{side}-{number}-{which}") for which in ("first", "second"))
            rows = (
                ("first program of a container", first, ()),
                ("the same program again", first, ()),
                ("first program of other rights", first, NOBODY),
                ("first program of a second container", second, ()),
            )
            for name, place, before in rows:
                elapsed_ns = timed(place, partial(run, place, *before, *READ_ALL))
                report.add(f"{FILES} small files: {name}", side, elapsed_ns)
            for place in (first, second):
                subprocess.run(["umount", str(place.directory)], check=True, timeout=places.TIMEOUT_S)


def _union(scratch: Path, keeper: Keeper, lower: Path, name: str, **settings: object) -> Path:
    upper = scratch / f"{name}-upper"
    upper.mkdir()
    lowers = [{"kind": "dir", "path": str(lower), "coherence": "immutable", "read_only": True}]
    over = {"kind": "dir", "path": str(upper), "coherence": "exclusive"}
    return keeper.mount({"kind": "union", "lowers": lowers, "upper": over}, scratch / name, **settings)


def _preloaded(scratch: Path, keeper: Keeper, lower: Path, name: str) -> Place:
    at = _union(scratch, keeper, lower, name, channel_writes=True)
    return Place(PRELOADED, at, keeper.variables(at))
