"""Records what the private path copies while programs work: the weights of the search for copies.

On an image layer unmodified programs run preloaded: a repository is searched and looked at, a C project read
by the compiler, everything archived, a large file read. Then a Python program copies all files to a volume
and reads them back (`polytropo.fs`). The counts of the service become `src/polytropo/tuning/weights.json`.
Needs root; works in namespaces of its own.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from benchmarks.common.host import ext4_in_memory
from benchmarks.path.places import DISK_BYTES, TIMEOUT_S, Keeper
from benchmarks.path.programs import C_FILES, fill
from polytropo.fs import Files
from polytropo.observe import Copies, sum_copies

WEIGHTS = Path(__file__).resolve().parents[2] / "src" / "polytropo" / "tuning" / "weights.json"
PROGRAMS = (
    ("grep", "-rc", "needle", "tree"),
    ("git", "--no-optional-locks", "-C", "tree", "status", "--porcelain"),
    ("cc", "-fsyntax-only", "project/main.c", *(f"project/f{number}.c" for number in range(C_FILES))),
    ("tar", "-cf", "-", "."),
    ("cat", "large"),
    ("/usr/bin/python3", "-c", "for name in ('large', 'project/main.c'): open(name, 'rb').read()"),
)
RUNS = 3
LARGE_BYTES = 16 << 20
PIECE_BYTES = 128 << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("record: needs root, to mount")
    if os.environ.get("BENCH_ISOLATED") != "1":
        os.environ["BENCH_ISOLATED"] = "1"
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable]
        os.execvp("unshare", [*words, "-m", "benchmarks.copy.record", *sys.argv[1:]])
    scratch = ext4_in_memory(DISK_BYTES)
    work = fill(scratch / "work")
    (work / "large").write_bytes(random.Random(1).randbytes(LARGE_BYTES))
    volume = scratch / "volume"
    volume.mkdir()
    keeper = Keeper(scratch / "run", "--channel-writes")
    root: dict[str, object] = {"kind": "dir", "path": str(work), "coherence": "immutable", "read_only": True}
    layer = keeper.mount(root, scratch / "layer")
    data = keeper.mount({"kind": "dir", "path": str(volume), "coherence": "exclusive"}, scratch / "data")
    environment = {**os.environ, **keeper.variables(layer)}
    for program in PROGRAMS * RUNS:
        subprocess.run(
            program,
            cwd=layer,
            env=environment,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    with Files(layer, keeper.gate) as source, Files(data, keeper.gate) as target:
        _copy_all(work, source, target)
        copies = _copies(keeper)
    arguments.out.write_text(json.dumps(copies, indent=1) + "\n")
    print(f"{sum(sum(sizes.values()) for sizes in copies.values())} copies: {arguments.out}")


def _copy_all(work: Path, source: Files, target: Files) -> None:
    """Every file in pieces as cp(1) takes them, then read back whole."""
    room = memoryview(bytearray(PIECE_BYTES))
    for directory, _, names in os.walk(work):
        place = Path(directory).relative_to(work)
        if place.parts:
            target.mkdir(str(place))
        for name in names:
            path = str(place / name)
            with source.open(path) as out_of, target.open(path, "w") as into:
                while count := out_of.readinto(room):
                    into.write(room[:count])
            target.read_bytes(path)


def _copies(keeper: Keeper) -> Copies:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(keeper.run_dir / "control.sock"))
        connection.sendall(b'{"op":"stats"}\n')
        answer = json.loads(connection.makefile().readline())
    counts = [mount["copies"] for mount in answer["ok"]["mounts"]]
    return sum_copies(
        {situation: {int(size): count for size, count in sizes.items()} for situation, sizes in each.items()}
        for each in counts
    )


if __name__ == "__main__":
    main()
