"""Where the sides of the comparison work: directories on one ext4 filesystem, shown in different ways."""

import json
import random
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.common import host
from polytropo.preload_files import stage_library, stage_sites
from polytropo.service import service_binary

DISK_BYTES = 2 << 30
TIMEOUT_S = 120.0
CHANNEL = "channel"
LAYER = "channel, image layer"
PRELOADED = "preloaded"
AUTO = "preloaded, auto"
FUSE = "FUSE"
EXT4 = "ext4"
OVERLAY = "overlayfs"
FUSE_OVERLAYFS = "fuse-overlayfs"
C_LIBRARY = Path("/lib/x86_64-linux-gnu/libc.so.6")

command = partial(host.command, timeout_s=TIMEOUT_S)


@dataclass(frozen=True)
class Place:
    """A directory of one side."""

    side: str
    directory: Path
    variables: dict[str, str] = field(default_factory=dict)
    """What programs here have in their environment."""
    socket: Path | None = None
    """Where the probe connects instead of asking the kernel."""
    writable: bool = True


class Keeper:
    """A service of its own, which mounts stacks."""

    def __init__(self, run_dir: Path, *options: str) -> None:
        self.run_dir = run_dir
        run_dir.mkdir()
        words = [str(service_binary()), "keeper", f"--run-dir={run_dir}", "--uid-base=3000000"]
        words += ["--idle-timeout-s=3600", *options]
        self.process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        self.gate = run_dir / "channel" / "channel.sock"
        deadline = time.monotonic() + 20
        while not self.gate.exists():
            if time.monotonic() > deadline:
                sys.exit("bench-path: the service does not start")
            time.sleep(0.01)

    def mount(self, root: dict[str, object], at: Path, **settings: object) -> Path:
        at.mkdir()
        stack = {"version": 1, "root": root, **settings}
        order = {"op": "mount", "stack": stack, "mountpoint": str(at)}
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(self.run_dir / "control.sock"))
            connection.sendall(json.dumps(order).encode() + b"\n")
            answer = json.loads(connection.makefile().readline())
        if "ok" not in answer:
            sys.exit(f"bench-path: {answer}")
        return at

    def variables(self, at: Path) -> dict[str, str]:
        """With them programs load the preload library for the mount."""
        directory = self.run_dir / "preload"
        directory.mkdir(exist_ok=True)
        library = stage_library(directory)
        with C_LIBRARY.open("rb") as file:
            stage_sites(directory, file.fileno())
        return {
            "LD_PRELOAD": str(library),
            "POLYTROPO_CHANNEL": str(self.gate),
            "POLYTROPO_MOUNT": str(at),
        }


def places_for_calls(scratch: Path, keeper: Keeper) -> list[Place]:
    """Directories with the same files for each side, written to by one side alone."""
    names = ("channel", "layer", "preloaded", "fuse", "ext4", "overlay", "fuse-overlay")
    channel, layer, preloaded, fuse, ext4, overlay, other = (_fill(scratch / name) for name in names)
    exclusive = {"kind": "dir", "coherence": "exclusive"}
    by_channel = keeper.mount(
        {**exclusive, "path": str(channel)}, scratch / "at-channel", channel_writes=True
    )
    by_layer = keeper.mount(
        {"kind": "dir", "path": str(layer), "coherence": "immutable", "read_only": True}, scratch / "at-layer"
    )
    by_library = keeper.mount(
        {**exclusive, "path": str(preloaded)}, scratch / "at-preloaded", channel_writes=True
    )
    return [
        Place(CHANNEL, by_channel, socket=keeper.gate),
        Place(LAYER, by_layer, socket=keeper.gate, writable=False),
        Place(PRELOADED, by_library, keeper.variables(by_library)),
        Place(FUSE, keeper.mount({**exclusive, "path": str(fuse)}, scratch / "at-fuse")),
        Place(EXT4, ext4),
        Place(OVERLAY, overlayfs(scratch, overlay)),
        Place(FUSE_OVERLAYFS, fuse_overlayfs(scratch, other)),
    ]


def places_for_programs(scratch: Path, keeper: Keeper, lower: Path) -> list[Place]:
    """The tree `lower`, to be changed: copied for ext4, under a fresh upper for the others."""
    plain = scratch / "plain"
    command("cp", "-a", lower, plain)

    def union(name: str, **settings: object) -> Path:
        upper = scratch / f"{name}-upper"
        upper.mkdir()
        lowers = [{"kind": "dir", "path": str(lower), "coherence": "immutable", "read_only": True}]
        over = {"kind": "dir", "path": str(upper), "coherence": "exclusive"}
        return keeper.mount({"kind": "union", "lowers": lowers, "upper": over}, scratch / name, **settings)

    by_library = union("programs-preloaded", channel_writes=True)
    patient = union("programs-auto")
    return [
        Place(PRELOADED, by_library, keeper.variables(by_library)),
        Place(AUTO, patient, {**keeper.variables(patient), "POLYTROPO_PRELOAD": "auto"}),
        Place(FUSE, union("programs-fuse")),
        Place(EXT4, plain),
        Place(OVERLAY, overlayfs(scratch, lower)),
        Place(FUSE_OVERLAYFS, fuse_overlayfs(scratch, lower)),
    ]


def overlayfs(scratch: Path, lower: Path, name: str = "overlayfs") -> Path:
    """Kernel overlayfs over a directory."""
    at, options = _over(scratch, lower, name)
    command("mount", "-t", "overlay", "overlay", "-o", options, at)
    return at


def fuse_overlayfs(scratch: Path, lower: Path, name: str = "fuse-overlayfs") -> Path:
    """fuse-overlayfs over a directory; its process ends with the namespace."""
    at, options = _over(scratch, lower, name)
    command("fuse-overlayfs", "-o", f"{options},allow_other", at)
    return at


def _over(scratch: Path, lower: Path, kind: str) -> tuple[Path, str]:
    upper, work, at = (scratch / f"{kind}-{lower.name}-{part}" for part in ("upper", "work", "at"))
    for directory in (upper, work, at):
        directory.mkdir()
    return at, f"lowerdir={lower},upperdir={upper},workdir={work}"


def _fill(directory: Path) -> Path:
    directory.mkdir()
    (directory / "large").write_bytes(random.Random(1).randbytes(1 << 20) * 64)
    (directory / "small").write_bytes(random.Random(2).randbytes(4096))
    names = directory / "names"
    names.mkdir()
    for number in range(1000):
        (names / f"{number:04}").touch()
    return directory
