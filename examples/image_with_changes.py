"""An image under a writable directory: what a program changes lands there, the image stays what it is.

    python image_with_changes.py IMAGE CHANGES MOUNTPOINT COMMAND...

Runs COMMAND in the mounted tree and prints what it left in the directory CHANGES.
"""

import subprocess
import sys
from pathlib import Path

from polytropo.compose import Dir, Image, Stack, Union
from polytropo.errors import PolytropoError


def main(image: str, changes: Path, mountpoint: Path, command: list[str]) -> int:
    upper = Dir(changes.resolve(), coherence="exclusive")  # nobody else writes there meanwhile
    stack = Stack(Union([Image(image)], upper=upper))
    with stack.mounted(mountpoint) as root:
        status = subprocess.run(command, cwd=root, check=False).returncode
    for path in sorted(changes.rglob("*")):
        # `.wh.NAME` says that NAME was removed; the union's own records are in `.wh..wh.polytropo`.
        if path.is_file() and ".wh..wh.polytropo" not in path.parts:
            print(path.relative_to(changes))
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
    except PolytropoError as error:
        sys.exit(f"image_with_changes: {error}")
