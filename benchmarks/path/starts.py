"""Programs that live on the mount themselves, as those of containers do: what their starts cost.

Each side shows the root directory of this machine with an upper directory of its own; programs run there
by chroot. Programs of containers run as the side that is patient, unless asked for. `asked` is what FUSE
costs where channels may write, to programs without the library.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.report import Report
from benchmarks.path import places
from benchmarks.path.places import AUTO, C_LIBRARY, FUSE, OVERLAY, PRELOADED, TIMEOUT_S, Keeper, Place
from polytropo.preload_files import LIBRARY, stage_library, stage_sites

ASKED = "FUSE, asked for opens"
_PLACE = "/run/.polytropo"
_WORK = "/var/tmp/bench-path"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# Checks of programs and headers as a configure script makes them: short programs, many small files once each.
_CONFIGURE = """
for check in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    mkdir conf$$.dir
    echo "#define HAVE_$check 1" >conf$$.dir/conftest.c
    grep -q HAVE_ conf$$.dir/conftest.c && sed 's/HAVE/HAS/' conf$$.dir/conftest.c >conf$$.dir/conftest.h
    test -f conf$$.dir/conftest.h && expr "x$check" : 'x[0-9]*' >conf$$.dir/out
    cat conf$$.dir/out conf$$.dir/conftest.h >>config.log
    uname -m >conf$$.dir/out
    sort conf$$.dir/out | tr a-z A-Z >conf$$.dir/sorted
    cmp -s conf$$.dir/sorted conf$$.dir/out
    rm -rf conf$$.dir
done
rm -f config.log
"""
_COMPILE = """
for number in 1 2 3 4; do
    for header in stdio stdlib string; do echo "#include <$header.h>"; done >unit$number.c
    echo 'int f(void) { return puts("x"); }' >>unit$number.c
    gcc -O1 -c unit$number.c -o unit$number.o || exit 1
done
rm -f unit*
"""

SCRIPTS: dict[str, tuple[str, ...]] = {
    "100 starts of `true`": ("/bin/sh", "-c", "i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i+1)); done"),
    "configure-like script, 260 starts": ("/bin/sh", "-c", _CONFIGURE),
    "start of Python, 4 modules": (
        "/usr/bin/python3",
        "-c",
        "import json, argparse, logging, csv",
    ),
    "compile 4 C files": ("/bin/sh", "-c", _COMPILE),
    "perl, 3 modules": ("/usr/bin/perl", "-MPOSIX", "-MFile::Find", "-MData::Dumper", "-e", "1"),
    "dpkg --list": ("/usr/bin/dpkg", "--list"),
    "find /usr/share": ("/usr/bin/find", "/usr/share", "-size", "+1M"),
    "grep -r in 750 headers": ("/bin/grep", "-rc", "needle", "/usr/include/linux"),
    "grep -r in all headers": ("/bin/grep", "-rc", "needle", "/usr/include"),
}


def measure(report: Report, scratch: Path, keeper: Keeper, rounds: int) -> None:
    """Adds elapsed time, and the processor time of programs and service together."""
    sides = _sides(scratch, keeper)
    for number in range(-1, rounds):
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            for name, words in SCRIPTS.items():
                elapsed_ns, processor_ns = _run(side, keeper, words)
                if number >= 0:
                    report.add(name, side.side, elapsed_ns)
                    report.add(f"{name}, processor time", side.side, processor_ns)


def _sides(scratch: Path, keeper: Keeper) -> list[Place]:
    lower = scratch / "machine"
    lower.mkdir()
    places.command("mount", "--bind", "/", lower)

    def union(name: str, **settings: object) -> Path:
        upper = scratch / f"{name}-upper"
        upper.mkdir()
        lowers = [{"kind": "dir", "path": str(lower), "coherence": "immutable", "read_only": True}]
        over = {"kind": "dir", "path": str(upper), "coherence": "exclusive"}
        return keeper.mount({"kind": "union", "lowers": lowers, "upper": over}, scratch / name, **settings)

    sides = [
        Place(PRELOADED, _with_library(scratch, keeper, union("starts-preloaded", channel_writes=True))),
        Place(
            AUTO,
            _with_library(scratch, keeper, union("starts-auto")),
            {"POLYTROPO_PRELOAD": "auto"},
        ),
        Place(ASKED, union("starts-asked", channel_writes=True)),
        Place(FUSE, union("starts-fuse")),
        Place(OVERLAY, places.overlayfs(scratch, lower)),
    ]
    for side in sides:
        (side.directory / _WORK.lstrip("/")).mkdir(parents=True)
        for special in ("dev", "proc"):
            places.command("mount", "--rbind", f"/{special}", side.directory / special)
    return sides


def _with_library(scratch: Path, keeper: Keeper, root: Path) -> Path:
    """Shows the library and the channel in a root, as `polytropo run` does."""
    library = keeper.run_dir / "preload-containers"
    if not library.exists():
        library.mkdir()
        stage_library(library)
        with C_LIBRARY.open("rb") as file:
            stage_sites(library, file.fileno())
    place = root / _PLACE.lstrip("/")
    listed = scratch / "ld.so.preload"
    listed.write_text(f"{_PLACE}/lib/{LIBRARY}\n")
    (keeper.run_dir / "channel/lib").mkdir(exist_ok=True)
    (place.parent).mkdir(exist_ok=True)
    place.mkdir()
    (root / "etc/ld.so.preload").touch()
    places.command("mount", "--bind", keeper.run_dir / "channel", place)
    places.command("mount", "--bind", library, place / "lib")
    places.command("mount", "--bind", listed, root / "etc/ld.so.preload")
    return root


def _run(side: Place, keeper: Keeper, words: tuple[str, ...]) -> tuple[float, float]:
    def enter() -> None:
        os.chroot(side.directory)
        os.chdir(_WORK)

    before, begun = _processor_ns(keeper), time.perf_counter_ns()
    done = subprocess.run(
        words,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", **side.variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=enter,
        timeout=TIMEOUT_S,
        check=False,
    )
    elapsed_ns = time.perf_counter_ns() - begun
    if done.returncode not in (0, 1) or done.stderr:
        sys.exit(f"bench-path: {words[0]} on {side.side}: status {done.returncode}\n{done.stderr[-2000:]}")
    return float(elapsed_ns), _processor_ns(keeper) - before


def _processor_ns(keeper: Keeper) -> float:
    """Of what this process has waited for, and of the service's processes so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime + _service_s(keeper.process.pid)) * 1e9


def _service_s(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    for task in Path(f"/proc/{process}/task").iterdir():
        own += sum(map(_service_s, map(int, (task / "children").read_text().split())))
    return own
