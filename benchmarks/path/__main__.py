"""`make bench-path`: file operations through shared memory beside the same through the kernel, in one run.

Sides: a channel to a stack that programs change, a channel to an image layer, our FUSE door, and ext4
itself, all on one ext4 filesystem in memory. Rounds alternate the sides and rotate their order; figures are
medians, nanoseconds a call. Needs root; works in namespaces of its own and leaves nothing behind.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.report import Report
from polytropo.service import service_binary

REPOSITORY = Path(__file__).resolve().parents[2]
PROBE = REPOSITORY / "target" / "release" / "polytropo-path-probe"
DISK_BYTES = 1 << 30
CHANNEL = "channel"
LAYER = "channel, image layer"
FUSE = "FUSE"
EXT4 = "ext4"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-path", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--time-ms", type=int, default=200, help="for each figure of each round")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("bench-path: needs root, to mount")
    if not PROBE.exists():
        sys.exit(f"bench-path: {PROBE} is missing; run it as `make bench-path`, which builds it")
    if os.environ.get("BENCH_ISOLATED") != "1":
        os.environ["BENCH_ISOLATED"] = "1"
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable]
        os.execvp("unshare", [*words, "-m", "benchmarks.path", *sys.argv[1:]])
    report = _measure(_ext4_in_memory(), arguments.rounds, arguments.time_ms)
    report.notes.append("One thread. Everything lies on an ext4 filesystem on a loop device in memory.")
    report.write(arguments.out, "path")
    print(report.table())
    print(f"\nwritten: {arguments.out}/path.json and path.png")


def _ext4_in_memory() -> Path:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES + (64 << 20)}", "tmpfs", "/mnt"], check=True
    )
    disk, at = Path("/mnt/disk"), Path("/mnt/ext4")
    with disk.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, DISK_BYTES)
    at.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, at], check=True)
    return at


def _fill(directory: Path) -> Path:
    directory.mkdir()
    (directory / "large").write_bytes(os.urandom(1 << 20) * 64)
    (directory / "small").write_bytes(os.urandom(4096))
    names = directory / "names"
    names.mkdir()
    for number in range(1000):
        (names / f"{number:04}").touch()
    return directory


def _mount(run_dir: Path, directory: Path, mountpoint: Path, **options: object) -> None:
    mountpoint.mkdir()
    stack = {"version": 1, "root": {"kind": "dir", "path": str(directory), **options}}
    order = {"op": "mount", "stack": stack, "mountpoint": str(mountpoint)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(run_dir / "control.sock"))
        connection.sendall(json.dumps(order).encode() + b"\n")
        answer = json.loads(connection.makefile().readline())
    if "ok" not in answer:
        sys.exit(f"bench-path: {answer}")


def _keeper(run_dir: Path, *arguments: str) -> None:
    run_dir.mkdir()
    words = [
        str(service_binary()),
        "keeper",
        f"--run-dir={run_dir}",
        "--uid-base=3000000",
        "--idle-timeout-s=3600",
    ]
    subprocess.Popen([*words, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (run_dir / "channel" / "channel.sock").exists():
        if time.monotonic() > deadline:
            sys.exit("bench-path: the service does not start")
        time.sleep(0.01)


def _measure(scratch: Path, rounds: int, time_ms: int) -> Report:
    writable, plain, usual, layer = (
        _fill(scratch / name) for name in ("writable", "plain", "usual", "layer")
    )
    private, public = scratch / "private", scratch / "public"
    _keeper(private, "--channel-writes")
    _keeper(public)
    _mount(private, writable, scratch / "mnt-writable", coherence="exclusive")
    _mount(private, layer, scratch / "mnt-layer", coherence="immutable", read_only=True)
    _mount(public, usual, scratch / "mnt-usual", coherence="exclusive")
    gate = f"--socket={private / 'channel' / 'channel.sock'}"
    sides = [
        (CHANNEL, [str(scratch / "mnt-writable"), gate, "--write"]),
        (LAYER, [str(scratch / "mnt-layer"), gate]),
        (FUSE, [str(scratch / "mnt-usual"), "--write"]),
        (EXT4, [str(plain), "--write"]),
    ]
    report = Report("File operations through shared memory", ours=CHANNEL)
    for number in range(rounds):
        turn = number % len(sides)
        for side, words in sides[turn:] + sides[:turn]:
            words = [str(PROBE), f"--time-ms={time_ms}", *words]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE)
            for metric, value in json.loads(done.stdout).items():
                report.add(metric, side, value)
    return report


main()
