"""Opening files inside a root while the whole machine moves."""

import os
import threading
from pathlib import Path

from polytropo.rooted import open_in_root


def test_renames_elsewhere_make_nothing_fail(tmp_path: Path) -> None:
    """The kernel cannot tell then whether ".." stays inside, and says EAGAIN."""
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    moved = tmp_path / "moved"
    moved.mkdir()
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            moved.rename(tmp_path / "away")
            (tmp_path / "away").rename(moved)

    mover = threading.Thread(target=move)
    mover.start()
    descriptor = os.open(root, os.O_PATH)
    try:
        for path in ("a/b/" + "../" * 60 + "a", b"a/b/" + b"../" * 60 + b"a"):
            for _ in range(3000):
                os.close(open_in_root(descriptor, path, os.O_PATH))
    finally:
        stop.set()
        mover.join()
        os.close(descriptor)
