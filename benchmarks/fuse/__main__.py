"""`make bench-fuse`: our FUSE door beside kernel overlayfs on ext4 and fuse-overlayfs, in one run.

Every side mounts the same layers of one Debian image. Rounds alternate the sides and rotate their order;
figures are medians. Needs root, podman and fuse-overlayfs; works in a mount namespace of its own and leaves
nothing behind.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.common.host import command, ext4_in_memory
from benchmarks.common.report import Report
from benchmarks.fuse import engines, pressure, programs, workloads
from benchmarks.fuse.sides import OURS, FuseOverlayfs, KernelOverlay, Polytropo, Side, mounted
from polytropo.state import State
from polytropo.trees import remove_tree

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE = "bench"
DISK_BYTES = 6 << 30
WORKLOADS = (
    workloads.image_tree,
    workloads.lower_file,
    workloads.read_only_image,
    programs.static_program,
    workloads.upper_file,
    workloads.small_files,
    workloads.threads,
    workloads.untar,
    programs.whole_programs,
    workloads.copy_up,
    workloads.copy_up_huge,
    pressure.twice_the_memory,
    pressure.second_container,
    workloads.memory,
    workloads.runc_start,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-fuse", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--only", nargs="*", help="workloads by name")
    parser.add_argument("--directory", type=Path, help="work there, on whatever filesystem that is")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("bench-fuse: needs root, to mount overlayfs and to run containers")
    if os.environ.get("BENCH_ISOLATED") != "1":
        _isolate()
    _check_tools()
    where = arguments.directory or ext4_in_memory(DISK_BYTES)
    with tempfile.TemporaryDirectory(prefix="bench-fuse-", dir=where) as scratch:
        Path(scratch).chmod(0o711)
        report = _measure(Path(scratch), arguments.rounds, arguments.only)
    if arguments.directory is None:
        report.notes.append("Everything lies on an ext4 filesystem on a loop device in memory.")
    report.write(arguments.out, "fuse")
    print(report.table())
    print(f"\nwritten: {arguments.out}/fuse.json and fuse.png")


def _isolate() -> None:
    # Whatever is mounted or started ends with these namespaces.
    os.environ["BENCH_ISOLATED"] = "1"
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable]
    os.execvp("unshare", [*words, "-m", "benchmarks.fuse", *sys.argv[1:]])


def _check_tools() -> None:
    missing = [tool for tool in ("podman", "fuse-overlayfs", "runc") if shutil.which(tool) is None]
    if missing:
        sys.exit(
            f"bench-fuse: {', '.join(missing)} not found; run it as `make bench-fuse`, which installs them"
        )


def _measure(scratch: Path, rounds: int, only: list[str] | None) -> Report:
    os.environ["POLYTROPO_HOME"] = str(scratch / "home")
    polytropo = Path(sys.executable).parent / "polytropo"
    command(polytropo, "image", "bootstrap", IMAGE, "--include", "python3", timeout_s=900)
    state = State.open()
    place = _place(state, scratch)
    sides: list[Side] = [KernelOverlay(), FuseOverlayfs(), Polytropo(state)]
    report = Report("FUSE door beside overlayfs and fuse-overlayfs", ours=OURS)
    for workload in WORKLOADS:
        if only and workload.__name__ not in only:
            continue
        started = time.monotonic()
        for number in range(rounds):
            for side in sides[number % 3 :] + sides[: number % 3]:
                workload(place, side, report)
        print(f"{workload.__name__}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    if not only or "engines" in only:
        _engines(place, sides[0], report, rounds)
    command(polytropo, "tenant", "stop", "--force", "default")
    remove_tree(scratch / "home")
    return report


def _engines(place: workloads.Place, kernel: Side, report: Report, rounds: int) -> None:
    tar = place.scratch / "root.tar"
    with mounted(kernel, place.lowers, place.scratch) as at:
        command("tar", "-cf", tar, "-C", at, ".")
    engines.measure(IMAGE, tar, place.scratch, report, rounds * 2)


def _place(state: State, scratch: Path) -> workloads.Place:
    from polytropo.images import get_image

    extra = scratch / "extra"
    (extra / workloads.MANY).mkdir(parents=True)
    (extra / workloads.BIG).write_bytes(os.urandom(workloads.BIG_BYTES))
    with (extra / workloads.HUGE).open("wb") as file:
        for _ in range(workloads.HUGE_BYTES // workloads.MIB):
            file.write(os.urandom(workloads.MIB))
    for number in range(workloads.MANY_FILES):
        (extra / workloads.MANY / f"{number:04}").write_bytes(os.urandom(4096))
    programs.fill(extra)
    library = Path(sysconfig.get_path("stdlib"))
    source = scratch / "source.tar"
    packages = (
        "asyncio",
        "collections",
        "concurrent",
        "email",
        "encodings",
        "idlelib",
        "importlib",
        "json",
        "unittest",
    )
    command("tar", "-cf", source, "-C", library, "--exclude=__pycache__", *packages)
    cold = os.access("/proc/sys/vm/drop_caches", os.W_OK)
    probe = REPOSITORY / "target" / "release" / "polytropo-probe"
    lowers = [extra, *get_image(state, IMAGE).layers]
    work = scratch / "work"
    work.mkdir()
    return workloads.Place(probe, lowers, source, work, cold)


if __name__ == "__main__":
    try:
        main()
    except subprocess.TimeoutExpired as error:
        sys.exit(f"bench-fuse: {error}")
