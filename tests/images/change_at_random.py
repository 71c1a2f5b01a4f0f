"""Changes a tree at random, and tells what it then looks like; run where the tree is mounted.

python change_at_random.py TREE SEED STEPS   prints the tree as JSON
"""

import json
import os
import random
import shutil
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.images.archives import tree_of


def names_in(top: Path) -> tuple[list[Path], list[Path]]:
    """Files (of any kind but directories) and directories."""
    files, directories = [], [top]
    for base, below, other in os.walk(top):
        files += [Path(base, name) for name in other]
        for name in below:
            path = Path(base, name)
            (files if path.is_symlink() else directories).append(path)
    return sorted(files), sorted(directories)


def change(top: Path, dice: random.Random) -> None:
    """One change. What cannot be done is left."""
    files, directories = names_in(top)
    file = dice.choice(files) if files else top / "none"
    directory, other = dice.choice(directories), dice.choice(directories)
    fresh = directory / dice.choice(["p", "q", "r", "one", "two", "deep", "dir", f"n{dice.randrange(9)}"])
    what = dice.randrange(12)
    if what in (0, 1) and file.is_file() and not file.is_symlink():
        with file.open("ab") as stream:
            stream.write(b"+" * dice.randrange(1, 50))
    elif what == 2 and not fresh.is_symlink():
        fresh.write_bytes(dice.randbytes(dice.randrange(200)))
    elif what in (3, 4):
        file.rename(fresh)
    elif what in (5, 6) and directory != top:
        directory.rename(other / fresh.name)
    elif what == 7:
        os.link(file, fresh, follow_symlinks=False)
    elif what == 8:
        file.unlink()
    elif what == 9 and directory != top and dice.random() < 0.5:
        shutil.rmtree(directory)
    elif what == 10:
        fresh.mkdir()
        fresh.chmod(dice.choice([0o700, 0o755, 0o2775]))
    elif what == 11:
        fresh.symlink_to(dice.choice(["one", "/etc/passwd", "no/such"]))


def main() -> None:
    top, seed, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dice = random.Random(seed)
    for _ in range(steps):
        with suppress(OSError):
            change(top, dice)
    shown = {os.fsdecode(name): [str(each) for each in value] for name, value in tree_of(top).items()}
    print(json.dumps(shown, sort_keys=True))


if __name__ == "__main__":
    main()
