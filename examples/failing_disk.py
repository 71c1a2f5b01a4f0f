"""A program tested on disks that fail: `fault` puts errors into a stack, anywhere and at an exact moment.

    python failing_disk.py DIRECTORY MOUNTPOINT

Saves a file the careful way (write beside, fsync, rename) while the disk fills up, then while it loses
bytes on their way; shows that the old content is there after each failure.
"""

import os
import sys
from pathlib import Path

from polytropo.compose import Dir, Fault, FaultRule, Stack
from polytropo.errors import PolytropoError

FAILURES = {
    "the disk fills up": FaultRule(operation="write", errno="ENOSPC"),
    "the disk loses bytes": FaultRule(operation="fsync", errno="EIO"),
    "the first write is short": FaultRule(operation="write", times=1, short_bytes=3),
}


def save(path: Path, content: bytes) -> None:
    beside = path.with_suffix(".new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def main(directory: Path, mountpoint: Path) -> None:
    (directory / "orders").write_bytes(b"one")
    for what, rule in FAILURES.items():
        stack = Stack(Fault(Dir(directory.resolve()), rules=[rule]))
        with stack.mounted(mountpoint) as root:
            try:
                save(root / "orders", b"one, two")
                outcome = "saved"
            except OSError as error:
                outcome = str(error.strerror)
            print(f"{what}: {outcome}; the file says {(root / 'orders').read_text()!r}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except PolytropoError as error:
        sys.exit(f"failing_disk: {error}")
