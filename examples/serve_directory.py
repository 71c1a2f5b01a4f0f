"""A directory of the host, mounted for the length of a `with` block.

    python serve_directory.py DIRECTORY MOUNTPOINT

Lists what is there, read-only, through the service of the default tenant.
"""

import sys
from pathlib import Path

from polytropo.compose import Dir, Stack
from polytropo.errors import PolytropoError


def main(directory: Path, mountpoint: Path) -> None:
    stack = Stack(Dir(directory.resolve(), read_only=True))
    with stack.mounted(mountpoint) as root:
        for path in sorted(root.iterdir()):
            print(f"{path.stat().st_size:>10}  {path.name}")
        try:
            (root / "new").touch()
        except OSError as error:
            print(f"writing there: {error.strerror}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except PolytropoError as error:
        sys.exit(f"serve_directory: {error}")
